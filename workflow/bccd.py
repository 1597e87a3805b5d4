"""Lays BCCD out as preset bccd wants it: `python workflow/bccd.py CLONE data/bccd`.

CLONE is a clone of github.com/Shenggan/BCCD_Dataset (MIT) at commit d272fb1: 364 photographs of blood cells with Pascal VOC
annotations. Training images are those of its trainval.txt, validation images those of its test.txt. The json is the same byte for byte
wherever it is made, so that everyone's runs have the same names.
"""

import json
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

INFO = {"description": "BCCD blood cell detection", "url": "https://github.com/Shenggan/BCCD_Dataset", "version": "d272fb1"}
LICENCE = {"id": 1, "name": "MIT", "url": "https://github.com/Shenggan/BCCD_Dataset/blob/master/LICENSE"}
CLASSES = ("RBC", "WBC", "Platelets")  # red and white blood cells
SPLITS = {"train": "trainval", "val": "test"}


def convert(source: Path, target: Path) -> None:
    """Write instances_train.json, instances_val.json and images/ into `target`."""
    categories = [{"id": number, "name": name, "supercategory": "cell"} for number, name in enumerate(CLASSES, start=1)]
    ids = {path.stem: number for number, path in enumerate(sorted((source / "Annotations").glob("*.xml")), start=1)}
    shutil.copytree(source / "JPEGImages", target / "images", dirs_exist_ok=True)
    count = 0
    for split, listed in SPLITS.items():
        images, annotations = [], []
        for name in sorted((source / "ImageSets" / "Main" / f"{listed}.txt").read_text().split()):
            about = ElementTree.parse(source / "Annotations" / f"{name}.xml")
            width, height = (int(about.findtext(f"size/{side}")) for side in ("width", "height"))
            images.append({"id": ids[name], "file_name": f"{name}.jpg", "width": width, "height": height})
            for one in about.iter("object"):
                left, top, right, bottom = (int(one.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
                width, height = right - left, bottom - top
                if width <= 0 or height <= 0:
                    continue  # two boxes of BCCD have no size
                count += 1
                box = {"bbox": [left, top, width, height], "area": width * height, "iscrowd": 0}
                annotations.append({"id": count, "image_id": ids[name], "category_id": CLASSES.index(one.findtext("name")) + 1} | box)
        content = {"info": INFO, "licenses": [LICENCE], "images": images, "annotations": annotations, "categories": categories}
        (target / f"instances_{split}.json").write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3 or not (Path(sys.argv[1]) / "BCCD" / "Annotations").is_dir():
        sys.exit("usage: python workflow/bccd.py CLONE data/bccd, where CLONE is a clone of github.com/Shenggan/BCCD_Dataset")
    Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
    convert(Path(sys.argv[1]) / "BCCD", Path(sys.argv[2]))
