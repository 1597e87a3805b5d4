"""FKD (Zhang & Ma, ICLR 2021): features under a mask of attention, pooled features, and relations between cells."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detrdistill.distill.levels import inside, share_of_step
from detrdistill.models.outputs import Targets


class FKDLoss(nn.Module):
    """Feature-based knowledge distillation on one level.

    - feature: || sqrt(M) (F_T - f(F_S)) ||, f a 1x1 convolution, M the mean of both models' spatial attention, a constant.
    - channel: || mean over cells of F_T - g(that of F_S) ||, g linear.
    - spatial: || mean over channels of F_T - k(that of F_S) ||, k a 3x3 convolution.
    - relation: || r(F_T) - h(r(F_S)) ||, r non-local blocks, one a model, both trained with this loss; h a 1x1 convolution.

    Args:
        student_dim, teacher_dim: channels.
        feature, channel, spatial, relation: weights of the four parts.
        temperature: of the attention.
        reduction, pool: as in `NonLocal`.

    The authors' repository holds no code; this is mmrazor's FBKD, and so are the recipe's weights (7e-5, 4e-3, 4e-3, 7e-5) and
    temperature (0.5). Its configs pool the maps (`pool`), most of all the largest; here that is not needed (`NonLocal`). Norms are
    not squared and span the whole batch, hence `share_of_step`. The attention over channels, which mmrazor computes but does not
    use, is left out. There, student and teacher are equally wide; here, f, g and h lead from one width to the other. Padding takes
    no part (there: as any other cell).
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        feature: float,
        channel: float,
        spatial: float,
        relation: float,
        temperature: float,
        reduction: int = 2,
        pool: int | None = None,
    ) -> None:
        super().__init__()
        self.weights = {"feature": feature, "channel": channel, "spatial": spatial, "relation": relation}
        self.temperature = temperature
        self.adapt = nn.Conv2d(student_dim, teacher_dim, 1)  # f
        self.adapt_channels = nn.Linear(student_dim, teacher_dim)  # g
        self.adapt_cells = nn.Conv2d(1, 1, 3, padding=1)  # k
        self.adapt_relation = nn.Conv2d(student_dim, teacher_dim, 1)  # h
        self.student_relation = NonLocal(student_dim, reduction, pool)
        self.teacher_relation = NonLocal(teacher_dim, reduction, pool)

    def forward(
        self, student: Float[Tensor, "B E H W"], teacher: Float[Tensor, "B D H W"], padding: Bool[Tensor, "B H W"], targets: Targets
    ) -> dict[str, Float[Tensor, ""]]:
        valid = inside(padding, student)
        mask = (spatial_attention(student, padding, self.temperature) + spatial_attention(teacher, padding, self.temperature)) / 2
        student_relation, teacher_relation = self.student_relation(student, padding), self.teacher_relation(teacher, padding)
        cells = self.adapt_cells(valid * student.mean(1, keepdim=True))
        differences = {
            "feature": mask.detach().sqrt()[:, None] * (teacher - self.adapt(student)),
            "channel": mean_of_cells(teacher, valid) - self.adapt_channels(mean_of_cells(student, valid)),
            "spatial": valid * (teacher.mean(1, keepdim=True) - cells),
            "relation": valid * (teacher_relation - self.adapt_relation(student_relation)),
        }
        share = share_of_step(padding, targets)
        # At 0 the gradient of `vector_norm` is 0; that of the root of a sum of squares would be NaN.
        return {name: share * self.weights[name] * torch.linalg.vector_norm(x) for name, x in differences.items()}


class NonLocal(nn.Module):
    """x + norm(out(y)), where a cell's y is the sum of all cells' g, weighted by theta . phi / number of cells.

    Non-local block (Wang et al., CVPR 2018) with plain dot products. Without a softmax, theta^T (phi g^T) needs no map of cells by
    cells: time and memory are linear in cells.

    Args:
        reduction: theta, phi and g have `dim / reduction` channels.
        pool: phi and g are max-pooled, by 2 and then by this, as where mmrazor's `sub_sample` is on. Padding is kept out of the
            maxima, but where the map goes on in padding, a last window may be kept that a map without padding would cut off.

    As officially, the block starts as the identity: the weight of `norm` is 0.
    """

    def __init__(self, dim: int, reduction: int, pool: int | None = None) -> None:
        super().__init__()
        inner = max(dim // reduction, 1)
        self.theta, self.phi, self.g = (nn.Conv2d(dim, inner, 1) for _ in range(3))
        self.out = nn.Conv2d(inner, dim, 1, bias=False)
        self.norm = MaskedBatchNorm(dim)
        self.pools = () if pool is None else (2, pool)
        for layer in (self.theta, self.phi, self.g):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        nn.init.kaiming_normal_(self.out.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Float[Tensor, "B D H W"], padding: Bool[Tensor, "B H W"]) -> Float[Tensor, "B D H W"]:
        phi, hidden = self.pooled(self.phi(x), padding)
        g, _ = self.pooled(self.g(x), padding)
        keys = (~hidden).sum((1, 2))[:, None, None]
        mixed = torch.einsum("bihw,bjhw->bij", phi, g) / keys
        y = torch.einsum("bihw,bij->bjhw", self.theta(x), mixed)
        return x + self.norm(self.out(y), padding)

    def pooled(self, x: Float[Tensor, "B I H W"], padding: Bool[Tensor, "B H W"]) -> tuple[Float[Tensor, "B I h w"], Bool[Tensor, "B h w"]]:
        """Maxima of windows, and which windows are all padding: 0 there."""
        for size in self.pools:
            window = [min(size, side) for side in x.shape[2:]]
            x = F.max_pool2d(x.masked_fill(padding[:, None], -torch.inf), window)
            padding = F.max_pool2d(inside(padding, x), window)[:, 0] == 0
        return x.masked_fill(padding[:, None], 0), padding


class MaskedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation whose statistics do not count padding."""

    def forward(self, x: Float[Tensor, "B D H W"], padding: Bool[Tensor, "B H W"]) -> Float[Tensor, "B D H W"]:
        if not self.training:
            return super().forward(x)
        valid = inside(padding, x)
        cells = valid.sum()
        mean = (valid * x).sum((0, 2, 3)) / cells
        centred = x - mean[:, None, None]
        variance = (valid * centred.square()).sum((0, 2, 3)) / cells
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * cells / (cells - 1).clamp(min=1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale[:, None, None] + self.bias[:, None, None]


def spatial_attention(features: Float[Tensor, "B D H W"], padding: Bool[Tensor, "B H W"], temperature: float) -> Float[Tensor, "B H W"]:
    """Softmax over cells of the mean absolute value over channels, times the number of cells: 1 on average, 0 on padding."""
    energy = (features.abs().mean(1) / temperature).masked_fill(padding, -torch.inf)
    return (~padding).sum((1, 2))[:, None, None] * energy.flatten(1).softmax(1).view_as(energy)


def mean_of_cells(features: Float[Tensor, "B D H W"], valid: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B D"]:
    return (valid * features).sum((2, 3)) / valid.sum((2, 3))
