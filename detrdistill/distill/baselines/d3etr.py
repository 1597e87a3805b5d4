"""D3ETR's MixMatcher (Chen et al., IJCAI 2024): predictions and attention of the decoder, queries paired in two ways.

Its own code is not public. What is not in the paper's abstract is TPRD's, which ported it to Deformable DETR: class, L1 and GIoU
with weights 1, 5, 2, squared errors between self-attention maps (1e4) and between cross-attention maps (1e3), stage by stage.

Ours deviates from TPRD in four points. Heads are averaged, as the heads of two models do not correspond and may differ in number;
TPRD compares head h with head h. Cross-attention is compared query by query, as self-attention is; TPRD compares its sum over
queries, which no pairing can change. So ours sums the queries' errors, which for independent errors is as large as the error of
the sum. The mean counts an image's valid cells; TPRD's counts padding. And self-attention, whose entries are the smaller the more
queries share it, is scaled to TPRD's 300 queries, so that its weight means the same with 20.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from detrdistill.criterion import box_losses
from detrdistill.distill.assignment import QueryAdapter
from detrdistill.distill.logits import class_loss, joint_cost
from detrdistill.distill.loss import DistillationLoss
from detrdistill.matching import Pairs, Problem
from detrdistill.models.outputs import DetectorOutput, Queries, Targets

QUERIES = 300  # that TPRD's weight of self-attention is for


class OneToOne(DistillationLoss):
    """Query i of the student against query i of the teacher.

    Args:
        self_attention, cross_attention: weights of the attention maps' mean squared errors; with 0 they are not compared.

    Class (cross-entropy against the teacher's probabilities), L1 and GIoU are those of `LogitsDistillation`'s joint pairs, without
    its cut at the border of the image, averaged over queries.
    """

    def __init__(self, self_attention: float = 1e4, cross_attention: float = 1e3) -> None:
        super().__init__()
        self.self_attention, self.cross_attention = self_attention, cross_attention
        self.attention = self_attention > 0 or cross_attention > 0

    def forward(
        self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets, pairs: Mapping[str, Pairs]
    ) -> dict[str, Float[Tensor, " S"]]:
        counts = student.logits.shape[:3]
        stage, image, query = torch.cartesian_prod(*(torch.arange(count, device=student.logits.device) for count in counts)).unbind(-1)
        same, queries = Pairs(stage, image, query, query), counts[2]
        losses = {"class": class_loss(student.logits, teacher.logits, same)}
        losses |= box_losses(student.boxes, teacher.boxes.flatten(0, 2), same, student.l1)
        losses = {name: value / queries for name, value in losses.items()}
        if self._compares(student.self_attention, teacher.self_attention, self.self_attention):
            error = (student.self_attention - teacher.self_attention).square()
            losses["self_attention"] = self.self_attention * (queries / QUERIES) ** 2 * error.mean((2, 3)).sum(1)
        if self._compares(student.cross_attention, teacher.cross_attention, self.cross_attention):
            # Padding gets no attention from either.
            valid = torch.cat([~mask.flatten(1) for mask in student.padding], dim=1).sum(1)
            error = (student.cross_attention - teacher.cross_attention).square()
            losses["cross_attention"] = self.cross_attention * (error.sum((2, 3)) / valid).sum(1)
        return {name: value / targets.step_images for name, value in losses.items()}

    def _compares(self, student: Tensor | None, teacher: Tensor | None, weight: float) -> bool:
        return weight > 0 and student is not None and teacher is not None


class AdaptiveMatching(OneToOne):
    """The student's own queries, paired with the teacher's by class and box, stage by stage.

    Numbers of queries may differ: as many are paired as the smaller one has, and self-attention is compared among these.
    """

    def problems(self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets) -> dict[str, Problem]:
        return {"queries": Problem(joint_cost(student, teacher, teacher.boxes))}

    def forward(
        self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets, pairs: Mapping[str, Pairs]
    ) -> dict[str, Float[Tensor, " S"]]:
        # Pairs come stage by stage and image by image, the same number of each.
        student_index, teacher_index = (
            index.view(*student.logits.shape[:2], -1) for index in (pairs["queries"].query, pairs["queries"].target)
        )
        return super().forward(chosen(student, student_index), chosen(teacher, teacher_index), targets, {})


class FixedMatching(OneToOne):
    """The teacher's queries, which the student decodes as well: no pairing is needed.

    Args:
        student_dim, teacher_dim, position: as in `QueryAdapter`.
        self_attention, cross_attention: as in `OneToOne`.
    """

    def __init__(
        self, student_dim: int, teacher_dim: int, position: bool = True, self_attention: float = 1e4, cross_attention: float = 1e3
    ) -> None:
        super().__init__(self_attention, cross_attention)
        self.adapter = QueryAdapter(student_dim, teacher_dim, position)

    def student_queries(self, teacher: DetectorOutput) -> Queries:
        """The teacher's queries in the student's width."""
        return self.adapter(teacher.initial)


def chosen(output: DetectorOutput, index: Int[Tensor, "S B K"]) -> DetectorOutput:
    """Some of the queries, in another order, which each stage and image has for itself."""

    def rows(x):
        return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))

    taken = {name: rows(getattr(output, name)) for name in ("logits", "boxes", "queries")}
    if output.self_attention is not None:
        columns = index[:, :, None].expand(-1, -1, index.shape[2], -1)
        taken["self_attention"] = rows(output.self_attention).gather(3, columns)
    if output.cross_attention is not None:
        taken["cross_attention"] = rows(output.cross_attention)
    return replace(output, **taken)
