"""BCCD's Pascal VOC folder becomes the COCO folder of preset bccd."""

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

from detrdistill.data.coco import open_dataset
from detrdistill.recipes.presets import get_preset

SCRIPT = Path(__file__).resolve().parents[2] / "workflow" / "bccd.py"


def voc(folder: Path, objects: dict[str, list[tuple[str, int, int, int, int]]], splits: dict[str, list[str]]) -> None:
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / name).mkdir(parents=True)
    for name, found in objects.items():
        Image.new("RGB", (64, 48)).save(folder / "JPEGImages" / f"{name}.jpg")
        sides = ("xmin", "ymin", "xmax", "ymax")
        boxes = ["".join(f"<{side}>{value}</{side}>" for side, value in zip(sides, box, strict=True)) for _, *box in found]
        inside = "".join(f"<object><name>{one[0]}</name><bndbox>{box}</bndbox></object>" for one, box in zip(found, boxes, strict=True))
        text = f"<annotation><size><width>64</width><height>48</height></size>{inside}</annotation>"
        (folder / "Annotations" / f"{name}.xml").write_text(text)
    for split, names in splits.items():
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))


def test_voc_becomes_coco(tmp_path: Path) -> None:
    objects = {"a": [("WBC", 1, 2, 11, 22), ("RBC", 5, 5, 5, 9)], "b": [("Platelets", 0, 0, 9, 9)], "c": [("RBC", 3, 4, 33, 14)]}
    voc(tmp_path / "clone" / "BCCD", objects, {"trainval": ["c", "a"], "test": ["b"]})
    subprocess.run([sys.executable, SCRIPT, tmp_path / "clone", tmp_path / "bccd"], check=True, timeout=60)
    data = get_preset("bccd").student.data.replace(path=tmp_path / "bccd")
    train, val = (open_dataset(data, split, tmp_path, None) for split in ("train", "val"))
    assert not train.report.faults and not val.report.faults
    content = json.loads((tmp_path / "bccd" / "instances_train.json").read_text())
    assert [image["id"] for image in content["images"]] == [1, 3]  # numbers of all images, sorted
    assert [(one["image_id"], one["category_id"], one["bbox"]) for one in content["annotations"]] == [
        (1, 2, [1, 2, 10, 20]),  # the box without width is left out
        (3, 1, [3, 4, 30, 10]),
    ]
    assert [one["id"] for one in val.coco.dataset["annotations"]] == [3]  # ids go on from split to split


def test_a_wrong_folder_is_said(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT, tmp_path, tmp_path / "bccd"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "CLONE is a clone of github.com/Shenggan/BCCD_Dataset" in done.stderr
    assert not (tmp_path / "bccd").exists()
