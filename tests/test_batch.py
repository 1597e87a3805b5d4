"""The batch from nothing to tables, in the smoke preset: what it runs, what it does not run again, and what a kill leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def snakemake(folder: Path, *words: str) -> list[str]:
    return [
        *(sys.executable, "-m", "snakemake", "--snakefile", "workflow/Snakefile", "--cores", "1", "--directory", str(folder)),
        *("--config", "preset=smoke", "seeds=0", *words),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to work in, with the sources of the batch."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("workflow", "notebooks"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "results" / "published").mkdir(parents=True)
    return folder


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if ".venv" not in p))  # as under make
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("DETRDISTILL_RESULTS", raising=False)


def test_killed_at_any_moment_it_ends_well_when_called_again(folder: Path, environment: None) -> None:
    records = folder / "results" / "smoke" / "runs"
    batch = subprocess.Popen(snakemake(folder), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 200
    while not list(records.glob("*/record.json")) and batch.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(batch.pid, signal.SIGKILL)
    batch.wait()
    before = {path: path.stat().st_mtime_ns for path in records.glob("*/record.json")}
    assert before, "the batch had done nothing when it was killed"

    subprocess.run(snakemake(folder, "--unlock"), cwd=ROOT, check=True, capture_output=True, timeout=120)
    again = subprocess.run(snakemake(folder), cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert again.returncode == 0, again.stderr
    after = {path: path.stat().st_mtime_ns for path in records.glob("*/record.json")}
    assert len(after) == 4, "backbone, teacher, student, distilled student"
    done = [path for path in before if json.loads(path.read_text())]
    assert sum(after[path] == before[path] for path in done) >= len(before) - 1, "complete runs were run again"
    for name in ("tables/main_results.csv", "tables/main_results.md", "tables/main_results.tex", "figures/convergence.pdf"):
        assert (folder / "results" / "smoke" / name).stat().st_size > 0
    assert sorted(path.name for path in (folder / "results" / "smoke" / "notebooks").iterdir()) == sorted(
        path.name for path in (ROOT / "notebooks").glob("*.ipynb")
    )


def test_a_second_call_computes_nothing(folder: Path, environment: None) -> None:
    again = subprocess.run(snakemake(folder, "--dry-run"), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "Nothing to be done" in again.stdout + again.stderr


def test_a_stored_teacher_asks_for_nothing(folder: Path, environment: None, tmp_path: Path) -> None:
    """As after a fresh clone: the teacher's record is there, the backbone it started from is not."""
    (teacher,) = (folder / "results" / "smoke" / "runs").glob("*plain-seed1-*")
    shutil.copytree(teacher, tmp_path / "results" / "smoke" / "runs" / teacher.name)
    wanted = f"{tmp_path}/results/smoke/runs/{teacher.name}/record.json"
    plan = subprocess.run([*snakemake(tmp_path, "--dry-run"), wanted], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert plan.returncode == 0 and "Nothing to be done" in plan.stdout + plan.stderr, plan.stderr
