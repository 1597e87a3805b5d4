"""How all figures look, and how they are saved: at the width and in the font of a paper, one colour a setting, same bytes for same data."""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import PlaceHolderLayoutEngine
from matplotlib.textpath import text_to_path

from detrdistill.errors import InputError
from detrdistill.figures.png import shrunk
from detrdistill.files import atomic

COLUMNS = {"one-column": 3.3, "two-column": 7.0}  # inches: of a paper of two columns
WIDTHS, SIZES = (3.0, 14.0), (6.0, 12.0)  # inches and points that layouts are made for
# All come with matplotlib, so they are the same everywhere; the last of each is for programs that open an SVG without having them.
FONTS = {"sans": ["DejaVu Sans", "sans-serif"], "serif": ["STIXGeneral", "DejaVu Serif", "serif"]}
LEAST = 6.0  # points: no text is smaller
LEAST_ROOM = 3.0  # what `room` must be at least

# seaborn's colour-blind palette, spelled out because importing seaborn takes longer than the rest of a report.
BLUE, AMBER, GREEN, RED, PINK, BROWN, ROSE, GREY, YELLOW, SKY = (
    "#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#fbafe4", "#949494", "#ece133", "#56b4e9"
)  # fmt: skip
COLOURS = {"student": BLUE, "detrdistill": RED, "teacher": GREEN, "ground truth": "#222222"}
VIOLET = "#7a5195"
OTHERS = (VIOLET, "#8a5a2b", "#b0478f")  # for settings without a colour of their own, in order
TEXT, FAINT = "#222222", "#6f6f6f"

STYLE = {
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
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "detrdistill",
}


@dataclass(frozen=True)
class Look:
    """How wide figures are, and how their text is set. A paper includes them unscaled, so that text has the stated size.

    Attributes:
        width: inches.
        font: "sans" or "serif".
        size: points of the axes' labels; all other text is in proportion to it, and none is smaller than `LEAST`.

    Raises:
        InputError: a width, font or size that figures cannot be drawn in, or text too large for the width.
    """

    width: float = 7.2
    font: str = "sans"
    size: float = 8.5

    def __post_init__(self) -> None:
        if not WIDTHS[0] <= self.width <= WIDTHS[1]:
            raise InputError(f"width {self.width:g} of figures: must be from {WIDTHS[0]:g} to {WIDTHS[1]:g} inches")
        if self.font not in FONTS:
            raise InputError(f"font '{self.font}' of figures is unknown; known: {', '.join(FONTS)}")
        if not SIZES[0] <= self.size <= SIZES[1]:
            raise InputError(f"size {self.size:g} of figures' text: must be from {SIZES[0]:g} to {SIZES[1]:g} points")
        if self.size > (most := self.width / LEAST_ROOM * Look.size) + 1e-9:
            raise InputError(
                f"size {self.size:g} of figures' text: too large for {self.width:g} inches, where at most {most:.1f} points fit"
            )


_look = ContextVar("look", default=Look())  # noqa: B039 (Look is frozen)


def read_width(text: str) -> float:
    """Inches, of a number or a word of `COLUMNS`.

    Raises:
        InputError: neither.
    """
    try:
        return COLUMNS[text] if text in COLUMNS else float(text)
    except ValueError:
        raise InputError(f"width '{text}' of figures: give inches, such as 3.3, or one of {', '.join(COLUMNS)}") from None


@contextmanager
def drawn_as(look: Look) -> Iterator[None]:
    """Whatever figure is drawn inside has this look."""
    token = _look.set(look)
    try:
        yield
    finally:
        _look.reset(token)


def width() -> float:
    """Of a figure, in inches."""
    return _look.get().width


def scale() -> float:
    """Of text, and of lengths that go with it: 1 as figures are drawn for the screen."""
    return _look.get().size / Look.size


def points(size: float) -> float:
    """The size of a text that has `size` points on the screen."""
    return max(size * scale(), min(size, LEAST))


def leading() -> float:
    """Height of a line, in lines of the font of the screen."""
    return 1.17 if _look.get().font == "serif" else 1.0


def room() -> float:
    """Width of a figure in lengths that go with its text: inches, where text is as large as on the screen."""
    return width() / scale()


def narrow() -> bool:
    """Whether a figure has but one of a paper's columns."""
    return room() < 5


class Picture(Figure):
    """A figure that a notebook shows when it is a cell's value. pyplot is not involved, so nothing is shown twice or kept open."""

    def __init__(self, *args: Any, layout: Any = None, **kwargs: Any) -> None:
        # Saving a figure sets its layout engine again, and where there is none, the style's: what was laid out by hand would be laid
        # out anew at the second saving. This one does nothing and stays.
        super().__init__(*args, layout=PlaceHolderLayoutEngine(True, True) if layout == "none" else layout, **kwargs)
        self.look = _look.get()

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        with drawn_as(self.look), paper():
            self.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
        return shrunk(buffer.getvalue())


@contextmanager
def paper() -> Iterator[None]:
    """Draw in the house style and the look of `drawn_as`, whatever the user's own matplotlib settings are."""
    with matplotlib.rc_context():
        matplotlib.rcParams.update({key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"})
        matplotlib.rcParams.update(STYLE | {key: points(value) for key, value in STYLE.items() if key.endswith("size")})
        matplotlib.rcParams["font.family"] = FONTS[_look.get().font]
        yield


def ink(colour: str) -> str:
    """The colour, or as dark a shade of it as text needs on white: a contrast of 4.5, as of WCAG."""
    rgb = np.array(to_rgb(colour))

    def contrast(dark):
        linear = np.where(dark <= 0.04045, dark / 12.92, ((dark + 0.055) / 1.055) ** 2.4)
        return 1.05 / (float(linear @ [0.2126, 0.7152, 0.0722]) + 0.05)

    return to_hex(next(rgb * part for part in np.linspace(1, 0, 101) if contrast(rgb * part) >= 4.5))


def colours(settings: Sequence[str]) -> dict[str, str]:
    """A colour for each setting, known by its name or its title; the others take theirs in order."""
    known = {name: colour for name, colour in COLOURS.items()} | {"Student": BLUE, "DETRDistill": RED, "Teacher": GREEN}
    others = [setting for setting in settings if setting not in known]
    return {**{name: known[name] for name in settings if name in known}, **dict(zip(others, cycle(OTHERS), strict=False))}


# What each format would write of the day and the program, so that equal figures were not equal files.
FORMATS = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    "svg": {"Date": None, "Creator": None},
}
USUAL = ("png", "pdf")


def check_formats(formats: Sequence[str]) -> None:
    """Raise InputError where figures cannot be written in a format."""
    if unknown := [name for name in formats if name not in FORMATS]:
        raise InputError(f"format '{unknown[0]}' of figures is unknown; known: {', '.join(FORMATS)}")


def save(figure: Figure, stem: Path | str, formats: Sequence[str] = USUAL) -> list[Path]:
    """Write `<stem>.png` (200 dpi), `<stem>.pdf` and `<stem>.svg` (vector), or some of them; equal figures are equal files.

    A PNG of a chart has a palette, which makes it less than half as large.

    Raises:
        InputError: an unknown format.
    """
    check_formats(formats)
    paths = []
    for suffix in formats:
        paths.append(Path(f"{stem}.{suffix}"))
        with drawn_as(figure.look if isinstance(figure, Picture) else Look()), paper(), atomic(paths[-1]) as temporary:
            figure.savefig(temporary, format=suffix, dpi=200, metadata=FORMATS[suffix])
            if suffix == "png":
                temporary.write_bytes(shrunk(temporary.read_bytes()))
    return paths


def note(figure: Figure, text: str) -> None:
    """Where the figure comes from, small, below everything."""
    if text:
        lines = "\n".join(wrapped(text, figure.get_figwidth()))
        figure.supxlabel(lines, x=0.01, ha="left", fontsize=points(6.5), color=FAINT)


def wrapped(text: str, width: float) -> list[str]:
    """A note's lines in a picture of that many inches."""
    letters = int(20 * width * 6.5 / points(6.5))
    return [part for line in text.split("\n") for part in textwrap.wrap(line, letters)]


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Width of a line of text, as `room` counts, a little generously, since a screen rounds letters to pixels."""
    font = FontProperties(size=points(size), weight=weight)
    return 1.03 * text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / 72 / scale()


def wrap(text: str, width: float, size: float, weight: str = "normal") -> list[str]:
    """As few lines as possible of at most that width; words are broken only if they do not fit alone."""
    for letters in range(len(text), 0, -1):
        lines = textwrap.wrap(text, letters)
        if all(text_width(line, size, weight) <= width for line in lines):
            return lines
    return []


def even(text: str, width: float, size: float, weight: str = "normal") -> list[str]:
    """As few lines as possible, of about equal length: no last word alone."""
    lines = wrap(text, width, size, weight)
    for letters in range(1, len(text)):
        evened = textwrap.wrap(text, letters, break_long_words=False)
        if len(evened) == len(lines) and all(text_width(line, size, weight) <= width for line in evened):
            return evened
    return lines


def cut(text: str, width: float, size: float) -> str:
    """As much of a text as fits into that width, with an ellipsis where some is left out."""
    if text_width(text, size) <= width:
        return text
    cuts = (text[:n].rstrip() + "\N{HORIZONTAL ELLIPSIS}" for n in range(len(text), 0, -1))
    return next((one for one in cuts if text_width(one, size) <= width), "\N{HORIZONTAL ELLIPSIS}")


def not_run(axes: Axes, text: str = "not run") -> None:
    """An empty panel that says why it is empty."""
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=FAINT, fontsize=points(10))


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
    """Write (height, text, colour) just right of the panel, at that height or as near as the others allow.

    Set the limits first, and whatever stands above or below: how tall the panel is decides how far labels are apart.
    """
    look = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": points(size), "annotation_clip": False}
    where = ("axes fraction", "data")
    texts = [axes.annotate(text, (1, y), xycoords=where, color=ink(colour), **look) for y, text, colour in labels]
    figure, (low, high) = axes.figure, axes.get_ylim()
    for _ in range(2):  # labels make room for themselves, and the panel smaller
        figure.get_layout_engine().execute(figure)
        inch = (high - low) / (axes.get_position().height * figure.get_figheight())
        tall = [1.03 * text.get_window_extent().height / figure.dpi * inch for text in texts]
        for text, y in zip(texts, spread([label[0] for label in labels], tall), strict=True):
            text.xy = (1, y)
