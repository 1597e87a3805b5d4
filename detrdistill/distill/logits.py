"""Hungarian-matching logits distillation: Eq. 3 (positives), Eq. 4 (negatives), summed over decoder stages (Eq. 5)."""

from collections.abc import Mapping

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from detrdistill.criterion import box_cost, box_losses
from detrdistill.matching import Pairs, Problem
from detrdistill.models.outputs import DetectorOutput, Targets


class LogitsDistillation(nn.Module):
    """The teacher's predictions are the student's targets, stage k to stage k.

    Positives are the teacher queries that the teacher's own Hungarian assignment gives an object; the student is matched to them by
    class and box (Eq. 3). All other teacher queries are negatives, matched and distilled by box alone, since their class is always
    background (Eq. 4): without them some 7 boxes an image would be all that is distilled. The two matchings are independent.

    The paper's class term, normaliser and choice of positives were not found. Class term and normaliser are the released code's:
    binary cross-entropy against the teacher's probabilities, summed over classes, and everything divided by the number of
    teacher queries, since Eq. 3 and 4 together are one sum over all of them. The released code has no split: it matches all
    queries at once and distils class and box of each.
    """

    def problems(self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets) -> dict[str, Problem]:
        boxes = box_cost(student.boxes, teacher.boxes, student.l1)
        return {
            "positive": Problem(boxes + class_cost(student.logits, teacher.logits), among="teacher"),
            "negative": Problem(boxes, besides="teacher"),
        }

    def forward(
        self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets, pairs: Mapping[str, Pairs]
    ) -> dict[str, Float[Tensor, " S"]]:
        positive, negative = pairs["positive"], pairs["negative"]
        queries = targets.step_images * teacher.logits.shape[2]
        losses = {"positive/class": class_loss(student.logits, teacher.logits, positive) / queries}
        for name, matched in (("positive", positive), ("negative", negative)):
            wanted = teacher.boxes[matched.stage, matched.image, matched.target]
            losses |= {f"{name}/{part}": value / queries for part, value in box_losses(student.boxes, wanted, matched, student.l1).items()}
        return losses


def class_cost(student: Float[Tensor, "S B Q C"], teacher: Float[Tensor, "S B N C"]) -> Float[Tensor, "S B Q N"]:
    """Binary cross-entropy of every student query against every teacher query's probabilities, summed over classes."""
    z, p = student.detach().float(), teacher.detach().float().sigmoid()
    return F.softplus(z).sum(-1, keepdim=True) - z @ p.transpose(-1, -2)


def class_loss(student: Float[Tensor, "S B Q C"], teacher: Float[Tensor, "S B N C"], pairs: Pairs) -> Float[Tensor, " S"]:
    """The same for matched pairs, with gradient, summed over the pairs of each stage."""
    z = student[pairs.stage, pairs.image, pairs.query]
    p = teacher[pairs.stage, pairs.image, pairs.target].sigmoid()
    loss = F.binary_cross_entropy_with_logits(z, p, reduction="none").sum(-1)
    return student.new_zeros(len(student)).index_add(0, pairs.stage, loss)
