"""What we publish as measured is what the stored records say, and the stored teacher is the one its record describes."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detrdistill.recipes.presets import get_preset
from detrdistill.recipes.tables import TABLES
from detrdistill.report.write import write_report
from detrdistill.runs.reference import LOGS
from detrdistill.runs.store import Store

RESULTS = Path(__file__).parents[2] / "results"
SEEDS = (0, 1, 2)


@pytest.mark.parametrize(
    ("preset", "folder", "seeds"),
    [
        ("quick", RESULTS / "reference" / "quick", SEEDS),
        ("mini", RESULTS / "reference" / "mini", (*SEEDS, 3, 4, 5)),
        ("bccd", RESULTS / "reference" / "bccd", (*SEEDS, 3, 4)),
    ],
)
def test_the_committed_report_is_made_from_the_committed_records(preset: str, folder: Path, seeds: tuple[int, ...], tmp_path: Path) -> None:
    for part in ("runs", "tables", "notebooks", "figures"):
        if (folder / part).is_dir():
            shutil.copytree(folder / part, tmp_path / part)
    shutil.copyfile(folder / LOGS, tmp_path / LOGS)
    tables = [path.stem for path in (folder / "tables").glob("*.csv") if path.stem in TABLES]
    for path in write_report(preset, seeds, tmp_path, tables, formats=["png"]):
        committed = folder / path.relative_to(tmp_path)
        assert committed.stat().st_size > 0
        if path.suffix in (".csv", ".md", ".tex", ".html"):
            assert path.read_bytes() == committed.read_bytes(), f"{path.name}: write it again from the records with write_report"
        if path.suffix == ".png":
            # Drawn by libraries that differ in the last pixel from machine to machine.
            ours, theirs = (np.asarray(Image.open(one).convert("RGB"), dtype=float) for one in (path, committed))
            assert ours.shape == theirs.shape and np.abs(ours - theirs).mean() < 1, f"{path.name}: another picture than the committed one"


@pytest.mark.parametrize("seed", SEEDS)
def test_the_distilled_student_is_ahead_of_the_plain_one(seed: int) -> None:
    """The claim of the README, seed by seed, at the same number of steps."""
    store, preset = Store(RESULTS / "reference" / "quick"), get_preset("quick")
    plain, distilled = (store.record(preset.recipe(setting, seed)) for setting in ("student", "detrdistill"))
    assert plain.cost["steps"] == distilled.cost["steps"] and distilled.metrics["AP"] > plain.metrics["AP"]
    assert all(record.provenance["commit"] and "+changes" not in record.provenance["commit"] for record in (plain, distilled))


def test_the_stored_teacher_is_that_of_its_record() -> None:
    store, preset = Store(RESULTS / "reference" / "quick"), get_preset("quick")
    record = store.record(preset.teacher)
    assert store.check_weights(record).stat().st_size < 6e6
    assert record.metrics["AP"] > preset.floor >= 45
    assert "+changes" not in record.provenance["commit"]


def test_a_checkout_stays_light() -> None:
    """At most 60 MiB of tracked files, and of large ones weights alone: what somebody clones before they have seen anything."""
    root = RESULTS.parent
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=False).stdout.split("\0")
    sizes = {name: (root / name).stat().st_size for name in listed if name and (root / name).is_file()}
    if not sizes:
        pytest.skip("not a git checkout")
    assert sum(sizes.values()) <= 60 * 2**20, "leave weights that nothing reads, PDF files and whole logs out of results/reference"
    large = [name for name, size in sizes.items() if size > 5e6 and not name.endswith("weights.safetensors")]
    assert not large, f"over 5 MB: {', '.join(large)}"
    assert not [name for name in sizes if name.endswith("log.jsonl")], "logs of committed runs are thinned and packed: runs.reference.bring"
