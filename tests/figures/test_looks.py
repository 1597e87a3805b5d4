"""Figures for a paper: whatever width and font they are drawn in, text has its size, and nothing is cut or lies on anything else."""

from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text

from detrdistill.analysis.where_to_look import REGIONS
from detrdistill.distill.stages import pair_stages
from detrdistill.errors import InputError
from detrdistill.figures import style
from detrdistill.figures.attention import active_regions
from detrdistill.figures.comparison import comparison
from detrdistill.figures.convergence import convergence
from detrdistill.figures.detections import compare
from detrdistill.figures.forest import forest
from detrdistill.figures.residuals import residuals
from detrdistill.figures.stage_pairs import stage_pairs
from detrdistill.figures.style import Look, drawn_as, save
from detrdistill.figures.weights import weight_trials
from tests.figures import test_claim_figures as claims
from tests.figures import test_comparison as tables
from tests.figures import test_figures as runs
from tests.figures import test_inside as inside

NOTE = "Measured on embedded digits, 96 px; not a COCO result; data da661eb1; commits 42a99c10, 5f245f36; 3 seeds."
MANY = ("teacher", "student", "detrdistill", "Positives and negatives, stage by stage", "fgd", "mgd", "fitnet", "kd_detr")
CURVES = {name: [runs.curve(5 + i, 15 + i, *[60] * (not i)), runs.curve(6 + i, 16 + 2 * i, *[61] * (not i))] for i, name in enumerate(MANY)}


def trials() -> pd.DataFrame:
    lines = [
        (f"row {i // 9}", f"Positives and negatives, stage by stage {i // 9}", 10.0 ** (i % 9 - 4), 20.0 + i, i % 9 == 3) for i in range(45)
    ]
    frame = pd.DataFrame(lines, columns=["row", "title", "multiplier", "AP_100", "chosen"])
    return frame.assign(detector="AdaMixer", AP_plain=25.0, AP_101=frame["AP_100"].where(frame["chosen"]) + 2)


FIGURES = {
    **{f"runs: {name}": make for name, make in runs.FIGURES.items()},
    **{f"inside: {name}": make for name, make in inside.FIGURES.items()},
    "inside: regions": lambda: active_regions(
        [inside.image()] * 2, [inside.truth()] * 2, *({title: [one] * 2 for title in REGIONS.values()} for one in (np.eye(4), 0.5)), NOTE
    ),
    # Two objects a column: more labels than that cover each other on so small a picture.
    "runs: detections": lambda: compare([runs.image()], {"ground truth": [runs.truth()], "student": [runs.found().above(0.7)]}, NOTE),
    "table: main": lambda: comparison(*tables.CASES["main"](), NOTE),
    "table: one seed": lambda: comparison(*tables.CASES["one seed"](), NOTE),
    "forest": lambda: forest(claims.weighed(), NOTE),
    "residuals": lambda: residuals({"AdaMixer": claims.runs()}, NOTE),
    "many curves": lambda: convergence(CURVES, NOTE),
    "few curves": lambda: convergence({name: CURVES[name] for name in MANY[:4]} | {"mgd": []}, NOTE),
    "weights": lambda: weight_trials(trials(), NOTE),
    "stage pairs": lambda: stage_pairs(
        {name: pair_stages(3, 6, name) for name in ("grouped", "last_only", "last_to_all", "uniform")}, 3, 6
    ),
}
LOOKS = {"report": Look(), "column": Look(3.3, "serif", 8), "narrowest": Look(3.0, "sans", 8.5), "page": Look(7.0, "serif", 9)}


def words(figure: Figure) -> list[Text]:
    """Every text that is seen: of ticks those within the axis alone."""
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    for axes in figure.axes:
        for axis, (low, high), at in ((axes.xaxis, sorted(axes.get_xlim()), 0), (axes.yaxis, sorted(axes.get_ylim()), 1)):
            ticks = [tick for which in ("major", "minor") for tick in axis.get_ticklabels(which=which)]
            shown = axes.get_visible() and axes.axison
            seen = {id(tick) for tick in ticks if shown and low - 1e-9 <= tick.get_position()[at] <= high + 1e-9}
            hidden = {id(text) for text in axis.findobj(Text) if id(text) not in seen and text is not axis.label}
            found = [text for text in found if id(text) not in hidden]
        if not axes.get_visible():
            gone = {id(text) for text in axes.findobj(Text)}
            found = [text for text in found if id(text) not in gone]
    return found


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_cut_too_small_or_over_other_text(name: str, look: str) -> None:
    with drawn_as(LOOKS[look]):
        figure = FIGURES[name]()
        figure.set_dpi(200)
        with style.paper():
            figure.draw_without_rendering()
            texts = words(figure)
            boxes = [text.get_window_extent() for text in texts]
    assert figure.get_figwidth() == LOOKS[look].width and len(texts) > 2
    assert {text.get_fontfamily()[0] for text in texts} == {style.FONTS[LOOKS[look].font][0]}
    page = figure.bbox.padded(1)
    for text, box in zip(texts, boxes, strict=True):
        assert text.get_fontsize() >= style.LEAST, text
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, (text, box, page)
    for (one, first), (other, second) in combinations(zip(texts, boxes, strict=True), 2):
        assert not first.padded(-2).overlaps(second.padded(-2)), (one, other)


def test_defaults_are_those_of_the_report() -> None:
    with drawn_as(Look()):
        assert (style.width(), style.scale(), style.points(6.5), style.narrow()) == (7.2, 1, 6.5, False)
    assert not {"svg"} & set(style.USUAL)


@pytest.mark.parametrize("font", style.FONTS)
def test_fonts_come_with_matplotlib(font: str) -> None:
    assert Path(font_manager.findfont(style.FONTS[font][0], fallback_to_default=False)).is_relative_to(matplotlib.get_data_path())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Look(2.0), "width 2 of figures: must be from 3 to 14 inches"),
        (lambda: Look(float("nan")), "width nan of figures: must be from"),
        (lambda: Look(font="comic"), "font 'comic' of figures is unknown; known: sans, serif"),
        (lambda: Look(size=30), "size 30 of figures' text: must be from 6 to 12 points"),
        (lambda: Look(3.3, size=11), "size 11 of figures' text: too large for 3.3 inches, where at most 9.3 points fit"),
        (lambda: style.read_width("wide"), "width 'wide' of figures: give inches, such as 3.3, or one of one-column, two-column"),
    ],
)
def test_what_cannot_be_drawn_is_refused(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_width_in_words() -> None:
    assert [style.read_width(text) for text in ("one-column", "two-column", "3.25")] == [3.3, 7.0, 3.25]


def test_a_figure_keeps_its_look_and_text_stays_text(tmp_path: Path) -> None:
    """Saved later, by a user with other settings, in every format; equal data gives equal files."""
    with drawn_as(LOOKS["column"]):
        figures = [FIGURES["few curves"]() for _ in range(2)]
    with matplotlib.rc_context({"font.family": "monospace", "svg.fonttype": "path", "svg.hashsalt": None}):
        first, second = (save(figure, tmp_path / name, tuple(style.FORMATS)) for figure, name in zip(figures, "ab", strict=True))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    png, pdf, svg = (path.read_bytes() for path in first)
    assert int.from_bytes(png[16:20], "big") == round(3.3 * 200)
    assert b"STIXGeneral" in pdf and b"DejaVuSans" not in pdf and b"/Subtype /Type3" not in pdf
    assert b">optimizer steps</text>" in svg and b"STIXGeneral" in svg and b"<dc:date>" not in svg and b"monospace" not in svg


@pytest.mark.parametrize("colour", [*style.COLOURS.values(), *style.OTHERS, style.GREY, style.AMBER])
def test_labels_are_dark_enough_to_be_read(colour: str) -> None:
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in matplotlib.colors.to_rgb(style.ink(colour))]
    assert 1.05 / (np.dot(linear, [0.2126, 0.7152, 0.0722]) + 0.05) >= 4.4
    if colour in style.OTHERS:
        assert style.ink(colour) == colour
