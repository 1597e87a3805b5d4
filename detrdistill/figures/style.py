"""How all figures look, and how they are saved: fonts readable in print, one colour a setting, the same bytes for the same data."""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import PlaceHolderLayoutEngine
from matplotlib.textpath import text_to_path

from detrdistill.errors import InputError
from detrdistill.files import atomic

WIDTH = 7.2  # inches: two columns of a paper

# seaborn's colour-blind palette, spelled out because importing seaborn takes longer than the rest of a report.
BLUE, AMBER, GREEN, RED, PINK, BROWN, ROSE, GREY, YELLOW, SKY = (
    "#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#fbafe4", "#949494", "#ece133", "#56b4e9"
)  # fmt: skip
COLOURS = {"student": BLUE, "detrdistill": RED, "teacher": GREEN, "ground truth": "#222222"}
OTHERS = (PINK, BROWN, SKY, "#7a5195", "#5d7a1f", GREY, ROSE, "#3b5b92")  # for settings without a colour of their own, in order
TEXT, FAINT = "#222222", "#6f6f6f"

STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so it is the same everywhere
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "text.color": TEXT,
    "text.parse_math": False,  # a class may be called $x^$
    "axes.labelcolor": TEXT,
    "axes.edgecolor": "#888888",
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,  # TrueType: text stays text
    "svg.hashsalt": "detrdistill",
}


class Picture(Figure):
    """A figure that a notebook shows when it is a cell's value. pyplot is not involved, so nothing is shown twice or kept open."""

    def __init__(self, *args: Any, layout: Any = None, **kwargs: Any) -> None:
        # Saving a figure sets its layout engine again, and where there is none, the style's: what was laid out by hand would be laid
        # out anew at the second saving. This one does nothing and stays.
        super().__init__(*args, layout=PlaceHolderLayoutEngine(True, True) if layout == "none" else layout, **kwargs)

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        with paper():
            self.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
        return buffer.getvalue()


@contextmanager
def paper() -> Iterator[None]:
    """Draw in the house style, whatever the user's own matplotlib settings are."""
    with matplotlib.rc_context():
        matplotlib.rcParams.update({key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"})
        matplotlib.rcParams.update(STYLE)
        yield


def colours(settings: Sequence[str]) -> dict[str, str]:
    """A colour for each setting, known by its name or its title; the others take theirs in order."""
    known = {name: colour for name, colour in COLOURS.items()} | {"Student": BLUE, "DETRDistill": RED, "Teacher": GREEN}
    others = [setting for setting in settings if setting not in known]
    return {**{name: known[name] for name in settings if name in known}, **dict(zip(others, cycle(OTHERS), strict=False))}


# What each format would write of the day and the program, so that equal figures were not equal files.
FORMATS = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Producer": None, "Creator": None}}


def check_formats(formats: Sequence[str]) -> None:
    """Raise InputError where figures cannot be written in a format."""
    if unknown := [name for name in formats if name not in FORMATS]:
        raise InputError(f"format '{unknown[0]}' of figures is unknown; known: {', '.join(FORMATS)}")


def save(figure: Figure, stem: Path | str, formats: Sequence[str] = tuple(FORMATS)) -> list[Path]:
    """Write `<stem>.png` (200 dpi) and `<stem>.pdf` (vector), or one of them; equal figures are equal files.

    Raises:
        InputError: an unknown format.
    """
    check_formats(formats)
    paths = []
    for suffix in formats:
        paths.append(Path(f"{stem}.{suffix}"))
        with paper(), atomic(paths[-1]) as temporary:
            figure.savefig(temporary, format=suffix, dpi=200, metadata=FORMATS[suffix])
    return paths


def note(figure: Figure, text: str) -> None:
    """Where the figure comes from, small, below everything."""
    if text:
        figure.supxlabel("\n".join(wrapped(text, figure.get_figwidth())), x=0.01, ha="left", fontsize=6.5, color=FAINT)


def wrapped(text: str, width: float) -> list[str]:
    """A note's lines in a picture of that many inches."""
    return [part for line in text.split("\n") for part in textwrap.wrap(line, int(20 * width))]


def cut(text: str, width: float, size: float) -> str:
    """As much of a text as fits into that many inches, with an ellipsis where some is left out."""

    def wide(one):
        return text_to_path.get_text_width_height_descent(one, FontProperties(size=size), ismath=False)[0] / 72

    if wide(text) <= width:
        return text
    letters = next((n for n in range(len(text), 0, -1) if wide(text[:n].rstrip() + "\N{HORIZONTAL ELLIPSIS}") <= width), 0)
    return text[:letters].rstrip() + "\N{HORIZONTAL ELLIPSIS}"


def not_run(axes: Axes, text: str = "not run") -> None:
    """An empty panel that says why it is empty."""
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=FAINT, fontsize=10)


def spread(values: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Centres of labels of these heights, moved apart until none overlap, as little as possible, in the same order."""
    order = np.argsort(values, kind="stable")
    tall = np.asarray(heights, float)[order]
    offsets = np.cumsum(tall) - tall / 2
    # Distances already kept become plateaus: what remains is the closest non-decreasing sequence.
    wanted = [[values[i] - offset] for i, offset in zip(order, offsets, strict=True)]
    blocks: list[list[float]] = []
    for block in wanted:
        blocks.append(block)
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    level = [float(np.mean(block)) for block in blocks for _ in block]
    placed = dict(zip(order.tolist(), np.add(level, offsets).tolist(), strict=True))
    return [placed[i] for i in range(len(values))]


def label_ends(axes: Axes, labels: Sequence[tuple[float, str, str]], size: float = 8.5) -> None:
    """Write (height, text, colour) just right of the panel, at that height or as near as the others allow; set the limits first."""
    height = axes.get_position().height * axes.figure.get_figheight()
    low, high = axes.get_ylim()
    line = size * 1.25 / 72 / height * (high - low)
    places = spread([label[0] for label in labels], [line * (1 + label[1].count("\n")) for label in labels])
    for (_, text, colour), y in zip(labels, places, strict=True):
        axes.annotate(
            text,
            (1, y),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=size,
            annotation_clip=False,
        )
