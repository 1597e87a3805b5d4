"""What the detectors share: position encodings, attention within groups of queries, and multi-scale deformable attention.

All in plain PyTorch: nothing to compile, the same numbers on CPU and GPU.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU between them, none after the last."""

    def __init__(self, inputs: int, hidden: int, outputs: int, layers: int) -> None:
        super().__init__()
        widths = [inputs, *[hidden] * (layers - 1), outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Float[Tensor, "*any I"]) -> Float[Tensor, "*any O"]:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


def exact(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`layer(x)` in at least float32, also under autocast: geometry needs more than bfloat16's 8 bits."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(x if x.dtype == torch.float64 else x.float())


def constants(values: Sequence, like: Tensor) -> Tensor:
    """A few numbers from the host beside `like`, in its dtype; the host does not wait for the device, as it would in `torch.tensor`."""
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


def sine_code(values: Float[Tensor, "*any"], features: int, temperature: float = 10000.0) -> Float[Tensor, "*any F"]:
    """Interleaved sines (even entries) and cosines (odd entries) of each value at `features` / 2 frequencies, 1 to 1 / `temperature`."""
    pair = torch.arange(features, device=values.device) // 2
    # Divided, and 2 pi multiplied in once by the callers, as the official codes do: equal to them to the last bit.
    phases = values[..., None] / temperature ** (2 * pair.float() / features)
    return torch.stack((phases[..., 0::2].sin(), phases[..., 1::2].cos()), dim=-1).flatten(-2)


def sine_position(padding: Bool[Tensor, "B H W"], features: int, shift: float, temperature: float = 10000.0) -> Float[Tensor, "B D H W"]:
    """Sine encoding of the position within the unpadded image, rows first, `features` channels an axis, always in float32.

    Args:
        shift: added to the 1-based pixel count before normalising: 0 in DETR and Conditional DETR, -0.5 in Deformable DETR.
    """
    valid = ~padding
    codes = []
    for axis in (1, 2):
        count = valid.cumsum(axis, dtype=torch.float32)
        total = count.select(axis, -1).unsqueeze(axis)
        codes.append(sine_code((count + shift) / (total + 1e-6) * (2 * math.pi), features, temperature))
    return torch.cat(codes, dim=-1).permute(0, 3, 1, 2)


def level_padding(padding: Bool[Tensor, "B H W"], shape: tuple[int, int]) -> Bool[Tensor, "B h w"]:
    """The images' padding mask on a feature level's grid: that of the pixel that torch's `interpolate` (nearest) takes for a cell.

    Written out, since an ONNX file would divide by the level's part of the image where torch multiplies by its inverse, and hit the
    pixel before where a cell begins exactly at one (seen with 130 pixels and 5 cells).
    """
    for axis, (pixels, cells) in enumerate(zip(padding.shape[1:], shape, strict=True), start=1):
        taken = (torch.arange(cells, dtype=torch.float32, device=padding.device) * (pixels / cells)).long()
        padding = padding.index_select(axis, taken.clamp(max=pixels - 1))
    return padding


def valid_ratio(padding: Bool[Tensor, "B H W"]) -> Float[Tensor, "B 2"]:
    """Part of width and of height (x, y) that is image rather than padding."""
    valid = ~padding
    return torch.stack((valid[:, 0, :].float().mean(1), valid[:, :, 0].float().mean(1)), dim=-1)


def attend(
    query: Float[Tensor, "B Q K"],
    key: Float[Tensor, "B T K"],
    value: Float[Tensor, "B T D"],
    heads: int,
    visible: Bool[Tensor, "B 1 1 T"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B Q D"]:
    """Multi-head attention of inputs that are projected already; scores are scaled by the width of a head's keys."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    width = value.shape[-1]
    # torch's fast kernel on CPUs wants keys and values of one width.
    value = F.pad(value, (0, key.shape[-1] - width))
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=dropout)
    return mixed[..., :width].transpose(1, 2).flatten(2)


def attention_map(
    query: Float[Tensor, "B Q K"], key: Float[Tensor, "B T K"], heads: int, bias: Float[Tensor, "B #heads #Q T"] | None = None
) -> Float[Tensor, "B Q T"]:
    """How `attend` weighs the keys, averaged over heads; without dropout. `bias` is added to the scores."""
    query, key = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return (scores if bias is None else scores + bias).softmax(-1).mean(1)


def self_attention_map(
    attention: nn.MultiheadAttention, x: Float[Tensor, "B Q D"], bias: Float[Tensor, "B #heads Q Q"] | None = None
) -> Float[Tensor, "B Q Q"]:
    """The same for queries and keys that `attention` makes from `x`. (Its own report has gone through dropout.)"""
    both = 2 * x.shape[-1]
    query, key = F.linear(x, attention.in_proj_weight[:both], attention.in_proj_bias[:both]).chunk(2, dim=-1)
    return attention_map(query, key, attention.num_heads, bias)


def within_groups(
    attention: Callable[..., Float[Tensor, "B Q D"]], sizes: Sequence[int], *inputs: Float[Tensor, "B Q _"]
) -> Float[Tensor, "B Q D"]:
    """`attention(*inputs)` within each group of queries; groups do not see each other. Groups of one size share one call."""
    if len(sizes) == 1:
        return attention(*inputs)
    if len(set(sizes)) == 1:
        folded = [x.unflatten(1, (len(sizes), -1)).flatten(0, 1) for x in inputs]
        return attention(*folded).unflatten(0, (-1, len(sizes))).flatten(1, 2)
    groups = zip(*(x.split(list(sizes), dim=1) for x in inputs), strict=True)
    return torch.cat([attention(*group) for group in groups], dim=1)


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Zhu et al., ICLR 2021, Eq. 3).

    Each query looks at a few points a level around its reference, at offsets and with weights that it predicts itself.
    """

    def __init__(self, dim: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Head h starts looking in direction 2 pi h / heads, point k at k + 1 cells, all points with equal weight."""
        angles = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1, dtype=torch.float32)
        bias = directions[:, None, None, :] * steps[None, None, :, None]
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        query: Float[Tensor, "B Q D"],
        reference: Float[Tensor, "B Q L P"],
        tokens: Float[Tensor, "B T D"],
        shapes: Sequence[tuple[int, int]],
        padding: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B Q D"]:
        """Attend from `query` to `tokens`.

        Args:
            reference: fraction of each padded level map: points (x, y), or boxes (cx, cy, w, h) that scale the offsets.
            tokens: the level maps, flattened row by row and concatenated.
            shapes: height and width of each level.
            padding: True on padding.
        """
        value = self.value_proj(tokens).masked_fill(padding[..., None], 0)
        locations, weights = self.points_of(query, reference, shapes)
        value = value.to(locations.dtype)
        with torch.autocast(value.device.type, enabled=False):  # which would lower the weighted sum
            sampled = sample_and_sum(value, shapes, locations, weights, self.heads)
        return self.output_proj(sampled)

    def map(
        self,
        query: Float[Tensor, "B Q D"],
        reference: Float[Tensor, "B Q L P"],
        shapes: Sequence[tuple[int, int]],
        padding: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B Q T"]:
        """How much each token counts for each query, averaged over heads."""
        locations, weights = self.points_of(query, reference, shapes)
        return sampling_map(shapes, locations, weights / self.heads, padding)

    def points_of(
        self, query: Float[Tensor, "B Q D"], reference: Float[Tensor, "B Q L P"], shapes: Sequence[tuple[int, int]]
    ) -> tuple[Float[Tensor, "B Q M L K 2"], Float[Tensor, "B Q M L K"]]:
        """Where each query looks, in fractions of the level maps, and with which weights; those of a head sum to 1."""
        offsets = exact(self.sampling_offsets, query).unflatten(-1, (self.heads, self.levels, self.points, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.heads, self.levels * self.points))
        weights = weights.to(offsets.dtype).softmax(-1).unflatten(-1, (self.levels, self.points))
        reference = reference[:, :, None, :, None, :]
        if reference.shape[-1] == 2:
            cell = constants([(1 / w, 1 / h) for h, w in shapes], offsets)
            locations = reference + offsets * cell[:, None, :]
        else:
            locations = reference[..., :2] + offsets / self.points * reference[..., 2:] * 0.5
        return locations, weights


def sample_and_sum(
    value: Float[Tensor, "B T D"],
    shapes: Sequence[tuple[int, int]],
    locations: Float[Tensor, "B Q M L K 2"],
    weights: Float[Tensor, "B Q M L K"],
    heads: int,
) -> Float[Tensor, "B Q D"]:
    """Bilinear samples of each level at `locations` (fractions of its map, zero outside), summed with `weights`."""
    batch, queries = locations.shape[:2]
    # Queries last: what is summed over the few points then runs along memory.
    grids = (2 * locations - 1).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # L, B*M, K, Q, 2
    weights = weights.permute(3, 0, 2, 4, 1).flatten(1, 2)  # L, B*M, K, Q
    maps = value.transpose(1, 2).unflatten(1, (heads, -1)).flatten(0, 1)  # B*M, D/M, T
    total = None
    for (h, w), level, grid, weight in zip(shapes, maps.split([h * w for h, w in shapes], dim=-1), grids, weights, strict=True):
        sampled = F.grid_sample(level.unflatten(-1, (h, w)), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        summed = (sampled * weight[:, None]).sum(2)
        total = summed if total is None else total + summed
    return total.reshape(batch, -1, queries).transpose(1, 2)


def sampling_map(
    shapes: Sequence[tuple[int, int]],
    locations: Float[Tensor, "B Q M L K 2"],
    weights: Float[Tensor, "B Q M L K"],
    padding: Bool[Tensor, "B T"],
) -> Float[Tensor, "B Q T"]:
    """How much each cell counts in bilinear samples at `locations` (fractions of their level's map) with `weights`.

    A point's weight is shared out among the four cells that it is interpolated from. What falls outside of the map or on padding is
    lost.
    """
    sizes = constants([(w, h) for h, w in shapes], locations)[:, None]  # L 1 2
    starts = constants([0, *accumulate(h * w for h, w in shapes[:-1])], locations).long()[:, None, None, None]
    place = (locations * sizes - 0.5).clamp(min=-1).minimum(sizes)  # far away is as good as just outside
    low = place.floor()
    cells = torch.stack((low, low + 1), dim=-1)  # B Q M L K 2 2, as the next: x and y, low and high
    parts = torch.stack((low + 1 - place, place - low), dim=-1)
    inside = (cells >= 0) & (cells < sizes[..., None])
    x, y = torch.where(inside, cells, 0).long().unbind(-2)
    share_x, share_y = (parts * inside).unbind(-2)
    widths = sizes[..., :1, None].long()
    tokens = (starts + y[..., :, None] * widths + x[..., None, :]).flatten(2)  # B Q and everything else
    shares = (weights[..., None, None] * share_y[..., :, None] * share_x[..., None, :]).flatten(2)
    shares = shares * (~padding).gather(1, tokens.flatten(1)).view_as(tokens)
    return shares.new_zeros(*shares.shape[:2], padding.shape[1]).scatter_add_(2, tokens, shares)
