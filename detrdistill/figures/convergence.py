"""AP against optimizer steps, a line a setting."""

import math
from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from detrdistill.figures import style
from detrdistill.recipes.words import TITLES
from detrdistill.statistics import mean_and_half

Curve = Sequence[Mapping[str, float | None]]


def convergence(curves: Mapping[str, Sequence[Curve]], note: str = "") -> Figure:
    """How fast each setting learns: thick the mean over seeds, thin each seed, the final AP at the line's end.

    A teacher that trains for another number of steps than the others is a level to reach, and not a curve.

    Args:
        curves: for every setting a list over seeds of `Record.curve`; an empty list is shown as "not run".
    """
    with style.paper():
        figure = style.Picture(figsize=(style.WIDTH, 3.4))
        axes = figure.subplots()
        ran = {setting: [series(curve, "AP") for curve in runs] for setting, runs in curves.items() if runs}
        ends, colours = [], style.colours(list(ran))
        last = {runs[0].index[-1] for setting, runs in ran.items() if setting != "teacher"}
        for setting, runs in ran.items():
            colour, title = colours[setting], TITLES.get(setting, setting)
            final, half = mean_and_half(pd.Series([run.iloc[-1] for run in runs]))
            text = f"{title} {final:.1f}" + ("" if math.isnan(half) else f" ± {half:.1f}")
            if setting == "teacher" and last and runs[0].index[-1] not in last:
                axes.axhline(final, color=colour, linestyle=(0, (5, 3)), linewidth=1.4)
                text += f"\nafter {runs[0].index[-1]:,} steps"
            else:
                draw(axes, runs, colour)
            ends.append((final, text, colour))
        missing = [TITLES.get(setting, setting) for setting, runs in curves.items() if not runs]
        if not ran:
            style.not_run(axes)
        elif missing:
            axes.text(0.02, 0.97, f"not run: {', '.join(missing)}", transform=axes.transAxes, va="top", color=style.FAINT)
        axes.set(xlabel="optimizer steps", ylabel="AP (percent)", xlim=(0, None), ylim=(0, 1.06 * axes.get_ylim()[1]))
        axes.margins(x=0.02)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        style.label_ends(axes, ends)
        style.note(figure, note)
    return figure


def series(curve: Curve, key: str) -> pd.Series:
    """What a record's curve tells under `key`, by step; NaN where it tells nothing."""
    return pd.Series({int(point["step"]): math.nan if point.get(key) is None else point[key] for point in curve}, dtype=float)


def draw(axes: Axes, runs: Sequence[pd.Series], colour: str) -> None:
    """A thick line for the mean over seeds, thin ones for the seeds."""
    mean = pd.concat(runs).groupby(level=0).mean()
    for run in runs if len(runs) > 1 else ():
        axes.plot(run.index, run, color=colour, linewidth=0.8, alpha=0.4)
    axes.plot(mean.index, mean, color=colour, marker="o", markersize=4)
