"""The figure of a table: right numbers in the right rows, nothing over anything else, and missing runs said to be missing."""

import math
import re
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from detrdistill.figures import style
from detrdistill.figures.comparison import comparison
from detrdistill.statistics import mean_and_half

NAN = math.nan
DIGITS = "embedded digits, 96 px; not a COCO result"
NOTE = f"Measured on {DIGITS}; data da661eb1; commits 42a99c10, 5f245f36; 3 seeds."
MAIN = {"fitnet": "FitNet", "mgd": "MGD", "fgd": "FGD", "detrdistill": "DETRDistill"}
PARTS = {
    "a": "logits distillation, positive queries only", "b": "logits distillation, negative queries only", "c": "features",
    "d": "query-prior assignment", "e": "logits and features, the quality score replaced by a constant one", "f": "all $x_1$ <b>parts</b>",
    "detrdistill": "A_setting_without_any_blank_in_it_where_a_line_could_be_broken",
}  # fmt: skip

Row = tuple[str, str, str, str, float, float]  # detector, setting, title, baseline, AP, published gain


def main_rows() -> list[Row]:
    rows: list[Row] = []
    for at, detector in ((30, "AdaMixer"), (8, "Conditional DETR"), (24, "Deformable DETR")):
        rows += [(detector, "teacher", "Teacher", "", at + 30, NAN), (detector, "student", "Student", "", at, NAN)]
        rows += [
            (detector, name, title, "student", at + i, NAN if name == "fgd" else i / 2) for i, (name, title) in enumerate(MAIN.items())
        ]
    return rows


def part_rows(published: bool = True) -> list[Row]:
    rows: list[Row] = [("AdaMixer", "plain", "no distillation", "", 24, NAN)]
    return rows + [("AdaMixer", name, title, "plain", 23 + i, i / 5 if published else NAN) for i, (name, title) in enumerate(PARTS.items())]


def both(rows: list[Row], seeds: int = 3, missing: tuple[str, ...] = (), where: str = DIGITS) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A frame and its summary, with seeds that differ by about 1 AP."""
    noise, runs, lines = np.random.default_rng(0), {}, []
    for detector, setting, _, _, ap, _ in rows:
        values = ap + noise.standard_normal(1 if setting == "teacher" else seeds)
        runs[detector, setting] = pd.Series(values * NAN if setting in missing else values)
    for detector, setting, title, baseline, _, published in rows:
        values = runs[detector, setting]
        gain = mean_and_half(values - runs[detector, baseline]) if baseline else (NAN, NAN)
        line = {"detector": detector, "setting": setting, "title": title, "baseline": baseline, "published": title}
        line |= {"family": setting.split(" ")[0]}
        line |= dict(zip(("AP", "AP_half", "gain", "gain_half"), (*mean_and_half(values), *gain), strict=True))
        line |= {"published_AP": NAN, "published_gain": published, "seeds": int(values.notna().sum()), "seeds_wanted": len(values)}
        lines.append(line | {"status": "not run" if values.isna().all() else "measured", "measured_on": where})
    frame = [
        {"detector": detector, "setting": setting, "seed": seed, "AP": value, "status": "not run" if math.isnan(value) else "measured"}
        for (detector, setting), values in runs.items()
        for seed, value in values.items()
    ]
    return pd.DataFrame(frame), pd.DataFrame(lines)


LONG = [("Deformable DETR with 6 encoder and 3 decoder layers, boxes refined", *row[1:]) for row in part_rows()]
CASES = {
    "main": lambda: both(main_rows(), missing=("mgd",)),
    "parts": lambda: both(part_rows()),
    "one seed": lambda: both(part_rows(), seeds=1),
    "two seeds": lambda: both(main_rows(), seeds=2),
    "nothing run": lambda: both(main_rows(), missing=("teacher", "student", *MAIN)),
    "nothing published": lambda: both(part_rows(published=False)),
    "nothing at all": lambda: both(part_rows(published=False), missing=("plain", *PARTS)),
    "one row": lambda: both(main_rows()[:1]),
    "long": lambda: both(LONG, where="folder a-rather-long-name-of-a-folder-with-photos, shorter side 480 px; not a COCO result"),
}


def written(figure: Figure) -> list[list[str]]:
    """Words of each row from its count of seeds to the right."""
    texts = sorted(figure.axes[0].texts, key=lambda text: text.get_position()[0])
    counts = sorted(text.get_position()[::-1] for text in texts if re.fullmatch(r"\d/\d", text.get_text()))
    return [[text.get_text() for text in texts if text.get_position()[1] == y and text.get_position()[0] >= x] for y, x in counts]


def drawn(axes: Axes, label: str) -> list[tuple[float, ...]]:
    return [tuple(line.get_xdata()) for line in axes.lines if line.get_label() == label]


@pytest.mark.parametrize("dpi", [130, 200])  # in a notebook, in a file
@pytest.mark.parametrize("case", CASES)
def test_nothing_overlaps_and_nothing_is_cut(case: str, dpi: int) -> None:
    figure = comparison(*CASES[case](), NOTE)
    figure.set_dpi(dpi)
    with style.paper():
        figure.draw_without_rendering()
    page = figure.bbox
    texts = list(figure.axes[0].texts)
    for axes in [axes for axes in figure.axes[1:] if axes.axison]:
        low, high = axes.get_xlim()
        texts += [axes.xaxis.label, *(text for text in axes.get_xticklabels() if low <= text.get_position()[0] <= high)]
    boxes = {text: text.get_window_extent() for text in texts}
    for text, box in boxes.items():
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, text
    for one, other in combinations(boxes, 2):
        assert not boxes[one].padded(-1).overlaps(boxes[other].padded(-1)), (one, other)
    marks = [line for axes in figure.axes[1:] for line in axes.lines if line.get_label() in ("mean", "seeds", "interval", "published")]
    for line in marks:
        box = line.get_window_extent()
        assert not [text for text in boxes if boxes[text].padded(-1).overlaps(box) and len(line.get_xdata())], line


@pytest.mark.parametrize("case", ["main", "one seed", "nothing at all"])
def test_equal_data_gives_equal_bytes(case: str, tmp_path: Path) -> None:
    first = [path.read_bytes() for path in style.save(comparison(*CASES[case](), NOTE), tmp_path / "a")]
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "figure.autolayout": True}):
        second = [path.read_bytes() for path in style.save(comparison(*CASES[case](), NOTE), tmp_path / "b")]
    assert first == second


def test_rows_are_grouped_in_the_tables_order() -> None:
    frame, summary = CASES["main"]()
    mixed = summary.iloc[[0, 6, 1, 7, *range(2, 6), *range(8, 18)]]
    for lines in (summary, mixed):
        figure = comparison(frame, lines)
        left = sorted((text.get_position()[::-1], text.get_text()) for text in figure.axes[0].texts if text.get_position()[0] < 0.5)
        titles = ["Teacher", "Student", *MAIN.values()]
        words = [text for _, text in left if text in titles or text in set(summary["detector"])]
        assert words == ["AdaMixer", *titles, "Conditional DETR", *titles, "Deformable DETR", *titles]
        assert [row[1] for row in written(figure)] == [row[1] for row in written(comparison(frame, summary))]


def test_numbers_and_marks_are_those_of_the_summary() -> None:
    frame, summary = CASES["main"]()
    figure = comparison(frame, summary)
    _, ap, gain, published = figure.axes
    assert drawn(ap, "mean") == [(value,) for value in summary["AP"].dropna()]
    assert drawn(gain, "mean") == [(value,) for value in summary["gain"].dropna()]
    assert drawn(published, "published") == [(value,) for value in summary["published_gain"].dropna()]
    assert sorted(value for values in drawn(ap, "seeds") for value in values) == sorted(frame["AP"].dropna())
    ours = summary.iloc[5]
    assert drawn(gain, "interval")[2] == (ours["gain"] - ours["gain_half"], ours["gain"] + ours["gain_half"])
    assert written(figure)[5] == [
        "3/3", f"{ours['AP']:.1f} ± {ours['AP_half']:.1f}", f"{ours['gain']:+.1f} ± {ours['gain_half']:.1f}", "+1.5",
    ]  # fmt: skip
    assert written(figure)[1][2:] == ["baseline", "-"]


def test_what_is_missing_is_said() -> None:
    rows = written(comparison(*CASES["main"]()))
    assert rows[3] == ["0/3", "not run", "not run", "+0.5"]
    assert rows[4][-1] == "not found"
    assert written(comparison(*both(main_rows()[:6], missing=("student",))))[5][2] == "baseline not run"
    nothing = comparison(*CASES["nothing run"]())
    assert all(words[1] == "not run" for words in written(nothing))
    assert [axes.axison for axes in nothing.axes[1:]] == [False, False, True]


def test_a_gain_of_seeds_that_do_not_meet_is_not_that_of_a_missing_baseline() -> None:
    frame, summary = CASES["parts"]()
    summary.loc[3, ["gain", "gain_half"]] = NAN
    assert written(comparison(frame, summary))[3][2] == "no seed in common"


def test_one_seed_is_said_to_be_one() -> None:
    figure = comparison(*CASES["one seed"](), NOTE)
    assert all(words[0] == "1/1" for words in written(figure))
    assert written(figure)[3][2].endswith(" (one seed)")
    assert not drawn(figure.axes[1], "interval") and not any("95 % interval" in text.get_text() for text in figure.axes[0].texts)


def test_ours_and_theirs_are_told_apart() -> None:
    figure = comparison(*CASES["main"](), NOTE)
    words = [text.get_text() for text in figure.axes[0].texts]
    assert f"measured here: {DIGITS}" in words and "published, COCO val2017" in words
    _, _, gain, published = figure.axes
    assert gain.get_xlim() != published.get_xlim()
    marks = [line for line in published.lines if line.get_label() == "published"]
    assert {line.get_markerfacecolor() for line in marks} == {"white"}
    colours = [line.get_color() for line in figure.axes[1].lines if line.get_label() == "mean"][:5]
    assert colours[:2] == [style.COLOURS["teacher"], style.COLOURS["student"]] and colours[4] == style.COLOURS["detrdistill"]
    assert colours[2] == colours[3] not in style.COLOURS.values()


def test_without_published_gains_a_line_says_so() -> None:
    figure = comparison(*CASES["nothing published"](), NOTE)
    assert len(figure.axes) == 3
    assert "published, COCO val2017: no gain found for any of these rows" in [text.get_text() for text in figure.axes[0].texts]


def test_wide_intervals_end_in_arrows_instead_of_squeezing_the_rest() -> None:
    frame, summary = CASES["parts"]()
    summary.loc[2, "gain_half"] = 400.0
    axes = comparison(frame, summary).axes[2]
    low, high = axes.get_xlim()
    assert high - low < 40
    assert sorted(line.get_marker() for line in axes.lines if line.get_marker() in ("<", ">")) == ["<", ">"]


def test_intervals_of_ap_end_where_ap_does() -> None:
    frame, summary = CASES["parts"]()
    summary.loc[1, ["AP", "AP_half"]] = 6.0, 120.0
    axes = comparison(frame, summary).axes[1]
    low, high = axes.get_xlim()
    assert -10 < low < 0 and high < 110
    assert sorted(line.get_marker() for line in axes.lines if line.get_marker() in ("<", ">")) == ["<", ">"]


def test_the_height_grows_with_the_rows_and_the_width_does_not() -> None:
    small, large = comparison(*CASES["one row"]()), comparison(*CASES["main"]())
    assert small.get_figwidth() == large.get_figwidth() == style.width()
    assert large.get_figheight() > small.get_figheight() + 17 * 0.2


def test_a_column_of_a_paper_keeps_the_numbers() -> None:
    frame, summary = both(main_rows(), missing=("mgd",))
    with style.drawn_as(style.Look(3.3)):
        figure = comparison(frame, summary, NOTE)
    sheet, gains = figure.axes
    words = [text.get_text() for text in sheet.texts]
    line = summary[(summary["setting"] == "fitnet") & (summary["detector"] == "AdaMixer")].iloc[0]
    assert f"{line['AP']:.1f}" in words and f"{line['gain']:+.1f} ± {line['gain_half']:.1f}".replace("-", "−") in words  # noqa: RUF001
    assert words.count("paper +0.5") == 3 and words.count("not run") == 6 and words.count("baseline") == 3
    assert len(drawn(gains, "mean")) == 9 and not drawn(gains, "published")
