"""Figures for a paper: those named, in their look, in a folder of their own; the report stays as it is."""

from pathlib import Path

import pytest

from detrdistill.commands import report
from detrdistill.errors import InputError
from detrdistill.figures.style import Look, drawn_as
from detrdistill.report.write import write_report
from detrdistill.runs.store import Store
from tests.report.test_tables import fill


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DETRDISTILL_RESULTS", str(tmp_path))
    fill(Store(tmp_path / "quick"))
    return tmp_path / "quick"


def files(folder: Path, ending: str = "*") -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob(ending) if path.is_file()}


def test_a_paper_gets_its_own_folder(results: Path, capsys: pytest.CaptureFixture) -> None:
    report("quick", tables=("main_results",))
    before = files(results)
    capsys.readouterr()
    report("quick", figures=("forest", "convergence"), width="one-column", font="serif", size=8, formats=("pdf", "svg"))
    after = files(results)
    assert {name: after[name] for name in before} == before, "the report stays as it is"
    new = after.keys() - before.keys()
    assert all(name.startswith("paper/") for name in new) and "paper/index.html" not in new and "paper/tables/main_results.tex" in new
    assert {name for name in new if "figures" in name} == {
        f"paper/figures/{name}.{suffix}" for name in ("forest", "convergence") for suffix in ("pdf", "svg")
    }
    assert b'width="237.6pt"' in after["paper/figures/convergence.svg"], "3.3 inches"
    assert sorted(capsys.readouterr().out.split()) == sorted(str(results / name) for name in new)


def test_any_folder_and_tables_named(results: Path, tmp_path: Path) -> None:
    report("quick", tables=("components",), out=tmp_path / "own", formats=("svg",))
    names = files(tmp_path / "own")
    assert "figures/components.svg" in names and not [name for name in names if "main_results" in name or name.endswith((".html", ".png"))]
    assert not (results / "tables").exists() and not (results / "paper").exists()


def test_the_look_alone_changes_a_figure(results: Path, tmp_path: Path) -> None:
    with drawn_as(Look(3.3, "serif", 8)):
        write_report("quick", [0], results, ["main_results"], formats=["svg"], figures=["figure1"], out=tmp_path / "a")
    write_report("quick", [0], results, ["main_results"], formats=["svg"], figures=["figure1"], out=tmp_path / "b")
    first, second = (files(tmp_path / name, "*.svg") for name in "ab")
    assert first.keys() == second.keys() == {"figures/figure1.svg"} and first != second


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"figures": ("forrest",)}, "figure 'forrest' is unknown; known: forest, residuals, main_results.* weights, figure1, convergence"),
        ({"width": "2"}, "width 2 of figures: must be from 3 to 14 inches"),
        ({"font": "times"}, "font 'times' of figures is unknown; known: sans, serif"),
        ({"formats": ("jpg",)}, "format 'jpg' of figures is unknown; known: png, pdf, svg"),
    ],
)
def test_a_slip_is_named_and_nothing_is_written(wishes: dict, message: str, results: Path) -> None:
    before = files(results)
    with pytest.raises(InputError, match=message):
        report("quick", **wishes)
    assert files(results) == before


def test_a_figure_of_nothing_is_said(results: Path) -> None:
    with pytest.raises(InputError, match="figure 'weights' has nothing to show: no run that it needs is stored"):
        report("quick", tables=("main_results",), figures=("weights", "forest"), formats=("pdf",))
    assert (results / "paper" / "figures" / "forest.pdf").exists()
