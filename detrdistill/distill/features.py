"""Target-aware feature distillation: query masks (Eq. 7), quality scores (Eq. 8) and the weighted loss (Eq. 9)."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detrdistill.boxes import cxcywh_to_xyxy, iou
from detrdistill.distill.loss import DistillationLoss
from detrdistill.matching import Pairs
from detrdistill.models.outputs import DetectorOutput, Targets

TINY = 1e-12
Mask = Literal["quality", "query", "boxes", "ones", "released"]


class FeatureDistillation(DistillationLoss):
    """The student's features follow the teacher's where a mask says so (Eq. 6).

    Args:
        student_dim, teacher_dim: channels.
        gamma: exponent of Eq. 8.
        mask: `quality`: the masks of all queries, each weighted by its quality score (Eq. 9). `query`: their plain mean (Eq. 7), which
            the paper found not to help. `boxes`: 1 inside the ground truth. `ones`: everywhere, FitNet's. `released`: see
            `released_weights`.
        maps: `features`, what the decoder attends to (Fig. 3: after the encoder), or `neck`, before the encoder, as released.
        queries: Q_i of Eq. 7: the teacher's decoder outputs of every stage, over which the loss is summed; those of the last stage;
            or the queries that its decoder starts from, content plus position, with the last stage's quality.
        normalised: the teacher's maps are divided by their root mean square over an image's level, and the weights by their mean: Eq. 9
            grows with the fourth power of the maps' scale, which transformers' detectors leave at anything between 1 and 300.
        adapter: phi of Eq. 6 is a learned 1x1 convolution, also where the widths agree: with the identity instead, a student can
            make the error small by letting its own features shrink to the teacher's mean. False: the identity where it fits, as
            released.

    M is all queries. The loss is summed over levels. Padding takes no part; H W counts the valid cells of each image.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        gamma: float,
        mask: Mask = "quality",
        maps: Literal["neck", "features"] = "features",
        queries: Literal["stages", "last", "initial"] = "stages",
        adapter: bool = True,
        normalised: bool = False,
    ) -> None:
        super().__init__()
        self.gamma, self.mask, self.maps, self.queries, self.normalised = gamma, mask, maps, queries, normalised
        self.adapter = nn.Conv2d(student_dim, teacher_dim, 1) if adapter or student_dim != teacher_dim else nn.Identity()

    def forward(
        self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets, pairs: Mapping[str, Pairs]
    ) -> dict[str, Float[Tensor, ""]]:
        adapted = [self.adapter(level) for level in getattr(student, self.maps)]
        levels = zip(adapted, getattr(teacher, self.maps), self.weights(teacher, targets), teacher.padding, strict=True)
        total = adapted[0].new_zeros(())
        for f_student, f_teacher, weight, padding in levels:
            valid = (~padding).to(f_teacher.dtype)
            if self.normalised:
                scale = (f_teacher.square().mean(1) * valid).sum((1, 2)) / valid.sum((1, 2))
                f_teacher = f_teacher / scale.sqrt().clamp(min=TINY)[:, None, None, None]
                weight = weight / ((weight * valid).sum((1, 2)) / valid.sum((1, 2))).clamp(min=TINY)[:, None, None]
            error = (f_teacher - f_student).square().mean(1)  # 1/d of Eq. 9
            total = total + ((weight * error * valid).sum((1, 2)) / valid.sum((1, 2))).sum()
        return {"features": total / targets.step_images}

    def weights(self, teacher: DetectorOutput, targets: Targets) -> list[Float[Tensor, "B _ _"]]:
        """What the squared error of each cell is multiplied with, a map a level: the mask's square, or the sum of squares of Eq. 9."""
        maps = getattr(teacher, self.maps)
        if self.mask == "ones":
            return [torch.ones_like(level[:, 0]) for level in maps]
        if self.mask == "boxes":
            return [box_mask(targets, padding).to(level.dtype) for level, padding in zip(maps, teacher.padding, strict=True)]
        if self.queries != "stages":
            teacher = teacher.at([len(teacher.logits) - 1])
        queries = teacher.queries
        if self.queries == "initial":
            initial = teacher.initial
            vectors = initial.content if initial.position is None else initial.content + initial.position
            queries = vectors[None].expand(1, queries.shape[1], -1, -1)
        if self.mask == "query":
            return query_weights(maps, queries)
        if self.mask == "released":
            return released_weights(maps, teacher.padding, queries, teacher.logits, teacher.boxes, targets)
        return quality_weights(maps, queries, quality_scores(teacher.logits, teacher.boxes, targets, self.gamma))


def quality_scores(
    logits: Float[Tensor, "S B Q C"], boxes: Float[Tensor, "S B Q 4"], targets: Targets, gamma: float
) -> Float[Tensor, "S B Q"]:
    """Eq. 8: q = c^gamma IoU^(1 - gamma), with the query's best class score and its best IoU with any object of the image.

    Which object the IoU is taken with was not found; the released code takes the best one too. Without objects in the image
    q = c, as in the released code.
    """
    score = logits.sigmoid().amax(-1)
    overlap, has_objects = best_overlap(boxes, targets)
    return torch.where(has_objects, score**gamma * overlap ** (1 - gamma), score)


def best_overlap(boxes: Float[Tensor, "S B Q 4"], targets: Targets) -> tuple[Float[Tensor, "S B Q"], Bool[Tensor, "1 B 1"]]:
    """Best IoU with any object of the image, and whether the image has any."""
    has_objects = torch.tensor([count > 0 for count in targets.counts]).to(boxes.device, non_blocking=True)[
        None, :, None
    ]  # without waiting
    if targets.boxes.shape[1] == 0:
        return torch.zeros_like(boxes[..., 0]), has_objects
    overlap, _ = iou(cxcywh_to_xyxy(boxes)[..., None, :], cxcywh_to_xyxy(targets.boxes)[None, :, None])
    return overlap.amax(-1), has_objects  # the padded boxes are empty: IoU 0


def query_masks(feature: Float[Tensor, "B D H W"], queries: Float[Tensor, "B Q D"]) -> Float[Tensor, "B Q H W"]:
    """Eq. 7: psi_i = F Q_i, the soft mask of each query."""
    return torch.einsum("bdhw,bqd->bqhw", feature, queries)


def quality_weights(
    features: Sequence[Float[Tensor, "B D _ _"]], queries: Float[Tensor, "S B Q D"], quality: Float[Tensor, "S B Q"]
) -> list[Float[Tensor, "B _ _"]]:
    """Eq. 9: sum over stages of 1/M sum_i q_i psi_i^2.

    psi_i is a dot product, so the sum over queries is a quadratic form, F(x)^T (sum_i q_i Q_i Q_i^T) F(x): D x D numbers an image
    instead of a map a query and stage.
    """
    form = torch.einsum("sbq,sbqd,sbqe->bde", quality / queries.shape[2], queries, queries)
    return [torch.einsum("bdhw,bde,behw->bhw", feature, form, feature) for feature in features]


def query_weights(features: Sequence[Float[Tensor, "B D _ _"]], queries: Float[Tensor, "S B Q D"]) -> list[Float[Tensor, "B _ _"]]:
    """Eq. 7 in Eq. 6: sum over stages of psi^2 with psi = 1/M sum_i psi_i, the mask of the mean query."""
    return [torch.einsum("bdhw,sbd->sbhw", feature, queries.mean(2)).square().sum(0) for feature in features]


def released_weights(
    features: Sequence[Float[Tensor, "B D _ _"]],
    padding: Sequence[Bool[Tensor, "B _ _"]],
    queries: Float[Tensor, "S B Q D"],
    logits: Float[Tensor, "S B Q C"],
    boxes: Float[Tensor, "S B Q 4"],
    targets: Targets,
    top: int = 100,
) -> list[Float[Tensor, "B _ _"]]:
    """The released code's mask, squared and summed over stages.

    Of each stage the `top` best pairs of query and class (a query may come more than once) are weighted by score times IoU, without
    gamma; masks are cosines instead of dot products, summed, kept above 0.01 and divided by their maximum on the image (there:
    padding included).
    """
    overlap, has_objects = best_overlap(boxes, targets)
    quality = logits.sigmoid() * torch.where(has_objects, overlap, 1.0)[..., None]
    chosen = logits.flatten(2).topk(min(top, logits[0, 0].numel()), dim=-1).indices
    weight = torch.zeros_like(quality).flatten(2).scatter(2, chosen, quality.flatten(2).gather(2, chosen)).view_as(quality).sum(-1)
    # A sum of cosines with one map is the map's product with the weighted sum of unit queries.
    mixed = torch.einsum("sbq,sbqd->sbd", weight, F.normalize(queries, dim=-1))
    weights = []
    for feature, hidden in zip(features, padding, strict=True):
        mask = torch.einsum("bdhw,sbd->sbhw", F.normalize(feature, dim=1), mixed).clamp(min=0.01).masked_fill(hidden, 0)
        weights.append((mask / mask.amax((2, 3), keepdim=True)).square().sum(0))
    return weights


def box_mask(targets: Targets, padding: Bool[Tensor, "B H W"]) -> Bool[Tensor, "B H W"]:
    """Which cells have their centre inside an object's box. Boxes are relative to the image without padding."""
    rows, columns = (~padding[:, :, 0]).sum(1), (~padding[:, 0, :]).sum(1)
    y = (torch.arange(padding.shape[1], device=padding.device) + 0.5) / rows[:, None]
    x = (torch.arange(padding.shape[2], device=padding.device) + 0.5) / columns[:, None]
    left, top, right, bottom = cxcywh_to_xyxy(targets.boxes).unbind(-1)  # [B N]; padded boxes are empty
    across = (x[:, None] > left[..., None]) & (x[:, None] < right[..., None])
    down = (y[:, None] > top[..., None]) & (y[:, None] < bottom[..., None])
    return (down[..., :, None] & across[..., None, :]).any(1)
