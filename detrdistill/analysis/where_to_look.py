"""Figures 2 and 4: where on an image a detector and the methods put their weight, and how much of it lies inside boxes."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrdistill.analysis.detections import ground_truth, pictures
from detrdistill.criterion import SetCriterion
from detrdistill.data.coco import CocoDataset, collate
from detrdistill.data.layout import data_cache, data_hash
from detrdistill.distill.baselines.fgd import object_masks
from detrdistill.distill.baselines.fgfi import anchors, near_anchors
from detrdistill.distill.baselines.fkd import spatial_attention
from detrdistill.distill.features import quality_scores, quality_weights
from detrdistill.errors import InputError
from detrdistill.figures.detections import Objects
from detrdistill.files import file_hash
from detrdistill.matching import match
from detrdistill.models.outputs import DetectorOutput, Targets
from detrdistill.recipes.methods import FGD, FGFI, DETRDistill
from detrdistill.records import InsideObjects, Record
from detrdistill.runs.load import load_detector, open_split
from detrdistill.runs.provenance import provenance
from detrdistill.runs.store import Store

IMAGES, DIGITS = 400, 5  # how many validation images are looked at, at most, and digits of the shares that are kept
# The maps of `where_to_look` that Figure 2 shows, and what it calls them.
REGIONS = {
    "fgd": "FGD: objects x attention",
    "fgfi": "FGFI: near anchors",
    "cross-attention": "cross-attention",
    "gradient": "gradient of detection loss",
    "queries": "query masks (Eq. 9)",
}


def where_to_look(detector: nn.Module, dataset: CocoDataset, index: int, *, gamma: float) -> dict[str, np.ndarray]:
    """Where on an image methods and detector put their weight: maps [h w] that sum to 1, by the names in `REGIONS` and "alike".

    - fgd: the foreground of FGD times the detector's attention over cells, on the maps before the encoder.
    - fgfi: the cells that FGFI imitates.
    - cross-attention: summed over queries and stages.
    - gradient: the norm over channels of dL_det / dF, F being what the decoder attends to.
    - queries: the weight of Eq. 9, summed over stages.
    - alike: the same without quality scores, q = 1 for all queries: the masks of Eq. 7.

    The weight of coarser levels is spread over their cells' area and added to the finest's. A map without any weight stays 0.
    """
    batch = collate([dataset[index]]).to(next(detector.parameters()).device)
    with torch.no_grad():
        memory = detector.eval().encode(batch.pixels, batch.padding)
    output, slopes = gradients(detector, memory, batch.targets)
    padding, fgd, fgfi = output.padding, FGD(), FGFI()
    attention = [spatial_attention(level, mask, fgd.temperature) for level, mask in zip(output.neck, padding, strict=True)]
    across = output.cross_attention.sum((0, 2)).split([mask[0].numel() for mask in padding], dim=1)
    quality = quality_scores(output.logits, output.boxes, batch.targets, gamma)
    found = {
        "fgd": [object_masks(batch.targets, mask)[0] * weight for mask, weight in zip(padding, attention, strict=True)],
        "fgfi": [count > 0 for count in near_anchors(batch.targets, padding, anchors(fgfi.scales, fgfi.ratios), fgfi.threshold)],
        "cross-attention": across,
        "gradient": [gradient.norm(dim=1) for gradient in slopes],
        "queries": quality_weights(output.features, output.queries, quality),
        "alike": quality_weights(output.features, output.queries, torch.ones_like(quality)),
    }
    shapes = [mask.shape[1:] for mask in padding]
    return {name: spread([x.detach().cpu() for x in levels], shapes) for name, levels in found.items()}


def regions(
    detector: nn.Module, dataset: CocoDataset, indices: Sequence[int], *, gamma: float
) -> tuple[dict[str, list[np.ndarray]], dict[str, list[float]]]:
    """The maps of `where_to_look` and their shares inside boxes, an image each, by the titles that `REGIONS` gives them."""
    maps = [where_to_look(detector, dataset, index, gamma=gamma) for index in indices]
    seen = list(zip(maps, ground_truth(dataset, indices), pictures(dataset, indices), strict=True))
    by_title = {title: [one[name] for one in maps] for name, title in REGIONS.items()}
    return by_title, {title: [share_inside(one[name], truth, image) for one, truth, image in seen] for name, title in REGIONS.items()}


def inside_objects(record: Record, store: Store, *, gamma: float) -> InsideObjects:
    """`share_inside` of every map of a run's detector on the first `IMAGES` validation images; measured once, and then read.

    It is kept beside the run's record, and decides the claims of Figure 4; with another gamma than DETRDistill's own it is not kept.

    Raises:
        InputError: weights or data are missing, or not those of the record.
    """
    found = store.inside_objects(record)
    if found is not None and found.gamma == gamma:
        return found
    weights, about = store.check_weights(record), record.provenance
    dataset = open_split(record.recipe, "val")
    if (data := data_hash(record.recipe.data, data_cache())) != about["data_sha256"]:
        raise InputError(f"run {record.id} was trained on other data ({about['data_sha256'][:8]}) than these ({data[:8]}); restore them")
    detector = load_detector(record.recipe, store, dataset)
    by_image = shares(detector, dataset, range(min(IMAGES, len(dataset))), gamma=gamma)
    found = InsideObjects(
        run=record.id,
        weights_sha256=file_hash(weights),
        data_sha256=data,
        gamma=gamma,
        images=list(by_image.index),
        percent={name: [None if np.isnan(x) else float(f"{100 * x:.{DIGITS}g}") for x in by_image[name]] for name in by_image},
        provenance=provenance(),
    )
    if gamma == DETRDistill().gamma:
        store.write_inside(record.recipe, found)
    return found


def shares(detector: nn.Module, dataset: CocoDataset, indices: Sequence[int], *, gamma: float) -> pd.DataFrame:
    """`share_inside` of every map, and the boxes' own area, which weight without aim has: a line an image that has objects."""
    found = {}
    for index, truth in zip(indices, ground_truth(dataset, indices), strict=True):
        if len(truth.boxes):
            (image,), maps = pictures(dataset, [index]), where_to_look(detector, dataset, index, gamma=gamma)
            maps["area"] = np.ones_like(maps["queries"])
            found[index] = {name: share_inside(one, truth, image) for name, one in maps.items()}
    return pd.DataFrame.from_dict(found, orient="index", columns=[*REGIONS, "alike", "area"])


def shares_table(measured: Mapping[str, InsideObjects]) -> pd.DataFrame:
    """A line a detector: the means over its images, in percent."""
    names = REGIONS | {"alike": "query masks, all queries alike", "area": "area of the boxes"}
    means = {detector: pd.DataFrame(one.percent, dtype=float).mean() for detector, one in measured.items()}
    return pd.DataFrame(means).T.rename(columns=names)


def share_inside(region: np.ndarray, truth: Objects, image: np.ndarray) -> float:
    """Part of a map's weight that lies in the ground-truth boxes; NaN for a map without weight."""
    height, width = image.shape[:2]
    inside = coverage(truth.boxes / (width, height, width, height), region.shape)
    return float((region * inside).sum() / region.sum()) if region.any() else float("nan")


def coverage(boxes: np.ndarray, shape: tuple[int, int], points: int = 256) -> np.ndarray:
    """Which part of each cell of a map [h w] lies in any of the boxes, looked at in at least `points` x `points` points of the image.

    Args:
        boxes: [N 4], x0 y0 x1 y1, relative to the image, which the map covers.
    """
    times = -(-points // min(shape))
    y, x = ((np.arange(side * times) + 0.5) / (side * times) for side in shape)
    across = (x > boxes[:, 0, None]) & (x < boxes[:, 2, None])
    down = (y > boxes[:, 1, None]) & (y < boxes[:, 3, None])
    inside = (down[:, :, None] & across[:, None, :]).any(0)
    return inside.reshape(shape[0], times, shape[1], times).mean((1, 3))


def spread(levels: Sequence[Tensor], shapes: Sequence[tuple[int, int]]) -> np.ndarray:
    """Maps of several levels as one on the finest grid, the first, that sums to 1: a coarse cell's weight lies all over its area.

    0 everywhere if all levels are.

    Args:
        levels: of one image, in any shape that holds h x w numbers.
    """
    total = torch.zeros(shapes[0])
    for level, shape in zip(levels, shapes, strict=True):
        level = level.float().reshape(1, 1, *shape)
        enlarged = F.interpolate(level, size=total.shape, mode="nearest")[0, 0]
        total += enlarged * (level.sum() / enlarged.sum().clamp(min=1e-30))
    return (total / total.sum().clamp(min=1e-30)).numpy()


def gradients(detector: nn.Module, memory: Any, targets: Targets) -> tuple[DetectorOutput, list[Tensor]]:
    """What the detector says, and the gradient of its detection loss in what the decoder attends to, [B D cells] a level."""
    name = "tokens" if "tokens" in {field.name for field in fields(memory)} else "maps"
    held = getattr(memory, name)
    leaves = [x.detach().requires_grad_() for x in (held if name == "maps" else [held])]
    criterion = SetCriterion()
    with torch.enable_grad():
        memory = replace(memory, **{name: leaves if name == "maps" else leaves[0]})
        (output,) = detector.decode(memory, detector.queries(memory), attention=True)
        losses: Mapping[str, Tensor] = criterion(output, targets, match(criterion.problems(output, targets)))
        found = torch.autograd.grad(sum(value.sum() for value in losses.values()), leaves)
    if name == "maps":
        return output, [gradient.flatten(2) for gradient in found]
    return output, list(found[0].transpose(1, 2).split([mask[0].numel() for mask in output.padding], dim=2))
