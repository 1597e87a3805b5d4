"""Data that would train and be measured without a word, and be wrong: each is refused, or a warning names it with its numbers."""

import json
import logging
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detrdistill.data.coco import CocoDataset, open_dataset
from detrdistill.data.images import check_image, read_image
from detrdistill.data.summary import advice, judgements, look_at_images, same_files, summarise, too_many_objects
from detrdistill.data.validation import NoObjectsError
from detrdistill.errors import InputError
from detrdistill.parameters import only_seed
from detrdistill.recipes.parts import Folder
from detrdistill.runs.load import warn_once
from detrdistill.session import open_session
from tests.folders import read_split, write_folder, write_split


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "mine")


def change(root: Path, split: str = "train", section: str = "annotations", **changes: object) -> None:
    """Give all entries of a section the same fields, or what a function makes of each."""
    content = read_split(root, split)
    for entry in content[section]:
        entry.update({name: value(entry) if callable(value) else value for name, value in changes.items()})
    write_split(root, split, content)


def opened(root: Path, split: str = "train") -> CocoDataset:
    return open_dataset(Folder(path=root), split, root / "cache", None)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_of_crowds_alone_is_refused(root: Path, split: str) -> None:
    change(root, split, iscrowd=1)
    with pytest.raises(NoObjectsError, match=rf"instances_{split}\.json: 0 objects, [78] crowds: all [78] annotations are crowds .*CVAT"):
        opened(root, split)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_annotations_is_refused(root: Path, split: str) -> None:
    write_split(root, split, read_split(root, split) | {"annotations": []})
    with pytest.raises(NoObjectsError, match=rf"instances_{split}\.json: no objects, so AP cannot be measured"):
        opened(root, split)


def test_what_leaves_nothing_but_crowds_is_refused(root: Path) -> None:
    content = read_split(root, "train")
    first, second, *others = content["annotations"]
    first["image_id"], second["bbox"] = float("nan"), [5, float("nan"), 9, 9]
    write_split(root, "train", content | {"annotations": [first, second, *(one | {"iscrowd": 1} for one in others)]})
    message = r"no objects: 2 of 7 annotations cannot be used, the first for .*image_id nan.*; 5 are crowds"
    with pytest.raises(NoObjectsError, match=message):
        opened(root)


def test_many_crowds_are_a_warning_with_both_numbers(root: Path) -> None:
    change(root, iscrowd=lambda one: int(one["image_id"] == 2))
    assert "3 of 7 annotations are crowds (iscrowd 1), which are neither trained on nor counted" in str(opened(root).report)
    change(root, iscrowd=0)
    assert opened(root).report.warnings == []


def test_more_objects_than_queries(root: Path) -> None:
    """Image 2 has three objects, images 1 and 3 one or two."""
    warned = too_many_objects(opened(root), queries=2)
    assert "1 of 4 images have more objects (up to 3) than the detector has queries (2)" in warned and "set queries=10" in warned
    assert too_many_objects(opened(root), queries=3) is None
    change(root, iscrowd=lambda one: int(one["id"] == 20))
    assert too_many_objects(opened(root), queries=2) is None, "crowds need no query"


def test_files_of_both_splits_and_of_two_images(root: Path) -> None:
    assert same_files(opened(root), opened(root, "val"), content=True) is None
    names = iter(("2.png", "3.png", "102.png", "103.png"))
    sizes = iter(((56, 64), (64, 48), (56, 64), (64, 48)))
    change(root, "val", "images", file_name=lambda one: next(names))
    content = read_split(root, "val")
    for entry, (width, height) in zip(content["images"], sizes, strict=True):
        entry |= {"width": width, "height": height}
    write_split(root, "val", content)
    told = same_files(opened(root), opened(root, "val"))
    assert "2 of 4 files are files of the training split too, 2 of them with other boxes" in told, told
    content["images"][3]["file_name"] = "103.png"
    content["images"][1] |= {"file_name": "sub/../103.png", "width": 64, "height": 48}
    (root / "images" / "sub").mkdir()
    write_split(root, "val", content)
    assert "1 of 4 images have another's file: ids 101 and 103" in str(opened(root, "val").report)


def test_the_same_picture_under_another_name_is_found_by_its_content(root: Path) -> None:
    (root / "images" / "103.png").write_bytes((root / "images" / "3.png").read_bytes())
    assert same_files(opened(root), opened(root, "val")) is None
    assert "1 of 4 files are files of the training split too, 1 of them with other boxes" in same_files(
        opened(root), opened(root, "val"), content=True
    )


def boxes(form: str, count: int = 12) -> list[list[float]]:
    """Boxes within 56 x 48 pixels, which all images have, at a border of these; in one of three forms."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(count):
        w, h = random.integers(8, 24, 2).tolist()
        x, y = int(random.integers(2)) * (56 - w), int(random.integers(2)) * (48 - h)
        found.append({"coco": [x, y, w, h], "corners": [x, y, x + w, y + h], "centres": [x + w / 2, y + h / 2, w, h]}[form])
    return found


def with_boxes(root: Path, listed: list[list[float]], **fields: object) -> None:
    annotations = [
        {"id": k + 1, "image_id": k % 4, "category_id": 3, "bbox": box} | {name: value[k] for name, value in fields.items()}
        for k, box in enumerate(listed)
    ]
    write_split(root, "train", read_split(root, "train") | {"annotations": annotations})


@pytest.mark.parametrize(
    ("form", "message"),
    [("corners", r"as if \[x1, y1, x2, y2\]: \d+ of 12"), ("centres", r"as if \[centre x, centre y, width, height\]: \d+ of 12")],
)
def test_boxes_of_another_form_are_refused(root: Path, form: str, message: str) -> None:
    with_boxes(root, boxes("coco"))
    assert not opened(root).report
    with_boxes(root, boxes(form))
    with pytest.raises(InputError, match=message):
        opened(root)


def test_areas_tell_corners_from_sizes(root: Path) -> None:
    """Boxes in the upper left corner fit their images in either form."""
    listed = [[1, 1, 9 + k, 8 + k] for k in range(8)]
    with_boxes(root, listed)
    assert not opened(root).report
    with_boxes(root, listed, area=[(8 + k) * (7 + k) for k in range(8)])
    with pytest.raises(InputError, match=r"as if \[x1, y1, x2, y2\]: .*8 have the area of such boxes, 0 of COCO's"):
        opened(root)


def test_a_few_boxes_that_reach_out_are_a_warning(root: Path) -> None:
    """Three of forty, which lie inside as corners."""
    with_boxes(root, [[2, 2, 10, 10]] * 37 + [[30, 20, 40, 40]] * 3)
    assert "3 of 40 boxes do not fit into their images, 0 if read as [x1, y1, x2, y2]" in str(opened(root).report)
    with_boxes(root, [[2, 2, 10, 10]] * 39 + [[30, 20, 40, 40]])
    assert opened(root).report.warnings == []


def test_float_pixels_are_refused_and_dark_ones_named(root: Path) -> None:
    grey = np.random.default_rng(0).random((48, 64)).astype(np.float32)
    Image.fromarray(grey).save(root / "images" / "1.tif")
    with pytest.raises(InputError, match=r"1\.tif has pixels of floating point, whose range is not known"):
        check_image(root / "images" / "1.tif", 64, 48)
    with pytest.raises(InputError, match=r"1\.tif has pixels of floating point"):
        read_image(root / "images" / "1.tif", 64, 48)
    for most, warned in ((3071, "is 3071 of 65535: they are seen with 11 of 255 grey levels"), (60000, "")):
        Image.fromarray((grey * most).clip(0, most).astype(np.uint16)).save(root / "images" / "1.png")
        Image.fromarray(np.full((48, 64), most, np.uint16)).save(root / "images" / "3.png")
        told = str(opened(root).report)
        assert warned in told and ("16-bit grey" in told) == bool(warned)
    flat = look_at_images(opened(root))
    assert flat == ([], ["3.png"]), "all of one grey"
    assert np.asarray(read_image(root / "images" / "1.png", 64, 48)).mean() > 100


@pytest.mark.parametrize(("turn", "size", "doubt"), [(6, (40, 40), True), (3, (64, 48), True), (6, (64, 48), False), (1, (40, 40), False)])
def test_turned_images_whose_size_cannot_tell(root: Path, turn: int, size: tuple[int, int], doubt: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.new("RGB", size).save(root / "images" / "1.png", exif=exif)
    content = read_split(root, "train")
    content["images"][1] |= {"width": size[0], "height": size[1]}
    write_split(root, "train", content)
    told = "1 images are turned by EXIF and of the same size either way, such as '1.png'"
    assert (told in str(opened(root).report)) == doubt


def test_doubts_are_said_once_a_command(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(root, iscrowd=lambda one: int(one["image_id"] == 2))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            for text in judgements(opened(root), {"val": opened(root, "val")}, queries=1):
                warn_once(text)
    assert len(caplog.records) == 3, "the report, and a line a split on queries"


def test_a_summary_counts_and_says_what_to_set(root: Path) -> None:
    change(root, iscrowd=lambda one: int(one["id"] == 20))
    numbers = summarise(opened(root))
    assert (numbers["images"], numbers["objects"], numbers["crowds"]) == (4, 6, 1)
    assert numbers["classes"] == {"cross": 3, "disc": 2, "bar": 1}
    assert numbers["objects_an_image"] == {"least": 1, "median": 1.5, "most": 2}
    json.dumps(numbers)
    crowded = deepcopy(numbers)
    crowded["objects_an_image"]["most"] = 62
    assert advice({"train": numbers, "val": crowded}, queries=20, short=32)[0] == "queries=80"
    assert advice({"train": numbers}, queries=20, short=32)[0] == "queries=20"


def test_several_seeds_are_refused_where_one_is_shown() -> None:
    assert only_seed((3,)) == 3
    common = {"preset": "smoke", "device": "cpu", "progress": False}
    for given in ([0, 1], "0 1", "[0, 1]"):
        session = open_session(seeds=given, **common)
        assert session.seeds == (0, 1)
        with pytest.raises(InputError, match=r"'seeds' = 0, 1: this notebook shows runs of one seed"):
            _ = session.seed
    with pytest.raises(InputError, match=r"^parameters: 'seeds' = \[\]: give at least one$"):
        open_session(seeds=[], **common)
    assert open_session(seeds=0, changes='{"schedule.steps": 3}', **common).preset.student.schedule.steps == 3
    with pytest.raises(InputError, match=r"'changes' = 'steps: 3': give a mapping, such as"):
        open_session(seeds=0, changes="steps: 3", **common)
