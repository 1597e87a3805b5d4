"""How often queries change their object from one decoder stage to the next, as the paper's Figure 7."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from detrdistill.figures import style
from detrdistill.figures.convergence import Curve, draw, series
from detrdistill.recipes.words import TITLES

Runs = Sequence[np.ndarray]
WHEN = ("Changes between decoder stages", "Changes since the evaluation before, last stage")


def instability(queries: Mapping[str, Runs], objects: Mapping[str, Runs], note: str = "") -> Figure:
    """Changed queries and changed objects an image, a group of bars a step between stages: lower is more stable.

    Bars are means over images and seeds. Whiskers: 95 % interval over the images of one run, or, with several seeds, a dot a seed.

    Args:
        queries: for every setting a list over seeds of counts [images, steps]; an empty list is shown as "no weights".
        objects: the same for objects.
    """
    with style.paper():
        figure, panels = _two_panels()
        figure.get_layout_engine().set(wspace=0.06)
        counts = {len(runs) for runs in queries.values()}
        for axes, scores, title in zip(panels, (queries, objects), ("queries", "objects"), strict=True):
            _panel(axes, scores)
            axes.set_title(f"{title.capitalize()} that change", loc="left")
            axes.set_ylabel(f"{title} an image")
        handles = [Patch(color=style.COLOURS.get(name, style.GREY), label=TITLES.get(name, name)) for name in queries]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), handlelength=1, columnspacing=1.5)
        how = ["Dots: seeds."] * (max(counts, default=0) > 1) + ["Whiskers: 95 % interval over the images of one run."] * (1 in counts)
        style.note(figure, f"{' '.join(how)}\n{note}".strip())
    return figure


def instability_in_training(curves: Mapping[str, Sequence[Curve]], note: str = "") -> Figure:
    """Changed queries an image while training: between decoder stages, and of the last stage from one evaluation to the next.

    The teacher, which trains on another schedule, is a level to reach between stages.

    Args:
        curves: for every setting a list over seeds of `Record.curve`; runs that tell no changes are shown as "not recorded".
    """
    with style.paper():
        figure, panels = _two_panels()
        figure.get_layout_engine().set(wspace=0.06)
        drawn = {}
        for axes, key, title in zip(panels, ("changes_between_stages", "changes_since_last"), WHEN, strict=True):
            for setting, runs in curves.items():
                colour, told = style.COLOURS.get(setting, style.GREY), [series(curve, key).dropna() for curve in runs]
                if not (told := [run for run in told if len(run)]):
                    continue
                if setting != "teacher":
                    drawn[setting] = colour
                    draw(axes, told, colour)
                elif key == "changes_between_stages":
                    drawn[setting] = colour
                    axes.axhline(told[0].iloc[-1], color=colour, linestyle=(0, (5, 3)), linewidth=1.4)
            if not axes.lines:
                style.not_run(axes, "not recorded")
            axes.set_title("\n".join(style.even(title, style.room() - 0.7, 9)), loc="left")
            axes.set(xlabel="optimizer steps", ylabel="queries an image", xlim=(0, None), ylim=(0, None))
        handles = [Line2D([], [], color=colour, label=TITLES.get(name, name)) for name, colour in drawn.items()]
        figure.legend(handles=handles, loc="outside upper left", ncols=max(1, len(handles)), handlelength=1.5, columnspacing=1.5)
        missing = ", ".join(TITLES.get(name, name) for name in curves if name not in drawn)
        style.note(figure, (f"Not recorded: {missing}.\n" if missing else "") + note)
    return figure


def _two_panels() -> tuple[Figure, Sequence[Axes]]:
    """Beside each other, or below where there is no room."""
    figure = style.Picture(figsize=(style.width(), (4.8 if style.narrow() else 2.9) * style.scale()))
    return figure, figure.subplots(2, 1) if style.narrow() else figure.subplots(1, 2)


def _panel(axes: Axes, scores: Mapping[str, Runs]) -> None:
    steps = max((run.shape[1] for runs in scores.values() for run in runs), default=0)
    if steps == 0:
        style.not_run(axes, "no weights" if not any(scores.values()) else "one decoder stage: nothing can change")
        return
    wide = 0.8 / len(scores)
    for place, (setting, runs) in enumerate(scores.items()):
        shift = wide * (place - (len(scores) - 1) / 2)
        colour = style.COLOURS.get(setting, style.GREY)
        if not runs:
            axes.annotate("no weights", (shift, 0), (0, 4), textcoords="offset points", rotation=90, ha="center", color=style.FAINT)
            continue
        means = np.stack([run.mean(0) for run in runs])
        x = np.arange(means.shape[1]) + shift
        axes.bar(x, means.mean(0), width=0.92 * wide, color=colour)
        tops = means.max(0)
        if len(runs) > 1:
            axes.plot(np.tile(x, (len(runs), 1)).ravel(), means.ravel(), ".", color=style.TEXT, markersize=5)
        elif len(runs[0]) > 1:
            half = 1.96 * runs[0].std(0, ddof=1) / len(runs[0]) ** 0.5
            axes.errorbar(x, means[0], half, fmt="none", color=style.TEXT, linewidth=1, capsize=2.5)
            tops = tops + half
        for at, mean, top in zip(x, means.mean(0), tops, strict=True):
            axes.annotate(
                f"{mean:.2f}", (at, top), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=style.points(7.5)
            )
    axes.set(xticks=range(steps), xticklabels=[f"stage {k + 1} to {k + 2}" for k in range(steps)])
    axes.margins(x=0.06, y=0.12)
    axes.set_ylim(0, None if axes.dataLim.y1 > 0 else 1)
    axes.grid(False, axis="x")
    axes.tick_params(axis="x", length=0)
