"""Deformable DETR (Zhu et al., ICLR 2021): plain, with iterative box refinement, and two-stage."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detrdistill.boxes import add_reference, inverse_sigmoid
from detrdistill.errors import InputError
from detrdistill.models.attention import (
    MLP,
    DeformableAttention,
    exact,
    level_padding,
    self_attention_map,
    sine_code,
    sine_position,
    valid_ratio,
    within_groups,
)
from detrdistill.models.outputs import AttentionMaps, DetectorOutput, Queries


@dataclass(frozen=True)
class Memory:
    """Encoded images.

    Attributes:
        tokens: all levels flattened and concatenated.
        padding: True where a token is padding.
        shapes: height and width of each level.
        ratios: valid part (x, y) of each level map.
        neck: the level maps before the encoder.
    """

    tokens: Float[Tensor, "B T D"]
    padding: Bool[Tensor, "B T"]
    shapes: list[tuple[int, int]]
    ratios: Float[Tensor, "B L 2"]
    neck: list[Float[Tensor, "B D _ _"]]

    def maps(self) -> list[Float[Tensor, "B D H W"]]:
        """The tokens again as a map a level."""
        return [level.transpose(1, 2).unflatten(2, shape) for level, shape in self._levels(self.tokens)]

    def masks(self) -> list[Bool[Tensor, "B H W"]]:
        """The padding again as a mask a level."""
        return [level.unflatten(1, shape) for level, shape in self._levels(self.padding)]

    def _levels(self, tokens: Tensor) -> zip:
        return zip(tokens.split([h * w for h, w in self.shapes], dim=1), self.shapes, strict=True)


class EncoderLayer(nn.Module):
    """Deformable self-attention over all tokens, then a feed-forward network; both post-norm."""

    def __init__(self, dim: int, heads: int, ffn: int, levels: int, points: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = DeformableAttention(dim, heads, levels, points)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1, self.linear2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x, position, reference, shapes, padding):  # [B T D], [B T D], [B T L 2]
        x = self.norm1(x + self.drop(self.self_attn(x + position, reference, x, shapes, padding)))
        return self.norm2(x + self.drop(self.linear2(self.drop(self.linear1(x).relu()))))


class DecoderLayer(nn.Module):
    """Self-attention among the queries of a group, deformable attention to the image, feed-forward network.

    The norms run in the order 2, 1, 3: the numbers are the official checkpoints' names.
    """

    def __init__(self, dim: int, heads: int, ffn: int, levels: int, points: int, dropout: float) -> None:
        super().__init__()
        self.cross_attn = DeformableAttention(dim, heads, levels, points)
        self.norm1 = nn.LayerNorm(dim)
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1, self.linear2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.norm3 = nn.LayerNorm(dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, t, position, sizes, reference, memory, maps=None):  # [B Q D], [B Q D], [B Q L P]; `sizes` of the query groups
        if maps is not None:
            maps.among.append([self_attention_map(self.self_attn, group) for group in (t + position).split(sizes, dim=1)])
        mixed = within_groups(lambda qk, v: self.self_attn(qk, qk, v, need_weights=False)[0], sizes, t + position, t)
        t = self.norm2(t + self.drop(mixed))
        if maps is not None:
            maps.across.append(self.cross_attn.map(t + position, reference, memory.shapes, memory.padding))
        seen = self.cross_attn(t + position, reference, memory.tokens, memory.shapes, memory.padding)
        t = self.norm1(t + self.drop(seen))
        return self.norm3(t + self.drop(self.linear2(self.drop(self.linear1(t).relu()))))


class DeformableDETR(nn.Module):
    """Deformable DETR (Zhu et al., ICLR 2021), on any number of levels.

    A query is a content [D] and a position [D]; its reference is a point [2], or a box [4] once it is refined. Encoder and decoder
    look at a few points a level (Eq. 3) around a token or a reference, and boxes are predicted relative to the reference.

    Equal to the official code (fundamentalvision/Deformable-DETR) number by number; see tests/parity. Where it differs: the sine
    codes of two-stage proposals work for any width (official: 256), and several groups of queries can share one pass.

    GroupNorm in `input_proj` counts padding, as in the official code, so that predictions for an image depend slightly on how much
    the batch pads it.

    Args:
        backbone: returns C3, C4, C5 and knows its `channels`.
        classes: number of classes C (no background class: focal loss).
        form: "plain", "box_refine" or "two_stage" (which refines boxes as well).
        levels: feature levels L; one: C5 alone; more than the backbone gives: 3x3 convolutions of stride 2 from C5 on.

    Raises:
        InputError: an unknown form.
    """

    query_position = True  # queries carry an embedding of their own
    top = 100  # detections an image in the official evaluation
    most_objects = None  # losses are divided by all objects
    own_loss = None  # the criterion of the DETRs

    def __init__(
        self,
        backbone: nn.Module,
        *,
        classes: int,
        form: str = "plain",
        dim: int = 256,
        heads: int = 8,
        ffn: int = 1024,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        queries: int = 300,
        levels: int = 4,
        points: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if form not in ("plain", "box_refine", "two_stage"):
            raise InputError(f"form '{form}' is unknown; known: plain, box_refine, two_stage")
        self.backbone, self.dim, self.levels, self.form = backbone, dim, levels, form
        self.refine, self.two_stage = form != "plain", form == "two_stage"
        self.used = backbone.channels[-1:] if levels == 1 else backbone.channels[:levels]
        projections = [nn.Conv2d(channels, dim, 1) for channels in self.used]
        for extra in range(levels - len(projections)):
            projections.append(nn.Conv2d(self.used[-1] if extra == 0 else dim, dim, 3, stride=2, padding=1))
        self.input_proj = nn.ModuleList(nn.Sequential(conv, nn.GroupNorm(32, dim)) for conv in projections)
        # Without an encoder nobody looks at it; DDP waits in vain for gradients that never come.
        self.level_embed = nn.Parameter(torch.empty(levels, dim), requires_grad=encoder_layers > 0)
        sizes = (dim, heads, ffn, levels, points, dropout)
        self.encoder = nn.ModuleList(EncoderLayer(*sizes) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(*sizes) for _ in range(decoder_layers))

        # Without refinement all stages share one head; two-stage has one more for the encoder's proposals.
        heads_needed = (decoder_layers if self.refine else 1) + self.two_stage
        self.class_embed = nn.ModuleList(nn.Linear(dim, classes) for _ in range(heads_needed))
        self.bbox_embed = nn.ModuleList(MLP(dim, dim, 4, 3) for _ in range(heads_needed))
        self.num_queries = queries
        if self.two_stage:
            self.enc_output, self.enc_output_norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
            self.pos_trans, self.pos_trans_norm = nn.Linear(2 * dim, 2 * dim), nn.LayerNorm(2 * dim)
        else:
            self.query_embed = nn.Embedding(queries, 2 * dim)  # query position, then content
            self.reference_points = nn.Linear(dim, 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the official code does; the backbone is left alone."""
        for name, parameter in self.named_parameters():
            if not name.startswith(("backbone", "class_embed", "bbox_embed", "query_embed")) and parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()
        for conv, _ in self.input_proj:
            nn.init.zeros_(conv.bias)
        nn.init.normal_(self.level_embed)
        if not self.two_stage:
            nn.init.zeros_(self.reference_points.bias)
        for head in self.class_embed:
            nn.init.constant_(head.bias, -math.log((1 - 0.01) / 0.01))  # every class starts at a probability of 1 %
        for i, head in enumerate(self.bbox_embed):
            nn.init.zeros_(head.layers[-1].weight)
            nn.init.zeros_(head.layers[-1].bias)
            if i == 0 and not self.two_stage:
                nn.init.constant_(head.layers[-1].bias[2:], -2.0)  # small first boxes

    def encode(self, pixels: Float[Tensor, "B 3 H W"], padding: Bool[Tensor, "B H W"]) -> Memory:
        """Backbone, projections and encoder. `padding` is True where the batch was padded."""
        return self.encode_features(self.backbone(pixels), padding)

    def encode_features(self, features: Sequence[Float[Tensor, "B _ _ _"]], padding: Bool[Tensor, "B H W"]) -> Memory:
        """As `encode`, from the backbone's maps on."""
        used = list(features)[-len(self.used) :] if self.levels == 1 else list(features)[: len(self.used)]
        maps = [project(x) for project, x in zip(self.input_proj, used, strict=False)]
        for project in self.input_proj[len(maps) :]:
            maps.append(project(used[-1] if len(maps) == len(used) else maps[-1]))
        shapes = [(x.shape[-2], x.shape[-1]) for x in maps]
        masks = [level_padding(padding, shape) for shape in shapes]
        x = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)
        position = [sine_position(mask, self.dim // 2, shift=-0.5).flatten(2).transpose(1, 2).to(x.dtype) for mask in masks]
        position = torch.cat([p + embed for p, embed in zip(position, self.level_embed, strict=True)], dim=1)
        memory = Memory(
            tokens=x,
            padding=torch.cat([mask.flatten(1) for mask in masks], dim=1),
            shapes=shapes,
            ratios=torch.stack([valid_ratio(mask) for mask in masks], dim=1),
            neck=maps,
        )
        reference = token_centres(memory)[:, :, None] * memory.ratios[:, None]
        for layer in self.encoder:
            x = layer(x, position, reference, shapes, memory.padding)
        return replace(memory, tokens=x)

    def queries(self, memory: Memory) -> Queries:
        """The detector's own queries; those of a two-stage detector are its best proposals for these images."""
        if self.two_stage:
            return self.propose(memory)
        position, content = self.query_embed.weight[None].split(self.dim, dim=-1)
        return self.place(Queries(content, position, None))

    def place(self, group: Queries) -> Queries:
        """The group, with reference points of this detector's own making where it has none (not in the two-stage form)."""
        return group if group.reference is not None else replace(group, reference=exact(self.reference_points, group.position))

    def propose(self, memory: Memory) -> Queries:
        """First stage of the two-stage form: every token proposes a box, the best become queries."""
        anchors, unusable = token_anchors(memory)
        tokens = self.enc_output_norm(self.enc_output(memory.tokens.masked_fill(unusable[..., None], 0)))
        logits = self.class_embed[-1](tokens)
        coordinates = exact(self.bbox_embed[-1], tokens) + anchors
        # Not `min`: an ONNX file's images may have fewer tokens than those that were traced.
        best = logits[..., 0].topk(torch.sym_min(self.num_queries, logits.shape[1]), dim=1).indices
        reference = coordinates.gather(1, best[..., None].expand(-1, -1, 4)).detach()
        codes = sine_code(reference.sigmoid() * (2 * math.pi), self.dim // 2).flatten(-2)
        position, content = self.pos_trans_norm(self.pos_trans(codes.to(tokens.dtype))).split(self.dim, dim=-1)
        proposals = DetectorOutput(logits[None], coordinates.sigmoid()[None], tokens[None], memory.maps(), memory.masks())
        return Queries(content, position, reference, proposals)

    def decode(self, memory: Memory, *groups: Queries, attention: bool = False) -> list[DetectorOutput]:
        """Decode all `groups` of queries in one pass; they share the image and do not see each other.

        Without groups, the detector's own queries. The result has one output a group, with attention maps if `attention`.
        """
        maps = AttentionMaps() if attention else None
        groups = [self.place(group) for group in groups] or [self.queries(memory)]
        sizes = [group.content.shape[1] for group in groups]
        start = Queries.join(groups, memory.tokens.shape[0])
        t, position, reference = start.content, start.position, start.reference  # logits of points or boxes
        states, logits, boxes = [], [], []
        for i, layer in enumerate(self.decoder):
            centre = reference.sigmoid()
            scale = memory.ratios if centre.shape[-1] == 2 else memory.ratios.repeat(1, 1, 2)
            t = layer(t, position, sizes, centre[:, :, None] * scale[:, None], memory, maps)
            head = i if self.refine else 0
            # Boxes are kept in full precision: they are refined stage by stage and compared to the pixel.
            box = add_reference(exact(self.bbox_embed[head], t), inverse_sigmoid(centre))
            states.append(t)
            logits.append(self.class_embed[head](t))
            boxes.append(box.sigmoid())
            if self.refine:
                reference = box.detach()
        predicted = (torch.stack(x) for x in (logits, boxes, states))
        return DetectorOutput(*predicted, features=memory.maps(), padding=memory.masks(), neck=memory.neck).split(groups, maps)


def token_centres(memory: Memory) -> Float[Tensor, "B T 2"]:
    """Centre (x, y) of each token, relative to the image without padding."""
    centres = []
    for (h, w), ratio in zip(memory.shapes, memory.ratios.unbind(1), strict=True):
        y = torch.arange(h, device=ratio.device, dtype=torch.float32) + 0.5
        x = torch.arange(w, device=ratio.device, dtype=torch.float32) + 0.5
        y = (y / (ratio[:, None, 1] * h))[:, :, None].expand(-1, h, w)
        x = (x / (ratio[:, None, 0] * w))[:, None, :].expand(-1, h, w)
        centres.append(torch.stack((x, y), dim=-1).flatten(1, 2))
    return torch.cat(centres, dim=1)


def token_anchors(memory: Memory) -> tuple[Float[Tensor, "B T 4"], Bool[Tensor, "B T"]]:
    """Un-activated first boxes of a two-stage detector, a square of 0.05 * 2^level around each token, and which are unusable.

    Unusable are tokens on padding and anchors that touch the border; theirs is infinite, as in the official code.
    """
    sizes = torch.cat([torch.full((h * w,), 0.05 * 2.0**i, device=memory.tokens.device) for i, (h, w) in enumerate(memory.shapes)])
    centres = token_centres(memory)
    anchors = torch.cat((centres, sizes[None, :, None].expand(centres.shape[0], -1, 2).to(centres.dtype)), dim=-1)
    unusable = memory.padding | ~((anchors > 0.01) & (anchors < 0.99)).all(-1)
    return torch.log(anchors / (1 - anchors)).masked_fill(unusable[..., None], math.inf), unusable
