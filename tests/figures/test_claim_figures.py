"""The figures of all claims and of the noise behind them: right numbers, nothing cut or over anything else, the same bytes again."""

import math
from itertools import combinations
from pathlib import Path

import pandas as pd
import pytest

from detrdistill.figures import style
from detrdistill.figures.forest import forest
from detrdistill.figures.residuals import residuals
from detrdistill.recipes.claims import CHANGES, INSIDE

NAN, LONG = math.nan, "Positives and negatives, stage by stage over Positives and negatives, last stage"


def weighed() -> pd.DataFrame:
    lines = [
        ("It helps", "Deformable DETR", "DETRDistill over Student", "AP", 4.6, 2.5, 2.5, 2.0, "holds"),
        ("It helps", "Conditional DETR", "DETRDistill over Student", "AP", -8.8, 6.3, 8.0, 2.0, "against"),
        ("It helps", "AdaMixer", "DETRDistill over Student", "AP", NAN, NAN, NAN, 2.0, "not run"),
        ("Every stage helps", "AdaMixer", LONG, "AP", 2.0, 400.0, 500.0, 2.0, "undecided (over 99 seeds)"),
        ("It is faster", "AdaMixer", "DETRDistill over Student", "AP halfway", 1.0, NAN, NAN, 2.0, "one seed"),
        ("It is steadier", "AdaMixer", "Student over DETRDistill", CHANGES, 0.8, 0.3, 0.3, NAN, "holds"),
        ("It looks at objects", "AdaMixer", "queries over area", INSIDE, 31.0, 1.0, 1.0, 5.0, "holds"),
    ]
    columns = ["claim", "detector", "part", "measure", "difference", "half", "adjusted_half", "margin", "status"]
    frame = pd.DataFrame(lines, columns=columns)
    return frame.assign(verdict=[status.partition(" (over")[0] for status in frame["status"]])


def runs() -> pd.DataFrame:
    lines = [("a", "DETRDistill", "Main results", 0.5), ("a", "DETRDistill", "Main results", -0.5), ("b", "DETRDistill", "Self", 3.0)]
    lines += [("b", "DETRDistill", "Self", -3.0), ("c", "FGD", "Main results", 1.0), ("c", "FGD", "Main results", -1.0)]
    frame = pd.DataFrame(lines, columns=["treatment", "title", "table", "residual"])
    return frame.assign(stands_out=frame["treatment"] == "b")


def test_the_forest_draws_means_and_both_intervals() -> None:
    ap, changes, inside = forest(weighed(), "A note.").axes
    assert [axes.get_xlabel() for axes in (ap, changes, inside)] == [
        f"difference in {unit}" for unit in ("AP points", "changes an image", "points of weight")
    ]
    assert [patch.get_x() for patch in inside.patches] == [-5.0], "each measure has a margin of its own"
    means = [(line.get_xdata()[0], line.get_color()) for line in ap.lines if line.get_marker() == "o"]
    assert means == [(4.6, style.BLUE), (-8.8, style.RED), (2.0, style.FAINT), (1.0, style.FAINT)]
    ends = [tuple(line.get_xdata()) for line in ap.lines if len(line.get_xdata()) == 2 and line.get_marker() == "None"]
    assert (4.6 - 2.5, 4.6 + 2.5) in ends and (-8.8 - 8.0, -8.8 + 8.0) in ends and (-8.8 - 6.3, -8.8 + 6.3) in ends
    low, high = ap.get_xlim()
    assert high - low < 110 and sorted(line.get_marker() for line in ap.lines if line.get_marker() in "<>") == ["<", ">"], "arrows"
    assert [patch.get_x() for patch in ap.patches] == [-2.0] and not changes.patches, "a margin where there is one"
    words = [text.get_text() for text in ap.texts]
    assert "over Positives and negatives, last stage" in words and "not run" in words and words.count("It helps") == 1


def test_nothing_of_the_forest_overlaps_and_nothing_is_cut() -> None:
    figure = forest(weighed(), "A long note. " * 30)
    with style.paper():
        figure.draw_without_rendering()
    texts = [text for axes in figure.axes for text in axes.texts] + list(figure.texts)
    boxes = [text.get_window_extent() for text in texts]
    for text, box in zip(texts, boxes, strict=True):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text
    for (one, first), (other, second) in combinations(zip(texts, boxes, strict=True), 2):
        assert not first.padded(-1).overlaps(second.padded(-1)), (one, other)


def test_residuals_stand_beside_their_row() -> None:
    (axes,) = residuals({"AdaMixer": runs(), "Deformable DETR": runs().iloc[:0]}, "A note.").axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["DETRDistill (main results)", "FGD", "DETRDistill (self)"], "in the order of their spread, each name once"
    drawn = sorted(map(tuple, axes.collections[0].get_offsets().tolist()))
    assert drawn == [(-3.0, 2.0), (-1.0, 1.0), (-0.5, 0.0), (0.5, 0.0), (1.0, 1.0), (3.0, 2.0)]


@pytest.mark.parametrize("make", [lambda: forest(weighed(), "A note."), lambda: residuals({"AdaMixer": runs()}, "A note.")])
def test_equal_data_gives_equal_bytes(make, tmp_path: Path) -> None:
    first, second = ([path.read_bytes() for path in style.save(make(), tmp_path / name)] for name in "ab")
    assert first == second


def test_a_column_of_a_paper_says_once_what_was_not_run() -> None:
    with style.drawn_as(style.Look(3.3)):
        ap, *_ = forest(weighed(), "A note.").axes
    words = [text.get_text() for text in ap.texts]
    assert words.count("AdaMixer") == 3 and words.count("DETRDistill over Student") == 3 and words.count("not run") == 1
    assert "undecided" in words and not [word for word in words if "99" in word], "no room for the number of seeds"
