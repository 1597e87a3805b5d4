"""Figure 2: where on an image a detector and the methods put their weight, and how much of it lies inside boxes."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrdistill.analysis.detections import ground_truth, pictures
from detrdistill.criterion import SetCriterion
from detrdistill.data.coco import CocoDataset, collate
from detrdistill.distill.baselines.fgd import object_masks
from detrdistill.distill.baselines.fgfi import anchors, near_anchors
from detrdistill.distill.baselines.fkd import spatial_attention
from detrdistill.distill.features import quality_scores, quality_weights
from detrdistill.figures.detections import Objects
from detrdistill.matching import match
from detrdistill.models.outputs import DetectorOutput, Targets
from detrdistill.recipes.methods import FGD, FGFI

# The maps of `where_to_look`, and what the figures call them.
REGIONS = {
    "fgd": "FGD: objects\nx attention",
    "fgfi": "FGFI:\nnear anchors",
    "cross-attention": "cross-\nattention",
    "gradient": "gradient of\ndetection loss",
    "queries": "query masks\n(Eq. 9)",
}


def plain_names() -> dict[str, str]:
    """The same names for a table's columns, and that of `shares`' last."""
    return {name: title.replace("-\n", "-").replace("\n", " ") for name, title in REGIONS.items()} | {"area": "area of the boxes"}


def where_to_look(detector: nn.Module, dataset: CocoDataset, index: int, *, gamma: float) -> dict[str, np.ndarray]:
    """Where on an image methods and detector put their weight: maps [h w] that sum to 1, by the names in `REGIONS`.

    - fgd: the foreground of FGD times the detector's attention over cells, on the maps before the encoder.
    - fgfi: the cells that FGFI imitates.
    - cross-attention: summed over queries and stages.
    - gradient: the norm over channels of dL_det / dF, F being what the decoder attends to.
    - queries: the weight of Eq. 9, summed over stages.

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


def shares(detector: nn.Module, dataset: CocoDataset, indices: Sequence[int], *, gamma: float) -> dict[str, float]:
    """`share_inside` of every map, the mean over the images with objects; and of the boxes' own area, which weight without aim has."""
    found = []
    for index, truth in zip(indices, ground_truth(dataset, indices), strict=True):
        if len(truth.boxes):
            (image,), regions = pictures(dataset, [index]), where_to_look(detector, dataset, index, gamma=gamma)
            regions["area"] = np.ones_like(regions["queries"])
            found.append({name: share_inside(region, truth, image) for name, region in regions.items()})
    return {name: float(np.nanmean([one[name] for one in found])) if found else float("nan") for name in (*REGIONS, "area")}


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
