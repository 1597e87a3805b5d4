"""A training step against that of an earlier commit, on one thread: `python -m benchmarks.since COMMIT`.

Both versions train the same recipe of preset mini in turn, each time in a process of its own, and are asked for the seconds that they
themselves record: loading, losses, gradient and optimizer step, without evaluation. Images come back as often as in a run of the preset.
"""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from benchmarks.measure import ROOT, Table, make_parser, spread, table_path
from detrdistill.errors import InputError
from detrdistill.recipes.identity import stated
from detrdistill.recipes.presets import get_preset
from detrdistill.recipes.recipe import Recipe
from detrdistill.recipes.words import ADAMIXER, CONDITIONAL, DEFORMABLE
from detrdistill.runs.provenance import commit

FIRST_ROUND = "de1601d"  # the end of the kit's first round
SETTINGS = ("student", "detrdistill")
COLUMNS = ("detector", "setting", "of", "ratio", "low", "high", "before_ms", "now_ms")
TRAIN = """
import json, sys, tempfile, torch
from detrdistill import Recipe, Store, run  # names that both versions know, wherever they lie in it
torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as folder:
    record = run(Recipe.read(json.loads(sys.argv[1])), Store(folder), device="cpu", workers=0, progress=False)
print(max(record.cost["seconds"], 0.05) / record.cost["steps"])  # a record rounds to tenths, and the tests take one step
"""


def short(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with as few steps, and as few images for each of them as the whole run has; its teacher learns nothing."""
    changes: dict[str, object] = {"backbone.crops.steps": 1, "schedule.evaluations": 1, "data.val": 8}
    images = max(1, round(recipe.data.train * steps / recipe.schedule.steps)) if recipe.schedule.steps > steps else recipe.data.train
    found = recipe.replace(**changes, **{"schedule.steps": steps, "data.train": images})
    if found.teacher is None:
        return found
    teacher = found.teacher.replace(**changes, **{"schedule.steps": 1, "data.train": images})
    return found.replace(teacher=teacher, teacher_floor=-1.0)


def unpack(version: str, folder: Path) -> None:
    """The package as it was at a commit.

    Raises:
        InputError: git does not have the commit.
    """
    try:
        packed = subprocess.run(["git", "archive", version, "detrdistill"], cwd=ROOT, check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise InputError(
            f"commit {version}: git does not have it here; measure in a clone with all of its history (git fetch --unshallow)"
        ) from None
    with tarfile.open(fileobj=BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")


def milliseconds(tree: Path, recipe: Recipe) -> float:
    """Of a step, as the run records it."""
    command = [sys.executable, "-W", "ignore", "-c", TRAIN, json.dumps(stated(recipe))]  # fields that are at their default may be newer
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True, text=True)
    return 1000 * float(done.stdout)


def main(words: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("commit", nargs="?", default=FIRST_ROUND, help="the earlier one")
    arguments = parser.parse_args(words)
    preset, steps, repeats = {"full": ("mini", 40, 3), "quick": ("mini", 30, 2), "small": ("smoke", 1, 1)}[arguments.scale]
    small = arguments.scale == "small"
    detectors, settings = ((DEFORMABLE,), SETTINGS[1:]) if small else ((DEFORMABLE, ADAMIXER, CONDITIONAL), SETTINGS)
    table = Table(table_path(arguments, "since.csv"), COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        try:
            unpack(arguments.commit, before := Path(folder))
        except InputError as missing:
            parser.exit(2, f"error: {missing}\n")
        table.start(f"commit {commit()} against {arguments.commit}; preset {preset}, {steps} steps, one thread; medians of {repeats}")
        for detector in detectors:
            for setting in settings:
                recipe = short(get_preset(preset, detector).recipe(setting), steps)
                pairs = [(milliseconds(before, recipe), milliseconds(ROOT, recipe)) for _ in range(repeats)]
                then, now = (spread([pair[i] for pair in pairs])["value"] for i in (0, 1))
                row = {"detector": detector, "setting": setting, "of": "a training step", "before_ms": then, "now_ms": now}
                table.add(row | spread([after / earlier for earlier, after in pairs], "ratio"))


if __name__ == "__main__":
    main()
