"""Benchmarks work: each runs here in its smallest sizes, whose numbers mean nothing."""

import csv
import json
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from benchmarks import benchmarks, coverage, detectors, distillation, export, gpu_days, growth, loader, pulls, since, teacher_outputs
from detrdistill.distill.build import build_distiller
from detrdistill.recipes.presets import get_preset
from detrdistill.recipes.words import ADAMIXER
from detrdistill.runs.run import run
from detrdistill.runs.store import Store
from tests.models.small import untyped

ROWS = {
    benchmarks: {"matching / textbook matcher, 2 images, 2 stages, 20 queries", "reference: gain of DETRDistill, three seeds"},
    detectors: {"deformable_detr", "conditional_detr", "adamixer"},
    distillation: {"random student", "deformable_detr", "conditional_detr", "adamixer"},
    teacher_outputs: {"deformable_detr", "conditional_detr", "adamixer"},
    coverage: {"Deformable DETR"},
    gpu_days: {"conditional_detr"},
    growth: {"deformable_detr", "conditional_detr", "adamixer"},
    export: {"deformable_detr", "conditional_detr", "adamixer"},
    loader: {"pil", "tensor"},
    pulls: {"fitnet", "fkd", "features", "detrdistill"},
    since: {"deformable_detr"},
}


@pytest.mark.parametrize(("benchmark", "rows"), ROWS.items(), ids=[module.__name__ for module in ROWS])
@pytest.mark.filterwarnings("default")  # of libraries: a benchmark is not stopped by them either
def test_a_benchmark_works(tmp_path: Path, capsys: pytest.CaptureFixture, benchmark: ModuleType, rows: set[str]) -> None:
    with untyped() if benchmark is export else nullcontext():
        benchmark.main(["--small", "--out", str(tmp_path), *(["HEAD"] if benchmark is since else [])])
    (path,) = tmp_path.iterdir()
    about, *table = path.read_text(encoding="utf-8").splitlines()
    found = list(csv.DictReader(table))
    assert about.startswith("# commit ") and rows <= {next(iter(row.values())) for row in found}
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(found), "every row is told when it is known"


@pytest.mark.parametrize("method", distillation.KNOWN)
def test_a_method_s_floor_decodes_what_the_method_does(method: str) -> None:
    taught_by, recipe = distillation.recipes("deformable_detr", distillation.SCALES["small"])
    whole = build_distiller(distillation.build(recipe, "cpu"), recipe.replace(methods=(distillation.KNOWN[method],), teacher=taught_by))
    floor = distillation.groups_of(whole)
    for names in ("with_student_queries", "with_teacher_queries"):
        assert [term.name for term in getattr(floor, names)] == [term.name for term in getattr(whole, names)]
    assert floor.attention == whole.attention and floor.student is whole.student


def test_pulls_are_measured_on_what_the_trainer_trains(tmp_path: Path) -> None:
    recipe, store = get_preset("smoke", ADAMIXER).recipe("fitnet"), Store(tmp_path)
    run(recipe, store, device="cpu", workers=0, progress=False)
    log = [json.loads(line) for line in (store.folder(recipe) / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = next(line for line in log if line["step"] == 2 and "loss" in line)
    ((step, part, ratio, _),) = pulls.pulls(recipe, store, 2)
    assert step == 2 and part == pytest.approx(trained["fitnet"] / trained["loss"], rel=1e-5) and ratio > 0


def test_without_the_history_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        since.main(["--small", "--out", str(tmp_path), "0" * 40])
    assert ended.value.code == 2 and not list(tmp_path.iterdir())
    out, error = capsys.readouterr()
    assert not out and error.startswith("error: commit 000") and len(error.splitlines()) == 1


def test_without_its_photographs_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """And ends well, so that what `make benchmark` measures after it is measured."""
    monkeypatch.chdir(tmp_path)
    for words in ([], ["--quick"]):
        teacher_outputs.main([*words, "--out", "out"])
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith("not measured: data folder data/bccd: does not exist; expected there: ")
    assert not list(tmp_path.iterdir())


def test_a_fresh_clone_gets_nothing_of_the_benchmark_s_own_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list, env: dict[str, str], **_: object) -> SimpleNamespace:
        calls.append(([str(word) for word in command], env))
        return SimpleNamespace(returncode=len(calls) > 2, stderr="no route to host")

    monkeypatch.setattr(benchmarks.subprocess, "run", run)
    for name in ("PYTHONPATH", "MAKEFLAGS", "OMP_NUM_THREADS", "DETRDISTILL_RESULTS"):
        monkeypatch.setenv(name, "ours")
    row = benchmarks.fresh_clone(tmp_path)
    (cloned, _), (made, environment) = calls
    assert (
        cloned[:2] == ["git", "clone"] and made[:3] == ["make", "--directory", cloned[-1]] and {"CORES=2", "ARGS=", "SEEDS=0"} <= set(made)
    )
    assert "ours" not in environment.values() and environment["DETRDISTILL_DATA"].startswith(str(tmp_path)) and "PATH" in environment
    assert row["what"].startswith("make reproduce from a fresh clone") and row["unit"] == "s"
    with pytest.raises(RuntimeError, match=r"git clone .*no route to host"):
        benchmarks.fresh_clone(tmp_path)
