"""What other tools write otherwise and can only mean one thing is read so, with a line in the report for each."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask

from detrdistill.data.coco import CocoDataset, open_dataset
from detrdistill.errors import InputError
from detrdistill.recipes.parts import Folder
from tests.folders import CATEGORIES, read_split, write_folder, write_split


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "mine")


def opened(root: Path) -> CocoDataset:
    return open_dataset(Folder(path=root), "train", root / "cache", None)


def repaired(root: Path, kind: str, count: int) -> str:
    """The report, in which so many are repaired in this way."""
    told = opened(root).report.text()
    assert f"{count} x {kind} (repair)" in told, told
    return told


def test_whole_numbers_written_as_floats(root: Path) -> None:
    content, before = read_split(root, "train"), opened(root).coco.dataset
    for one in content["annotations"]:
        one |= {name: float(one[name]) for name in ("id", "image_id", "category_id", "iscrowd")}
    for entry in content["images"]:
        entry |= {"id": float(entry["id"]), "width": float(entry["width"])}
    for category in content["categories"]:
        category["id"] = float(category["id"])
    write_split(root, "train", content)
    assert "id, image_id, category_id, iscrowd are 10.0, 1.0, 3.0, 0.0" in repaired(root, "whole numbers as 1.0", 7)
    assert opened(root).coco.dataset["annotations"] == before["annotations"]
    assert [(type(entry["id"]), entry["id"]) for entry in opened(root).coco.dataset["images"]] == [(int, n) for n in range(4)]


@pytest.mark.parametrize("value", [1.5, float("nan"), float("inf"), "1", True])
def test_other_numbers_are_no_ids(root: Path, value: object) -> None:
    content = read_split(root, "train")
    content["annotations"][1]["image_id"] = value
    write_split(root, "train", content)
    told = opened(root).report.text()
    assert "1 x unknown image (drop)" in told and ("(write 1, without quotes)" in told) == (value == "1" and value is not True)


def rle(image: dict, box: list[int], compressed: bool) -> dict:
    drawn = np.zeros((image["height"], image["width"]), np.uint8, order="F")
    x, y, w, h = box
    drawn[y : y + h, x : x + w] = 1
    if compressed:
        found = mask.encode(drawn)
        return {"size": found["size"], "counts": found["counts"].decode()}
    flat, counts, value = drawn.flatten(order="F"), [], 0
    while len(flat):
        run = int((flat != value).argmax()) if (flat != value).any() else len(flat)
        counts.append(run)
        flat, value = flat[run:], 1 - value
    return {"size": [image["height"], image["width"]], "counts": counts}


@pytest.mark.parametrize("kind", ["polygon", "counts", "text"])
@pytest.mark.parametrize("listed", [None, []])
def test_a_box_from_an_outline(root: Path, kind: str, listed: object) -> None:
    content, before = read_split(root, "train"), opened(root).coco.dataset["annotations"]
    images = {entry["id"]: entry for entry in content["images"]}
    for one in content["annotations"]:
        x, y, w, h = one.pop("bbox")
        ring = [x, y, x + w, y, x + w, y + h, x, y + h]
        outline = [ring, ring] if kind == "polygon" else rle(images[one["image_id"]], [x, y, w, h], kind == "text")
        one |= {"segmentation": outline} | ({"bbox": listed} if listed is not None else {})
    write_split(root, "train", content)
    assert "around its segmentation is used" in repaired(root, "no box", 7)
    assert [one["bbox"] for one in opened(root).coco.dataset["annotations"]] == [one["bbox"] for one in before]


SIZE = {"size": [48, 64]}  # of image 1
OUTLINES = [
    [], [[]], [[1, 2, 3]], [[1, 2, 3, "4", 5, 6]], [[1, 2, 3, float("nan"), 5, 6]], "x", 3, {}, SIZE, SIZE | {"counts": []},
    SIZE | {"counts": [-1, 3073]}, SIZE | {"counts": [1, 2]}, SIZE | {"counts": [1.5, 3070.5]}, {"size": [0, 0], "counts": []},
    {"size": [64, 48], "counts": [3072]}, SIZE | {"counts": "oooo"}, SIZE | {"counts": "\u00e9"}, SIZE | {"counts": [10**30]},
]  # fmt: skip


@pytest.mark.parametrize("outline", OUTLINES, ids=range(len(OUTLINES)))
def test_outlines_that_are_none_are_dropped(root: Path, outline: object) -> None:
    """A text of run lengths whose last number does not end would have pycocotools read on in memory that is not its own."""
    content = read_split(root, "train")
    content["annotations"][1] |= {"bbox": [], "segmentation": outline}
    write_split(root, "train", content)
    report = opened(root).report
    assert "no box can be put around its segmentation" in report.text() and len(opened(root).coco.anns) == 6


def rename(root: Path, listed: str, there: str) -> None:
    """Image 1 is called `listed` in the annotations and `there` on disk."""
    content = read_split(root, "train")
    content["images"][1]["file_name"] = listed
    write_split(root, "train", content)
    path = root / "images" / there
    path.parent.mkdir(exist_ok=True)
    (root / "images" / "1.png").rename(path)


NAMES = [
    ("images/1.png", "1.png"), (r"images\1.png", "1.png"), (r"sub\1.png", "sub/1.png"), ("./1.png", "1.png"),
    ("images/sub/1.png", "sub/1.png"),
    (unicodedata.normalize("NFC", "Zürich é.png"), unicodedata.normalize("NFD", "Zürich é.png")),
    (unicodedata.normalize("NFD", "Zürich é.png"), unicodedata.normalize("NFC", "Zürich é.png")),
]  # fmt: skip


@pytest.mark.parametrize(("listed", "there"), NAMES)
def test_file_names_of_other_tools(root: Path, listed: str, there: str) -> None:
    rename(root, listed, there)
    if listed == "./1.png":  # is that file as it stands
        assert opened(root).load_image(1).size == (64, 48)
        return
    told = repaired(root, "file name", 1)
    assert ("in another form of Unicode" in told) == ("rich" in listed)
    assert opened(root).load_image(1).size == (64, 48)


@pytest.mark.parametrize(
    ("listed", "there", "hint"),
    [
        ("my%201.png", "my 1.png", "'my 1.png'"),
        ("a.PNG", "a.png", "'a.png'"),
        ("a", "a.png", "'a.png'"),
        ("deep/a.png", "a.png", "'a.png'"),
        ("photograph_17.png", "photograph-17.png", "'photograph-17.png'"),
        ("quite another", "1.png", ""),
    ],
)
def test_a_missing_file_s_nearest_name_is_told(root: Path, listed: str, there: str, hint: str) -> None:
    rename(root, listed, there)
    with pytest.raises(InputError, match=r"is missing in .*images") as refusal:
        opened(root)
    assert (f"; the nearest name there is {hint}" in str(refusal.value)) == bool(hint) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["images/../../x.png", r"..\x.png", r"images\..\..\x.png"])
def test_no_repair_leads_out_of_the_folder(root: Path, name: str) -> None:
    (root / "images" / "1.png").rename(root / "x.png")
    rename_only = read_split(root, "train")
    rename_only["images"][1]["file_name"] = name
    write_split(root, "train", rename_only)
    with pytest.raises(InputError, match=r"image 1: .*(missing in|leads out of)"):
        opened(root)


def categories(root: Path, entries: list[dict]) -> None:
    write_split(root, "train", read_split(root, "train") | {"categories": entries})


@pytest.mark.parametrize("name", ["things", "disc"])
def test_roboflow_s_root_category_is_left_out(root: Path, name: str) -> None:
    """Also where it has the name of a class."""
    children = [one | {"supercategory": name} for one in CATEGORIES]
    categories(root, [{"id": 0, "name": name, "supercategory": "none"}, *children])
    assert f"category 0 '{name}' is above all others" in repaired(root, "root category", 1)
    assert [one.name for one in opened(root).categories] == ["cross", "disc", "bar"]


def test_a_category_of_annotations_or_beside_others_is_no_root(root: Path) -> None:
    children = [one | {"supercategory": "cross"} for one in CATEGORIES[1:]]
    categories(root, [CATEGORIES[0] | {"supercategory": "none"}, *children])
    assert len(opened(root).categories) == 3, "it has annotations"
    others = [CATEGORIES[0] | {"supercategory": "things"}, *CATEGORIES[1:]]
    categories(root, [{"id": 0, "name": "things", "supercategory": "none"}, *others])
    assert len(opened(root).categories) == 4, "not all others are below it"
    categories(root, [CATEGORIES[0], *CATEGORIES])
    with pytest.raises(InputError, match="category id 3 is used twice"):
        opened(root)
