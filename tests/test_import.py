"""Importing the kit, and reading results, must not pay for torch."""

import subprocess
import sys

import pytest

import detrdistill

SLOW = {"torch", "torchvision", "transformers"}
DRAWS = {"matplotlib", "seaborn", "scipy", "statsmodels", "sklearn", "skimage", "pandas"}


@pytest.mark.parametrize("module", ["", ".cli", ".recipes.recipe", ".runs.store", ".report.write"])
def test_import_is_quick_and_without_torch(module):
    """Nothing is imported that takes seconds; how many depends on the machine."""
    code = f"import sys, detrdistill{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    imported = set(done.stdout.split())
    assert f"detrdistill{module}" in imported
    assert imported.isdisjoint(SLOW if module == ".report.write" else SLOW | DRAWS)


WINDOWS = """
import sys
sys.modules.update(dict.fromkeys(("resource", "fcntl", "pwd", "grp", "termios")))
from detrdistill import process
from detrdistill.errors import InputError
from detrdistill.recipes.presets import smoke
from detrdistill.runs.run import run
from detrdistill.runs.store import Store
from detrdistill.training import checkpointing
assert process.peak_memory() is None and process.largest_file() is None
try:
    run(smoke().student, Store(sys.argv[1]), device="cpu", progress=False)
except InputError as refusal:
    print(refusal)
"""


def test_without_the_modules_that_windows_lacks(tmp_path):
    """Everything can be imported, and training ends with one line."""
    done = subprocess.run([sys.executable, "-c", WINDOWS, str(tmp_path)], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "runs cannot be locked on this system (Windows), so nothing is trained; use Linux, macOS or WSL\n"
    assert not list(tmp_path.rglob("*"))


def test_names_are_there_on_first_use():
    assert set(detrdistill.__all__) <= set(dir(detrdistill))
    for name in detrdistill.__all__:
        assert getattr(detrdistill, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'ruin'"):
        _ = detrdistill.ruin
