"""The paper's Figure 1 beside ours: student, distilled student, teacher."""

import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from detrdistill.figures import style
from detrdistill.published import published_value
from detrdistill.recipes.words import TITLES

ORDER = ("student", "detrdistill", "teacher")
IN_PAPER = {"student": "Student", "detrdistill": "Ours", "teacher": "Teacher"}
IN_ORDER = ("Conditional DETR", "Deformable DETR", "AdaMixer")


def bars(published: pd.DataFrame, summary: pd.DataFrame, note: str = "") -> Figure:
    """Final AP as bars from zero (the paper's start at 40), two panels whose data and scales have nothing in common.

    Args:
        published: `published("figure1")`.
        summary: of `main_results`; whiskers are 95 % intervals over seeds, rows without a run say so.
    """
    with style.paper():
        measured = dict.fromkeys(summary["detector"])
        ours = [*(name for name in IN_ORDER if name in measured), *(name for name in measured if name not in IN_ORDER)]
        stacked = style.narrow()
        points = 6.5 if stacked or len(ours) > 1 else 7.5
        figure = style.Picture(figsize=(style.width(), (5.4 if stacked else 3.3) * style.scale()))
        spans = [len(IN_ORDER) + 0.2, max(len(ours) + 0.2, 1.7)]
        left, right = figure.subplots(2, 1) if stacked else figure.subplots(1, 2, width_ratios=spans)
        figure.get_layout_engine().set(wspace=0.08)
        for x, detector in enumerate(IN_ORDER):
            for i, setting in enumerate(ORDER):
                _bar(left, x, i, published_value(published, f"{detector} / {IN_PAPER[setting]}", "AP"), points)
        left.set_title("Published\nCOCO val2017\nResNet-101 teaches ResNet-50", loc="left")
        for line in summary[summary["setting"].isin(ORDER)].to_dict("records"):
            _bar(right, ours.index(line["detector"]), ORDER.index(line["setting"]), line["AP"], points, line["AP_half"])
        counts = sorted(set(summary.loc[summary["setting"].isin(ORDER[:2]) & (summary["seeds"] > 0), "seeds"].map(int)))
        where = summary["measured_on"].iloc[0].replace("; ", "\n")
        least = f"{counts[0]} to " if len(counts) > 1 else ""
        count = f", {least}{counts[-1]} seed{'s' * (counts[-1] > 1)}" if counts else ""
        right.set_title(f"Measured here{count}\n{where}", loc="left")
        for axes, names, span in zip((left, right), (IN_ORDER, ours), spans, strict=True):
            middle = (len(names) - 1) / 2
            axes.set(
                xticks=range(len(names)),
                xticklabels=[name.replace(" ", "\n") for name in names],
                ylabel="AP (percent)",
                xlim=(middle - span / 2, middle + span / 2),
            )
            if axes.patches:
                axes.set_ylim(0, 1.1 * axes.dataLim.y1)
            else:
                axes.set(yticks=[], ylim=(0, 1))
            axes.grid(False, axis="x")
            axes.tick_params(axis="x", length=0)
        handles = [Patch(color=style.COLOURS[setting], label=TITLES[setting]) for setting in ORDER]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), handlelength=1, columnspacing=1.2 if stacked else 1.5)
        style.note(figure, f"{note} Whiskers: 95 % t-interval over seeds." if summary["AP_half"].notna().any() else note)
    return figure


def _bar(axes: Axes, group: int, place: int, value: float, points: float, half: float = math.nan) -> None:
    x, colour = group + 0.28 * (place - 1), style.COLOURS[ORDER[place]]
    if math.isnan(value):
        axes.annotate("not run", (x, 0), (0, 4), textcoords="offset points", rotation=90, ha="center", va="bottom", color=style.FAINT)
        return
    axes.bar(x, value, width=0.26, color=colour)
    top = value
    if not math.isnan(half):
        axes.errorbar(x, value, half, color=style.TEXT, linewidth=1, capsize=2.5)
        top += half
    axes.annotate(
        f"{value:.1f}",
        (x, top),
        xytext=(0, 2),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=style.points(points),
    )
