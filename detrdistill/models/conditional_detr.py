"""Conditional DETR (Meng et al., ICCV 2021): each query looks around its own reference point, so that few epochs suffice."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detrdistill.boxes import add_reference, inverse_sigmoid
from detrdistill.models.attention import MLP, attend, attention_map, exact, level_padding, sine_code, sine_position, within_groups
from detrdistill.models.outputs import AttentionMaps, DetectorOutput, Queries


@dataclass(frozen=True)
class Memory:
    """Encoded images: one level, flattened row by row.

    Attributes:
        tokens: encoder output.
        position: sine encoding of each token's place in the image without padding.
        padding: True where a token is padding.
        shape: height and width of the level.
        neck: the level before the encoder.
    """

    tokens: Float[Tensor, "B T D"]
    position: Float[Tensor, "B T D"]
    padding: Bool[Tensor, "B T"]
    shape: tuple[int, int]
    neck: Float[Tensor, "B D H W"]


class EncoderLayer(nn.Module):
    """Self-attention over all tokens, then a feed-forward network; both post-norm. DETR's layer."""

    def __init__(self, dim: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1, self.linear2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x, position, padding):  # [B T D], [B T D], [B T]
        placed = x + position
        mixed, _ = self.self_attn(placed, placed, x, key_padding_mask=padding, need_weights=False)
        x = self.norm1(x + self.drop(mixed))
        return self.norm2(x + self.drop(self.linear2(self.drop(self.linear1(x).relu()))))


class DecoderLayer(nn.Module):
    """Self-attention among the queries of a group, conditional cross-attention, feed-forward network.

    Content and position are added in self-attention but stay apart in cross-attention: within each head, queries and keys are the
    content beside the position, so that a score is a content match plus a spatial match. Only the first layer, whose content says
    nothing yet, adds the position to the content as well.
    """

    def __init__(self, dim: int, heads: int, ffn: int, dropout: float, first: bool) -> None:
        super().__init__()
        self.heads, self.first = heads, first
        self.sa_qcontent_proj, self.sa_qpos_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.sa_kcontent_proj, self.sa_kpos_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.sa_v_proj, self.sa_out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.ca_qcontent_proj, self.ca_qpos_sine_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.ca_kcontent_proj, self.ca_kpos_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        if first:
            self.ca_qpos_proj = nn.Linear(dim, dim)
        self.ca_v_proj, self.ca_out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1, self.linear2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.norm3 = nn.LayerNorm(dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, t, position, code, sizes, memory, maps=None):  # [B Q D], [B Q D], [B Q D]; `sizes` of the query groups
        dropout = self.drop.p if self.training else 0.0
        query = self.sa_qcontent_proj(t) + self.sa_qpos_proj(position)
        key = self.sa_kcontent_proj(t) + self.sa_kpos_proj(position)
        if maps is not None:
            groups = zip(query.split(sizes, dim=1), key.split(sizes, dim=1), strict=True)
            maps.among.append([attention_map(*group, self.heads) for group in groups])
        mixed = within_groups(lambda q, k, v: attend(q, k, v, self.heads, dropout=dropout), sizes, query, key, self.sa_v_proj(t))
        t = self.norm1(t + self.drop(self.sa_out_proj(mixed)))

        query, key, key_position = self.ca_qcontent_proj(t), self.ca_kcontent_proj(memory.tokens), self.ca_kpos_proj(memory.position)
        if self.first:
            query, key = query + self.ca_qpos_proj(position), key + key_position
        query, key = self._beside(query, self.ca_qpos_sine_proj(code)), self._beside(key, key_position)
        if maps is not None:
            hidden = torch.zeros_like(memory.padding, dtype=query.dtype).masked_fill(memory.padding, -math.inf)
            maps.across.append(attention_map(query, key, self.heads, hidden[:, None, None]))
        seen = attend(query, key, self.ca_v_proj(memory.tokens), self.heads, ~memory.padding[:, None, None], dropout)
        t = self.norm2(t + self.drop(self.ca_out_proj(seen)))
        return self.norm3(t + self.drop(self.linear2(self.drop(self.linear1(t).relu()))))

    def _beside(self, content: Tensor, position: Tensor) -> Tensor:
        """Content and position side by side within each head."""
        return torch.cat([x.unflatten(-1, (self.heads, -1)) for x in (content, position)], dim=-1).flatten(-2)


class ConditionalDETR(nn.Module):
    """Conditional DETR (Meng et al., ICCV 2021), on the last feature level: C5 at stride 32, or DC5 with a dilated backbone.

    A query is an embedding e [D] without content, f = 0; its reference point r = sigmoid(MLP(e)) [2] is one for all layers. A layer
    attends by content and by the conditional spatial query MLP(f) * sine_code(r) [D] (section "Conditional Cross-Attention"), and a
    box is sigmoid(MLP(f) + (logit(r), 0, 0)) [4]. All heads are shared by all layers.

    Equal to the official code (Atten4Vis/ConditionalDETR) number by number; see tests/parity. Where it differs: the sine code of
    queries works for any width (official: 256), and several groups of queries can share one pass.

    Args:
        backbone: its last map is used; knows its `channels`.
        classes: number of classes C (no background class: focal loss).
        temperature: of the sine codes. DAB-DETR (Liu et al., ICLR 2022) found 20 better than 10000, half of whose codes hardly change
            within an image.
    """

    query_position = True  # queries carry an embedding of their own
    levels = 1  # maps in its outputs
    top = 100  # detections an image in the official evaluation
    most_objects = None  # losses are divided by all objects
    own_loss = None  # the criterion of the DETRs

    def __init__(
        self,
        backbone: nn.Module,
        *,
        classes: int,
        dim: int = 256,
        heads: int = 8,
        ffn: int = 2048,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        queries: int = 300,
        dropout: float = 0.1,
        temperature: float = 10000.0,
    ) -> None:
        super().__init__()
        self.backbone, self.dim, self.temperature = backbone, dim, temperature
        self.input_proj = nn.Conv2d(backbone.channels[-1], dim, 1)
        self.encoder = nn.ModuleList(EncoderLayer(dim, heads, ffn, dropout) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(dim, heads, ffn, dropout, first=i == 0) for i in range(decoder_layers))
        self.norm = nn.LayerNorm(dim)  # of what the heads see; the next layer gets the state as it is
        self.query_embed = nn.Embedding(queries, dim)
        self.query_scale, self.ref_point_head = MLP(dim, dim, dim, 2), MLP(dim, dim, 2, 2)
        # The first layer does without; DDP waits in vain for gradients that never come.
        self.query_scale.requires_grad_(decoder_layers > 1)
        self.class_embed, self.bbox_embed = nn.Linear(dim, classes), MLP(dim, dim, 4, 3)  # one for all layers
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the official code does; the backbone is left alone."""
        for name, parameter in self.named_parameters():
            if name.startswith(("encoder", "decoder", "query_scale", "ref_point_head")) and parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for layer in self.decoder:
            nn.init.zeros_(layer.sa_out_proj.bias)
            nn.init.zeros_(layer.ca_out_proj.bias)
        nn.init.constant_(self.class_embed.bias, -math.log((1 - 0.01) / 0.01))  # every class starts at a probability of 1 %
        nn.init.zeros_(self.bbox_embed.layers[-1].weight)
        nn.init.zeros_(self.bbox_embed.layers[-1].bias)

    def encode(self, pixels: Float[Tensor, "B 3 H W"], padding: Bool[Tensor, "B H W"]) -> Memory:
        """Backbone, projection and encoder. `padding` is True where the batch was padded."""
        return self.encode_features(self.backbone(pixels), padding)

    def encode_features(self, features: Sequence[Float[Tensor, "B _ _ _"]], padding: Bool[Tensor, "B H W"]) -> Memory:
        """As `encode`, from the backbone's maps on."""
        x = self.input_proj(features[-1])
        mask = level_padding(padding, x.shape[-2:])
        position = sine_position(mask, self.dim // 2, 0.0, self.temperature).to(x.dtype)
        tokens, position = (y.flatten(2).transpose(1, 2) for y in (x, position))
        memory = Memory(tokens, position, mask.flatten(1), (x.shape[-2], x.shape[-1]), x)
        for layer in self.encoder:
            tokens = layer(tokens, position, memory.padding)
        return replace(memory, tokens=tokens)

    def queries(self, memory: Memory) -> Queries:
        """The detector's own queries, the same for all images."""
        position = self.query_embed.weight[None]
        return self.place(Queries(torch.zeros_like(position), position, None))

    def place(self, group: Queries) -> Queries:
        """The group, with reference points of this detector's own making where it has none."""
        return group if group.reference is not None else replace(group, reference=exact(self.ref_point_head, group.position))

    def decode(self, memory: Memory, *groups: Queries, attention: bool = False) -> list[DetectorOutput]:
        """Decode all `groups` of queries in one pass; they share the image and do not see each other.

        Without groups, the detector's own queries. The result has one output a group, with attention maps if `attention`.
        """
        maps = AttentionMaps() if attention else None
        groups = [self.place(group) for group in groups] or [self.queries(memory)]
        sizes = [group.content.shape[1] for group in groups]
        start = Queries.join(groups, memory.tokens.shape[0])
        t, point = start.content, start.reference.sigmoid()
        # The code names y before x.
        code = sine_code(point.flip(-1) * (2 * math.pi), self.dim // 2, self.temperature).flatten(-2)
        states, logits, boxes = [], [], []
        for i, layer in enumerate(self.decoder):
            t = layer(t, start.position, code if i == 0 else code * self.query_scale(t), sizes, memory, maps)
            states.append(self.norm(t))
            logits.append(self.class_embed(states[-1]))
            boxes.append(add_reference(exact(self.bbox_embed, states[-1]), inverse_sigmoid(point)).sigmoid())
        predicted = (torch.stack(x) for x in (logits, boxes, states))
        levels = [memory.tokens.transpose(1, 2).unflatten(2, memory.shape)]
        padding = [memory.padding.unflatten(1, memory.shape)]
        return DetectorOutput(*predicted, features=levels, padding=padding, neck=[memory.neck]).split(groups, maps)
