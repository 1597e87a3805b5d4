"""Annotations are checked before training: each fault is listed by image and annotation id with what was done about it.

A fault of one annotation costs that annotation at most (dropped, clipped or repaired); a fault that makes ids, classes or images
doubtful refuses the file. Whatever the JSON holds, the only exception is `InputError`.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from detrdistill.data.boxes import box_of_outline, finite_box, read_box, require_coco_form
from detrdistill.data.file_names import ImageFolder
from detrdistill.data.images import LONGEST, check_image, doubts
from detrdistill.data.values import counted, is_id, is_length, number, show, show_number, steers, whole
from detrdistill.errors import InputError

Policy = Literal["drop", "clip", "repair", "refuse"]
SHOWN = 3
MANY_CROWDS = 0.1  # of all annotations; COCO has 0.01


class NoObjectsError(InputError):
    """A file has no object to train on, nor to measure AP with."""


@dataclass(frozen=True)
class Fault:
    """One finding. `policy` says what was done: drop (the annotation), clip (the box), repair (a field), refuse (the file).

    Attributes:
        file_name: of the image, where it is known; YOLO and VOC have no other name for it.
    """

    kind: str
    image_id: int | None
    annotation_id: int | None
    detail: str
    policy: Policy
    file_name: str | None = None

    def __str__(self) -> str:
        image = "" if self.image_id is None else f"image {self.image_id}" + (f" ({self.file_name})" if self.file_name else "")
        annotation = "" if self.annotation_id is None else f"annotation {self.annotation_id}"
        where = ", ".join(filter(None, (image, annotation)))
        return f"{where}: {self.detail}" if where else self.detail


@dataclass
class Report:
    """What was found in one annotation file.

    Attributes:
        faults: of single annotations and images, and what was done.
        warnings: about the file as a whole, where only its owner can tell whether it is meant so; nothing was done.
    """

    file: Path
    images: int = 0
    annotations: int = 0
    faults: list[Fault] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return self.text(SHOWN)

    def __bool__(self) -> bool:
        return bool(self.faults or self.warnings)

    def text(self, most: int | None = None) -> str:
        """All warnings, and all faults by kind, or of each kind the first `most`."""
        lines = [
            f"{self.file}: {counted(self.images, 'image')}, {counted(self.annotations, 'annotation')}, {counted(len(self.faults), 'fault')}"
        ]
        lines += [f"  warning: {one}" for one in self.warnings]
        for (kind, policy), count in Counter((fault.kind, fault.policy) for fault in self.faults).most_common():
            found = [str(fault) for fault in self.faults if (fault.kind, fault.policy) == (kind, policy)]
            lines += [f"  {count} x {kind} ({policy})", *(f"    {fault}" for fault in found[:most])]
            if most is not None and count > most:
                lines.append(f"    and {count - most} more")
        return "\n".join(lines)


def load_annotations(file: Path, images: Path) -> tuple[dict[str, Any], Report]:
    """Read and validate a COCO annotation file whose images lie in `images`.

    Raises:
        InputError: the file cannot be read, or its content is refused.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8-sig"), object_hook=without_outline)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); give a folder with COCO annotations") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid JSON ({str(error)[:100]}); write the file again") from None
    return validate(content, file, images)


def without_outline(entry: dict[str, Any]) -> dict[str, Any]:
    """Outlines are most of a file and of no use beside boxes; gone as soon as read, they take no memory."""
    if entry.get("bbox"):
        entry.pop("segmentation", None)
    return entry


def validate(content: Any, file: Path, images: Path) -> tuple[dict[str, Any], Report]:
    """Clean a parsed COCO file. Annotations keep only what boxes need: id, image_id, category_id, bbox, area, iscrowd.

    Raises:
        InputError: sections, categories or images cannot be trusted, there is no image, boxes are of another form than COCO's.
        NoObjectsError: no annotation is of an object, or none survives.
    """
    if not isinstance(content, dict):
        raise InputError(f"{file}: the top level is a {type(content).__name__}, not an object; COCO has images, annotations and categories")
    for section in ("images", "annotations", "categories"):
        if not isinstance(content.get(section), list):
            found = "is missing" if section not in content else f"is {show(content[section])}, not a list"
            raise InputError(f"{file}: section '{section}' {found}; COCO has lists of images, annotations and categories")
    if not content["images"]:
        raise InputError(f"{file}: section 'images' is empty; give at least one image")
    report = Report(Path(file), len(content["images"]), len(content["annotations"]))
    categories = list(_categories(_without_root(content, report), report))
    entries = list(_images(content["images"], ImageFolder(Path(images)), report))
    _refuse(report)
    by_id = {entry["id"]: entry for entry in entries}
    boxes: list[tuple[list[float], float | None, dict]] = []
    annotations = list(_annotations(content["annotations"], by_id, {c["id"] for c in categories}, report, boxes))
    try:
        unsure = require_coco_form(boxes)
    except InputError as fault:
        raise InputError(f"{file}: {fault}") from None
    report.warnings += [unsure] if unsure else []
    _require_objects(annotations, report)
    return {"info": {}, "licenses": [], "images": entries, "annotations": annotations, "categories": categories}, report


def _refuse(report: Report) -> None:
    """One line for all faults that refuse the file: the first in full, of the others ids."""
    refused = [fault for fault in report.faults if fault.policy == "refuse"]
    if refused:
        ids = [str(fault.image_id) for fault in refused[1:] if fault.image_id is not None]
        others = f" (and {len(refused) - 1} more" + (f": images {', '.join(ids[:10])}" if ids else "") + ")" if refused[1:] else ""
        raise InputError(f"{report.file}: {refused[0]}{others}; correct the file or the folder")


def _require_objects(annotations: list[dict], report: Report) -> None:
    """Refuse a file without objects, and warn of one where many are crowds."""
    crowds, listed, dropped = sum(one["iscrowd"] for one in annotations), report.annotations, report.annotations - len(annotations)
    told = "are crowds (iscrowd 1), which are neither trained on nor counted; CVAT writes masks so; set iscrowd 0"
    if len(annotations) > crowds:
        if crowds > MANY_CROWDS * listed:
            report.warnings.append(f"{crowds} of {listed} annotations {told} where they are objects")
        return
    if not listed:
        raise NoObjectsError(f"{report.file}: no objects, so AP cannot be measured, nor anything learned; give annotated images")
    if not dropped:
        raise NoObjectsError(f"{report.file}: 0 objects, {crowds} crowds: all {listed} annotations {told}")
    first = next(fault for fault in report.faults if fault.policy == "drop")
    those = f"{dropped} of {listed} annotations cannot" if crowds else f"none of {listed} annotations can"
    raise NoObjectsError(
        f"{report.file}: no objects: {those} be used, the first for {first}; correct it" + f"; {crowds} {told}" * (crowds > 0)
    )


def _without_root(content: dict, report: Report) -> list[Any]:
    """The categories but for Roboflow's root: of no annotation, of no category above, and named by all others as that above them."""
    entries = content["categories"]
    used = {whole(one.get("category_id")) for one in content["annotations"] if isinstance(one, dict)}
    for root in entries:
        others = [one for one in entries if one is not root]
        if not others or not all(isinstance(one, dict) for one in entries) or root.get("supercategory") not in (None, "", "none"):
            continue
        name, number = root.get("name"), whole(root.get("id"))
        if number is not None and number not in used and isinstance(name, str) and all(one.get("supercategory") == name for one in others):
            detail = f"category {number} {show(name)} is above all others and of no annotation, as Roboflow writes it; it is left out"
            report.faults.append(Fault("root category", None, None, detail, "repair"))
            return others
    return entries


def _categories(entries: list[Any], report: Report) -> Iterable[dict[str, Any]]:
    ids, names = set(), set()

    def refuse(kind: str, detail: str) -> None:
        report.faults.append(Fault(kind, None, None, detail, "refuse"))

    if not entries:
        refuse("no categories", "'categories' is empty, so there is nothing to detect")
    for k, entry in enumerate(entries):
        number, name = (whole(entry.get("id")), entry.get("name")) if isinstance(entry, dict) else (None, None)
        if number is None:
            refuse("category id", f"categories[{k}] = {show(entry)} has no whole number as 'id'")
        elif not isinstance(name, str) or not name.strip() or steers(name):
            refuse("category name", f"category {number} has the name {show(name)}; every class needs one of printable letters")
        elif number in ids:
            refuse("duplicate category id", f"category id {number} is used twice")
        elif name in names:
            refuse("duplicate category name", f"category name {show(name)} is used twice, by category {number} again")
        else:
            ids.add(number)
            names.add(name)
            yield {"id": number, "name": name}


def _images(entries: list[Any], folder: ImageFolder, report: Report) -> Iterable[dict[str, Any]]:
    files: dict[str, int] = {}
    ids, shared, headers = set(), [], {}
    for k, entry in enumerate(entries):
        number = whole(entry.get("id")) if isinstance(entry, dict) else None
        if number is None:
            report.faults.append(Fault("image id", None, None, f"images[{k}] = {show(entry)} has no whole number as 'id'", "refuse"))
            continue
        if number in ids:
            report.faults.append(Fault("duplicate image id", number, None, "this image id is used twice", "refuse"))
            continue
        ids.add(number)
        note = partial(_note, report, [number, None], "", None)  # details name the file
        if size := _size_fault(entry):
            note(*size, "refuse")
            continue
        name, fault = folder.find(entry.get("file_name"))
        try:
            if fault is None:
                headers[name] = check_image(folder.folder / name, int(entry["width"]), int(entry["height"]))
        except InputError as damage:  # known now, not in the middle of an epoch
            fault = "image file", str(damage)
        if fault is not None:
            note(*fault, "refuse")
            continue
        if name != entry["file_name"]:
            form = "" if entry["file_name"].replace("\\", "/").endswith(name) else ", in another form of Unicode"
            note("file name", f"file_name {show(entry['file_name'])} is there as {show(name)}{form}", "repair")
        if (first := files.setdefault(folder.same_file(name), number)) != number:
            shared.append(f"{first} and {number}")
        yield entry | {"id": number, "file_name": name, "width": int(entry["width"]), "height": int(entry["height"])}
    if shared:
        report.warnings.append(
            f"{len(shared)} of {len(entries)} images have another's file: ids {', '.join(shared[:SHOWN])}; list each file once"
        )
    report.warnings += doubts(headers, folder.folder)


def _size_fault(entry: dict) -> tuple[str, str] | None:
    width, height = (number(entry.get(side)) for side in ("width", "height"))
    if not (is_length(width) and is_length(height)):
        stated = f"width {show_number(entry.get('width'))}, height {show_number(entry.get('height'))}"
        return "image size", f"{stated}; whole numbers of pixels above 0 are needed"
    if max(width, height) > LONGEST * min(width, height):
        shape = f"width {width}, height {height}; the longer side may be {LONGEST} times the shorter, so cut the image into parts"
        return "image shape", shape
    return None


def _annotations(
    entries: list[Any], images: dict[int, dict], categories: set[int], report: Report, boxes: list[tuple]
) -> Iterable[dict[str, Any]]:
    """Those that can be used; `boxes` is filled with what they list."""
    # Repaired ids follow the largest that the file names, so that none of them meets a later one.
    fresh = max((whole(entry.get("id")) or 0 for entry in entries if isinstance(entry, dict)), default=0)
    fresh = max(fresh, 0)
    seen: dict[int, tuple] = {}
    for k, entry in enumerate(entries):
        if not isinstance(entry, dict):
            report.faults.append(Fault("no annotation", None, None, f"annotations[{k}] = {show(entry)} is not an object", "drop"))
            continue
        stated = [entry.get(key) for key in ("id", "image_id", "category_id", "iscrowd")]
        own, image_id, category_id, crowd = (whole(value) if isinstance(value, float) else value for value in stated)
        ids = [value if is_id(value) else None for value in (image_id, own)]
        image = images.get(image_id) if is_id(image_id) else None
        note = partial(_note, report, ids, "" if is_id(own) else f"annotations[{k}]: ", image and image["file_name"])
        if image is None:
            note("unknown image", f"image_id {show_number(entry.get('image_id'))} is not among the images")
        elif not is_id(category_id) or category_id not in categories:
            note("unknown category", f"category_id {show_number(entry.get('category_id'))} is not among the categories")
        elif entry.get("iscrowd") is not None and not (isinstance(crowd, int) and crowd in (0, 1)):  # true and false are clear enough
            note("iscrowd", f"iscrowd is {show_number(entry['iscrowd'])}, not 0 or 1")
        elif box := _box(entry, image, note, boxes):
            if any(isinstance(value, float) and whole(value) is not None for value in stated):
                note("whole numbers as 1.0", f"id, image_id, category_id, iscrowd are {', '.join(map(show, stated))}", "repair")
            area = number(entry.get("area", box[2] * box[3]))
            if area is None or area < 0:
                note("area", f"area is {show(entry['area'])}; width times height is used", "repair")
                area = box[2] * box[3]
            what = (image_id, category_id, tuple(box), bool(crowd))
            if is_id(own) and seen.get(own) == what:
                note("duplicate annotation", "the same annotation is listed twice")
                continue
            if not is_id(own) or own <= 0 or own in seen:  # COCOeval takes id 0 as "not matched"
                fresh += 1
                used = is_id(own) and own > 0
                note("annotation id", f"id {show(stated[0])} is {'used twice' if used else 'no number above 0'}; {fresh} is used", "repair")
                own = fresh
            seen[own] = what
            yield {"id": own, "image_id": image_id, "category_id": category_id, "bbox": box, "area": area, "iscrowd": int(bool(crowd))}


def _box(entry: dict, image: dict, note: partial, boxes: list[tuple]) -> list[float] | None:
    """The annotation's box within its image, from its outline where it has none; None if it is dropped."""
    listed = entry.get("bbox")
    if not listed and "segmentation" in entry:
        around = box_of_outline(entry["segmentation"], image)
        if around is None:
            return note("box", f"bbox is {show(listed)}, and no box can be put around its segmentation {show(entry['segmentation'])}")
        note("no box", f"bbox is {show(listed)}; {show(around)} around its segmentation is used", "repair")
        listed = around
    elif (numbers := finite_box(listed)) is not None:
        boxes.append((numbers, number(entry.get("area")), image))
    return read_box(listed, image, note)


def _note(
    report: Report, ids: list[int | None], where: str, file_name: str | None, kind: str, detail: str, policy: Policy = "drop"
) -> None:
    report.faults.append(Fault(kind, *ids, where + detail, policy, file_name))
