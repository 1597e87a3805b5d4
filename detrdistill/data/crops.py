"""Crops of the training objects, on which a thin backbone learns to classify before it detects: the stand-in for ImageNet."""

from itertools import groupby

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from detrdistill.data.coco import CocoDataset
from detrdistill.errors import InputError

CONTEXT = 0.5  # a crop is up to this much wider than its box
SHIFT = 0.1  # and off centre by up to this part of its width


def object_crops(dataset: CocoDataset, size: int, seed: int, most: int = 50_000) -> tuple[UInt8[Tensor, "N 3 s s"], Int[Tensor, "N"]]:
    """A square crop around every object, `size` pixels a side, with its class index; a random `most` of them where there are more.

    Deterministic in `seed`. Crowds are left out. A crop keeps the object's proportions unless the image ends first.

    Raises:
        InputError: there is no object, or an image cannot be decoded.
    """
    rng = np.random.default_rng(seed)
    objects = [a for image_id in dataset.ids for a in dataset.coco.imgToAnns[image_id] if not a["iscrowd"]]
    if not objects:
        raise InputError(f"{dataset.report.file}: no objects to cut out and classify; annotate some, or set backbone.weights to 'none'")
    chosen = np.sort(rng.permutation(len(objects))[:most])  # in order of images, so that each is decoded once
    crops = torch.empty(len(chosen), 3, size, size, dtype=torch.uint8)
    labels = torch.tensor([dataset.index_of[objects[k]["category_id"]] for k in chosen], dtype=torch.long)
    n = 0
    for image_id, group in groupby((objects[k] for k in chosen), key=lambda a: a["image_id"]):
        image = dataset.load_image(image_id)
        for annotation in group:
            box = _square(annotation["bbox"], image.size, rng)
            crop = np.array(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
            crops[n] = torch.from_numpy(crop).permute(2, 0, 1)
            n += 1
    return crops, labels


def _square(bbox: list[float], image: tuple[int, int], rng: np.random.Generator) -> tuple[float, ...]:
    """(left, top, right, bottom) of a jittered square around the box [x y w h], moved or cut to stay inside the image (width, height)."""
    side = max(bbox[2:]) * (1 + CONTEXT * rng.random())
    low, high = [], []
    for start, length, end in zip(bbox[:2], bbox[2:], image, strict=True):
        first = start + length / 2 - side / 2 + side * SHIFT * rng.uniform(-1, 1)
        first = min(max(first, 0.0), max(end - side, 0.0))
        low.append(first)
        high.append(min(first + side, float(end)))
    return (*low, *high)
