"""What a detector makes of chosen images, as numpy arrays for the figures."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from detrdistill.boxes import cxcywh_to_xyxy
from detrdistill.data.coco import CocoDataset, collate
from detrdistill.distill.features import quality_scores, quality_weights, query_masks
from detrdistill.figures.detections import Objects
from detrdistill.models.outputs import DetectorOutput, Targets
from detrdistill.training.evaluation import detections


def pictures(dataset: CocoDataset, indices: Sequence[int]) -> list[np.ndarray]:
    """The images as they lie on disk, [H W 3] uint8."""
    return [np.asarray(dataset._load_image(dataset.ids[index])) for index in indices]


def ground_truth(dataset: CocoDataset, indices: Sequence[int]) -> list[Objects]:
    """The annotated objects of each image; crowds are left out."""
    found = []
    for index in indices:
        objects = [a for a in dataset.coco.imgToAnns[dataset.ids[index]] if not a["iscrowd"]]
        boxes = np.array([a["bbox"] for a in objects], dtype=float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        found.append(Objects(boxes, [dataset.categories[dataset.index_of[a["category_id"]]].name for a in objects]))
    return found


def detect(detector: nn.Module, dataset: CocoDataset, indices: Sequence[int]) -> list[Objects]:
    """What the detector sees on each image, best first."""
    output, _, sizes = _forward(detector, dataset, indices)
    names = [category.name for category in dataset.categories]
    return [
        Objects(found["boxes"].numpy(), [names[label] for label in found["labels"].tolist()], found["scores"].numpy())
        for found in detections(output.logits[-1], output.boxes[-1], sizes, detector.top)
    ]


@dataclass(frozen=True)
class QueryView:
    """The queries of one image at one decoder stage.

    Attributes:
        masks: Eq. 7, [Q h w], on the finest level.
        quality: Eq. 8, [Q].
        names: the class each query is most sure of.
        boxes: [Q 4], x0 y0 x1 y1 in pixels of the image.
        weights: what Eq. 9 multiplies the squared feature error with, [h w], summed over all stages.
        unweighted: the same without quality scores (Eq. 7 alone), as if every query were perfect.
    """

    masks: np.ndarray
    quality: np.ndarray
    names: list[str]
    boxes: np.ndarray
    weights: np.ndarray
    unweighted: np.ndarray

    def best(self, count: int) -> list[int]:
        """The queries of highest quality."""
        return np.argsort(-self.quality, kind="stable")[:count].tolist()

    def worst(self, count: int) -> list[int]:
        """The queries of lowest quality, the very lowest first."""
        return np.argsort(self.quality, kind="stable")[:count].tolist()


def view_queries(detector: nn.Module, dataset: CocoDataset, index: int, *, gamma: float, stage: int = -1) -> QueryView:
    """Query masks, quality scores and selection masks of one image."""
    output, targets, ((height, width),) = _forward(detector, dataset, [index])
    quality = quality_scores(output.logits, output.boxes, targets, gamma)
    feature = output.features[0]
    scores = output.logits[stage, 0].sigmoid()
    corners = cxcywh_to_xyxy(output.boxes[stage, 0]) * torch.tensor([width, height, width, height])
    return QueryView(
        masks=query_masks(feature, output.queries[stage])[0].numpy(),
        quality=quality[stage, 0].numpy(),
        names=[dataset.categories[label].name for label in scores.argmax(-1).tolist()],
        boxes=corners.numpy(),
        weights=quality_weights([feature], output.queries, quality)[0][0].numpy(),
        unweighted=quality_weights([feature], output.queries, torch.ones_like(quality))[0][0].numpy(),
    )


@torch.no_grad()
def _forward(detector: nn.Module, dataset: CocoDataset, indices: Sequence[int]) -> tuple[DetectorOutput, Targets, list[tuple[int, int]]]:
    batch = collate([dataset[index] for index in indices])
    device = next(detector.parameters()).device
    memory = detector.eval().encode(batch.pixels.to(device), batch.padding.to(device))
    (output,) = detector.decode(memory, detector.queries(memory))
    moved = DetectorOutput(
        output.logits.cpu(), output.boxes.cpu(), output.queries.cpu(), [f.cpu() for f in output.features], [p.cpu() for p in output.padding]
    )
    return moved, batch.targets, batch.original_sizes
