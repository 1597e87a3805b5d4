"""All claims of a preset at a glance: each difference with its own interval and the adjusted one, beside the margin."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import PlaceHolderLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Affine2D, Transform, blended_transform_factory

from detrdistill.figures import style
from detrdistill.recipes.claims import AP, CHANGES, HALFWAY, INSIDE
from detrdistill.recipes.words import NOT_RUN
from detrdistill.statistics import AGAINST, HOLDS, SMALL

ROW, SECOND, HEAD = 0.165, 0.1, 0.25  # inches: a comparison, a further line of its name, the title of a claim
TOP, FOOT, GAP = 0.8, 0.1, 0.75  # inches: above, below, and between panels
UNIT = 0.115  # inches: a line of the note
TEXT = 6.5  # points: names and words


@dataclass(frozen=True)
class Widths:
    """Inches, in a page's width or in one of a paper's columns, where a detector has a line of its own above its comparisons."""

    names: float = 3.05
    words: float = 1.5
    indent: float = 1.0
    own_line: bool = False


PAGE, COLUMN = Widths(), Widths(1.45, 0.88, 0.16, True)
CLEAR = {HOLDS: style.BLUE, HOLDS + SMALL: style.BLUE, AGAINST: style.RED, AGAINST + SMALL: style.RED}  # other verdicts are grey


def forest(weighed: pd.DataFrame, note: str = "") -> Figure:
    """A line a comparison, grouped by claim; thick: its own 95 % interval, thin: adjusted for the others of its claim.

    Measures that are no AP have a panel of their own. An interval that would squeeze all others ends in an arrow.

    Args:
        weighed: of `claims.weigh`: claim, part, detector, measure, difference, half, adjusted_half, margin, verdict, status.
    """
    units = weighed["measure"].map({AP: "AP points", HALFWAY: "AP points", CHANGES: "changes an image", INSIDE: "points of weight"})
    panels = [(unit, weighed[units == unit]) for unit in units.unique()]
    with style.paper():
        # As in `comparison`, all lengths are those of text as large as on the screen.
        room, widths = style.room(), COLUMN if style.narrow() else PAGE
        heights = [sum(tall for _, tall in _lines(part, widths)) for _, part in panels]
        lines = style.wrapped(note, style.width())
        titles = style.wrap("Every claim as a difference that should be positive", room - 0.1, 10, "bold")
        more = 0.16 * (len(titles) - 1)
        top = TOP + more + UNIT * 2 * widths.own_line
        height = top + sum(heights) + GAP * (len(panels) - 1) + 0.45 + FOOT + UNIT * style.leading() * len(lines)
        figure = style.Picture(figsize=(style.width(), height * style.scale()), layout=PlaceHolderLayoutEngine(True, True))
        figure.text(0.012, 1 - 0.1 / height, "\n".join(titles), va="top", fontsize=style.points(10), weight="bold")
        handles = [
            Line2D([], [], color=style.TEXT, linewidth=3, marker="o", markersize=4, label="95 % interval"),
            Line2D([], [], color=style.TEXT, linewidth=0.9, label="adjusted for the claim's other comparisons"),
            Patch(color="#e9e9e9", label="margin"),
        ]
        look = {"fontsize": style.points(7.5), "handlelength": 1.8, "ncols": 1 if widths.own_line else 3}
        figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, 1 - (0.27 + more) / height), **look)
        for (unit, part), tall in zip(panels, heights, strict=True):
            wide = (room - widths.names - widths.words) / room
            axes = figure.add_axes((widths.names / room, 1 - (top + tall) / height, wide, tall / height), ylim=(tall, 0))
            axes.set(yticks=[], xlabel=f"difference in {unit}")
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="x", top=True, labeltop=True)
            axes.xaxis.set_major_locator(MaxNLocator(max(2, int(wide * room / 0.35)), steps=[1, 2, 5, 10]))
            _draw(axes, part, widths)
            top += tall + GAP
        figure.text(0.012, 0.06 / height, "\n".join(lines), va="bottom", fontsize=style.points(6.5), color=style.FAINT)
    return figure


def _lines(part: pd.DataFrame, widths: Widths) -> list[tuple[str | Mapping[str, Any], float]]:
    """What stands below each other, and how tall: titles of claims, detectors where they have a line, and comparisons."""
    found: list[tuple[str | Mapping[str, Any], float]] = []
    for claim, lines in part.groupby("claim", sort=False):
        titles = style.wrap(str(claim), style.room() - 0.16, 7.5, "bold")
        found.append(("\n".join(titles), HEAD + 0.12 * (len(titles) - 1)))
        for detector, own in lines.groupby("detector", sort=False):
            if widths.own_line and (own["status"] == NOT_RUN).all():  # a column has no room for each of them
                found.append((own.iloc[0].to_dict() | {"names": [], "words": [NOT_RUN], "detector": detector}, ROW))
                continue
            found += [(str(detector), ROW)] * widths.own_line
            for i, line in enumerate(own.to_dict("records")):
                names = _names(line["part"], widths.names - widths.indent - 0.05)
                words = style.wrap(line["verdict"] if widths.own_line and line["verdict"] else line["status"], widths.words - 0.08, TEXT)
                shown = {"names": names, "words": words, "detector": "" if i or widths.own_line else detector}
                found.append((line | shown, ROW + SECOND * (max(len(names), len(words)) - 1)))
    return found


def _draw(axes: Axes, part: pd.DataFrame, widths: Widths) -> None:
    known = part[part["difference"].notna()]
    # Wide enough for all means and the margin, and for intervals that would not squeeze the others.
    halves = known["adjusted_half"].fillna(known["half"])
    halves = halves.fillna(0).clip(upper=3 * halves.median())
    margin = part["margin"].max()
    low = min([-margin, *(known["difference"] - halves)])
    high = max([margin, *(known["difference"] + halves)])
    low, high = (low, high) if high > low else (-1.0, 1.0)
    axes.set_xlim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    if margin > 0:
        axes.axvspan(-margin, margin, color="#e9e9e9", linewidth=0, zorder=0)
    axes.axvline(0, color="#888888", linewidth=0.9, zorder=1)
    y = 0.0
    for line, tall in _lines(part, widths):
        if isinstance(line, str):
            claim = tall >= HEAD
            look = {"fontsize": style.points(7.5), "weight": "bold"} if claim else {"fontsize": style.points(TEXT)}
            at = y + (HEAD * 0.6 + 0.06 * line.count("\n") if claim else tall / 2)
            _write(axes, 0.08 if claim else 0.12, at, line, widths, **look)
        else:
            _comparison(axes, y + tall / 2, line, (low, high), widths)
        y += tall


def _write(axes: Axes, x: float, y: float, text: str, widths: Widths, **look: Any) -> None:
    """Text at x inches from the figure's left edge; what is centred includes room below the letters, so a little lower."""
    axes.text(x - widths.names, y + 0.012, text, transform=_inches(axes), **({"fontsize": style.points(TEXT), "va": "center"} | look))


def _comparison(axes: Axes, y: float, line: Mapping[str, Any], ends: tuple[float, float], widths: Widths) -> None:
    colour = CLEAR.get(line["verdict"], style.FAINT)
    _write(axes, 0.12, y, line["detector"], widths)
    for i, name in enumerate(line["names"]):
        _write(axes, widths.indent, y + SECOND * (i - (len(line["names"]) - 1) / 2), name, widths)
    for i, words in enumerate(line["words"]):
        at = y + SECOND * (i - (len(line["words"]) - 1) / 2)
        shade = style.ink(colour) if colour in CLEAR.values() else style.TEXT
        _write(axes, style.room() - widths.words + 0.06, at, words, widths, color=shade)
    mean = line["difference"]
    if math.isnan(mean):
        return
    for half, thick in ((line["adjusted_half"], 0.9), (line["half"], 3.0)):
        if not math.isnan(half):
            drawn = [max(mean - half, ends[0]), min(mean + half, ends[1])]
            axes.plot(drawn, (y, y), color=colour, linewidth=thick, solid_capstyle="butt", alpha=1 if thick < 1 else 0.55)
            for end, wanted, arrow in zip(drawn, (mean - half, mean + half), "<>", strict=True):
                if end != wanted and thick < 1:
                    axes.plot([end], [y], marker=arrow, color=colour, markersize=3.5, markeredgewidth=0)
    axes.plot([mean], [y], "o", color=colour, markersize=3.6, markeredgewidth=0)


def _names(part: str, room: float) -> list[str]:
    """In lines of that width, parted before "over" where one is too short."""
    ahead, over, than = part.partition(" over ")
    whole = style.wrap(part, room, TEXT)
    return whole if len(whole) == 1 or not over else style.wrap(ahead, room, TEXT) + style.wrap(f"over {than}", room, TEXT)


def _inches(axes: Axes) -> Transform:
    """x from the panel's left edge as `style.room` counts, y as the panel's data, which are inches too."""
    at = Affine2D().scale(style.scale(), 1).translate(axes.get_position().x0 * style.width(), 0)
    from_left = at + axes.figure.dpi_scale_trans
    return blended_transform_factory(from_left, axes.transData)
