"""AP against optimizer steps: few settings in one panel, many in a panel each beside the plain student."""

import math
from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from detrdistill.figures import style
from detrdistill.recipes.words import TITLES
from detrdistill.statistics import mean_and_half

Curve = Sequence[Mapping[str, float | None]]
Runs = Mapping[str, Sequence[pd.Series]]

TOGETHER = 3  # settings in one panel, a teacher's level not counted; more would lie on each other
PANEL = 1.6  # inches: a panel of many
LEVEL = {"linestyle": (0, (5, 3)), "linewidth": 1.4}


def convergence(curves: Mapping[str, Sequence[Curve]], note: str = "") -> Figure:
    """How fast each setting learns: thick the mean over seeds, thin each seed, and the final AP.

    A teacher that trains for another number of steps than the others is a level to reach, and not a curve.

    Args:
        curves: for every setting a list over seeds of `Record.curve`; an empty list is shown as "not run".
    """
    ran = {setting: [series(curve, "AP") for curve in runs] for setting, runs in curves.items() if runs}
    missing = [_title(setting) for setting, runs in curves.items() if not runs]
    last = {runs[0].index[-1] for setting, runs in ran.items() if setting != "teacher"}
    is_level = "teacher" in ran and bool(last) and ran["teacher"][0].index[-1] not in last
    with style.paper():
        draw_all = _together if len(ran) - is_level <= TOGETHER else _apart
        return draw_all(ran, is_level, "\n".join([f"not run: {', '.join(missing)}"] * bool(missing) + [note]))


def _together(ran: Runs, is_level: bool, note: str) -> Figure:
    """All in one panel, each named at its end."""
    figure = style.Picture(figsize=(style.width(), (2.8 if style.narrow() else 3.4) * style.scale()))
    axes, ends, colours = figure.subplots(), [], style.colours(list(ran))
    for setting, runs in ran.items():
        colour, final = colours[setting], _final(runs)
        text = "\n".join([*style.even(_title(setting), 0.3 * style.room(), 7.5), final]) if style.narrow() else f"{_title(setting)} {final}"
        if setting == "teacher" and is_level:
            axes.axhline(_mean(runs), color=colour, **LEVEL)
            text += f"\n{_trained(runs)}"
        else:
            draw(axes, runs, colour)
        ends.append((_mean(runs), text, colour))
    if not ran:
        style.not_run(axes)
    axes.set(xlabel="optimizer steps", ylabel="AP (percent)", xlim=(0, None), ylim=(0, 1.06 * axes.get_ylim()[1]))
    axes.margins(x=0.02)
    _steps(axes, 3 if style.narrow() else 0)
    style.note(figure, note)
    style.label_ends(axes, ends, 7.5 if style.narrow() else 8.5)
    return figure


def _apart(ran: Runs, is_level: bool, note: str) -> Figure:
    """A panel a setting, its final AP in the title, the plain student in grey in all of them; one scale for all.

    A teacher far above the others is named and not drawn: its level would press all curves to the ground.
    """
    settings = [setting for setting in ran if setting != "student" and not (setting == "teacher" and is_level)]
    rows = -(-len(settings) // max(1, int(style.room() / PANEL)))
    columns = -(-len(settings) // rows)
    titles = [style.even(f"{_title(setting)} {_final(ran[setting])}", style.room() / columns - 0.35, 8) for setting in settings]
    tall = sum(1.25 + 0.13 * max(map(len, titles[row * columns : (row + 1) * columns])) for row in range(rows))
    figure = style.Picture(figsize=(style.width(), (tall + 0.85) * style.scale()))
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    highest = max(run.max() for setting, runs in ran.items() if setting != "teacher" or not is_level for run in runs)
    keys = []
    if "student" in ran:
        keys.append(Line2D([], [], color=style.GREY, label=f"{_title('student')} {_final(ran['student'])}"))
    if is_level:
        near = _mean(ran["teacher"]) <= 1.3 * highest
        text = f"Teacher {_final(ran['teacher'])} {_trained(ran['teacher'])}{'' if near else ', above the panels'}"
        text = "\n".join(style.even(text, style.room() - 0.6, 8.5))
        keys.append(Line2D([], [], color=style.COLOURS["teacher"], label=text, **LEVEL if near else {"linestyle": "none"}))
        highest = max(highest, _mean(ran["teacher"]) if near else 0)
    for i, (axes, setting, title) in enumerate(zip(panels, settings, titles, strict=False)):
        colour = style.COLOURS.get(setting, style.VIOLET)
        if "student" in ran:
            draw(axes, ran["student"], style.GREY, marker="")
        if is_level and near:
            axes.axhline(_mean(ran["teacher"]), color=style.COLOURS["teacher"], **LEVEL)
        draw(axes, ran[setting], colour, marker="")
        axes.set_title("\n".join(title), loc="left", fontsize=style.points(8), color=style.ink(colour))
        axes.set(xlim=(0, None), ylim=(0, 1.06 * (highest or 1.0)))
        axes.tick_params(labelbottom=i + columns >= len(settings))  # also where none is below
        _steps(axes, 3)
    for axes in panels[len(settings) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(settings) - columns) : len(settings)]:
        axes.set_xlabel("optimizer steps")
    figure.supylabel("AP (percent)", fontsize=style.points(8.5))
    figure.legend(handles=keys, loc="outside upper left", ncols=1 if style.narrow() else max(1, len(keys)), handlelength=1.8)
    style.note(figure, note)
    return figure


def _trained(runs: Sequence[pd.Series]) -> str:
    steps = runs[0].index[-1]
    return f"after {steps:,} steps" if steps else "(published)"


def _title(setting: str) -> str:
    return TITLES.get(setting, setting)


def _mean(runs: Sequence[pd.Series]) -> float:
    return mean_and_half(pd.Series([run.iloc[-1] for run in runs]))[0]


def _final(runs: Sequence[pd.Series]) -> str:
    final, half = mean_and_half(pd.Series([run.iloc[-1] for run in runs]))
    return f"{final:.1f}" + ("" if math.isnan(half) else f" ± {half:.1f}")


def _steps(axes: Axes, most: int) -> None:
    """Write steps at as many places at most, where a panel is narrow."""
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if most:
        axes.xaxis.set_major_locator(MaxNLocator(most, steps=[1, 2, 3, 5, 10]))


def series(curve: Curve, key: str) -> pd.Series:
    """What a record's curve tells under `key`, by step; NaN where it tells nothing."""
    return pd.Series({int(point["step"]): math.nan if point.get(key) is None else point[key] for point in curve}, dtype=float)


def draw(axes: Axes, runs: Sequence[pd.Series], colour: str, marker: str = "o") -> None:
    """A thick line for the mean over seeds, thin ones for the seeds."""
    mean = pd.concat(runs).groupby(level=0).mean()
    for run in runs if len(runs) > 1 else ():
        axes.plot(run.index, run, color=colour, linewidth=0.8, alpha=0.4)
    axes.plot(mean.index, mean, color=colour, marker=marker, markersize=4)
