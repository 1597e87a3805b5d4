"""Data that is no pair of COCO files becomes one in the data cache: converted, or divided into training and validation images."""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from detrdistill.data.file_names import ImageFolder
from detrdistill.data.foreign import Read
from detrdistill.data.validation import load_annotations, without_outline
from detrdistill.errors import InputError
from detrdistill.files import file_hash, write_text

REVISION = 2  # raise when what is written changes


def converted(root: Path, cache: Path, read: Callable[[], Read], division: tuple[float, int] | None) -> dict[str, tuple[Path, Path]]:
    """Annotation file in the cache and image folder by split. Written once, and anew when any file of the data folder has changed.

    Args:
        read: gives COCO's content and the image folder by split.
        division: the part of the training images that validates, and the seed that draws them; None where all splits are there.

    Raises:
        InputError: what `read` raises, a file cannot be read, or there is nothing to divide.
    """
    folder = cache / f"converted-{_state(root, division)}"
    try:
        places = json.loads((folder / "images.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        try:
            splits = read()
            if division:
                splits |= divide(*splits["train"], *division)
        except OSError as error:
            raise InputError(f"data folder {root}: {error.filename} cannot be read ({error.strerror}); correct its name") from None
        for split, (content, _) in splits.items():
            write_text(folder / f"instances_{split}.json", json.dumps(content, separators=(",", ":")))
        places = {split: str(images) for split, (_, images) in splits.items()}
        write_text(folder / "images.json", json.dumps(places))  # last: what says that the others are whole
    return {split: (folder / f"instances_{split}.json", Path(images)) for split, images in places.items()}


def _state(root: Path, division: tuple[float, int] | None) -> str:
    """A name for the folder as it is: changes with any file's name, length or time."""
    digest = sha256(json.dumps([REVISION, os.path.realpath(root), division]).encode())
    for place, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "converted-")))  # the cache may lie within
        for name in sorted(files):
            path = os.path.join(place, name)
            about = os.stat(path) if os.path.exists(path) else None
            digest.update(f"{path}\0{about and (about.st_size, about.st_mtime_ns)}\0".encode(errors="surrogatepass"))
    return digest.hexdigest()[:12]


def read_coco(file: Path, images: Path) -> Read:
    """One COCO file as it is.

    Raises:
        InputError: it cannot be read, or its content is refused.
    """
    load_annotations(file, images)  # refused under its own name, not under that of a copy in the cache
    return {"train": (json.loads(file.read_text(encoding="utf-8-sig"), object_hook=without_outline), images)}


def divide(content: dict[str, Any], images: Path, fraction: float, seed: int) -> Read:
    """Training and validation images of one file. What shows one picture stays together: the same file, copies of it, and what Roboflow
    made of one photograph. Images with objects and those without are divided in the same proportion.

    Raises:
        InputError: there is only one picture with objects.
    """
    with_objects = {one.get("image_id") for one in content["annotations"] if isinstance(one, dict) and not one.get("iscrowd")}
    groups: dict[str, list[dict]] = defaultdict(list)
    for entry, picture in zip(content["images"], _pictures(content["images"], images), strict=True):
        groups[picture].append(entry)
    random, chosen = np.random.default_rng(seed), set()
    for has in (True, False):
        names = sorted(name for name, group in groups.items() if any(one["id"] in with_objects for one in group) == has)
        if has and len(names) < 2:
            raise InputError(
                f"data in {images}: {len(names)} picture with objects cannot be divided into training and validation; add some"
            )
        wanted = round(fraction * len(names))
        wanted = min(max(wanted, 1), len(names) - 1) if has else wanted
        chosen |= {names[k] for k in random.permutation(len(names))[:wanted]}
    val = {one["id"] for name in chosen for one in groups[name]}
    found: Read = {}
    for split, inside in (("train", False), ("val", True)):
        kept = {
            "images": [one for one in content["images"] if (one["id"] in val) == inside],
            # What belongs to no image is listed with the training images' faults.
            "annotations": [one for one in content["annotations"] if _of(one, val) == inside],
        }
        found[split] = content | kept, images
    return found


def _of(annotation: Any, images: set[Any]) -> bool:
    image = annotation.get("image_id") if isinstance(annotation, dict) else None
    return isinstance(image, int | float) and image in images


def _pictures(entries: list[dict], images: Path) -> list[str]:
    """A name for what each image shows."""
    folder = ImageFolder(images)
    names = [folder.find(entry["file_name"])[0] or str(entry["file_name"]) for entry in entries]
    lengths = {name: (images / name).stat().st_size if (images / name).is_file() else -1 for name in names}
    alike = Counter(lengths.values())
    first: dict[str, str] = {}
    found = []
    for name in names:
        content = file_hash(images / name) if lengths[name] >= 0 and alike[lengths[name]] > 1 else name
        found.append(first.setdefault(content, name.partition(".rf.")[0]))
    return found
