"""The benchmark of kept teacher outputs works, and says in one line that its data is missing."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "teacher_outputs.py"


def start(folder: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, *words, "--out", folder / "out"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, check=False, env=ENVIRONMENT)


ENVIRONMENT = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}


def test_it_works(tmp_path: Path) -> None:
    done = start(tmp_path, "--small")
    assert done.returncode == 0, done.stderr[-3000:]
    about, *table = (tmp_path / "out" / "teacher_outputs.csv").read_text(encoding="utf-8").splitlines()
    rows = list(csv.DictReader(table))
    assert about.startswith("# commit ") and "preset smoke" in about and len(done.stdout.splitlines()) == 1 + len(rows) == 16
    kinds = [row["step"] for row in rows if row["detector"] == "adamixer"]
    assert kinds == ["student", "student and decoding", "computed", "disk", "memory"]
    assert {row["of student and decoding"] for row in rows if row["step"] == "student and decoding"} == {"1.0"}


@pytest.mark.parametrize("words", [[], ["--quick"]])
def test_without_data_it_says_so(tmp_path: Path, words: list[str]) -> None:
    done = start(tmp_path, *words)
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert done.stderr.splitlines()[-1].startswith("data folder data/bccd: does not exist; expected there: ")
