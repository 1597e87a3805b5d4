"""Benchmarks work: each runs here in its smallest sizes, whose numbers mean nothing."""

import csv
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import benchmarks, coverage, detectors, distillation, gpu_days, since

ROWS = {
    benchmarks: {"matching / textbook matcher, 2 images, 2 stages, 20 queries", "reference: gain of DETRDistill, three seeds"},
    detectors: {"deformable_detr", "conditional_detr", "adamixer"},
    distillation: {"random student", "deformable_detr", "conditional_detr", "adamixer"},
    coverage: {"Deformable DETR"},
    gpu_days: {"conditional_detr"},
    since: {"deformable_detr"},
}


@pytest.mark.parametrize(("benchmark", "rows"), ROWS.items(), ids=[module.__name__ for module in ROWS])
@pytest.mark.filterwarnings("default")  # of libraries: a benchmark is not stopped by them either
def test_a_benchmark_works(tmp_path: Path, capsys: pytest.CaptureFixture, benchmark: ModuleType, rows: set[str]) -> None:
    benchmark.main(["--small", "--out", str(tmp_path), *(["HEAD"] if benchmark is since else [])])
    (path,) = tmp_path.iterdir()
    about, *table = path.read_text(encoding="utf-8").splitlines()
    found = list(csv.DictReader(table))
    assert about.startswith("# commit ") and rows <= {next(iter(row.values())) for row in found}
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(found), "every row is told when it is known"
