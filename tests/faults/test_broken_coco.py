"""Broken COCO folders, made up by Hypothesis: refused by id when they are opened, or usable to the last image.

A file is broken in its json (fields missing, of other types, extreme, or the text itself cut and overwritten) and in its images
(cut, overwritten, other formats and modes). What opens is loaded, augmented, collated, cropped and evaluated.
"""

import io
import json
import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from detrdistill.data.coco import CocoDataset, collate, open_dataset
from detrdistill.data.crops import object_crops
from detrdistill.data.summary import look_at_images
from detrdistill.data.transforms import build_transform
from detrdistill.errors import InputError
from detrdistill.recipes.parts import Folder, Resize
from detrdistill.training.evaluation import coco_metrics
from tests.data.test_layouts import voc, yolo
from tests.folders import write_folder

SIZES = {1: (40, 30), 2: (30, 40), 3: (33, 33)}
GOOD = {
    "images": [{"id": n, "file_name": f"{n}.jpg", "width": w, "height": h} for n, (w, h) in SIZES.items()],
    "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
    "annotations": [
        {"id": 10, "image_id": 1, "category_id": 7, "bbox": [1, 2, 10, 12], "area": 100, "iscrowd": 0},
        {"id": 11, "image_id": 1, "category_id": 3, "bbox": [5, 5, 8, 8], "area": 64, "iscrowd": 1},
        {"id": 12, "image_id": 2, "category_id": 3, "bbox": [0, 0, 30, 40], "area": 1200, "iscrowd": 0},
    ],
}
TRANSFORMS = [build_transform(Resize(train=train, short=32, long=64), train=train != "none") for train in ("none", "detr", "jitter")]

NUMBERS = st.sampled_from(
    [math.nan, math.inf, 0, -1, 1, 2, 3, 7, 10, 12, 30, 40, 0.004, 0.5, -0.0, 1e-300, 1e300, 2**31, 2**53 - 1, -(2**53) + 1, 2**63, 10**400]
)
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 50)
    | NUMBERS
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["", "\ud800", "\0", "../1.jpg", "1.jpg"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["id", "name", "bbox", "width", "x"]), inner, max_size=4),
    max_leaves=5,
)
RINGS = st.lists(st.lists(NUMBERS | st.floats(-5, 60), max_size=8), max_size=3)
RUNS = st.lists(st.integers(-1, 1300), max_size=6) | st.text("0123Oo`~\u00e9", max_size=8)
MASKS = st.fixed_dictionaries({"size": st.sampled_from([[30, 40], [40, 30], [0, 0], [30]]), "counts": RUNS | st.just([40, 20, 1140])})
BOXES = st.lists(NUMBERS | st.floats(-5, 60), min_size=4, max_size=4)
PLACES = [(section, k, key) for section, entries in GOOD.items() for k, entry in enumerate(entries) for key in entry]
CHANGES = st.one_of(
    st.tuples(st.sampled_from(PLACES), JUNK | NUMBERS),
    st.tuples(st.sampled_from([place for place in PLACES if place[2] == "bbox"]), BOXES),
    st.tuples(st.sampled_from(PLACES), st.just(KeyError)),  # the field is missing
    st.tuples(st.sampled_from([("annotations", k, "outline") for k in range(3)]), RINGS | MASKS | JUNK),  # in the place of a box
    st.tuples(st.sampled_from(PLACES), st.sampled_from([1.0, 2.0, 3.0, 7.0, 10.0, 30.0])),  # whole numbers as pandas writes them
    st.tuples(st.sampled_from([*GOOD]), JUNK),  # a whole section
    st.tuples(st.sampled_from([*GOOD]), st.just("twice")),
)
FORMATS = [("JPEG", mode) for mode in ("RGB", "L", "CMYK")] + [("PNG", mode) for mode in ("RGBA", "P", "1", "I;16", "LA")]
FORMATS += [
    ("GIF", "P"),
    ("TIFF", "RGB"),
    ("TIFF", "F"),
    ("WEBP", "RGB"),
    ("BMP", "RGB"),
    ("PPM", "RGB"),
    ("JPEG2000", "RGB"),
    ("TGA", "RGB"),
]
# Where a file is cut, from its end, and what is written where, a header being worth more than the rest.
DAMAGES = st.tuples(st.none() | st.floats(0, 1), st.lists(st.tuples(st.floats(0, 1) | st.floats(0, 0.05), st.integers(0, 255)), max_size=4))
PICTURES = st.tuples(st.sampled_from([*SIZES]), st.sampled_from(FORMATS), st.integers(0, 9), DAMAGES)


def damaged(content: bytes, damage: tuple) -> bytes:
    cut, writes = damage
    found = bytearray(content if cut is None else content[: int(cut * len(content))])
    for place, value in writes if found else ():
        found[int(place * (len(found) - 1))] = value
    return bytes(found)


def picture(number: int, kind: tuple[str, str] = ("JPEG", "RGB"), orientation: int = 0) -> bytes:
    width, height = SIZES[number]
    noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise[..., 0].astype(np.uint16)) if kind[1] == "I;16" else Image.fromarray(noise).convert(kind[1])
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, kind[0], **({"exif": exif} if orientation and kind[0] in ("JPEG", "PNG", "TIFF", "WEBP") else {}))
    return buffer.getvalue()


def broken(changes: list[tuple]) -> dict:
    content = deepcopy(GOOD)
    for place, value in changes:
        if isinstance(place, str):
            content[place] = content[place] * 2 if value == "twice" and isinstance(content[place], list) else value
            continue
        section, k, key = place
        entries = content[section] if isinstance(content[section], list) else []
        entry = entries[k] if k < len(entries) else None
        if isinstance(entry, dict) and key == "outline":
            entry |= {"bbox": [], "segmentation": value}
        elif isinstance(entry, dict):
            entry.pop(key, None) if value is KeyError else entry.update({key: value})
    return content


def survives(folder: Path) -> str:
    """How it ended, after everything that training and evaluation do with the data was done."""
    file = folder / "instances_train.json"
    try:
        data = CocoDataset(file, folder / "images", TRANSFORMS[0])
    except InputError as refusal:
        text = str(refusal)
        assert text.startswith(f"{file}: ") and "\n" not in text and len(text) < 1000 and text.isprintable()
        return "refused"
    data.report.text().encode()
    unread = look_at_images(data)[0]
    assert all(fault.startswith(tuple(f"image {id}: " for id in data.ids)) and "\n" not in fault for fault in unread)
    for seed, transform in enumerate(TRANSFORMS):
        data = CocoDataset(file, folder / "images", transform)
        samples = []
        for index, id in enumerate(data.ids):
            try:
                samples.append(data.sample(index, seed))
            except InputError as refusal:
                assert str(refusal) in unread and f"image {id}: " in str(refusal)
        assert len(samples) == len(data) - len(unread)
        for image, target in samples:
            boxes = target["boxes"]
            assert image.isfinite().all() and max(image.shape) <= 64 + 32 and len(boxes) == len(target["labels"])
            assert boxes.isfinite().all() and (boxes >= 0).all() and (boxes <= 1).all() and (boxes[:, 2:] > 0).all()
            assert ((target["labels"] >= 0) & (target["labels"] < len(data.categories))).all()
        if samples:
            assert collate(samples).pixels.isfinite().all()
    if not unread:
        crops, labels = object_crops(data, 8, seed=0)
        assert len(crops) == len(labels) == sum(not a["iscrowd"] for a in data.coco.anns.values())
    found = [{key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.5} for a in data.coco.anns.values()]
    assert all(value is None or 0 <= value <= 100 + 1e-6 for value in coco_metrics(data.coco.dataset, found).values())
    assert not found or torch.tensor([one["bbox"] for one in found]).isfinite().all()
    return "unread images" if unread else "opened"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("broken")
    (root / "images").mkdir()
    return root


def write(folder: Path, content: bytes, pictures: list[tuple] = ()) -> None:
    for number in SIZES:
        (folder / "images" / f"{number}.jpg").write_bytes(picture(number))
    for number, kind, orientation, damage in pictures:
        (folder / "images" / f"{number}.jpg").write_bytes(damaged(picture(number, kind, orientation), damage))
    (folder / "instances_train.json").write_bytes(content)


@pytest.mark.timeout(600)
def test_broken_fields(folder: Path, examples, tries) -> None:
    ends = set()

    @examples(30, 3000)
    @given(st.lists(CHANGES, min_size=1, max_size=4))
    def run(changes: list[tuple]) -> None:
        write(folder, json.dumps(broken(changes)).encode())
        with tries("broken COCO fields"):
            ends.add(survives(folder))

    run()
    assert ends == {"refused", "opened"}, "both ways were taken"


@pytest.mark.timeout(600)
def test_broken_text(folder: Path, examples, tries) -> None:
    whole = json.dumps(GOOD).encode()

    @examples(40, 500)
    @given(DAMAGES | JUNK)
    def run(damage: object) -> None:
        write(folder, damaged(whole, damage) if isinstance(damage, tuple) else json.dumps(damage).encode())
        with tries("broken COCO text"):
            survives(folder)

    run()


@pytest.mark.timeout(600)
def test_broken_images(folder: Path, examples, tries) -> None:
    ends = set()

    @examples(40, 2500)
    @given(st.lists(PICTURES, min_size=1, max_size=3))
    def run(pictures: list[tuple]) -> None:
        write(folder, json.dumps(GOOD).encode(), pictures)
        with tries("broken image files"):
            ends.add(survives(folder))

    run()
    assert ends == {"refused", "unread images", "opened"}, "all ways were taken"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("build", [yolo, voc], ids=["yolo", "voc"])
def test_broken_files_of_other_tools(build: Callable[[Path], Path], tmp_path: Path, examples, tries) -> None:
    """A label, a list or a description, overwritten or cut: refused on one line, or opened."""
    root = build(write_folder(tmp_path / "mine"))
    files = sorted(path for path in root.rglob("*") if path.suffix in (".txt", ".xml", ".yaml"))
    ends = set()

    @examples(30, 1000)
    @given(st.integers(0, len(files) - 1), DAMAGES)
    def run(number: int, damage: tuple) -> None:
        whole = files[number].read_bytes()
        files[number].write_bytes(damaged(whole, damage))
        with tries("broken files of YOLO and VOC"):
            try:
                for split in ("train", "val"):
                    data = open_dataset(Folder(path=root), split, tmp_path / "cache", TRANSFORMS[0])
                    data.report.text().encode()
                    assert all(data[index][1]["boxes"].isfinite().all() for index in range(len(data)))
                ends.add("opened")
            except InputError as refusal:
                assert "\n" not in str(refusal) and str(refusal).isprintable() and len(str(refusal)) < 1500
                ends.add("refused")
            finally:
                files[number].write_bytes(whole)

    run()
    assert ends == {"refused", "opened"}, "both ways were taken"
