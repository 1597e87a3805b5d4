"""A small data folder of a user: COCO json with gaps between category ids, and images of different sizes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 3, "name": "cross"}, {"id": 17, "name": "disc"}, {"id": 90, "name": "bar"}]


def write_folder(root: Path, images: int = 4) -> Path:
    (root / "images").mkdir(parents=True)
    for split, offset in (("train", 0), ("val", 100)):
        entries, annotations = [], []
        for number in range(offset, offset + images):
            width, height = (64, 48) if number % 2 else (56, 64)
            pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / f"{number}.png")
            entries.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
            for k in range(1 + number % 3):
                box = [4 + 8 * k, 6, 20, 24]
                annotations.append({"id": 10 * number + k, "image_id": number, "category_id": (3, 17, 90)[k], "bbox": box, "iscrowd": 0})
        write_split(root, split, {"images": entries, "annotations": annotations, "categories": CATEGORIES})
    return root


def write_split(root: Path, split: str, content: dict[str, Any]) -> None:
    (root / f"instances_{split}.json").write_text(json.dumps(content))


def read_split(root: Path, split: str) -> dict[str, Any]:
    return json.loads((root / f"instances_{split}.json").read_text())
