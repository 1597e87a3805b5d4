"""Masked Generative Distillation: the student's map, with cells hidden at random, has to generate the teacher's whole map."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detrdistill.distill.levels import adapter
from detrdistill.models.outputs import Targets


class MGDLoss(nn.Module):
    """Squared error of a small generator that sees part of the student's map (Yang et al., MGD, ECCV 2022).

    sum over channels and cells of (F_T - G(f(F_S) M))^2, averaged over images, with G = conv 3x3, ReLU, conv 3x3. The hidden cells
    are drawn anew at every call and shared by all channels. It is a sum, not a mean: large images count more, as published.

    Alpha is the term's weight: 2e-5 with `masked` 0.65 in the official one-stage configs, 5e-7 with 0.45 in the two-stage ones.
    (TPRD's port differs: a mean, divided by the images once more, with `masked` 0.5 and weight 10.)

    The official code generates padding too. Here padding is no target, and the generator sees zeros there, as beyond the map's
    edge: an image gives the same with and without padding, but for other random numbers.

    Args:
        student_dim, teacher_dim: channels.
        masked: lambda, the probability that a cell is hidden.
    """

    def __init__(self, student_dim: int, teacher_dim: int, masked: float) -> None:
        super().__init__()
        self.masked = masked
        self.align = adapter(student_dim, teacher_dim)

        def conv():
            return nn.Conv2d(teacher_dim, teacher_dim, 3, padding=1)

        self.generation = nn.Sequential(conv(), nn.ReLU(), conv())

    def forward(
        self, student: Float[Tensor, "B E H W"], teacher: Float[Tensor, "B D H W"], padding: Bool[Tensor, "B H W"], targets: Targets
    ) -> dict[str, Float[Tensor, ""]]:
        noise = torch.rand(len(student), 1, *student.shape[2:], dtype=student.dtype, device=student.device)
        generated = self.generate(student, padding, hide(noise, self.masked))
        error = (generated - teacher).square() * ~padding[:, None]
        return {"mgd": error.sum() / targets.step_images}

    def generate(
        self, student: Float[Tensor, "B E H W"], padding: Bool[Tensor, "B H W"], hidden: Bool[Tensor, "B 1 H W"]
    ) -> Float[Tensor, "B D H W"]:
        """What G makes of the cells that are not hidden."""
        valid = ~padding[:, None]
        inner, activation, outer = self.generation
        # The first convolution writes into the padding, from where the second would read it back.
        return outer(activation(inner(self.align(student) * (valid & ~hidden))) * valid)


def hide(noise: Float[Tensor, "B 1 H W"], part: float) -> Bool[Tensor, "B 1 H W"]:
    """Which cells are hidden, given numbers that are uniform in [0, 1)."""
    return noise > 1 - part
