"""Hungarian-matching logits distillation: Eq. 3 (positives), Eq. 4 (negatives), summed over decoder stages (Eq. 5)."""

from collections.abc import Mapping
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from detrdistill.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from detrdistill.criterion import box_cost, box_losses, in_cache, pairwise_box_cost, target_cost
from detrdistill.distill.contrast import ContrastiveHead
from detrdistill.distill.loss import DistillationLoss
from detrdistill.matching import Pairs, Problem
from detrdistill.models.outputs import DetectorOutput, Targets


class LogitsDistillation(DistillationLoss):
    """The teacher's predictions are the student's targets, stage to stage.

    Args:
        matching: `split`: positives are the teacher queries that the teacher's own Hungarian assignment gives an object; the student
            is matched to them by class and box (Eq. 3). All other teacher queries are negatives, matched and distilled by box alone,
            since their class is always background (Eq. 4): without them some 7 boxes an image would be all that is distilled. The
            two matchings are independent. `positives`: Eq. 3 alone. `joint`: the released code, which has no split: all teacher
            queries at once, class and box of each, their boxes cut at the border of the image.
        normaliser: `queries`: everything is divided by the teacher's queries, since Eq. 3 and 4 together are one sum over all of
            them. `pairs`: positives by the number of objects, negatives by the other queries, joint pairs by their number.
        contrast: the released code's contrastive head, on the queries of joint pairs.
        contrast_weight: of its loss (released: 0.2).

    The paper's class term, normaliser and choice of positives were not found. The class term is the released code's: binary
    cross-entropy against the teacher's probabilities, summed over classes. Weights of class, L1 and GIoU are its 1, 5, 2. Numbers
    of queries may differ: as many are matched as the smaller one has.
    """

    def __init__(
        self,
        matching: Literal["split", "positives", "joint"] = "split",
        normaliser: Literal["queries", "pairs"] = "queries",
        contrast: ContrastiveHead | None = None,
        contrast_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.matching, self.normaliser, self.contrast, self.contrast_weight = matching, normaliser, contrast, contrast_weight

    def problems(self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets) -> dict[str, Problem]:
        """The teacher's assignment to the ground truth, and student queries to teacher queries."""
        if self.matching == "joint":
            return {"joint": Problem(joint_cost(student, teacher, self._target_boxes(teacher)))}
        boxes = box_cost(student.boxes, teacher.boxes, student.l1)
        problems = {
            "teacher": Problem(target_cost(teacher, targets), targets.counts),
            "positive": Problem(boxes + class_cost(student.logits, teacher.logits), matched_in="teacher"),
        }
        return problems if self.matching == "positives" else problems | {"negative": Problem(boxes, unmatched_in="teacher")}

    def forward(
        self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets, pairs: Mapping[str, Pairs]
    ) -> dict[str, Float[Tensor, " S"]]:
        target_boxes, losses = self._target_boxes(teacher), {}
        for name in ("joint",) if self.matching == "joint" else ("positive", "negative"):
            if name not in pairs:
                continue
            matched, divisor = pairs[name], self._divisor(name, student, teacher, targets)
            if name != "negative":
                losses[f"{name}/class"] = class_loss(student.logits, teacher.logits, matched) / divisor
            boxes = box_losses(student.boxes, target_boxes[matched.stage, matched.image, matched.target], matched, student.l1)
            losses |= {f"{name}/{part}": value / divisor for part, value in boxes.items()}
        if self.contrast is not None:
            losses["contrast"] = self.contrast_weight * self.contrast(student, teacher, targets, pairs["joint"])
        return losses

    def _target_boxes(self, teacher: DetectorOutput) -> Float[Tensor, "S B N 4"]:
        """The teacher's boxes; the released code cuts them at the border of the image, within which cxcywh alone may reach out."""
        return xyxy_to_cxcywh(cxcywh_to_xyxy(teacher.boxes).clamp(0, 1)) if self.matching == "joint" else teacher.boxes

    def _divisor(self, name: str, student: DetectorOutput, teacher: DetectorOutput, targets: Targets) -> float:
        queries = teacher.logits.shape[2]
        if self.normaliser == "queries":
            return targets.step_images * queries
        if name == "joint":
            return targets.step_images * min(queries, student.logits.shape[2])
        # Counted over the whole optimizer step, where an image with more objects than queries is as rare as it is harmless.
        return targets.step_boxes if name == "positive" else max(targets.step_images * queries - targets.step_boxes, 1.0)


def joint_cost(student: DetectorOutput, teacher: DetectorOutput, target_boxes: Float[Tensor, "S B N 4"]) -> Float[Tensor, "S B Q N"]:
    """Price of every student query for every teacher query, by class and box."""

    def cost(logits: Tensor, target_logits: Tensor, boxes: Tensor, target_boxes: Tensor) -> Tensor:
        return pairwise_box_cost(boxes, target_boxes, student.l1).add_(class_cost(logits, target_logits))

    return in_cache(cost, student.logits.shape[2] * teacher.logits.shape[2], student.logits, teacher.logits, student.boxes, target_boxes)


def class_cost(student: Float[Tensor, "*any Q C"], teacher: Float[Tensor, "*any N C"]) -> Float[Tensor, "*any Q N"]:
    """Binary cross-entropy of every student query against every teacher query's probabilities, summed over classes."""
    z, p = student.detach().float(), teacher.detach().float().sigmoid()
    return F.softplus(z).sum(-1, keepdim=True) - z @ p.transpose(-1, -2)


def class_loss(student: Float[Tensor, "S B Q C"], teacher: Float[Tensor, "S B N C"], pairs: Pairs) -> Float[Tensor, " S"]:
    """The same for matched pairs, with gradient, summed over the pairs of each stage."""
    z = student[pairs.stage, pairs.image, pairs.query]
    p = teacher[pairs.stage, pairs.image, pairs.target].sigmoid()
    loss = F.binary_cross_entropy_with_logits(z, p, reduction="none").sum(-1)
    return student.new_zeros(len(student)).index_add(0, pairs.stage, loss)
