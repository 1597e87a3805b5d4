"""PKD: Pearson correlation between the channels of student and teacher."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detrdistill.distill.levels import adapter, inside, share_of_step
from detrdistill.models.outputs import Targets

EPSILON = 1e-6  # of the official code: a channel that is the same everywhere becomes 0


class PKDLoss(nn.Module):
    """Half the mean squared error of standardised channels, 1 - Pearson's r (Cao et al., PKD, NeurIPS 2022).

    Each channel is standardised over all valid cells of the batch, with the standard deviation of a sample (n - 1). The weight in
    mmrazor's configs is 10 for one-stage detectors, 6 for two-stage ones. Its statistics count padding, ours do not. It has no
    adapter; ours is a learned 1x1 convolution where the widths differ, whose bias has no effect.

    The statistics span the batch, so this is no sum over images: micro-batches are averaged (`share_of_step`).
    """

    def __init__(self, student_dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.adapter = adapter(student_dim, teacher_dim)

    def forward(
        self, student: Float[Tensor, "B E H W"], teacher: Float[Tensor, "B D H W"], padding: Bool[Tensor, "B H W"], targets: Targets
    ) -> dict[str, Float[Tensor, ""]]:
        valid = inside(padding, teacher)
        difference = standardise(self.adapter(student), valid) - standardise(teacher, valid)
        error = difference.square().sum() / (valid.sum() * teacher.shape[1])
        return {"pkd": error / 2 * share_of_step(padding, targets)}


def standardise(features: Float[Tensor, "B D H W"], valid: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B D H W"]:
    """Every channel with mean 0 and standard deviation 1 over the valid cells of all images; 0 on padding."""
    cells = valid.sum()
    mean = (features * valid).sum((0, 2, 3), keepdim=True) / cells
    centred = (features - mean) * valid
    # A norm, because a root would turn the gradient of a constant channel into NaN. At least 1, for a map of a single cell.
    deviation = torch.linalg.vector_norm(centred, dim=(0, 2, 3), keepdim=True) / (cells - 1).clamp(min=1).sqrt()
    return centred / (deviation + EPSILON)
