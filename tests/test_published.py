"""The paper's numbers as data: complete, and consistent wherever two of its tables state the same thing."""

import math

import pandas as pd
import pytest

from detrdistill import published as module
from detrdistill.errors import InputError
from detrdistill.published import COLUMNS, VALUES, published, published_value

FILES = sorted(path.stem for path in VALUES.glob("*.csv"))
DETECTORS = ("AdaMixer", "Deformable DETR", "Conditional DETR")
SIZES = ("AP", "AP_S", "AP_M", "AP_L")


def test_every_table_and_figure_with_numbers_has_a_file() -> None:
    assert set(FILES) >= {f"table{i}" for i in range(1, 11)} | {"figure1", "figure7", "readme"}


@pytest.mark.parametrize("name", FILES)
def test_rows_are_complete_and_unique(name: str) -> None:
    frame = published(name)
    assert list(frame.columns) == COLUMNS
    assert set(frame["table"]) == {name}
    assert not frame.duplicated(["row", "column"]).any()
    gaps = frame["value"].isna()
    assert (gaps == (frame["source"] == "not found")).all()
    assert (gaps == (frame["confidence"] == "none")).all()
    assert set(frame["confidence"]) <= {"high", "medium", "low", "none"}
    assert set(frame.loc[~gaps, "unit"]) <= {"percent", "AP points", "epochs", "queries"}


@pytest.mark.parametrize("name", ["table2", "table5", "table8", "table9", "figure7"])
def test_gaps_are_visible(name: str) -> None:
    frame = published(name)
    assert len(frame) == 1 and frame["value"].isna().all()


def student_of(row: str, table: str) -> str:
    """Name of the row that the gain of `row` is over."""
    if table == "table1":
        return "AdaMixer / Baseline w/o KD"
    if table == "table7":
        return "AdaMixer / no KD"
    detector, _, *rest = row.split(" / ")
    return " / ".join([detector, "Student", *rest])


def test_every_printed_gain_is_the_difference_to_its_student() -> None:
    checked = 0
    for name in ("table1", "table3", "table4", "table7", "table10"):
        frame = published(name)
        for line in frame[frame["column"].str.startswith("gain")].itertuples():
            column = line.column.replace("gain", "AP", 1)
            difference = published_value(frame, line.row, column) - published_value(frame, student_of(line.row, name), column)
            assert difference == pytest.approx(line.value), (name, line.row)
            checked += 1
    assert checked == 15 + 12 + 4 + 5 + 6


def test_table_1_ends_as_table_3_has_it() -> None:
    first, main = published("table1"), published("table3")
    for method, setting in (("Baseline w/o KD", "Student"), ("FGD", "FGD"), ("MGD", "MGD"), ("FitNet", "FitNet")):
        assert published_value(first, f"AdaMixer / {method}", "AP 12 epochs") == published_value(main, f"AdaMixer / {setting}", "AP")


def test_table_7_starts_and_ends_as_table_3_has_it() -> None:
    parts, main = published("table7"), published("table3")
    for row, setting in (("no KD", "Student"), ("logits + features + assignment", "Ours")):
        for column in SIZES:
            assert published_value(parts, f"AdaMixer / {row}", column) == published_value(main, f"AdaMixer / {setting}", column)


@pytest.mark.parametrize("detector", DETECTORS)
def test_teachers_of_table_10_are_those_of_table_3(detector: str) -> None:
    for column in (*SIZES, "epochs", "queries"):
        wanted = published_value(published("table3"), f"{detector} / Teacher", column)
        assert published_value(published("table10"), f"{detector} / Teacher / R101", column) == wanted


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("setting", ["Student", "Ours", "Teacher"])
def test_figure_1_draws_table_3(detector: str, setting: str) -> None:
    row = f"{detector} / {setting}"
    assert published_value(published("figure1"), row, "AP") == published_value(published("table3"), row, "AP")


def test_released_readme_agrees_but_for_the_teacher() -> None:
    readme, main, light = published("readme"), published("table3"), published("table10")
    for setting in ("Student", "Ours"):
        row = f"Deformable DETR / {setting}"
        assert published_value(readme, f"{row} / R50", "AP") == published_value(main, row, "AP")
        row = f"{row} / R18"
        assert published_value(readme, row, "AP") == published_value(light, row, "AP")
    assert published_value(readme, "Deformable DETR / Teacher / R101", "AP") == 44.8
    assert published_value(main, "Deformable DETR / Teacher", "AP") == 45.5


def test_what_is_not_stated_is_nan() -> None:
    assert math.isnan(published_value(published("table3"), "AdaMixer / Student", "gain"))
    assert math.isnan(published_value(pd.DataFrame(columns=COLUMNS), "any", "AP"))


def test_unknown_table_and_missing_clone_are_explained(tmp_path, monkeypatch) -> None:
    with pytest.raises(InputError, match="'table11' is unknown; known: figure1"):
        published("table11")
    monkeypatch.setattr(module, "VALUES", tmp_path / "none")
    with pytest.raises(InputError, match="clone"):
        published("table3")
