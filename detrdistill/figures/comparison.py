"""Any table as one picture: AP and gain measured here, a row a setting, and apart from them what was published."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import PlaceHolderLayoutEngine
from matplotlib.ticker import MaxNLocator

from detrdistill.figures import style
from detrdistill.recipes.words import NOT_RUN

Line = Mapping[str, Any]
Mark = tuple[Line, float, str]  # a line, the height it is drawn at, and its colour

NEUTRAL, BAND = "#5a5a5a", "#f5f5f5"
HEAD, SIZE, SMALL, TINY = 8.5, 8, 7.5, 6.5  # points: detectors, titles of rows, numbers, notes
# Inches, like all lengths of the sheet; only what is drawn inside a panel has a scale of its own.
ROW, LEADING, HEADING, MARGIN, GAP, INDENT, TITLES_AT_MOST = 0.235, 0.14, 0.25, 0.08, 0.15, 0.1, 1.7
PANEL_AT_LEAST = 0.55  # where the figure has one of a paper's columns
SPAN_AT_LEAST = 4.0  # AP: a panel does not blow up what little differs
MINUS = "\N{MINUS SIGN}"
PUBLISHED = "published, COCO val2017"
HEADS = ({"fontsize": SIZE, "weight": "bold", "ha": "right"}, {"fontsize": SIZE, "weight": "bold"})  # over words, over a panel


@dataclass(frozen=True)
class Column:
    """A panel and the words right of it.

    Attributes:
        title: over the panel.
        unit: under its axis.
        value: the column of the summary that is drawn; NaN for nothing.
        words: what is written, and whether it is a number (and not a reason why there is none).
        share: of the width left for panels; 0 for words alone.
        below: more words, under these: a published number.
    """

    title: str
    unit: str
    value: str
    words: Callable[[Line], tuple[str, bool]]
    share: float
    below: Callable[[Line], tuple[str, bool]] | None = None


def comparison(frame: pd.DataFrame, summary: pd.DataFrame, note: str = "") -> Figure:
    """Means, 95 % intervals and seeds of a table's rows, grouped by detector; left of the zero line a method did harm.

    Published gains have a panel and an axis of their own, since they were measured on other data; without any, a line says so. One of a
    paper's columns has room for the panel of gains alone: AP stands beside it in words, and a published gain under ours.

    Args:
        frame: a line a run, of `tables.collect`.
        summary: a line a row of the table: detector, setting, title, baseline (the setting that the gain is over, "" for none), AP,
            AP_half, gain, gain_half, published (its name in the paper, "" if it has no such row), published_AP, published_gain,
            seeds, seeds_wanted, status, measured_on.
    """
    lines = [line for detector in summary["detector"].unique() for line in summary[summary["detector"] == detector].to_dict("records")]
    ran = {(line["detector"], line["setting"]) for line in lines if line["seeds"]}
    baselines = {(line["detector"], line["baseline"]) for line in lines}
    colours = [_colour(line, baselines) for line in lines]
    stated, narrow = summary["published_gain"].notna().any(), style.narrow()

    def gain(line: Line) -> tuple[str, bool]:
        return _gain(line, ran, baselines, "" if narrow else " (one seed)")

    where = [("measured here: " + "; ".join(summary["measured_on"].unique()), 0, 1)]  # and the columns it stands over
    if narrow:
        columns = [Column("AP", "", "AP", _mean, 0), Column("gain", "AP points", "gain", gain, 1, _below if stated else None)]
        where = [(f"{where[0][0]}{'; paper: COCO val2017' if stated else ''}", 0, 1)]
        note += " Without ±: one seed." if ((summary["seeds"] == 1) & summary["gain"].notna()).any() else ""
    else:
        columns = [Column("AP", "percent", "AP", _ap, 1.2), Column("gain over the baseline", "AP points", "gain", gain, 1.2)]
    if stated and not narrow:
        columns.append(Column("gain", "AP points", "published_gain", _published, 0.7))
        where.append((PUBLISHED, 2, 2))
    elif not stated:
        why = "no gain found for any of these rows" if (summary["published"] != "").any() else "no such rows"
        note = f"{PUBLISHED}: {why}\n{note}"
    if any(not math.isnan(line[half]) for line in lines for half in ("AP_half", "gain_half")):
        note += f" {'Dots' if narrow else 'Large dots'} and bars: mean and 95 % interval{'' if narrow else '; small dots: seeds'}."

    with style.paper():
        # Widths, from the left: titles of rows, counts of seeds, and for each column a panel with words right of it. All lengths are
        # those of text as large as on the screen, and so is the sheet's scale; the figure itself is `scale` times as large.
        room, titles_at_most = style.room(), TITLES_AT_MOST
        if narrow:
            titles_at_most = room - 2 * MARGIN - INDENT - len(columns) * GAP - sum(_beside(columns, lines)) - PANEL_AT_LEAST
        titles = [style.even(str(line["title"]), titles_at_most, SIZE) for line in lines]
        counts = [f"{line['seeds']}/{line['seeds_wanted']}" for line in lines]
        left = MARGIN + INDENT + max(style.text_width(text, SIZE) for title in titles for text in title)
        left += 0 if narrow else 0.1 + max(style.text_width(text, SMALL) for text in [*counts, "seeds"])
        left = max(left, MARGIN + min(titles_at_most, max(style.text_width(line["detector"], HEAD, "bold") for line in lines)))
        edges = _edges(columns, lines, left)
        heads = [(MARGIN if narrow else edges[first][0], edges[last][2], text) for text, first, last in where]
        heads = [(start, end, style.even(text, end - start + 0.01, SMALL)) for start, end, text in heads]
        groups = [style.wrap(line["detector"], (room if narrow else left) - MARGIN + 0.01, HEAD, "bold") for line in lines]
        notes = [text for part in note.split("\n") for text in style.wrap(part.strip(), room - 2 * MARGIN, TINY)]

        # Heights, from the top: where it was measured, titles of columns, the rows, axes, and notes.
        rule = MARGIN + LEADING * max(len(text) for *_, text in heads) + 0.02
        top = y = rule + 0.3
        bands, places, group_places = [], [], {}
        for i, line in enumerate(lines):
            if not i or line["detector"] != lines[i - 1]["detector"]:
                group_places[i] = y + HEADING / 2 + 0.02
                y += HEADING + LEADING * (len(groups[i]) - 1)
            two = any(column.below and column.below(line)[0] for column in columns)
            bands.append((y, ROW + LEADING * (max(len(titles[i]), 1 + two) - 1)))
            places.append(y + bands[-1][1] / 2)
            y += bands[-1][1]
        bottom = y + 0.04
        below = bottom + (0.5 if summary[[column.value for column in columns if column.share]].notna().any(axis=None) else 0.15)
        height = below + 0.115 * len(notes)

        figure = style.Picture(figsize=(style.width(), height * style.scale()), layout=PlaceHolderLayoutEngine(True, True))
        sheet = figure.add_axes((0, 0, 1, 1), xlim=(0, room), ylim=(height, 0), label="sheet")
        sheet.set_axis_off()
        for start, tall in bands[::2]:
            sheet.barh(start, room - MARGIN, tall, left=MARGIN / 2, align="edge", color=BAND)
        for start, end, wrapped in heads:
            _write(sheet, start, rule - 0.02 - LEADING * (len(wrapped) - 0.5), wrapped)
            sheet.plot((start, end), (rule, rule), color=style.FAINT, linewidth=0.7)
        if not narrow:
            _write(sheet, left, top - 0.15, ["seeds"], ha="right", color=style.FAINT)
        for i, at in group_places.items():
            _write(sheet, MARGIN, at, groups[i], fontsize=HEAD, weight="bold")
        for title, count, at in zip(titles, counts, places, strict=True):
            _write(sheet, MARGIN + INDENT, at - LEADING * (len(title) - 1) / 2, title, fontsize=SIZE)
            if not narrow:
                _write(sheet, left, at, [count], ha="right", color=style.FAINT)
        for column, (start, end, far) in zip(columns, edges, strict=True):
            _write(sheet, start if column.share else far, top - 0.15, [column.title], **HEADS[bool(column.share)])
            for line, at in zip(lines, places, strict=True):
                text, number = column.words(line)
                under = column.below(line)[0] if column.below else ""
                _write(sheet, far, at - LEADING / 2 * bool(under), [text], ha="right", color=style.TEXT if number else style.FAINT)
                if under:
                    _write(sheet, far, at + LEADING / 2, [under], ha="right", color=style.FAINT)
            if not column.share:
                continue
            axes = figure.add_axes((start / room, 1 - bottom / height, (end - start) / room, (bottom - top) / height))
            axes.set(facecolor="none", ylim=(bottom, top), yticks=[], label=column.title)
            shown = [mark for mark in zip(lines, places, colours, strict=True) if not math.isnan(mark[0][column.value])]
            _panel(axes, column, shown, frame, end - start)
        _write(sheet, MARGIN, below, notes, 0.115, fontsize=TINY, color=style.FAINT)
    return figure


def _beside(columns: Sequence[Column], lines: Sequence[Line]) -> list[float]:
    """How wide the words of each column are, with the gap to its panel."""
    wide = []
    for column in columns:
        texts = [text for text, number in map(column.words, lines) if number]
        texts += [column.below(line)[0] for line in lines if column.below]
        wide.append(max([style.text_width(text, SMALL) for text in texts] + [0.35]) + 0.1 * (column.share > 0))
    return wide


def _edges(columns: Sequence[Column], lines: Sequence[Line], left: float) -> list[tuple[float, float, float]]:
    """Of each column: where its panel starts and ends, and where its words end."""
    beside = _beside(columns, lines)
    room = style.room() - MARGIN - left - GAP * len(columns) - sum(beside)
    shares = np.array([column.share for column in columns])
    wide = room * shares / shares.sum()
    if len(columns) == 3:  # what is written over the last must fit
        wide[2] = max(wide[2], style.text_width(PUBLISHED, SMALL) - beside[2])
        wide[:2] = (room - wide[2]) * shares[:2] / shares[:2].sum()
    ends = left + np.cumsum(wide + beside + GAP)
    return [(end - words - panel, end - words, end) for end, words, panel in zip(ends.tolist(), beside, wide.tolist(), strict=True)]


def _panel(axes: Axes, column: Column, shown: Sequence[Mark], frame: pd.DataFrame, width: float) -> None:
    axes.spines["left"].set_visible(False)
    if not shown:
        axes.set_axis_off()
        return
    if column.value == "published_gain":
        _draw_published(axes, shown)
    else:
        _draw_measured(axes, shown, column.value, frame)
    axes.set_xlabel(column.unit, labelpad=2)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=max(2, int(width / 0.3)), steps=[1, 2, 5, 10], min_n_ticks=2))
    axes.tick_params(axis="x", length=2.5)


def _write(sheet: Axes, x: float, y: float, lines: Sequence[str], leading: float = LEADING, **look: Any) -> None:
    """Lines of text, the first centred at y."""
    look = {"fontsize": SMALL, "va": "center"} | look
    look["fontsize"] = style.points(look["fontsize"])
    for i, text in enumerate(lines):
        # What is centred includes room below the letters: a little lower, their middle is where dots are.
        sheet.text(x, y + leading * i + 0.012, text, **look)


def _ap(line: Line) -> tuple[str, bool]:
    return (NOT_RUN, False) if math.isnan(line["AP"]) else (_number(line["AP"], ".1f", line["AP_half"]), True)


def _mean(line: Line) -> tuple[str, bool]:
    return (NOT_RUN, False) if math.isnan(line["AP"]) else (_number(line["AP"], ".1f"), True)


def _gain(line: Line, ran: set[tuple[str, str]], baselines: set[tuple[str, str]], one_seed: str) -> tuple[str, bool]:
    if not line["baseline"]:
        return ("baseline" if (line["detector"], line["setting"]) in baselines else "-"), False
    if math.isnan(line["gain"]):
        if not line["seeds"]:
            return NOT_RUN, False
        return ("no seed in common" if (line["detector"], line["baseline"]) in ran else "baseline not run"), False
    return _number(line["gain"], "+.1f", line["gain_half"]) + (one_seed if math.isnan(line["gain_half"]) else ""), True


def _published(line: Line) -> tuple[str, bool]:
    if math.isnan(line["published_gain"]):
        return ("not found" if line["baseline"] and line["published"] else "-"), False
    return _number(line["published_gain"], "+.1f"), True


def _below(line: Line) -> tuple[str, bool]:
    return ("", False) if math.isnan(line["published_gain"]) else (f"paper {_published(line)[0]}", True)


def _number(value: float, form: str, half: float = math.nan) -> str:
    return format(value, form).replace("-", MINUS) + ("" if math.isnan(half) else f" ± {half:.1f}")


def _colour(line: Line, baselines: set[tuple[str, str]]) -> str:
    """The setting's own colour; the student's for what others are compared with; neutral for the rest, which the row names already."""
    return style.COLOURS.get(line["family"], style.BLUE if (line["detector"], line["setting"]) in baselines else NEUTRAL)


def _draw_measured(axes: Axes, shown: Sequence[Mark], name: str, frame: pd.DataFrame) -> None:
    """Means with intervals, AP also with its seeds; an interval so wide that it would squeeze all others ends in an arrow."""
    seeds = [_seeds(frame, line) if name == "AP" else [] for line, _, _ in shown]
    points = [line[name] for line, _, _ in shown] + [value for values in seeds for value in values] + [0.0] * (name == "gain")
    span = max(max(points) - min(points), SPAN_AT_LEAST)
    halves = [0.0 if math.isnan(line[f"{name}_half"]) else line[f"{name}_half"] for line, _, _ in shown]
    low = max(min(points) - span, min([min(points), *(line[name] - half for (line, _, _), half in zip(shown, halves, strict=True))]))
    high = min(max(points) + span, max([max(points), *(line[name] + half for (line, _, _), half in zip(shown, halves, strict=True))]))
    if name == "AP":
        low, high = max(low, 0.0), min(high, 100.0)  # an interval of few seeds knows no such limits
    pad = max(0.06 * (high - low), (SPAN_AT_LEAST - high + low) / 2)
    axes.set_xlim(low - pad, high + pad)
    if name == "gain":
        axes.axvline(0, color="#888888", linewidth=0.9, zorder=1)
    for (line, at, colour), values, half in zip(shown, seeds, halves, strict=True):
        axes.plot(values, [at + 0.075] * len(values), "o", color=colour, markersize=2.4, alpha=0.6, markeredgewidth=0, label="seeds")
        if half:
            ends = (max(line[name] - half, low), min(line[name] + half, high))
            axes.plot(ends, (at, at), color=colour, linewidth=1.3, solid_capstyle="butt", label="interval")
            for end, wanted, arrow in zip(ends, (line[name] - half, line[name] + half), "<>", strict=True):
                axes.plot([end], [at], marker="|" if end == wanted else arrow, color=colour, markersize=4.5)
        axes.plot([line[name]], [at], "o", color=colour, markersize=4.6, markeredgewidth=0, label="mean")


def _draw_published(axes: Axes, shown: Sequence[Mark]) -> None:
    """Open diamonds: nobody measured these here."""
    values = [0.0, *(line["published_gain"] for line, _, _ in shown)]
    pad = 0.1 * max(max(values) - min(values), 0.5)
    axes.set_xlim(min(values) - pad, max(values) + pad)
    axes.axvline(0, color="#888888", linewidth=0.9, zorder=1)
    look = {"markerfacecolor": "white", "markersize": 4.5, "markeredgewidth": 1.3, "clip_on": False, "label": "published"}
    for line, at, colour in shown:
        axes.plot([line["published_gain"]], [at], "D", color=colour, **look)


def _seeds(frame: pd.DataFrame, line: Line) -> list[float]:
    return frame.loc[(frame["detector"] == line["detector"]) & (frame["setting"] == line["setting"]), "AP"].dropna().tolist()
