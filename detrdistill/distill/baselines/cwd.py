"""CWD: where each channel of the teacher is active, as a softmax over its cells."""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from detrdistill.distill.levels import adapter
from detrdistill.models.outputs import Targets


class CWDLoss(nn.Module):
    """KL divergence between channels as distributions over cells (Shu et al., Channel-wise Knowledge Distillation, ICCV 2021).

    temperature^2 / (channels * images) times the sum over images and channels of KL(teacher || student), at least 0. Adding a number
    to a whole channel changes nothing. mmrazor's configs for detectors have temperature 1 and weight 10. There padding has its share
    of each distribution, and there is no adapter; here padding has none, and a learned 1x1 convolution fits widths that differ.

    Args:
        student_dim, teacher_dim: channels.
        temperature: tau, what both maps are divided by.
    """

    def __init__(self, student_dim: int, teacher_dim: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.adapter = adapter(student_dim, teacher_dim)

    def forward(
        self, student: Float[Tensor, "B E H W"], teacher: Float[Tensor, "B D H W"], padding: Bool[Tensor, "B H W"], targets: Targets
    ) -> dict[str, Float[Tensor, ""]]:
        log_student, log_teacher = (self.log_probabilities(features, padding) for features in (self.adapter(student), teacher))
        # On padding both are minus infinity, and their difference NaN.
        difference = (log_teacher - log_student).masked_fill(padding.flatten(1)[:, None], 0)
        divergence = (log_teacher.exp() * difference).sum()
        return {"cwd": self.temperature**2 * divergence / (teacher.shape[1] * targets.step_images)}

    def log_probabilities(self, features: Float[Tensor, "B D H W"], padding: Bool[Tensor, "B H W"]) -> Float[Tensor, "B D HW"]:
        return (features / self.temperature).masked_fill(padding[:, None], float("-inf")).flatten(2).log_softmax(-1)
