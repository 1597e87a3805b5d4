"""Where a data set's files lie, and its hash, which a recipe is pinned to. No torch here: the batch names runs before any is trained."""

import json
import os
from hashlib import sha256
from pathlib import Path

from detrdistill.data.digits import CATEGORIES, write_digits
from detrdistill.data.layouts import Split, find
from detrdistill.errors import InputError
from detrdistill.recipes.parts import Digits, Folder


def data_cache() -> Path:
    """Folder for data sets the kit writes: `$DETRDISTILL_DATA`, else `~/.cache/detrdistill`."""
    return Path(os.environ.get("DETRDISTILL_DATA") or Path.home() / ".cache" / "detrdistill")


def data_hash(spec: Digits | Folder, cache: Path) -> str:
    """SHA-256 over the two annotation files, train then val: `cat instances_train.json instances_val.json | sha256sum`.

    Where the data was converted or divided, these are the files in the cache. A test file does not count: it changes nothing trained.

    Raises:
        InputError: the folder is missing or not laid out as expected, or the recipe states another hash than it has.
    """
    digest = sha256()
    for split in ("train", "val"):
        with layout(spec, split, cache)[0].open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    found = digest.hexdigest()
    if isinstance(spec, Folder) and spec.sha256 and spec.sha256 != found:
        raise InputError(f"data folder {spec.path}: its annotations hash to {found}, the recipe says {spec.sha256}; give that run's data")
    return found


def category_ids(spec: Digits | Folder, cache: Path) -> dict[str, int]:
    """The id of each class by its name, without a look at the images.

    Raises:
        InputError: as `data_hash` and `layout`.
    """
    if isinstance(spec, Digits):
        return {one["name"]: one["id"] for one in CATEGORIES}
    if spec.sha256:
        data_hash(spec, cache)
    listed = json.loads(layout(spec, "val", cache)[0].read_text(encoding="utf-8"))["categories"]
    return {one["name"]: one["id"] for one in listed}


def layout(spec: Digits | Folder, split: Split, cache: Path) -> tuple[Path, Path]:
    """Annotation file and image folder of a split.

    Raises:
        InputError: the folder is missing or not laid out in a known way, or has no such split.
    """
    if isinstance(spec, Digits):
        root = write_digits(spec, cache)
        return root / f"instances_{split}.json", root / "images"
    found = find(spec, cache)
    if split not in found.splits:
        raise InputError(f"data folder {spec.path}: no annotations of the split '{split}'; it has {', '.join(found.splits)}")
    return found.splits[split]


def how_found(spec: Digits | Folder, cache: Path) -> tuple[str, bool]:
    """What to say about a folder's layout, nothing about the kit's own; and whether there is a test split."""
    if isinstance(spec, Digits):
        return "", False
    found = find(spec, cache)
    return found.how and f"data folder {spec.path}: {found.how}", "test" in found.splits
