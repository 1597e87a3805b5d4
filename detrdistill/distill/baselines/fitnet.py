"""FitNet for detectors: every cell of the teacher's maps is imitated alike."""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from detrdistill.distill.levels import inside
from detrdistill.models.outputs import Targets


class FitNetLoss(nn.Module):
    """Mean squared error between adapted student and teacher (Romero et al., FitNets, ICLR 2015; the mask psi = 1 of DETRDistill).

    No setting for detectors was published. As in TPRD's port to Deformable DETR the adapter is a learned 1x1 convolution, also where
    the widths agree; its weight is 10 and levels are averaged. Two deviations from that port:

    - It divides the mean by the images once more, so that its loss shrinks with the batch. That is left out: where it ran with B
      images on a device, its weight of 10 is 10 / B here.
    - It averages over padding too; here the mean is over the valid cells of each image, and then over the images of the step.
    """

    def __init__(self, student_dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.adapter = nn.Conv2d(student_dim, teacher_dim, 1)

    def forward(
        self, student: Float[Tensor, "B E H W"], teacher: Float[Tensor, "B D H W"], padding: Bool[Tensor, "B H W"], targets: Targets
    ) -> dict[str, Float[Tensor, ""]]:
        valid = inside(padding, teacher)
        error = (self.adapter(student) - teacher).square().mean(1, keepdim=True)
        means = (error * valid).sum((1, 2, 3)) / valid.sum((1, 2, 3))
        return {"fitnet": means.sum() / targets.step_images}
