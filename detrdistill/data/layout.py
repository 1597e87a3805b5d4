"""Where a data set's files lie, and its hash, which a recipe is pinned to. No torch here: the batch names runs before any is trained."""

import os
from hashlib import sha256
from pathlib import Path
from typing import Literal

from detrdistill.data.digits import write_digits
from detrdistill.errors import InputError
from detrdistill.files import nearby
from detrdistill.recipes.parts import Digits, Folder

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")
LAYOUT = "instances_train.json, instances_val.json and images/, or COCO's annotations/instances_train2017.json, train2017/ and so on"


def data_cache() -> Path:
    """Folder for data sets the kit writes: `$DETRDISTILL_DATA`, else `~/.cache/detrdistill`."""
    return Path(os.environ.get("DETRDISTILL_DATA") or Path.home() / ".cache" / "detrdistill")


def data_hash(spec: Digits | Folder, cache: Path) -> str:
    """SHA-256 over the two annotation files, train then val: `cat instances_train.json instances_val.json | sha256sum`.

    Raises:
        InputError: the folder is missing or not laid out as expected, or the recipe states another hash than it has.
    """
    digest = sha256()
    for split in SPLITS:
        with layout(spec, split, cache)[0].open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    found = digest.hexdigest()
    if isinstance(spec, Folder) and spec.sha256 and spec.sha256 != found:
        raise InputError(f"data folder {spec.path}: its annotations hash to {found}, the recipe says {spec.sha256}; give that run's data")
    return found


def layout(spec: Digits | Folder, split: Split, cache: Path) -> tuple[Path, Path]:
    """Annotation file and image folder of a split.

    Raises:
        InputError: the folder is missing or not laid out as expected.
    """
    root = write_digits(spec, cache) if isinstance(spec, Digits) else nearby(spec.path)
    if not root.is_dir():
        raise InputError(f"data folder {root}: {'not a folder' if root.exists() else 'does not exist'}; expected there: {LAYOUT}")
    candidates = [
        (root / f"instances_{split}.json", root / "images"),
        (root / "annotations" / f"instances_{split}2017.json", root / f"{split}2017"),
    ]
    for annotations, images in candidates:
        if annotations.is_file():
            if not images.is_dir():
                raise InputError(f"data folder {root}: {annotations.name} is there but not the image folder {images}; expected: {LAYOUT}")
            return annotations, images
    raise InputError(f"data folder {root}: no annotations of the split '{split}'; expected there: {LAYOUT}")
