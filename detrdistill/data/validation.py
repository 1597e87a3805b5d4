"""Annotations are checked before training: each fault is listed by image and annotation id with what was done about it.

A fault of one annotation costs that annotation at most (dropped, clipped or repaired); a fault that makes ids, classes or images
doubtful refuses the file. Whatever the JSON holds, the only exception is `InputError`.
"""

import json
import math
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

from detrdistill.data.images import LONGEST, check_image
from detrdistill.errors import InputError

Policy = Literal["drop", "clip", "repair", "refuse"]
SMALLEST = 0.01  # pixels; COCO writes two decimals, so less than this is a side of zero
LARGEST_ID = 2**53  # pycocotools keeps ids in float64 arrays
SHOWN = 3
UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # line breaks and what else steers a terminal; halves of surrogate pairs, which no file can hold


@dataclass(frozen=True)
class Fault:
    """One finding. `policy` says what was done: drop (the annotation), clip (the box), repair (a field), refuse (the file)."""

    kind: str
    image_id: int | None
    annotation_id: int | None
    detail: str
    policy: Policy

    def __str__(self) -> str:
        named = (("image", self.image_id), ("annotation", self.annotation_id))
        where = ", ".join(f"{name} {number}" for name, number in named if number is not None)
        return f"{where}: {self.detail}" if where else self.detail


@dataclass
class Report:
    """All faults of one annotation file."""

    file: Path
    images: int = 0
    annotations: int = 0
    faults: list[Fault] = field(default_factory=list)

    def __str__(self) -> str:
        return self.text(SHOWN)

    def text(self, most: int | None = None) -> str:
        """All faults by kind, or of each kind the first `most`."""
        lines = [f"{self.file}: {self.images} images, {self.annotations} annotations, {len(self.faults)} faults"]
        for (kind, policy), number in Counter((fault.kind, fault.policy) for fault in self.faults).most_common():
            found = [str(fault) for fault in self.faults if (fault.kind, fault.policy) == (kind, policy)]
            lines += [f"  {number} x {kind} ({policy})", *(f"    {fault}" for fault in found[:most])]
            if most is not None and number > most:
                lines.append(f"    and {number - most} more")
        return "\n".join(lines)


def load_annotations(file: Path, images: Path) -> tuple[dict[str, Any], Report]:
    """Read and validate a COCO annotation file whose images lie in `images`.

    Raises:
        InputError: the file cannot be read, or its content is refused.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8-sig"), object_hook=_without_outline)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); give a folder with COCO annotations") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid JSON ({str(error)[:100]}); write the file again") from None
    return validate(content, file, images)


def _without_outline(entry: dict[str, Any]) -> dict[str, Any]:
    """Outlines are most of a file and of no use to boxes; gone as soon as read, they take no memory."""
    entry.pop("segmentation", None)
    return entry


def validate(content: Any, file: Path, images: Path) -> tuple[dict[str, Any], Report]:
    """Clean a parsed COCO file. Annotations keep only what boxes need: id, image_id, category_id, bbox, area, iscrowd.

    Raises:
        InputError: sections, categories or images cannot be trusted, there is no image, or no annotation survives.
    """
    if not isinstance(content, dict):
        raise InputError(f"{file}: the top level is a {type(content).__name__}, not an object; COCO has images, annotations and categories")
    for section in ("images", "annotations", "categories"):
        if not isinstance(content.get(section), list):
            found = "is missing" if section not in content else f"is {_show(content[section])}, not a list"
            raise InputError(f"{file}: section '{section}' {found}; COCO has lists of images, annotations and categories")
    if not content["images"]:
        raise InputError(f"{file}: section 'images' is empty; give at least one image")
    report = Report(Path(file), len(content["images"]), len(content["annotations"]))
    categories = list(_categories(content["categories"], report))
    entries = list(_images(content["images"], Path(images), report))
    _refuse(report)
    annotations = list(_annotations(content["annotations"], {i["id"]: i for i in entries}, {c["id"] for c in categories}, report))
    if content["annotations"] and not annotations:
        raise InputError(f"{file}: none of {report.annotations} annotations can be used, the first for {report.faults[0]}; correct it")
    if len(annotations) > 1 and all(max(a["bbox"]) <= 1 for a in annotations):
        raise InputError(f"{file}: all boxes lie within one pixel, as if relative to the image; give [x, y, width, height] in pixels")
    return {"info": {}, "licenses": [], "images": entries, "annotations": annotations, "categories": categories}, report


def _refuse(report: Report) -> None:
    """One line for all faults that refuse the file: the first in full, of the others ids."""
    refused = [fault for fault in report.faults if fault.policy == "refuse"]
    if refused:
        ids = [str(fault.image_id) for fault in refused[1:] if fault.image_id is not None]
        others = f" (and {len(refused) - 1} more" + (f": images {', '.join(ids[:10])}" if ids else "") + ")" if refused[1:] else ""
        raise InputError(f"{report.file}: {refused[0]}{others}; correct the file or the folder")


def _categories(entries: list[Any], report: Report) -> Iterable[dict[str, Any]]:
    ids, names = set(), set()

    def refuse(kind: str, detail: str) -> None:
        report.faults.append(Fault(kind, None, None, detail, "refuse"))

    if not entries:
        refuse("no categories", "'categories' is empty, so there is nothing to detect")
    for k, entry in enumerate(entries):
        number, name = (entry.get("id"), entry.get("name")) if isinstance(entry, dict) else (None, None)
        if not _is_id(number):
            refuse("category id", f"categories[{k}] = {_show(entry)} has no whole number as 'id'")
        elif not isinstance(name, str) or not name.strip() or _steers(name):
            refuse("category name", f"category {number} has the name {_show(name)}; every class needs one of printable letters")
        elif number in ids:
            refuse("duplicate category id", f"category id {number} is used twice")
        elif name in names:
            refuse("duplicate category name", f"category name {_show(name)} is used twice, by category {number} again")
        else:
            ids.add(number)
            names.add(name)
            yield {"id": number, "name": name}


def _images(entries: list[Any], folder: Path, report: Report) -> Iterable[dict[str, Any]]:
    ids = set()
    real_folder = lru_cache(maxsize=None)(os.path.realpath)
    for k, entry in enumerate(entries):
        number = entry.get("id") if isinstance(entry, dict) else None
        if not _is_id(number):
            report.faults.append(Fault("image id", None, None, f"images[{k}] = {_show(entry)} has no whole number as 'id'", "refuse"))
            continue
        if number in ids:
            report.faults.append(Fault("duplicate image id", number, None, "this image id is used twice", "refuse"))
            continue
        ids.add(number)
        width, height = (_number(entry.get(side)) for side in ("width", "height"))
        if not (_is_length(width) and _is_length(height)):
            size = f"width {_show(entry.get('width'))}, height {_show(entry.get('height'))}; whole numbers of pixels above 0 are needed"
            report.faults.append(Fault("image size", number, None, size, "refuse"))
        elif max(width, height) > LONGEST * min(width, height):
            shape = f"width {width}, height {height}; the longer side may be {LONGEST} times the shorter, so cut the image into parts"
            report.faults.append(Fault("image shape", number, None, shape, "refuse"))
        elif fault := _path_fault(entry.get("file_name"), folder, real_folder) or _image_fault(entry, folder):
            report.faults.append(Fault(fault[0], number, None, fault[1], "refuse"))
        else:
            yield entry | {"width": int(width), "height": int(height)}


def _steers(text: str) -> bool:
    return any(unicodedata.category(letter) in UNPRINTABLE for letter in text)


def _path_fault(name: Any, folder: Path, real_folder: Callable[[str], str]) -> tuple[str, str] | None:
    """Kind and detail if `name` is no regular file inside the image folder. `real_folder` is a cached realpath: it costs ten lstats."""
    if not isinstance(name, str) or not name:
        return "file name", f"file_name is {_show(name)}, not text"
    if _steers(name):
        return "file name", f"file_name {_show(name)} has letters that cannot be printed"
    path = os.path.join(folder, name)
    try:
        parent, root = real_folder(os.path.dirname(path)), real_folder(str(folder))
        real = os.path.realpath(path) if stat.S_ISLNK(os.lstat(path).st_mode) else os.path.join(parent, "")
        if os.path.isabs(name) or os.path.commonpath([root, real]) != root:
            return "file outside the folder", f"file_name {_show(name)} leads out of {folder}; images must lie inside"
        if not stat.S_ISREG(os.stat(path).st_mode):
            return "missing image", f"file_name {_show(name)} in {folder} is not a file"
    except FileNotFoundError:
        return "missing image", f"file_name {_show(name)} is missing in {folder}"
    except (OSError, ValueError) as error:  # ValueError: a NUL or half a surrogate pair in the name
        reason = getattr(error, "strerror", None) or "impossible name"
        return "missing image", f"file_name {_show(name)} in {folder} cannot be read ({reason})"
    return None


def _image_fault(entry: dict[str, Any], folder: Path) -> tuple[str, str] | None:
    """Kind and detail if the file's header is none of an image of the stated size: known now, not in the middle of an epoch."""
    try:
        check_image(folder / entry["file_name"], int(entry["width"]), int(entry["height"]))
    except InputError as fault:
        return "image file", str(fault)
    return None


def _annotations(entries: list[Any], images: dict[int, dict], categories: set[int], report: Report) -> Iterable[dict[str, Any]]:
    # Repaired ids follow the largest that the file names, so that none of them meets a later one.
    fresh = max((entry["id"] for entry in entries if isinstance(entry, dict) and _is_id(entry.get("id"))), default=0)
    fresh = max(fresh, 0)
    seen: dict[int, tuple] = {}
    for k, entry in enumerate(entries):
        if not isinstance(entry, dict):
            report.faults.append(Fault("no annotation", None, None, f"annotations[{k}] = {_show(entry)} is not an object", "drop"))
            continue
        number, image_id, category_id, crowd = (entry.get(key) for key in ("id", "image_id", "category_id", "iscrowd"))
        ids = [value if _is_id(value) else None for value in (image_id, number)]
        note = partial(_note, report, ids, "" if _is_id(number) else f"annotations[{k}]: ")
        if not _is_id(image_id) or image_id not in images:
            note("unknown image", f"image_id {_show(image_id)} is not among the images")
        elif not _is_id(category_id) or category_id not in categories:
            note("unknown category", f"category_id {_show(category_id)} is not among the categories")
        elif crowd is not None and not (isinstance(crowd, int) and crowd in (0, 1)):  # true and false are clear enough
            note("iscrowd", f"iscrowd is {_show(crowd)}, not 0 or 1")
        elif box := _box(entry.get("bbox"), images[image_id], note):
            area = _number(entry.get("area", box[2] * box[3]))
            if area is None or area < 0:
                note("area", f"area is {_show(entry['area'])}; width times height is used", "repair")
                area = box[2] * box[3]
            what = (image_id, category_id, tuple(box), bool(crowd))
            if _is_id(number) and seen.get(number) == what:
                note("duplicate annotation", "the same annotation is listed twice")
                continue
            if not _is_id(number) or number <= 0 or number in seen:  # COCOeval takes id 0 as "not matched"
                fresh += 1
                used = _is_id(number) and number > 0
                note("annotation id", f"id {_show(number)} is {'used twice' if used else 'no number above 0'}; {fresh} is used", "repair")
                number = fresh
            seen[number] = what
            yield {"id": number, "image_id": image_id, "category_id": category_id, "bbox": box, "area": area, "iscrowd": int(bool(crowd))}


def _note(report: Report, ids: list[int | None], where: str, kind: str, detail: str, policy: Policy = "drop") -> None:
    report.faults.append(Fault(kind, *ids, where + detail, policy))


def _box(value: Any, image: dict, note: Callable[..., None]) -> list[float] | None:
    """The box [x, y, w, h] within its image, or None if it is dropped."""
    numbers = [_number(v) for v in value] if isinstance(value, list) else []
    if len(numbers) != 4 or None in numbers:
        return note("box", f"bbox is {_show(value)}, not four finite numbers")
    x, y, w, h = numbers
    if w < SMALLEST or h < SMALLEST:
        return note("empty box", f"bbox {_show(value)} has no width or no height")
    left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + w, float(image["width"])), min(y + h, float(image["height"]))
    if right - left < SMALLEST or bottom - top < SMALLEST:
        return note("box outside", f"bbox {_show(value)} lies outside the image of {image['width']} x {image['height']}")
    clipped = [left, top, right - left, bottom - top]
    beyond = max(left - x, top - y, x + w - right, y + h - bottom)
    if beyond <= 0:
        return numbers
    if beyond > SMALLEST:  # less is rounding, clipped without a word
        note("box partly outside", f"bbox {_show(value)} reaches out of the image of {image['width']} x {image['height']}", "clip")
    return clipped


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST_ID


def _is_length(value: float | None) -> bool:
    return value is not None and 1 <= value < 2**20 and value == int(value)


def _number(value: Any) -> float | None:
    """The value if it is a finite number, not a bool; else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value) if isinstance(value, float) or abs(value) >= LARGEST_ID else value
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def _show(value: Any) -> str:
    """A value on one line, cut short."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # integers of more than 4300 digits, nests
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
