"""Shapes and types in detectors and losses are checked against their annotations while the tests run."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

CHECKED = ("boxes", "criterion", "distill", "matching", "models")

install_import_hook([f"detrdistill.{name}" for name in CHECKED], "beartype.beartype")


@pytest.fixture(scope="session", autouse=True)
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Data sets that tests write go to a folder of their own, those of child processes too."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("data")
        patch.setenv("DETRDISTILL_DATA", str(folder))
        yield folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the smoke preset's distilled student, its teacher and their backbone. Not to be written to."""
    from detrdistill.recipes.presets import smoke
    from detrdistill.runs.run import run
    from detrdistill.runs.store import Store

    root = tmp_path_factory.mktemp("finished")
    run(smoke().recipe("detrdistill"), Store(root), device="cpu", progress=False)
    return root
