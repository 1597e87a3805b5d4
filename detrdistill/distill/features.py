"""Target-aware feature distillation: query masks (Eq. 7), quality scores (Eq. 8) and the weighted loss (Eq. 9)."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from detrdistill.boxes import cxcywh_to_xyxy, iou
from detrdistill.matching import Pairs, Problem
from detrdistill.models.outputs import DetectorOutput, Targets


class FeatureDistillation(nn.Module):
    """The student's features follow the teacher's where the teacher's good queries look.

    Args:
        student_dim, teacher_dim: channels. Phi of Eq. 6 is a learned 1x1 convolution between them, also where they agree: with the
            identity instead, a student can make the error small by letting its own features shrink to the teacher's mean.
        gamma: exponent of Eq. 8.

    Features are what the decoder attends to (Fig. 3: after the encoder), queries the teacher's decoder outputs of every stage,
    M all queries. The loss is summed over stages and levels. Padding takes no part; H W counts the valid cells of each image.
    The released code differs: no phi, features before the encoder, cosine instead of dot product, one mask clamped and divided by
    its maximum, the 100 best query-class pairs, no gamma.
    """

    def __init__(self, student_dim: int, teacher_dim: int, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma
        self.adapter = nn.Conv2d(student_dim, teacher_dim, 1)

    def problems(self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets) -> dict[str, Problem]:
        return {}

    def forward(
        self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets, pairs: Mapping[str, Pairs]
    ) -> dict[str, Float[Tensor, ""]]:
        quality = quality_scores(teacher.logits, teacher.boxes, targets, self.gamma)
        adapted = [self.adapter(level) for level in student.features]
        weights = mask_weights(teacher.features, teacher.queries, quality)
        total = adapted[0].new_zeros(())
        for f_student, f_teacher, weight, padding in zip(adapted, teacher.features, weights, teacher.padding, strict=True):
            error = (f_teacher - f_student).square().mean(1)  # 1/d of Eq. 9
            valid = (~padding).to(error.dtype)
            total = total + ((weight * error * valid).sum((1, 2)) / valid.sum((1, 2))).sum()
        return {"features": total / targets.step_images}


def quality_scores(
    logits: Float[Tensor, "S B Q C"], boxes: Float[Tensor, "S B Q 4"], targets: Targets, gamma: float
) -> Float[Tensor, "S B Q"]:
    """Eq. 8: q = c^gamma IoU^(1 - gamma), with the query's best class score and its best IoU with any object of the image.

    Which object the IoU is taken with was not found; the released code takes the best one too. Without objects in the image
    q = c, as in the released code.
    """
    score = logits.sigmoid().amax(-1)
    if targets.boxes.shape[1] == 0:
        return score
    overlap, _ = iou(cxcywh_to_xyxy(boxes)[..., None, :], cxcywh_to_xyxy(targets.boxes)[None, :, None])
    overlap = overlap.amax(-1)  # the padded boxes are empty: IoU 0
    some = torch.tensor([count > 0 for count in targets.counts]).to(score.device, non_blocking=True)[None, :, None]  # without waiting
    return torch.where(some, score**gamma * overlap ** (1 - gamma), score)


def query_masks(feature: Float[Tensor, "B D H W"], queries: Float[Tensor, "B Q D"]) -> Float[Tensor, "B Q H W"]:
    """Eq. 7: psi_i = F Q_i, the soft mask of each query."""
    return torch.einsum("bdhw,bqd->bqhw", feature, queries)


def mask_weights(
    features: Sequence[Float[Tensor, "B D _ _"]], queries: Float[Tensor, "S B Q D"], quality: Float[Tensor, "S B Q"]
) -> list[Float[Tensor, "B _ _"]]:
    """What Eq. 9 multiplies the squared error of each cell with: sum over stages of 1/M sum_i q_i psi_i^2.

    psi_i is a dot product, so the sum over queries is a quadratic form, F(x)^T (sum_i q_i Q_i Q_i^T) F(x): D x D numbers an image
    instead of a map a query and stage.
    """
    form = torch.einsum("sbq,sbqd,sbqe->bde", quality / queries.shape[2], queries, queries)
    return [torch.einsum("bdhw,bde,behw->bhw", feature, form, feature) for feature in features]
