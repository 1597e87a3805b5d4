"""KD-DETR (Wang et al., CVPR 2024): teacher and student decode the same queries, so that predictions correspond one by one."""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from detrdistill.boxes import cxcywh_to_xyxy, iou
from detrdistill.distill.assignment import QueryAdapter
from detrdistill.distill.loss import DistillationLoss
from detrdistill.matching import Pairs
from detrdistill.models.outputs import DetectorOutput, Queries, Targets

IMAGES = 8  # on each of the authors' GPUs, over which they sum the class term
EDGE = 11.5  # logit of 1 - 1e-5, beyond which the DETRs know no difference


class SpecificSampling(DistillationLoss):
    """The teacher's own queries, which look where its objects are, decoded by the student as well.

    Args:
        student_dim, teacher_dim, position: as in `QueryAdapter`.
        form: `released`: the class term is T^2 KL, averaged over classes, weighted and summed over queries; L1 (the mean of 4
            coordinates) and 1 - GIoU are weighted means over the batch. The authors divide the class term by nothing, in batches of 8
            images a GPU; here it is divided by the images, as everything else, and multiplied by these 8, so that class and boxes
            weigh as theirs. Weights are their 1, 5, 2. They compare every student stage with the teacher's last (`last_to_all`).
            `tprd`: the port to Deformable DETR by TPRD, stage by stage (`grouped`): KL and L1 are sums over classes and coordinates,
            each image is a weighted mean of its queries. Weights are its 2, 5, 2.
        temperature: T of both softmaxes, over classes (both: 10).

    A query is weighted by the teacher's confidence, w = max_c sigmoid(z_c). The means of `released` over a batch are weighted by the
    batch's part in the optimizer step: they alone depend on how it is divided.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        position: bool = True,
        form: Literal["released", "tprd"] = "released",
        temperature: float = 10.0,
    ) -> None:
        super().__init__()
        self.adapter = QueryAdapter(student_dim, teacher_dim, position)
        self.form, self.temperature = form, temperature

    def student_queries(self, teacher: DetectorOutput) -> Queries:
        """What the teacher has decoded, in the student's width."""
        return self.adapter(teacher.initial)

    def forward(
        self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets, pairs: Mapping[str, Pairs]
    ) -> dict[str, Float[Tensor, " S"]]:
        log_student, log_teacher = ((output.logits / self.temperature).log_softmax(-1) for output in (student, teacher))
        divergence = self.temperature**2 * F.kl_div(log_student, log_teacher, reduction="none", log_target=True)  # S B Q C
        corners = [cxcywh_to_xyxy(output.boxes) for output in (student, teacher)]
        a, b = (student.boxes, teacher.boxes) if student.l1 == "cxcywh" else corners
        distance, giou = (a - b).abs(), iou(*corners)[1]
        confidence = teacher.logits.amax(-1).sigmoid()
        if self.form == "released":
            of_batch = student.logits.shape[1] / confidence.sum((1, 2), keepdim=True)
            return {
                "class": IMAGES * _weighted(divergence.mean(-1), confidence, targets),
                "l1": 5 * _weighted(distance.mean(-1), confidence * of_batch, targets),
                "giou": 2 * _weighted(1 - giou, confidence * of_batch, targets),
            }
        of_image = confidence / confidence.sum(2, keepdim=True)
        return {
            "class": 2 * _weighted(divergence.sum(-1), of_image, targets),
            "l1": 5 * _weighted(distance.sum(-1), of_image, targets),
            "giou": 2 * _weighted(1 - giou, of_image, targets),
        }


class GeneralSampling(SpecificSampling):
    """Random queries, new in every step, which look everywhere: both models decode the same.

    Args:
        queries: how many; as many as the teacher has if not given (the authors: 300).

    Content, position and reference are drawn from normal distributions with the mean and spread of the teacher's own, channel by
    channel, so that they suit decoders of any kind; references stay in the range of the teacher's own, for a size must not become
    negative, and an infinite one (a two-stage detector's unusable proposals) counts as one at the edge. (TPRD draws embeddings from
    N(0, 1), and each model places them itself.)
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        position: bool = True,
        form: Literal["released", "tprd"] = "released",
        temperature: float = 10.0,
        queries: int | None = None,
    ) -> None:
        super().__init__(student_dim, teacher_dim, position, form, temperature)
        self.queries = queries

    def teacher_queries(self, own: Queries) -> Queries:
        """Random queries, distributed as the teacher's `own`."""
        count = self.queries or len(own)
        position = None if own.position is None else _draw_like(own.position, count)
        reference = own.reference
        if reference is not None:
            reference = reference.clamp(-EDGE, EDGE)
            low, high = reference.aminmax(dim=1, keepdim=True)
            reference = _draw_like(reference, count).clamp(low, high)
        return Queries(_draw_like(own.content, count), position, reference)


def _weighted(values: Float[Tensor, "S B Q"], weights: Float[Tensor, "S B Q"], targets: Targets) -> Float[Tensor, " S"]:
    return (weights * values).sum((1, 2)) / targets.step_images


def _draw_like(values: Float[Tensor, "B Q D"], count: int) -> Float[Tensor, "B N D"]:
    """Normally distributed, with the mean and spread of `values` over queries."""
    noise = torch.randn(len(values), count, values.shape[2], dtype=values.dtype, device=values.device)
    return values.mean(1, keepdim=True) + values.std(1, correction=0, keepdim=True) * noise
