"""Notebooks refuse bad parameters at once, a killed one is never taken for a finished one, and running twice changes nothing."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from papermill.parameterize import parameterize_notebook

from detrdistill.errors import InputError
from detrdistill.notebooks import execute
from tests import warm
from tests.test_notebook_runner import notebook, outputs

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))

# What is given, and what the one line says: the parameter, its value, the rule.
REFUSED = {
    "preset unknown": ({"preset": "quik"}, "'preset' = 'quik': unknown preset; known: smoke, quick"),
    "seed negative": ({"seeds": [0, -1]}, "'seeds.1' = -1: Input should be greater than or equal to 0"),
    "text for a number": ({"seeds": "one"}, "'seeds.0' = 'one': Input should be a valid integer"),
    "text for yes or no": ({"progress": "perhaps"}, "'progress' = 'perhaps': Input should be a valid boolean"),
    "device unknown": ({"device": "tpu"}, "'device' = 'tpu': use auto, cpu, cuda, or cuda:1 for the second GPU"),
    "field mistyped": ({"changes": {"schedule.lrr": 1e-3}}, "unknown parameter 'schedule.lrr' = 0.001; known here: steps, epochs, batch"),
    "field negative": ({"changes": {"schedule.steps": -5}}, "'schedule.steps' = -5: Input should be greater than or equal to 0"),
    "field not a number": ({"changes": {"schedule.lr": float("nan")}}, "'schedule.lr' = nan: Input should be"),
}

# Runs a notebook's first cells in a new interpreter, without papermill and kernel.
CELLS = """
import json, sys
from detrdistill.errors import InputError
cells, names = json.loads(sys.stdin.read()), {}
try:
    for cell in cells:
        exec(cell, names)
except InputError as error:
    print(json.dumps([sorted(sys.modules), str(error)]))
"""
# What takes seconds to import. How long it takes depends on the machine; that nothing waits for it does not.
SLOW = {"torch", "torchvision", "transformers", "matplotlib", "seaborn", "scipy", "statsmodels", "sklearn", "skimage", "nbformat"}


def until_checked(path: Path, given: dict) -> list[str]:
    """The code cells up to the one that checks the parameters, with these injected as papermill does it."""
    cells = [
        cell.source for cell in parameterize_notebook(papermill.iorw.load_notebook_node(str(path)), given).cells if cell.cell_type == "code"
    ]
    return cells[: 1 + next(i for i, cell in enumerate(cells) if "open_session(" in cell)]


@pytest.mark.parametrize("fault", REFUSED)
def test_bad_parameters_are_refused_before_anything_slow_is_imported(fault: str, tmp_path: Path, times, tries) -> None:
    """Within a second of a notebook's first cell, on a usual machine."""
    given, message = REFUSED[fault]
    for number in range(times(1, 4)):
        path = NOTEBOOKS[(list(REFUSED).index(fault) + 5 * number) % len(NOTEBOOKS)]
        with tries(f"parameter: {fault}"):
            command, cells = [sys.executable, "-c", CELLS], json.dumps(until_checked(path, given))
            done = subprocess.run(command, input=cells, capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path)
            imported, error = json.loads(done.stdout)
            assert message in error and error.startswith("parameters: ") and "\n" not in error, path.name
            assert "detrdistill.session" in imported and SLOW.isdisjoint(imported), path.name
            assert not list(tmp_path.iterdir())


def test_a_name_that_papermill_only_warns_of_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times, tries) -> None:
    """In a kernel, by the cell that checks the parameters, which is the last that runs."""
    monkeypatch.setenv("DETRDISTILL_RESULTS", str(tmp_path / "results"))
    executed = tmp_path / "out.ipynb"
    for path in NOTEBOOKS[1 :: times(len(NOTEBOOKS), 5)]:
        with tries("parameter: name mistyped"):
            command = [sys.executable, "-m", "papermill", path, executed, "-p", "preset", "smoke", "-p", "sede", "3"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
            assert done.returncode == 1
            assert "InputError: parameters: unknown sede, injected by papermill; known here: preset, seeds" in done.stderr
            ran = [cell.source for cell in nbformat.read(executed, as_version=4).cells if cell.get("execution_count")]
            assert "open_session(" in ran[-1]
            assert not (tmp_path / "results").exists()


# What a kernel meets that has no memory left, and what is told.
MEMORY = {
    "kernel killed": (
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        r"Kernel died: something killed it, most often the system for want of memory; free some, or take a smaller preset; see ",
    ),
    "kernel out of memory": ("kept = [bytes(10**7) for _ in range(10**5)]", r"papermill ended with code 1: MemoryError.*; see "),
    "kernel out of memory in torch": ("import torch; torch.ones(10**10)", r"code 1: RuntimeError: .*(can't|not enough) .*memory.*; see "),
}
LITTLE = "import resource; resource.setrlimit(resource.RLIMIT_AS, (6 * 10**9, 6 * 10**9))"


def test_a_notebook_without_memory_is_reported_failed(tmp_path: Path, times, tries) -> None:
    """The result of the run before stays, what failed is kept beside it, and a later success clears it away."""
    result = tmp_path / "results" / "a.ipynb"
    result.parent.mkdir()
    result.write_text("the result of yesterday")
    failed = result.with_suffix(".failed.ipynb")
    for fault, (cell, message) in list(MEMORY.items())[: times(2, 3)]:
        source = notebook(tmp_path / "a.ipynb", "print('first')", LITTLE, cell, "print('later')")
        with tries(fault):
            with pytest.raises(InputError, match=message) as error:
                execute(source, result, {}, 100)
            assert str(error.value).startswith(f"notebook {source} failed: papermill ended with code ") and str(failed) in str(error.value)
            assert result.read_text() == "the result of yesterday" and "later" not in outputs(failed)
            assert sorted(path.name for path in result.parent.iterdir()) == ["a.failed.ipynb", "a.ipynb"]
    with tries("running again after a kill"):
        execute(notebook(tmp_path / "a.ipynb", "print('first')"), result, {}, 100)
        assert outputs(result) == "first\n" and [path.name for path in result.parent.iterdir()] == ["a.ipynb"]


def files(root: Path) -> dict[str, bytes]:
    """All results by place, records without what their run cost."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.name != ".lock":
            found[str(path.relative_to(root))] = path.read_bytes()
            if path.name == "record.json":
                body = json.loads(path.read_text())
                found[str(path.relative_to(root))] = json.dumps({k: v for k, v in body.items() if k not in ("cost", "sha256")}).encode()
    return found


def pictures(executed: Path) -> list[str]:
    cells = [cell for cell in nbformat.read(executed, as_version=4).cells if cell.cell_type == "code"]
    return [output.data["image/png"] for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]


@pytest.mark.parametrize("name", ["10_query_masks", "05_self_distillation", "12_stability"])
def test_running_twice_gives_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times, tries, name: str) -> None:
    """In two empty folders: runs, weights, logs, figures. With --long also in the same one, where nothing is trained again."""
    if not times(name == "05_self_distillation", True):
        pytest.skip("with --long")
    source = ROOT / "notebooks" / f"{name}.ipynb"
    given = {"preset": "smoke", "progress": False}
    given |= {"detectors": ["deformable_detr"]} if "detectors" in papermill.inspect_notebook(str(source)) else {}
    one, other = tmp_path / "one", tmp_path / "other"
    with tries("running twice"):
        shown = []
        for root in (one, other, other)[: times(2, 3)]:
            before = {path: path.read_bytes() for path in root.rglob("record.json")}
            monkeypatch.setenv("DETRDISTILL_RESULTS", str(root))
            warm.execute(source, tmp_path / "executed.ipynb", given, 280)
            shown.append(pictures(tmp_path / "executed.ipynb"))
            assert all(path.read_bytes() == record for path, record in before.items())
        found, again = files(one), files(other)
        assert {Path(path).suffix for path in found} >= {".json", ".jsonl", ".safetensors", ".png", ".pdf"}
        assert [path for path in found | again if found.get(path) != again.get(path)] == []
        assert shown[0] and all(some == shown[0] for some in shown)
