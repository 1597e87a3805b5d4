"""AdaMixer (Gao et al., CVPR 2022): queries sample points in a 3D feature space and mix them adaptively; no encoder."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detrdistill.boxes import cxcywh_to_xyxy
from detrdistill.models.attention import constants, exact, level_padding, sampling_map, self_attention_map, sine_code, within_groups
from detrdistill.models.outputs import AttentionMaps, DetectorOutput, Queries


@dataclass(frozen=True)
class Memory:
    """Images as the decoder sees them: the neck's maps.

    Attributes:
        padding: True on padding, a mask a level.
        sizes: width and height of each image without padding, twice over as boxes have it, in pixels.
    """

    maps: list[Float[Tensor, "B D _ _"]]
    padding: list[Bool[Tensor, "B _ _"]]
    sizes: Float[Tensor, "B 1 4"]


class Neck(nn.Module):
    """A 1x1 convolution a level, then one GroupNorm that all levels share. No top-down path.

    GroupNorm counts padding, as in the official code, so that predictions for an image depend slightly on how much the batch pads it.
    """

    def __init__(self, inputs: Sequence[int], channels: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(nn.Conv2d(one, channels, 1) for one in inputs)
        self.gn_out = nn.GroupNorm(32, channels)

    def forward(self, features: Sequence[Float[Tensor, "B _ _ _"]]) -> list[Float[Tensor, "B D _ _"]]:
        return [self.gn_out(conv(x)) for conv, x in zip(self.lateral_convs, features, strict=True)]


class AdaptiveMixing(nn.Module):
    """Mixes the points sampled for a query over channels, then over points, with weights made from the query ("Adaptive Content Mixing").

    Both layer norms run over points and channels jointly and have no parameters.
    """

    def __init__(self, dim: int, channels: int, in_points: int, out_points: int, groups: int) -> None:
        super().__init__()
        self.channels, self.in_points, self.out_points = channels // groups, in_points, out_points
        self.groups = groups
        self.parameter_generator = nn.Linear(dim, groups * (self.channels**2 + in_points * out_points))
        self.out_proj = nn.Linear(out_points * channels, dim)

    def forward(self, x: Float[Tensor, "B Q G P C"], query: Float[Tensor, "B Q D"]) -> Float[Tensor, "B Q D"]:
        over_channels, over_points = self.mixers(query)
        x = x @ over_channels
        x = F.layer_norm(x, x.shape[-2:]).relu_()
        x = over_points @ x
        x = F.layer_norm(x, x.shape[-2:]).relu_()
        return query + self.out_proj(x.flatten(-3))

    def mixers(self, query: Float[Tensor, "B Q D"]) -> tuple[Float[Tensor, "B Q G C C"], Float[Tensor, "B Q G O P"]]:
        """What each query mixes channels and points with: the generator's rows for either, so that the large result need not be cut."""
        made = []
        for rows in (slice(self.channels**2), slice(self.channels**2, None)):
            weight, bias = (x.unflatten(0, (self.groups, -1))[:, rows].flatten(0, 1) for x in self.parameter_generator.parameters())
            made.append(F.linear(query, weight, bias).unflatten(-1, (self.groups, -1)))
        return made[0].unflatten(-1, (self.channels, self.channels)), made[1].unflatten(-1, (self.out_points, self.in_points))


class Stage(nn.Module):
    """One decoder stage: attention among queries biased by how boxes overlap, sampling, mixing, feed-forward network, heads."""

    def __init__(
        self, dim: int, channels: int, heads: int, ffn: int, in_points: int, out_points: int, groups: int, classes: int, dropout: float
    ) -> None:
        super().__init__()
        self.groups, self.in_points = groups, in_points
        self.iof_tau = nn.Parameter(torch.empty(heads))
        self.attention = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.attention_norm = nn.LayerNorm(dim)
        self.sampling_offset_generator = nn.Linear(dim, groups * in_points * 3)
        self.mixing = AdaptiveMixing(dim, channels, in_points, out_points, groups)
        self.mixing_norm = nn.LayerNorm(dim)
        self.linear1, self.linear2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.ffn_norm = nn.LayerNorm(dim)
        self.cls_fcs, self.reg_fcs = (nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim), nn.ReLU()) for _ in range(2))
        self.fc_cls, self.fc_reg = nn.Linear(dim, classes), nn.Linear(dim, 4)
        self.drop = nn.Dropout(dropout)

    def reset_parameters(self) -> None:
        """Initialise as the official code does: no refinement and no query-dependent sampling or mixing at first."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
                nn.init.xavier_uniform_(module.weight)
        nn.init.xavier_uniform_(self.attention.in_proj_weight)
        nn.init.zeros_(self.attention.in_proj_bias)
        nn.init.uniform_(self.iof_tau, 0, 4)
        nn.init.constant_(self.fc_cls.bias, -math.log((1 - 0.01) / 0.01))  # every class starts at a probability of 1 %
        for zero in (self.fc_reg.weight, self.fc_reg.bias, self.sampling_offset_generator.weight, self.mixing.parameter_generator.weight):
            nn.init.zeros_(zero)
        with torch.no_grad():
            offsets = self.sampling_offset_generator.bias.view(self.groups, self.in_points, 3)
            side = math.isqrt(self.in_points)
            if side**2 == self.in_points:
                cells = (torch.arange(side) + 0.5) / side - 0.5
                offsets[..., :2] = torch.cartesian_prod(cells, cells).view(-1, 2)
            else:
                nn.init.uniform_(offsets[..., :2], -0.5, 0.5)
            offsets[..., 2] = -1  # an octave finer than the query's box

    def forward(self, content, xyzr, sizes, maps, strides, padding=(), seen=None):  # [B Q D], [B Q 4]; `sizes` of the query groups
        # The position is part of the values and of what the attention is added to, as in the official code.
        placed = content + position_code(xyzr, content.shape[-1]).to(content.dtype)
        boxes = to_boxes(xyzr)
        mixed = within_groups(self.look_around, sizes, placed, boxes)
        content = self.attention_norm(placed + self.drop(mixed))
        points = sample_points(xyzr, exact(self.sampling_offset_generator, content))
        if seen is not None:
            groups = zip(placed.split(sizes, dim=1), boxes.split(sizes, dim=1), strict=True)
            seen.among.append([self_attention_map(self.attention, x, self.preference(around)) for x, around in groups])
            seen.across.append(map_3d(points, strides, padding))
        with torch.autocast(points.device.type, enabled=False):
            sampled = sample_3d(maps, strides, points, self.groups)
        content = self.mixing_norm(self.mixing(sampled, content))
        content = self.ffn_norm(content + self.drop(self.linear2(self.drop(self.linear1(content).relu()))))
        return content, self.fc_cls(self.cls_fcs(content)), exact(self.fc_reg, exact(self.reg_fcs, content))

    def look_around(self, placed: Float[Tensor, "B Q D"], boxes: Float[Tensor, "B Q 4"]) -> Float[Tensor, "B Q D"]:
        """Attention among queries; each head prefers, by a learned degree, boxes that cover the query's own."""
        bias = self.preference(boxes).flatten(0, 1).to(placed.dtype)
        mixed, _ = self.attention(placed, placed, placed, attn_mask=bias, need_weights=False)
        return mixed

    def preference(self, boxes: Float[Tensor, "B Q 4"]) -> Float[Tensor, "B heads Q Q"]:
        """What is added to the scores of the attention among queries."""
        return self.iof_tau[:, None, None] * log_iof(boxes)[:, None]


class AdaMixer(nn.Module):
    """AdaMixer (Gao et al., CVPR 2022), on C2 to C5.

    A query is a content vector [D] and a box (x, y, z, r) [4]: centre in pixels, z = log2 sqrt(w h), r = log2 h / w ("Object Query
    Definition"). All start as the whole image. A stage lets queries attend to each other, samples in_points points (x, y, z) a group
    in the maps, z blending between levels (Eq. 6), mixes them to out_points, and moves the box: (x, y) += delta 2^z, (z, r) += delta.
    The content carries its gradient from stage to stage, the box does not.

    Equal to the official code (MCG-NJU/AdaMixer) number by number; see tests/parity. Where it differs: boxes are given as cxcywh
    relative to the image without padding (official: xyxy in pixels; neither is clipped), several groups of queries can share one pass,
    and BatchNorm's affine part is frozen with its statistics, as in the DETRs (official: trained).

    Args:
        backbone: its maps, of any number, are all used; knows its `channels` and `strides`.
        classes: number of classes C (no background class: focal loss).
        channels: of the neck's maps; as `dim` if None.
        in_points, out_points: points that a group samples for a query, and how many it mixes them to.
        groups: groups of channels, each sampled at its own points.
        dropout: in attention and feed-forward network; officially 0.
    """

    query_position, own_loss = False, None  # the decoder derives positions from the boxes; the criterion of the DETRs

    def __init__(
        self,
        backbone: nn.Module,
        *,
        classes: int,
        dim: int = 256,
        channels: int | None = None,
        heads: int = 8,
        ffn: int = 2048,
        decoder_layers: int = 6,
        queries: int = 100,
        in_points: int = 32,
        out_points: int = 128,
        groups: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        channels = channels or dim
        self.backbone, self.levels = backbone, len(backbone.channels)
        self.top = self.most_objects = queries  # detections kept, and objects that losses are divided by, an image
        self.neck = Neck(backbone.channels, channels)
        sizes = (dim, channels, heads, ffn, in_points, out_points, groups, classes, dropout)
        self.stages = nn.ModuleList(Stage(*sizes) for _ in range(decoder_layers))
        self.init_content = nn.Embedding(queries, dim)
        # The official code stores these boxes among the parameters, but they get no gradient.
        self.register_buffer("init_boxes", torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(queries, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the official code does; the backbone is left alone."""
        for conv in self.neck.lateral_convs:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)
        for stage in self.stages:
            stage.reset_parameters()
        nn.init.normal_(self.init_content.weight)

    def encode(self, pixels: Float[Tensor, "B 3 H W"], padding: Bool[Tensor, "B H W"]) -> Memory:
        """Backbone and neck. `padding` is True where the batch was padded."""
        return self.encode_features(self.backbone(pixels), padding)

    def encode_features(self, features: Sequence[Float[Tensor, "B _ _ _"]], padding: Bool[Tensor, "B H W"]) -> Memory:
        """As `encode`, from the backbone's maps on."""
        maps = [x.contiguous() for x in self.neck(features)]  # every stage samples groups of channels
        sizes = torch.stack(((~padding[:, 0]).sum(-1), (~padding[:, :, 0]).sum(-1)), dim=-1).to(self.init_boxes.dtype)
        return Memory(maps, [level_padding(padding, x.shape[-2:]) for x in maps], sizes.repeat(1, 2)[:, None])

    def queries(self, memory: Memory) -> Queries:
        """The detector's own queries, the same for all images: normalised contents, and the whole image as box."""
        content = self.init_content.weight[None]
        return Queries(F.layer_norm(content, content.shape[-1:]), None, self.init_boxes[None])

    def place(self, group: Queries) -> Queries:
        """The group, starting from the whole image where it has no boxes."""
        return group if group.reference is not None else replace(group, reference=self.init_boxes[None, :1].expand(1, len(group), 4))

    def decode(self, memory: Memory, *groups: Queries, attention: bool = False) -> list[DetectorOutput]:
        """Decode all `groups` of queries in one pass; they share the image and do not see each other.

        Without groups, the detector's own queries. The result has one output a group, with attention maps if `attention`.
        """
        maps = AttentionMaps() if attention else None
        groups = [self.place(group) for group in groups] or [self.queries(memory)]
        sizes = [group.content.shape[1] for group in groups]
        start = Queries.join(groups, memory.sizes.shape[0])
        content, xyzr = start.content, to_xyzr(start.reference * memory.sizes)
        states, logits, boxes = [], [], []
        for stage in self.stages:
            content, score, delta = stage(content, xyzr, sizes, memory.maps, self.backbone.strides, memory.padding, maps)
            moved = refine(xyzr, delta)
            states.append(content)
            logits.append(score)
            boxes.append(to_boxes(moved) / memory.sizes)
            xyzr = moved.detach()
        predicted = (torch.stack(x) for x in (logits, boxes, states))
        output = DetectorOutput(*predicted, features=memory.maps, padding=memory.padding, l1="xyxy", neck=memory.maps)
        return output.split(groups, maps)


def to_xyzr(boxes: Float[Tensor, "*any 4"]) -> Float[Tensor, "*any 4"]:
    """Boxes cxcywh in pixels as centre, scale and aspect (x, y, z, r)."""
    width, height = boxes[..., 2].log2(), boxes[..., 3].log2()
    return torch.stack((boxes[..., 0], boxes[..., 1], (width + height) / 2, height - width), dim=-1)


def to_boxes(xyzr: Float[Tensor, "*any 4"]) -> Float[Tensor, "*any 4"]:
    """The boxes again, cxcywh in pixels."""
    z, r = xyzr[..., 2], xyzr[..., 3]
    return torch.cat((xyzr[..., :2], torch.stack((2 ** (z - r / 2), 2 ** (z + r / 2)), dim=-1)), dim=-1)


def refine(xyzr: Float[Tensor, "B Q 4"], delta: Float[Tensor, "B Q 4"]) -> Float[Tensor, "B Q 4"]:
    """Move the centre by multiples of the scale, add to scale and aspect."""
    return torch.cat((xyzr[..., :2] + delta[..., :2] * 2 ** xyzr[..., 2:3], xyzr[..., 2:] + delta[..., 2:]), dim=-1)


def position_code(xyzr: Float[Tensor, "B Q 4"], features: int) -> Float[Tensor, "B Q D"]:
    """Sine codes of x / 1000, y / 1000, z and r, a quarter of the features each."""
    return sine_code(xyzr / constants([1000, 1000, 1, 1], xyzr), features // 4).flatten(-2)


def log_iof(boxes: Float[Tensor, "B Q 4"]) -> Float[Tensor, "B Q Q"]:
    """Logarithm of the part of each box (row) that each other box (column) covers."""
    corners, area = cxcywh_to_xyxy(boxes), boxes[..., 2:].prod(-1)
    low = torch.maximum(corners[:, :, None, :2], corners[:, None, :, :2])
    high = torch.minimum(corners[:, :, None, 2:], corners[:, None, :, 2:])
    return ((high - low).clamp(min=0).prod(-1) / area.clamp(min=1e-6)[:, :, None] + 1e-7).log()


def sample_points(xyzr: Float[Tensor, "B Q 4"], offsets: Float[Tensor, "B Q O"]) -> Float[Tensor, "B Q P 3"]:
    """Points (x, y, z): offsets count in widths, heights and octaves of the query's box ("Adaptive Location Sampling")."""
    centre, size = xyzr[..., None, :3], to_boxes(xyzr)[..., None, 2:]
    offsets = offsets.unflatten(-1, (-1, 3))
    return torch.cat((centre[..., :2] + offsets[..., :2] * size, centre[..., 2:] + offsets[..., 2:]), dim=-1)


def level_weights(z: Float[Tensor, "*any"], strides: Sequence[int]) -> Float[Tensor, "L *any"]:
    """How much each level counts at scale z: a Gaussian around the level's own scale, log2 of its stride (Eq. 6, tau = 2)."""
    scales = constants([math.log2(stride) for stride in strides], z).view(-1, *[1] * z.dim())
    return (-(z - scales).square() / 2).softmax(0)


def sample_3d(
    maps: Sequence[Float[Tensor, "B D _ _"]], strides: Sequence[int], points: Float[Tensor, "B Q P 3"], groups: int
) -> Float[Tensor, "B Q G p C"]:
    """Bilinear samples at `points`, interpolated between levels; zero outside of the maps.

    Args:
        points: x and y in pixels, z in octaves; group by group, and each group sees its own channels only.
    """
    weights = level_weights(points[..., 2], strides)
    places = points[..., :2].unflatten(2, (groups, -1)).transpose(1, 2).flatten(0, 1)  # B*G, Q, p, 2
    weights = weights.unflatten(3, (groups, -1)).transpose(2, 3).flatten(1, 2)  # L, B*G, Q, p
    total = None
    for level, stride, weight in zip(maps, strides, weights, strict=True):
        extent = constants([level.shape[-1] * stride, level.shape[-2] * stride], places)
        grouped = level.unflatten(1, (groups, -1)).flatten(0, 1).to(places.dtype)
        sampled = F.grid_sample(grouped, 2 * places / extent - 1, mode="bilinear", padding_mode="zeros", align_corners=False)
        total = sampled * weight[:, None] if total is None else torch.addcmul(total, sampled, weight[:, None])
    return total.unflatten(0, (-1, groups)).permute(0, 3, 1, 4, 2)


def map_3d(points: Float[Tensor, "B Q P 3"], strides: Sequence[int], padding: Sequence[Bool[Tensor, "B _ _"]]) -> Float[Tensor, "B Q T"]:
    """How much each cell of the maps counts in `sample_3d`, all points of a query counting the same.

    Points on padding are sampled too, but not counted.
    """
    shapes = [(mask.shape[1], mask.shape[2]) for mask in padding]
    extents = constants([(w * stride, h * stride) for (h, w), stride in zip(shapes, strides, strict=True)], points)
    places = points[:, :, None, :, :2] / extents[:, None]  # B Q L P 2
    weights = level_weights(points[..., 2], strides).permute(1, 2, 0, 3) / points.shape[2]
    return sampling_map(shapes, places[:, :, None], weights[:, :, None], torch.cat([mask.flatten(1) for mask in padding], dim=1))
