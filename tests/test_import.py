"""Importing the kit, and reading results, must not pay for torch."""

import subprocess
import sys

import pytest

import detrdistill

TIMED = "import sys, time; start = time.perf_counter(); import detrdistill{}; print(time.perf_counter() - start, 'torch' in sys.modules)"


@pytest.mark.parametrize("module", ["", ".cli", ".recipes.recipe", ".runs.store", ".report.write"])
def test_import_is_quick_and_without_torch(module):
    done = subprocess.run([sys.executable, "-c", TIMED.format(module)], capture_output=True, text=True, timeout=60, check=True)
    seconds, torch_imported = done.stdout.split()
    assert torch_imported == "False"
    if module in ("", ".cli", ".recipes.recipe"):
        assert float(seconds) < 2


def test_names_are_there_on_first_use():
    assert set(detrdistill.__all__) <= set(dir(detrdistill))
    for name in detrdistill.__all__:
        assert getattr(detrdistill, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'ruin'"):
        _ = detrdistill.ruin
