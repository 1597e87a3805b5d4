"""The set criterion of the DETRs: Hungarian matching, then focal, L1 and GIoU losses on every decoder stage.

Carion et al., ECCV 2020, with the focal loss that Deformable and Conditional DETR use (Lin et al., ICCV 2017). The same weights
serve as matching cost and as loss: class 2, L1 5, GIoU 2. A detector's output says whether L1 compares centres and sizes (the
DETRs) or corners (AdaMixer), both relative to the image.

AdaMixer's code, as all of mmdetection, divides by matched queries, the DETRs' by objects, which are more where an image has more objects
than queries: a detector's `most_objects` says so. Official codes differ in two more points that no number here shows: AdaMixer's class
cost has an epsilon of 1e-12 instead of 1e-8, and without any object its code divides by zero; here the divisor is at least 1.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from detrdistill.boxes import cxcywh_to_xyxy, iou
from detrdistill.matching import Pairs, Problem, match
from detrdistill.models.outputs import DetectorOutput, Targets

CLASS, L1, GIOU = 2.0, 5.0, 2.0
ALPHA, GAMMA = 0.25, 2.0
CACHED = 2**17  # pairs of boxes


class SetCriterion(nn.Module):
    """L_det of the paper: the detector's own loss.

    Call `problems`, have `matching.match` solve them together with those of other losses, then call the criterion with the pairs.
    """

    def problems(self, student: DetectorOutput, targets: Targets) -> dict[str, Problem]:
        problems = {"student": Problem(target_cost(student, targets), targets.counts)}
        if student.initial.proposals is not None:
            problems["proposals"] = Problem(target_cost(student.initial.proposals, _one_class(targets)), targets.counts)
        return problems

    def forward(self, student: DetectorOutput, targets: Targets, pairs: Mapping[str, Pairs]) -> dict[str, Float[Tensor, " S"]]:
        """Weighted losses, one value a decoder stage."""
        losses = set_losses(student, targets, pairs["student"])
        if student.initial.proposals is not None:
            proposals = set_losses(student.initial.proposals, _one_class(targets), pairs["proposals"])
            losses |= {f"proposals/{name}": value for name, value in proposals.items()}
        return losses


def target_cost(output: DetectorOutput, targets: Targets) -> Float[Tensor, "S B Q N"]:
    """Price of giving query q to target n of its own image: 2 focal + 5 L1 - 2 GIoU."""
    labels = targets.labels[None, :, None, :].expand(*output.logits.shape[:3], -1)
    classes = _focal_cost(output.logits.detach().gather(-1, labels).float())
    return CLASS * classes + box_cost(output.boxes, targets.boxes[None], output.l1)


def box_cost(rows: Float[Tensor, "S B Q 4"], columns: Float[Tensor, "#S B N 4"], l1: str = "cxcywh") -> Float[Tensor, "S B Q N"]:
    """5 L1 - 2 GIoU between all boxes of an image, without gradient. `l1` is the form of the boxes that L1 compares."""
    columns = columns.expand(len(rows), -1, -1, -1)
    return in_cache(lambda a, b: pairwise_box_cost(a, b, l1), rows.shape[2] * columns.shape[2], rows, columns)


def in_cache(cost: Callable[..., Tensor], pairs: int, *inputs: Float[Tensor, "S B _ _"]) -> Float[Tensor, "S B Q N"]:
    """`cost` of all stages and images, without gradient and in full precision.

    On a CPU a few images at a time, so that intermediate results stay in its cache: five times as fast with 300 x 300 pairs.

    Args:
        cost: called with the inputs, stages and images as one dimension.
        pairs: Q N.
    """
    stages, images = inputs[0].shape[:2]
    at_once = max(1, CACHED // max(pairs, 1)) if inputs[0].device.type == "cpu" else stages * images
    parts = zip(*(x.detach().float().flatten(0, 1).split(at_once) for x in inputs), strict=True)
    return torch.cat([cost(*part) for part in parts]).unflatten(0, (stages, images))


def pairwise_box_cost(rows: Float[Tensor, "K Q 4"], columns: Float[Tensor, "K N 4"], l1: str) -> Float[Tensor, "K Q N"]:
    """As `_compare` for every pair of an image, coordinate by coordinate and in place: the same numbers in less memory."""
    a, b = cxcywh_to_xyxy(rows), cxcywh_to_xyxy(columns)
    distance = torch.cdist(rows, columns, p=1) if l1 == "cxcywh" else torch.cdist(a, b, p=1)
    (left, top, right, bottom), others = a[:, :, None].unbind(-1), b[:, None].unbind(-1)

    def side(low, high, one, other):
        return high(one[1], other[1]).sub_(low(one[0], other[0])).clamp_(min=0)

    horizontal, vertical = ((left, right), others[0::2]), ((top, bottom), others[1::2])
    overlap = side(torch.maximum, torch.minimum, *horizontal).mul_(side(torch.maximum, torch.minimum, *vertical))
    hull = side(torch.minimum, torch.maximum, *horizontal).mul_(side(torch.minimum, torch.maximum, *vertical))
    areas = [(corners[..., 2:] - corners[..., :2]).clamp(min=0).prod(-1) for corners in (a, b)]
    union = areas[0][:, :, None] + areas[1][:, None] - overlap
    tiny = torch.finfo(rows.dtype).tiny
    giou = (overlap / union.clamp(min=tiny)).sub_((hull - union).div_(hull.clamp(min=tiny)))
    return distance.mul_(L1).sub_(giou.mul_(GIOU))


def set_losses(output: DetectorOutput, targets: Targets, pairs: Pairs) -> dict[str, Float[Tensor, " S"]]:
    """Weighted class, L1 and GIoU losses of given pairs, one value a stage, divided by the objects of the optimizer step."""
    classes = torch.zeros_like(output.logits)
    classes[pairs.stage, pairs.image, pairs.query, targets.labels[pairs.image, pairs.target]] = 1
    focal = sigmoid_focal_loss(output.logits, classes, alpha=ALPHA, gamma=GAMMA).sum((1, 2, 3))
    boxes = box_losses(output.boxes, targets.boxes[pairs.image, pairs.target], pairs, output.l1)
    return {"class": CLASS * focal / targets.step_boxes} | {name: value / targets.step_boxes for name, value in boxes.items()}


def box_losses(
    boxes: Float[Tensor, "S B Q 4"], matched: Float[Tensor, "K 4"], pairs: Pairs, l1: str = "cxcywh"
) -> dict[str, Float[Tensor, " S"]]:
    """Weighted L1 and GIoU losses summed over the pairs of each stage."""
    distance, giou = _compare(boxes[pairs.stage, pairs.image, pairs.query], matched, l1)

    def per_stage(values):
        return boxes.new_zeros(len(boxes)).index_add(0, pairs.stage, values)

    return {"l1": L1 * per_stage(distance), "giou": GIOU * per_stage(1 - giou)}


def _compare(a: Float[Tensor, "*#any 4"], b: Float[Tensor, "*#any 4"], l1: str) -> tuple[Float[Tensor, "*any"], Float[Tensor, "*any"]]:
    """L1 distance in the form `l1`, and GIoU."""
    corners_a, corners_b = cxcywh_to_xyxy(a), cxcywh_to_xyxy(b)
    distance = (a - b if l1 == "cxcywh" else corners_a - corners_b).abs().sum(-1)
    return distance, iou(corners_a, corners_b)[1]


def matched_objects(output: DetectorOutput, targets: Targets) -> Int[Tensor, "S B Q"]:
    """The object of its image that each query is matched with at each stage, by the price of the detection loss; -1 for none.

    Raises:
        NonFiniteError: a prediction is NaN or infinite.
    """
    pairs = match({"objects": Problem(target_cost(output, targets), targets.counts)})["objects"]
    objects = torch.full(output.logits.shape[:3], -1, device=output.logits.device)
    objects[pairs.stage, pairs.image, pairs.query] = pairs.target
    return objects


def _focal_cost(logits: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """What the focal loss would change if the class were present: positive term minus negative term (Deformable DETR's code)."""
    p = logits.sigmoid()
    present = ALPHA * (1 - p) ** GAMMA * -torch.log(p + 1e-8)
    absent = (1 - ALPHA) * p**GAMMA * -torch.log(1 - p + 1e-8)
    return present - absent


def _one_class(targets: Targets) -> Targets:
    """The encoder of a two-stage detector proposes objects of any class; its logit 0 stands for "object"."""
    return replace(targets, labels=torch.zeros_like(targets.labels))
