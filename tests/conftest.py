"""Shapes and types in detectors and losses are checked against their annotations while the tests run."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

import tests.lean  # noqa: F401

# `make test-fast` leaves these out: files or single tests that start processes, run notebooks or the batch, or draw whole reports.
# The dearest come first, since workers take files in this order: none is left with a long one at the end.
SLOW = (
    "tests/test_notebooks.py",
    "tests/runs/test_batch.py",
    "tests/test_benchmarks.py",
    "tests/faults/test_batch_kills.py",
    "tests/test_gpu_check.py",
    "tests/faults/",
    "tests/report/test_reference.py",
    "tests/test_sliders.py",
    "tests/report/test_inside_objects.py::test_they_are_shown",
    "tests/export/test_onnx.py",
    "tests/export/test_families.py",
    "tests/training/test_trainer.py::test_two_processes_are_one",
    "tests/test_notebook_runner.py",
    "tests/report/test_claims.py",
    "tests/test_session_table.py",
    "tests/report/test_tables.py",
    "tests/report/test_paper.py",
    "tests/training/test_teacher_outputs.py",
    "tests/runs/test_continuing.py::test_more_steps",
    "tests/training/test_keeping.py::test_resume_is_exact",
    *(f"tests/runs/test_published.py::test_a_{one}" for one in ("smaller_student", "session")),
    "tests/runs/test_published.py::test_each_format",
    "tests/checkpoints/test_locate.py::test_a_hub_id",
    "tests/models/test_backbones.py::test_few_channels_do_not_crash",
    "tests/test_cli.py::test_every_run_that_the_batch_names_is_known",
    "tests/figures/",
    "tests/compare/test_compare.py",
    "tests/parity/",
    "tests/any_detr/",
    "tests/distill/test_every_method.py::test_a_teacher_with_other_sizes",
    *(f"tests/training/test_trainer.py::test_resume_is_exact[{case}" for case in ("plain", "distilled-4", "distilled-5")),
    "tests/training/test_trainer.py::test_a_checkpoint_of_something_else_is_refused",
    "tests/test_cli.py::test_runs_of_a_folder_are_called_by_the_names_that_the_batch_waits_for",
    "tests/test_cli.py::test_a_truncated_image_is_named",
    "tests/models/test_backbone_weights.py::test_frozen_norms_in_the_convolutions_change_rounding_alone",
)
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {}
    for item in items:
        place = next((number for number, start in enumerate(SLOW) if item.nodeid.startswith(start)), len(SLOW))
        places[item.path] = min(place, places.get(item.path, place))
        if place < len(SLOW):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: places[item.path])
