"""FGD (Yang et al., CVPR 2022): foreground and background apart under the teacher's attention, and the relation of cells."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detrdistill.boxes import cxcywh_to_xyxy
from detrdistill.distill.baselines.fkd import mean_of_cells, spatial_attention
from detrdistill.distill.levels import adapter, inside
from detrdistill.models.outputs import Targets


class FGDLoss(nn.Module):
    """Focal and global distillation on one level.

    - foreground, background: sum of M A^S A^C (F_T - f(F_S))^2 with the masks M of `object_masks` and the teacher's attention over
      cells, A^S, and over channels, A^C.
    - attention: the L1 distance of the student's A^S and A^C to the teacher's.
    - relation: sum of (R(F_T) - R(f(F_S)))^2, R global contexts, one a model, both trained with this loss.

    Args:
        student_dim, teacher_dim: channels. f is a 1x1 convolution where they differ.
        foreground, background, attention, relation: weights of the four parts: alpha, beta, gamma, lambda.
        temperature: of the attention.

    Averaged over images. The recipe's weights (1e-3, 5e-4, 5e-4, 5e-6) and temperature (0.5) are those of the official configs of
    one-stage detectors. Padding takes no part, neither in attention nor in relation nor as background (officially it does). An
    object's cells are found on the part of the map that the image covers: the official code scales boxes by the image without
    padding to the map with it, which puts masks beside their objects wherever there is padding.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        foreground: float,
        background: float,
        attention: float,
        relation: float,
        temperature: float,
    ) -> None:
        super().__init__()
        self.weights = {"foreground": foreground, "background": background, "attention": attention, "relation": relation}
        self.temperature = temperature
        self.align = adapter(student_dim, teacher_dim)
        self.student_context, self.teacher_context = GlobalContext(teacher_dim), GlobalContext(teacher_dim)

    def forward(
        self, student: Float[Tensor, "B E H W"], teacher: Float[Tensor, "B D H W"], padding: Bool[Tensor, "B H W"], targets: Targets
    ) -> dict[str, Float[Tensor, ""]]:
        student, valid = self.align(student), inside(padding, teacher)
        foreground, background = object_masks(targets, padding)
        (cells, channels), (student_cells, student_channels) = (self.attend(maps, padding) for maps in (teacher, student))
        error = cells * (channels[..., None, None] * (teacher - student).square()).sum(1)
        relation = self.teacher_context(teacher, padding) - self.student_context(student, padding)
        parts = {
            "foreground": (foreground * error).sum(),
            "background": (background * error).sum(),
            "attention": (cells - student_cells).abs().sum() + (channels - student_channels).abs().sum(),
            "relation": (valid * relation.square()).sum(),
        }
        return {name: self.weights[name] * value / targets.step_images for name, value in parts.items()}

    def attend(self, maps: Float[Tensor, "B D H W"], padding: Bool[Tensor, "B H W"]) -> tuple[Float[Tensor, "B H W"], Float[Tensor, "B D"]]:
        """A^S and A^C: softmax of mean absolute values, times the number of cells or channels."""
        energy = mean_of_cells(maps.abs(), inside(padding, maps)) / self.temperature
        return spatial_attention(maps, padding, self.temperature), energy.shape[1] * energy.softmax(1)


class GlobalContext(nn.Module):
    """Adds to every cell the same transform of a learned average over cells (GcBlock; Cao et al., ICCVW 2019).

    As officially, it starts as the identity: the last layer is 0.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score = nn.Conv2d(dim, 1, 1)
        self.transform = nn.Sequential(nn.Linear(dim, dim // 2), nn.LayerNorm(dim // 2), nn.ReLU(), nn.Linear(dim // 2, dim))
        nn.init.kaiming_normal_(self.score.weight, nonlinearity="relu")
        for zero in (self.score.bias, self.transform[-1].weight, self.transform[-1].bias):
            nn.init.zeros_(zero)

    def forward(self, x: Float[Tensor, "B D H W"], padding: Bool[Tensor, "B H W"]) -> Float[Tensor, "B D H W"]:
        share = self.score(x)[:, 0].masked_fill(padding, -torch.inf).flatten(1).softmax(1)
        context = torch.einsum("bdn,bn->bd", x.flatten(2), share)
        return x + self.transform(context)[..., None, None]


def object_masks(targets: Targets, padding: Bool[Tensor, "B H W"]) -> tuple[Float[Tensor, "B H W"], Float[Tensor, "B H W"]]:
    """Foreground and background.

    Foreground: 1 / number of its cells on all cells of an object, 0 elsewhere; where objects overlap, the smaller one's. Background:
    1 / number of background cells there, 0 elsewhere; all 0 if there is none.

    As officially, an object begins in the cell of its left and top edge and reaches one cell beyond that of its right and bottom
    edge; cells beyond the map count in the number.
    """
    boxes = in_cells(F.pad(targets.boxes, (0, 0, 0, 1)), padding)  # one object of padding, so that there is one
    low, high = boxes[..., :2].floor(), boxes[..., 2:].ceil()
    weight = (boxes != 0).any(-1) / (high - low + 1).prod(-1)  # 0 for padding
    y, x = (torch.arange(side, device=boxes.device) for side in padding.shape[1:])
    across = (x >= low[..., 0, None]) & (x <= high[..., 0, None])
    down = (y >= low[..., 1, None]) & (y <= high[..., 1, None])
    covered = (weight[..., None, None] * (down[..., :, None] & across[..., None, :])).amax(1)
    foreground = covered.masked_fill(padding, 0)
    background = inside(padding, boxes)[:, 0] * (foreground == 0)
    return foreground, background / background.sum((1, 2), keepdim=True).clamp(min=1)


def in_cells(boxes: Float[Tensor, "B N 4"], padding: Bool[Tensor, "B H W"]) -> Float[Tensor, "B N 4"]:
    """Boxes cxcywh relative to the image without padding as xyxy in cells, cut at the image's border.

    (Cut, lest a rounding error put an edge on the border into the next cell.)
    """
    size = torch.stack(((~padding[:, 0, :]).sum(1), (~padding[:, :, 0]).sum(1)), dim=-1)
    return cxcywh_to_xyxy(boxes).clamp(0, 1) * size.repeat(1, 2)[:, None]
