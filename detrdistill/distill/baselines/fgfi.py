"""FGFI (Wang et al., CVPR 2019): features are imitated near objects, where anchors overlap them."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from detrdistill.distill.baselines.fgd import in_cells
from detrdistill.distill.levels import inside, share_of_step
from detrdistill.distill.loss import DistillationLoss
from detrdistill.matching import Pairs
from detrdistill.models.attention import constants
from detrdistill.models.outputs import DetectorOutput, Targets

CELL = 16  # units of length a cell: the stride of the official detector
AT_ONCE = 2**24  # pairs of object and anchor held in memory


class FGFILoss(DistillationLoss):
    """Fine-grained feature imitation: sum of I (F_T - f(F_S))^2 / (2 * number of cells with I = 1).

    Args:
        student_dim, teacher_dim: channels.
        levels: number of maps. Each has an f of its own: 3x3 convolution and ReLU, as released.
        maps: which maps: what the encoder starts from, or what the decoder attends to.
        threshold: I is 1 on the cells that have an anchor whose IoU with an object is above this part of the best IoU that any
            anchor has with that object (published: 0.5).
        scales: sides of the anchors in cells. The recipe's 2, 4, 8 on every level are ours; officially 4, 8, 16, 32 on the only one.
        ratios: their height over width.

    The mask is made of a detector's own anchors, which a DETR has not: here the same anchors are laid on every cell of every level,
    and an object's best IoU is taken over all levels, so that it is imitated where anchors of its size are. (Officially there
    is one level of stride 16.) The published weight, 0.01, is the recipe's. The number of cells is that of the whole batch, hence
    `share_of_step`. Padding takes no part. Because of the ReLU, negative features of the teacher are never reached; the official
    teacher has none. The official first 400 iterations without imitation are left to the schedule.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        levels: int,
        maps: Literal["neck", "features"],
        threshold: float,
        scales: Sequence[float],
        ratios: Sequence[float],
    ) -> None:
        super().__init__()
        self.maps, self.threshold, self.anchors = maps, threshold, anchors(scales, ratios)
        self.adapters = nn.ModuleList(nn.Sequential(nn.Conv2d(student_dim, teacher_dim, 3, padding=1), nn.ReLU()) for _ in range(levels))

    def forward(
        self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets, pairs: Mapping[str, Pairs]
    ) -> dict[str, Float[Tensor, ""]]:
        error, cells = 0.0, 0
        counts = near_anchors(targets, teacher.padding, self.anchors, self.threshold)
        levels = zip(self.adapters, getattr(student, self.maps), getattr(teacher, self.maps), teacher.padding, counts, strict=True)
        for adapt, student_map, teacher_map, padding, count in levels:
            near = count > 0
            error = error + (near * (teacher_map - adapt(inside(padding, student_map) * student_map)).square().sum(1)).sum()
            cells = cells + near.sum()
        return {"fgfi": share_of_step(teacher.padding[0], targets) * error / (2 * cells.clamp(min=1))}


def anchors(scales: Sequence[float], ratios: Sequence[float]) -> list[tuple[float, float, float, float]]:
    """Anchors xyxy of the first cell, with its centre: sides are rounded and xyxy are pixels that belong to the box, as in Faster R-CNN."""
    boxes = []
    for ratio in ratios:
        width = round((CELL**2 / ratio) ** 0.5)
        height = round(width * ratio)
        for scale in scales:
            x, y = (width * scale - 1) / 2, (height * scale - 1) / 2
            centre = (CELL - 1) / 2
            boxes.append((centre - x, centre - y, centre + x, centre + y))
    return boxes


@torch.no_grad()
def near_anchors(
    targets: Targets, padding: Sequence[Bool[Tensor, "B _ _"]], anchors: Sequence[tuple[float, float, float, float]], threshold: float
) -> list[Int[Tensor, "B _ _"]]:
    """For each cell, a map a level, the number of pairs of an object and an anchor of the cell whose IoU is above the threshold."""
    shapes = constants(anchors, targets.boxes)
    counts = [torch.zeros(level.shape, dtype=torch.long, device=level.device) for level in padding]
    an_object = len(anchors) * sum(level.numel() for level in padding)
    for boxes in targets.boxes.split(max(AT_ONCE // an_object, 1), dim=1):
        overlaps = [anchor_iou(boxes, level, shapes) for level in padding]
        best = torch.stack([overlap.amax((2, 3, 4)) for overlap in overlaps]).amax(0)
        for count, overlap in zip(counts, overlaps, strict=True):
            count += (overlap > threshold * best[..., None, None, None]).sum((1, 2))
    return counts


def anchor_iou(boxes: Float[Tensor, "B N 4"], padding: Bool[Tensor, "B H W"], anchors: Float[Tensor, "A 4"]) -> Float[Tensor, "B N A H W"]:
    """IoU of boxes with the anchors of every cell, 0 on padding and for objects of padding. A last pixel belongs to its box."""
    objects = CELL * in_cells(boxes, padding)
    sides = []
    for axis, cells in enumerate(reversed(padding.shape[1:])):
        shift = CELL * torch.arange(cells, device=boxes.device)
        low, high = (anchors[:, edge, None] + shift for edge in (axis, axis + 2))
        begin, end = (objects[..., edge, None, None] for edge in (axis, axis + 2))
        sides.append((torch.minimum(high, end) - torch.maximum(low, begin) + 1).clamp(min=0))
    across, down = sides
    down = down * (boxes != 0).any(-1)[..., None, None]
    overlap = down[..., :, None] * across[..., None, :] * inside(padding, boxes)[:, :, None]
    area, object_area = ((box[..., 2:] - box[..., :2] + 1).prod(-1) for box in (anchors, objects))
    return overlap / (area[:, None, None] + object_area[..., None, None, None] - overlap)
