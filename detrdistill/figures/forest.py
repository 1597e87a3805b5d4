"""All claims of a preset at a glance: each difference with its own interval and the adjusted one, beside the margin."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import PlaceHolderLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.transforms import Affine2D, Transform, blended_transform_factory

from detrdistill.figures import style
from detrdistill.recipes.claims import AP, CHANGES, HALFWAY, INSIDE
from detrdistill.statistics import AGAINST, HOLDS, SMALL

ROW, SECOND, HEAD = 0.165, 0.1, 0.25  # inches: a comparison, a second line of its name, the title of a claim
TOP, FOOT, GAP = 0.8, 0.1, 0.75  # inches: above, below, and between panels
LEFT, RIGHT, INDENT = 3.05, 1.5, 1.0  # inches: of names, of words, and of the detector among the names
UNIT = 0.115  # inches: a line of the note
CLEAR = {HOLDS: style.BLUE, HOLDS + SMALL: style.BLUE, AGAINST: style.RED, AGAINST + SMALL: style.RED}  # other verdicts are grey


def forest(weighed: pd.DataFrame, note: str = "") -> Figure:
    """A line a comparison, grouped by claim; thick: its own 95 % interval, thin: adjusted for the others of its claim.

    Measures that are no AP have a panel of their own. An interval that would squeeze all others ends in an arrow.

    Args:
        weighed: of `claims.weigh`: claim, part, detector, measure, difference, half, adjusted_half, margin, verdict, status.
    """
    units = weighed["measure"].map({AP: "AP points", HALFWAY: "AP points", CHANGES: "changes an image", INSIDE: "points of weight"})
    panels = [(unit, weighed[units == unit]) for unit in units.unique()]
    heights = [sum(ROW + SECOND * (len(_names(name)) - 1) for name in part["part"]) + HEAD * part["claim"].nunique() for _, part in panels]
    lines = style.wrapped(note, style.WIDTH)
    height = TOP + sum(heights) + GAP * (len(panels) - 1) + 0.45 + FOOT + UNIT * len(lines)
    with style.paper():
        figure = style.Picture(figsize=(style.WIDTH, height), layout=PlaceHolderLayoutEngine(True, True))
        figure.text(0.012, 1 - 0.1 / height, "Every claim as a difference that should be positive", va="top", fontsize=10, weight="bold")
        handles = [
            Line2D([], [], color=style.TEXT, linewidth=3, marker="o", markersize=4, label="95 % interval"),
            Line2D([], [], color=style.TEXT, linewidth=0.9, label="adjusted for the claim's other comparisons"),
            Patch(color="#e9e9e9", label="margin"),
        ]
        figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, 1 - 0.27 / height), ncols=3, fontsize=7.5, handlelength=1.8)
        top = TOP
        for (unit, part), tall in zip(panels, heights, strict=True):
            width = (style.WIDTH - LEFT - RIGHT) / style.WIDTH
            axes = figure.add_axes((LEFT / style.WIDTH, 1 - (top + tall) / height, width, tall / height), ylim=(tall, 0))
            axes.set(yticks=[], xlabel=f"difference in {unit}")
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="x", top=True, labeltop=True)
            _draw(axes, part)
            top += tall + GAP
        figure.text(0.012, 0.06 / height, "\n".join(lines), va="bottom", fontsize=6.5, color=style.FAINT)
    return figure


def _draw(axes: Axes, part: pd.DataFrame) -> None:
    known = part[part["difference"].notna()]
    # Wide enough for all means, and for intervals that would not squeeze the others.
    ends = (known["difference"].abs() + known["half"]).dropna()
    reach = max([*known["difference"].abs(), *ends.clip(upper=3 * ends.median())], default=1.0) or 1.0
    axes.set_xlim(-1.1 * reach, 1.1 * reach)
    if (margin := part["margin"].max()) > 0:
        axes.axvspan(-margin, margin, color="#e9e9e9", linewidth=0, zorder=0)
    axes.axvline(0, color="#888888", linewidth=0.9, zorder=1)
    y = 0.0
    for claim, lines in part.groupby("claim", sort=False):
        axes.text(-LEFT + 0.08, y + HEAD * 0.6, claim, transform=_inches(axes), fontsize=7.5, weight="bold", va="center")
        y, before = y + HEAD, ""
        order = list(lines["detector"].unique())
        for line in lines.sort_values("detector", key=lambda names: names.map(order.index), kind="stable").to_dict("records"):
            tall = ROW + SECOND * (len(_names(line["part"])) - 1)
            _comparison(axes, y + tall / 2, line, reach, "" if line["detector"] == before else line["detector"])
            y, before = y + tall, line["detector"]


def _comparison(axes: Axes, y: float, line: Mapping[str, Any], reach: float, detector: str) -> None:
    colour = CLEAR.get(line["verdict"], style.FAINT)
    small = {"transform": _inches(axes), "fontsize": 6.5, "va": "center"}
    axes.text(0.12 - LEFT, y, detector, **small)
    for i, name in enumerate(names := _names(line["part"])):
        axes.text(INDENT - LEFT, y + SECOND * (i - (len(names) - 1) / 2), name, **small)
    axes.text(style.WIDTH - LEFT - RIGHT + 0.06, y, line["status"], color=colour if colour in CLEAR.values() else style.TEXT, **small)
    mean = line["difference"]
    if math.isnan(mean):
        return
    for half, width in ((line["adjusted_half"], 0.9), (line["half"], 3.0)):
        if not math.isnan(half):
            ends = [max(mean - half, -reach), min(mean + half, reach)]
            axes.plot(ends, (y, y), color=colour, linewidth=width, solid_capstyle="butt", alpha=1 if width < 1 else 0.55)
            for end, wanted, arrow in zip(ends, (mean - half, mean + half), "<>", strict=True):
                if end != wanted and width < 1:
                    axes.plot([end], [y], marker=arrow, color=colour, markersize=3.5, markeredgewidth=0)
    axes.plot([mean], [y], "o", color=colour, markersize=3.6, markeredgewidth=0)


def _names(part: str) -> list[str]:
    """In two lines where one is too short for it."""
    room = LEFT - INDENT - 0.05
    if style.cut(part, room, 6.5) == part or " over " not in part:
        return [style.cut(part, room, 6.5)]
    ahead, _, than = part.partition(" over ")
    return [style.cut(ahead, room, 6.5), style.cut(f"over {than}", room, 6.5)]


def _inches(axes: Axes) -> Transform:
    """x in inches from the panel's left edge, y as the panel's data, which are inches too."""
    from_left = Affine2D().translate(axes.get_position().x0 * style.WIDTH, 0) + axes.figure.dpi_scale_trans
    return blended_transform_factory(from_left, axes.transData)
