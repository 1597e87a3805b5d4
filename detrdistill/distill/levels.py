"""Losses between feature maps, level by level: what the methods made for convolutional detectors have in common."""

from collections.abc import Mapping, Sequence
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn

from detrdistill.distill.loss import DistillationLoss
from detrdistill.matching import Pairs
from detrdistill.models.outputs import DetectorOutput, Targets


class LevelByLevel(DistillationLoss):
    """The sum of a loss over the levels, each with a module of its own.

    Args:
        losses: one a level, called with `(student [B E H W], teacher [B D H W], padding [B H W], targets)`, returning named scalars.
        maps: "neck", what the encoder starts from, as the published methods attach to the neck; or "features", what the decoder
            attends to. A detector without an encoder has one and the same.
        average: the mean over levels instead of the sum.
    """

    def __init__(self, losses: Sequence[nn.Module], maps: Literal["neck", "features"] = "neck", average: bool = False) -> None:
        super().__init__()
        self.losses, self.maps = nn.ModuleList(losses), maps
        self.share = 1 / len(losses) if average else 1.0

    def forward(
        self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets, pairs: Mapping[str, Pairs]
    ) -> dict[str, Float[Tensor, ""]]:
        losses: dict[str, Tensor] = {}
        levels = zip(self.losses, getattr(student, self.maps), getattr(teacher, self.maps), teacher.padding, strict=True)
        for loss, student_map, teacher_map, padding in levels:
            for name, value in loss(student_map, teacher_map, padding, targets).items():
                losses[name] = losses.get(name, 0) + self.share * value
        return losses


def adapter(student_dim: int, teacher_dim: int) -> nn.Module:
    """A learned 1x1 convolution where the widths differ."""
    return nn.Identity() if student_dim == teacher_dim else nn.Conv2d(student_dim, teacher_dim, 1)


def inside(padding: Bool[Tensor, "B H W"], like: Tensor) -> Float[Tensor, "B 1 H W"]:
    """1 on the image, 0 on padding."""
    return (~padding[:, None]).to(like.dtype)


def share_of_step(padding: Bool[Tensor, "B H W"], targets: Targets) -> float:
    """Part of the optimizer step's images that are in this batch.

    It weighs losses that are no sum over images (their norms or statistics span the batch), so that micro-batches and devices are
    averaged. For these losses alone, what is computed depends on how the step is divided.
    """
    return len(padding) / targets.step_images
