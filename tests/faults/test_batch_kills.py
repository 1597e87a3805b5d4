"""Notebooks and the batch are killed, or one run of many fails: what is not complete is called so, and a second call completes it."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from detrdistill.notebooks import unfinished
from detrdistill.recipes.identity import parents
from detrdistill.recipes.presets import smoke
from detrdistill.records import read_record
from detrdistill.runs.store import Store
from tests.faults.killing import holder, steps, until
from tests.warm import python_m

ROOT = Path(__file__).parents[2]
STUDENT = smoke().student
LONG = STUDENT.replace(**{"schedule.steps": 40, "schedule.evaluations": 10})
CELLS = """
results: str = ""
---
from detrdistill.recipes.presets import smoke
from detrdistill.runs.run import run
from detrdistill.runs.store import Store
recipe = smoke().student.replace(**{"schedule.steps": 40, "schedule.evaluations": 10})
---
print(run(recipe, Store(results), device="cpu", progress=False).id)
---
print("the end")
"""


def backbone_only(finished: Path, root: Path) -> Store:
    store, given = Store(root), Store(finished)
    for parent in parents(STUDENT).values():
        shutil.copytree(given.folder(parent), store.folder(parent))
    return store


def notebook(folder: Path, store: Store) -> subprocess.Popen:
    cells = [new_code_cell(text.strip()) for text in CELLS.split("---")]
    cells[0].metadata["tags"] = ["parameters"]
    content = new_notebook(cells=cells)
    content.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(content, folder / "trains.ipynb")
    words = ["notebook", str(folder / "trains.ipynb"), str(folder / "out" / "trains.ipynb"), "--parameters", f"results={store.root}"]
    return subprocess.Popen([sys.executable, "-m", "detrdistill", *words], stderr=subprocess.PIPE, text=True)


VICTIMS = {
    "kernel": (2, "papermill ended with code "),
    "papermill": (2, "papermill was killed by signal 9: "),
    "notebook runner, by SIGTERM": (143, ""),
    "notebook runner": (-signal.SIGKILL, ""),
}


@pytest.mark.timeout(1200)
def test_a_notebook_that_trains(finished: Path, tmp_path: Path, times: Callable[[int, int], int], tries, chance: random.Random) -> None:
    """Whoever is killed, there is no notebook, and all processes end; called again, its run continues and equals the undisturbed one."""
    wanted = None
    for number in range(times(1, 8)):
        folder, victim = tmp_path / str(number), list(VICTIMS)[number % len(VICTIMS)]
        folder.mkdir()
        store = backbone_only(finished, folder / "results")
        with tries(f"{'SIGTERM' if 'SIGTERM' in victim else 'kill -9'} of the {victim.partition(',')[0]}"):
            runner, lines = notebook(folder, store), chance.randrange(5, 9)
            until(lambda: steps(store, LONG) >= lines, runner)  # noqa: B023
            kernel = psutil.Process(holder(store, LONG))
            papermill = kernel.parent()
            if victim == "kernel":
                kernel.kill()
            elif victim == "papermill":
                papermill.kill()
            elif victim == "notebook runner":
                runner.kill()
                papermill.kill()  # it would go on alone
            else:
                runner.terminate()
            told, code = runner.communicate(timeout=100)[1], runner.returncode
            assert (code, VICTIMS[victim][1] in told) == (VICTIMS[victim][0], True), told
            _, alive = psutil.wait_procs([kernel, papermill], timeout=20)
            assert not alive and not (folder / "out" / "trains.ipynb").exists() and store.record(LONG) is None
            again = notebook(folder, store)
            assert (again.communicate(timeout=200)[1], again.returncode)[1] == 0
            assert unfinished(folder / "out" / "trains.ipynb") is None
            assert [path.name for path in (folder / "out").iterdir()] == ["trains.ipynb"], "a killed notebook's file is left"
            assert store.record(LONG).cost["resumed"] == 1
            log = (store.folder(LONG) / "log.jsonl").read_bytes()
            wanted = wanted or undisturbed(finished, tmp_path / "undisturbed")
            assert log == wanted


def undisturbed(finished: Path, root: Path) -> bytes:
    from detrdistill.runs.run import run

    store = backbone_only(finished, root)
    run(LONG, store, device="cpu", progress=False)
    return (store.folder(LONG) / "log.jsonl").read_bytes()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Folders to call the batch in, with its sources."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("DETRDISTILL_RESULTS", raising=False)

    def make(name: str) -> Path:
        for source in ("workflow", "notebooks"):
            shutil.copytree(ROOT / source, tmp_path / name / source)
        (tmp_path / name / "results" / "smoke" / "runs").mkdir(parents=True)
        return tmp_path / name

    return make


def batch(place: Path, *words: str) -> list[str]:
    """The smallest table: a student beside a teacher, and what it learns from it."""
    return [
        *("snakemake", "--snakefile", "workflow/Snakefile", "--cores", "1", "--directory", str(place)),
        *("--config", "preset=smoke", "seeds=0", "tables=self_distillation", "detectors=deformable_detr", *words),
    ]


def call(place: Path, *words: str) -> subprocess.CompletedProcess:
    return python_m(*batch(place, *words), cwd=ROOT, timeout=280)


def check_left(place: Path, wanted: dict[str, bytes]) -> int:
    """What the batch calls complete is: every record with its log and weights, every notebook. How many runs there are."""
    results = place / "results" / "smoke"
    records = [read_record(path) for path in results.glob("runs/*/record.json")]
    for record in records:
        Store(results).check_weights(record)
        log = results / "runs" / record.id / "log.jsonl"
        assert record.id not in wanted or log.read_bytes() == wanted[record.id]
    for path in (results / "notebooks").glob("[!.]*.ipynb"):
        assert path.name.endswith(".failed.ipynb") or unfinished(path) is None
    for path in results.glob("tables/[!.]*.csv"):
        assert path.read_text().endswith("\n")
    return len(records)


@pytest.mark.timeout(1500)
def test_the_batch_at_any_moment(
    finished: Path, place: Callable[[str], Path], times: Callable[[int, int], int], tries, chance: random.Random
) -> None:
    """The whole of it, and Snakemake alone, whose children then go on: a call meanwhile is refused what they hold, and says so."""
    if not times(0, 1):
        pytest.skip("minutes: with --long; tests/runs/test_batch.py kills the batch twice")
    logs = {path.parent.name: path.read_bytes() for path in finished.glob("runs/*/log.jsonl")}
    for chain in range(2):
        folder, before = place(str(chain)), 0
        for _ in range(5):
            alone = chance.random() < 0.5
            with tries("kill -9 of Snakemake alone" if alone else "kill -9 of the whole batch"):
                process = subprocess.Popen(
                    [sys.executable, "-m", *batch(folder)],
                    cwd=ROOT,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
                try:
                    time.sleep(chance.uniform(0, 25))
                    process.kill() if alone else os.killpg(process.pid, signal.SIGKILL)
                    process.wait(20)
                    complete = check_left(folder, logs)
                    assert complete >= before
                    before = complete
                    assert call(folder, "--unlock").returncode == 0
                finally:
                    if not alone:
                        with contextlib.suppress(ProcessLookupError):
                            os.killpg(process.pid, signal.SIGKILL)
        for _ in range(4):
            done = call(folder)
            if done.returncode == 0:
                break
            assert "is being trained by process" in done.stdout + done.stderr, done.stderr
            time.sleep(10)
        assert done.returncode == 0
        assert check_left(folder, logs) == 4, "backbone, teacher, student, distilled student"
        assert "not run" not in (folder / "results" / "smoke" / "tables" / "self_distillation.md").read_text()


@pytest.mark.timeout(600)
def test_one_failing_run_is_a_visible_hole(finished: Path, place: Callable[[str], Path], times: Callable[[int, int], int], tries) -> None:
    """Here for a damaged checkpoint. The report is made all the same, the exit code is not 0, and what it says is done mends it."""
    folder = place("clone")
    store = Store(folder / "results" / "smoke")
    shutil.copytree(finished, store.root, dirs_exist_ok=True)
    damaged = store.folder(STUDENT) / "checkpoint.pt"
    damaged.parent.mkdir()
    damaged.write_bytes(b"half of it")
    table = store.root / "tables" / "self_distillation.md"
    with tries("one failing run of many"):
        done = call(folder)
        assert done.returncode != 0
        assert f"error: checkpoint {damaged}: not readable" in done.stdout + done.stderr
        assert "delete it to start this run afresh" in done.stdout + done.stderr
        cells = [[cell.strip() for cell in line.split("|")[2:4]] for line in table.read_text().splitlines() if line.startswith("| D")]
        aps = dict(cells[1:])
        assert aps.pop("Student") == "not run" and len(aps) == 2 and all(float(ap) >= 0 for ap in aps.values())
        assert not (store.root / "notebooks").exists() or not list((store.root / "notebooks").glob("[!.]*.ipynb"))
        assert json.loads((store.folder(smoke().recipe("detrdistill")) / "record.json").read_text())["metrics"]
        if times(0, 1):
            damaged.unlink()
            assert call(folder).returncode == 0 and "not run" not in table.read_text()
