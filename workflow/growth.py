"""How the cost of a distillation step grows, for docs/speed.md: curves and a table; `workflow/prose.py` puts them there."""

import io
import math
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from PIL import Image

from detrdistill.errors import InputError
from detrdistill.figures import style
from detrdistill.recipes.words import DETECTORS
from workflow.findings import Line, as_table, read

TABLE = Path(__file__).resolve().parents[1] / "benchmarks" / "growth.csv"
THINGS = {"queries": "queries", "side": "image side (px)", "objects": "objects an image", "teacher": "teacher's backbone"}
PARTS = ("teacher", "encoder", "decoder", "matching", "losses", "backward")
LINEAR, WORTH = 1.2, 0.01  # exponents above the first need a reason, in parts that take this share of the largest step at least
WHY = {  # what can be worse than linear, in which detectors
    ("queries", "matching"): (
        tuple(DETECTORS),
        "every pair of a student's and a teacher's query has a price, and the search for the cheapest pairs takes about the third power.",
    ),
    ("queries", "decoder"): (tuple(DETECTORS), "queries attend to each other; what each does for itself outweighs that."),
    ("objects", "matching"): (
        tuple(DETECTORS),
        "the more queries have an object, the longer the next object's search for a free one.",
    ),
    ("side", "encoder"): (("conditional_detr",), "cells attend to each other; at a stride of 32 pixels they are few."),
}
NOUNS = {"side": "pixels"}
COLOURS = dict(zip(DETECTORS, (style.BLUE, style.RED, style.GREEN), strict=True))
TICKS = (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)
SHAPES = dict(zip(DETECTORS, "os^", strict=True))


def measured(thing: str, detector: str) -> list[Line]:
    """Rows from the smallest to the largest value of what grows."""
    return [line for line in read(TABLE) if (line["grows"], line["detector"]) == (thing, detector)]


def size(line: Line) -> float:
    """What cost would be linear in: of a side its square, the pixels."""
    return float(line["value"]) ** (2 if line["grows"] == "side" else 1)


def curves() -> bytes:
    """A panel for each thing that grows, seconds above and memory below, as a PNG file has them."""
    with style.paper():
        figure = style.Picture(figsize=(6.8, 3.8))
        rows = figure.subplots(2, len(THINGS), sharex="col", sharey="row")
        for panels, cost, unit, title in zip(rows, ("step", "MiB"), (1, 1024), ("seconds a step", "GiB at most"), strict=True):
            for draw in (draw_measured, draw_linear):
                for axes, thing in zip(panels, THINGS, strict=True):
                    draw(axes, thing, cost, unit)
            panels[0].set_ylabel(title)
        for axes, label in zip(rows[-1], THINGS.values(), strict=True):
            axes.set_xlabel(label)
        handles = [Line2D([], [], color=COLOURS[one], marker=SHAPES[one], markersize=4, label=title) for one, title in DETECTORS.items()]
        handles.append(Line2D([], [], color=style.FAINT, linestyle=":", linewidth=1, label="if linear (in the image: in its pixels)"))
        figure.legend(handles=handles, loc="outside upper left", ncols=4, handlelength=2, columnspacing=1.5)
    return figure._repr_png_()


def same_picture(one: bytes, other: bytes) -> bool:
    """But for the last bits of pixels: the libraries that draw differ in them from machine to machine."""
    first, second = (np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), dtype=float) for content in (one, other))
    return first.shape == second.shape and bool(np.abs(first - second).mean() < 1)


def draw_measured(axes: Axes, thing: str, cost: str, unit: float) -> None:
    axes.set_yscale("log")
    for detector, colour in COLOURS.items():
        lines = measured(thing, detector)
        places = range(len(lines)) if thing == "teacher" else [float(line["value"]) for line in lines]
        costs = [float(line[cost]) / unit for line in lines]
        axes.plot(places, costs, marker=SHAPES[detector], color=colour, markersize=4, linewidth=1.5)
        if cost == "step":
            axes.vlines(places, [float(line["low"]) for line in lines], [float(line["high"]) for line in lines], color=colour, linewidth=1)
    axes.set_xscale("linear" if thing == "teacher" else "log")
    axes.set_xticks(places, [words(line) for line in lines])
    axes.minorticks_off()


def draw_linear(axes: Axes, thing: str, cost: str, unit: float) -> None:
    """How each detector's cost would go on from its first point, as far as that is inside the panel; all are drawn before."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    for detector, colour in COLOURS.items() if thing != "teacher" else ():
        lines = measured(thing, detector)
        costs = [float(lines[0][cost]) / unit * size(line) / size(lines[0]) for line in lines]
        axes.plot([float(line["value"]) for line in lines], costs, ":", color=colour, linewidth=1)


def growth() -> str:
    """What the largest value of each thing costs beside the smallest, its seconds by part, and what can be worse than linear."""
    table = []
    for thing, label in THINGS.items():
        for detector, title in DETECTORS.items():
            lines = measured(thing, detector)
            first, last = lines[0], lines[-1]
            costs = [f"{float(last[cost]) / float(first[cost]):.1f} x" for cost in ("step", "MiB")]
            if thing != "teacher":
                costs = [f"{cost} ({exponent(lines, name):.1f})" for cost, name in zip(costs, ("step", "MiB"), strict=True)]
            shares = sorted(((float(last[part]) / float(last["step"]), part) for part in PARTS), reverse=True)
            mostly = ", ".join(f"{part} {share:.0%}" for share, part in shares if share >= 0.1)
            table.append([f"{label}: {words(first)} to {words(last)}", title, *costs, mostly])
    bullets = [f"- {cost[0].upper()}{cost[1:]} with {NOUNS.get(thing, thing)} ({said}): {why}" for thing, cost, said, why in reasons()]
    base = re.search("base: ([^;]+)", TABLE.read_text(encoding="utf-8"))[1]
    heading = ["What grows", "Detector", "Seconds", "Peak memory", "Seconds of the largest"]
    return "\n".join([f"One thing changes at a time, from this: {base}.", "", as_table(heading, table), "", *bullets])


def reasons() -> Iterator[tuple[str, str, str, str]]:
    """What can be worse than linear: thing, part, exponents of detectors (bold where it is so), and why.

    Raises:
        InputError: something is worse than linear, and nobody has said why.
    """
    for thing in THINGS:
        if thing == "teacher":
            continue
        for cost in (*PARTS, "step", "MiB"):
            known, why = WHY.get((thing, cost), ((), ""))
            said = []
            for detector, title in DETECTORS.items():
                lines = measured(thing, detector)
                power = exponent(lines, cost)
                fast = power > LINEAR and float(lines[-1][cost]) >= WORTH * float(lines[-1]["step"])
                if fast and detector not in known:
                    raise InputError(f"growth.csv: {cost} of {detector} grows with {thing} to the power of {power}; say why in WHY")
                if detector in known:
                    said.append(f"{title} **{power}**" if fast else f"{title} {power}")
            if said:
                yield thing, cost, ", ".join(said), why


def exponent(lines: Sequence[Line], cost: str) -> float:
    """The power of what grows that a cost grows with, the largest between neighbouring points; one digit, as spread allows no more.

    What takes less than `WORTH` of the largest step tells nothing.
    """
    known = [line for line in lines if float(line[cost]) >= WORTH * float(lines[-1]["step"])] if cost in PARTS else lines
    powers = [math.log(float(b[cost]) / float(a[cost])) / math.log(size(b) / size(a)) for a, b in pairwise(lines) if b in known]
    return round(max(powers, default=0.0), 1) + 0.0


def words(line: Line) -> str:
    return line["value"].replace("resnet", "R")
