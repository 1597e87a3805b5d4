"""YOLO's and Pascal VOC's files, read as COCO's. Own code: the libraries that convert bring OpenCV or video decoders along, or drop what
they cannot read without a word. What a line or box cannot mean is handed on as it is written, for `validation` to list.
"""

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from detrdistill.data.images import ORIENTATION, QUARTER_TURNS, open_image
from detrdistill.data.values import is_length, show, steers
from detrdistill.errors import InputError

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".jp2", ".png", ".pgm", ".ppm", ".tif", ".tiff", ".webp"}
CALLED = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
Read = dict[str, tuple[dict[str, Any], Path]]  # by split: COCO's content, and the image folder


def yolo(root: Path) -> tuple[set[str], Callable[[], Read]] | None:
    """The splits of a YOLO folder, and what reads them; None if there is no data.yaml that names classes and training images.

    Raises:
        InputError: the file cannot be read, or names a folder that is not within `root`.
    """
    for file in sorted(root.glob("*.y*ml"), key=lambda one: (one.stem not in ("data", "dataset"), one.name)):
        try:
            stated = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            if file.stem != "data":
                continue
            raise InputError(f"{file}: not valid YAML ({' '.join(str(error).split())[:100]}); write the file again") from None
        if isinstance(stated, dict) and stated.get("names") and stated.get("train"):
            break
    else:
        return None
    names = stated["names"]
    names = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(names, dict) or not all(isinstance(key, int) for key in names):
        raise InputError(f"{file}: names is {show(names)}; give a list of the classes' names")
    entries = {split: next((stated[one] for one in called if stated.get(one)), None) for split, called in CALLED.items()}
    images = {split: _yolo_images(file, stated.get("path"), entry, split) for split, entry in entries.items() if entry}
    images = {split: found for split, found in images.items() if found is not None}
    categories = [{"id": number + 1, "name": str(name)} for number, name in sorted(names.items())]

    def read() -> Read:
        image = partial(_yolo_image, root=root, classes=names.keys(), pose=bool(stated.get("kpt_shape")))
        return {split: (_content(categories, map(image, found), root), root) for split, found in images.items()}

    return set(images), read


def _yolo_images(file: Path, base: Any, entry: Any, split: str) -> list[Path] | None:
    """Images of a split: those in folders, or listed in text files. None for a test split that is named and not there."""
    root, found = file.parent, []
    for one in entry if isinstance(entry, list) else [entry]:
        # Roboflow writes ../train/images and means ./train/images; many name a place on their own disk as `path`.
        tried = [root / str(base or "") / str(one), root / str(one), root / str(one).lstrip("./")]
        place = next((path for path in tried if path.exists() and path.resolve().is_relative_to(root.resolve())), None)
        if place is None:
            if split == "test":
                return None
            raise InputError(
                f"{file}: {split} is {show(one)}, which is not there within {root}; name a folder of images beside {file.name}"
            )
        if place.is_dir():
            found += sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES)
        else:
            found += [root / line for line in _lines(place)]
    return found


def _yolo_image(path: Path, root: Path, classes: Collection[int], pose: bool) -> tuple[str, int, int, Iterator[dict[str, Any]]]:
    # YOLO's coordinates are those of the image as it is seen, turned by EXIF.
    inside = not steers(str(path)) and path.resolve().is_relative_to(root.resolve())
    width, height = _size(path) if inside else (1, 1)  # refused when the images are checked
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
    before, folder, after = f"/{name}".rpartition("/images/")
    labels = (root / (f"{before}/labels/{after}" if folder else name).lstrip("/")).with_suffix(".txt")
    lines = _lines(labels) if labels.is_file() else []
    values = 5 if pose else None  # key points follow the box
    return name, width, height, (_yolo_object(line.split()[:values], width, height, classes) for line in lines)


def _lines(file: Path) -> list[str]:
    """The lines of a text that are not empty."""
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read ({type(error).__name__}); write the file again") from None


def _yolo_object(words: list[str], width: int, height: int, classes: Collection[int]) -> dict[str, Any]:
    """A line "class x y w h", x and y of the centre, or "class x1 y1 x2 y2 ..." of an outline; all but the class relative to the image."""
    try:
        kind = int(float(words[0]))
    except (ValueError, OverflowError):
        kind = words[0]
    category = kind + 1 if kind in classes else f"class {kind}"
    try:
        values = [float(word) for word in words[1:]]
    except ValueError:
        return {"category_id": category, "bbox": words[1:]}
    if len(values) == 4:
        x, y, w, h = values
        corners = x - w / 2, y - h / 2, x + w / 2, y + h / 2
    elif len(values) >= 6 and len(values) % 2 == 0:
        corners = min(values[0::2]), min(values[1::2]), max(values[0::2]), max(values[1::2])
    else:
        return {"category_id": category, "bbox": values}
    return {"category_id": category, "bbox": _box(corners, width, height)}


def _box(corners: tuple[float, ...], width: float = 1, height: float = 1) -> list[float]:
    left, top, right, bottom = corners
    return [round(value, 3) for value in (left * width, top * height, (right - left) * width, (bottom - top) * height)]


def voc(root: Path) -> tuple[set[str], Callable[[], Read]] | None:
    """The splits of a Pascal VOC folder ("train" alone where nothing divides it), and what reads them; None if there are no xml files.

    Raises:
        InputError: a list of images names one that has no xml file.
    """
    files = _voc_files(root)
    if not files:
        years = [folder.parent for folder in root.glob("VOCdevkit/VOC*/Annotations")]
        return voc(years[0]) if len(years) == 1 else None

    def read() -> Read:
        parsed = {split: [_voc_image(path, folder) for path in paths] for split, (paths, folder) in files.items()}
        names = sorted({one["name"] for images in parsed.values() for _, _, _, objects in images for one in objects})
        ids = {name: number for number, name in enumerate(names, start=1)}
        categories = [{"id": number, "name": name} for name, number in ids.items()]
        found: Read = {}
        for split, images in parsed.items():
            named = ((*one[:3], ({"category_id": ids[o.pop("name")]} | o for o in one[3])) for one in images)
            found[split] = _content(categories, named, files[split][1]), files[split][1]
        return found

    return set(files), read


def _voc_files(root: Path) -> dict[str, tuple[list[Path], Path]]:
    """By split the xml files, and the folder of their images: VOC's own layout, Roboflow's, or one folder for all."""
    own = root / "Annotations" if (root / "Annotations").is_dir() else root / "annotations"
    images = next((root / name for name in ("JPEGImages", "images") if (root / name).is_dir()), None)
    every = sorted(own.glob("*.xml"))
    if every and images:
        found = {}
        for split in CALLED:
            listed = root / "ImageSets" / "Main" / f"{split}.txt"
            if listed.is_file():
                stems = [line.split()[0] for line in _lines(listed)]
                found[split] = [own / f"{stem}.xml" for stem in stems], images
                if absent := [stem for stem in stems if not (own / f"{stem}.xml").is_file()]:
                    raise InputError(f"{listed}: {absent[0]!r} has no file in {own} (nor have {len(absent) - 1} others); correct the list")
        return {split: one for split, one in found.items() if one[0]} if "train" in found else {"train": (every, images)}
    places = {split: next((root / name for name in called if (root / name).is_dir()), root / split) for split, called in CALLED.items()}
    found = {split: (sorted(place.glob("*.xml")), place) for split, place in places.items() if any(place.glob("*.xml"))}
    beside = sorted(root.glob("*.xml"))
    return found or ({"train": (beside, images or root)} if beside else {})


def _voc_image(file: Path, folder: Path) -> tuple[str, int, int, list[dict[str, Any]]]:
    try:
        content = file.read_bytes()
        if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
            raise InputError(f"{file}: declares entities, which annotations do not need and which are not read; remove them")
        tree = ElementTree.fromstring(content)
    except (OSError, ElementTree.ParseError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: not valid XML ({str(error)[:100]}); write the file again") from None
    stated = Path((tree.findtext("filename") or "").replace("\\", "/")).name
    beside = (folder / f"{file.stem}{suffix}" for end in sorted(SUFFIXES) for suffix in (end, end.upper()))
    path = folder / stated if stated and (folder / stated).is_file() else next((one for one in beside if one.is_file()), None)
    if path is None:
        raise InputError(f"{file}: its image {show(stated or file.stem)} is not in {folder}; put it there, or remove the file")
    sides = [_float(tree.findtext(f"size/{side}")) for side in ("width", "height")]
    width, height = [int(side) for side in sides] if all(map(is_length, sides)) else _size(path)
    # VOC's own pixels are counted from 1 and both ends belong to the box; tools that write its form count from 0.
    first = 1 if "VOC" in (tree.findtext("source/database") or "") else 0
    objects = []
    for one in tree.iter("object"):
        corners = [_float(one.findtext(f"bndbox/{name}")) for name in ("xmin", "ymin", "xmax", "ymax")]
        bbox = corners if None in corners else _box((corners[0] - first, corners[1] - first, *corners[2:]))
        difficult = (one.findtext("difficult") or "0").strip() == "1"
        objects.append({"name": (one.findtext("name") or "").strip(), "bbox": bbox, "iscrowd": int(difficult)})
    return path.name, width, height, objects


def _float(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _size(path: Path) -> tuple[int, int]:
    """Width and height of an image as it is seen."""
    with open_image(path) as image:
        turned = image.format != "PNG" and image.getexif().get(ORIENTATION) in QUARTER_TURNS
        return (image.height, image.width) if turned else image.size


def _content(categories: list[dict], images: Iterator[tuple], folder: Path) -> dict[str, Any]:
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (name, width, height, objects) in enumerate(images, start=1):
        entries.append({"id": number, "file_name": name, "width": width, "height": height})
        annotations += [{"image_id": number, "iscrowd": 0} | one for one in objects]
    annotations = [{"id": number} | one for number, one in enumerate(annotations, start=1)]
    return {"images": entries, "annotations": annotations, "categories": categories}
