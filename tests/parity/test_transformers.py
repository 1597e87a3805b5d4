"""Our detectors against their ports in transformers: random weights, really padded batches, every stage's logits and boxes."""

import re

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    ResNetConfig,
)

from detrdistill.experiments import recipes
from detrdistill.models.backbones import Backbone
from detrdistill.models.conditional_detr import ConditionalDETR
from detrdistill.models.deformable_detr import DeformableDETR
from tests.parity.names import our_name

SIZES = [(96, 118), (71, 128), (128, 60)]
LAYERS, CLASSES, QUERIES = 3, 7, 11
RESNET = [
    (r"^model\.backbone\.model\.embedder\.embedder\.convolution\.", "backbone.body.conv1."),
    (r"^model\.backbone\.model\.embedder\.embedder\.normalization\.", "backbone.body.bn1."),
    *[(rf"^model\.backbone\.model\.encoder\.stages\.{i}\.layers\.", f"backbone.body.layer{i + 1}.") for i in range(4)],
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    *[(rf"\.layer\.{i}\.convolution\.", f".conv{i + 1}.") for i in range(2)],
    *[(rf"\.layer\.{i}\.normalization\.", f".bn{i + 1}.") for i in range(2)],
]
SHARED = [
    *RESNET,
    (r"^model\.(encoder|decoder)\.layers\.", r"\1."),
    (r"^model\.", ""),
    (r"^query_position_embeddings\.", "query_embed."),
    (r"\.mlp\.fc", ".linear"),
    (r"^(encoder\.\d+)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"^(encoder\.\d+)\.final_layer_norm\.", r"\1.norm2."),
    (r"^(decoder\.\d+)\.final_layer_norm\.", r"\1.norm3."),
    (r"^(encoder\.\d+\.self_attn)\.o_proj\.", r"\1.out_proj."),
]
CONDITIONAL = [
    *SHARED,
    (r"^input_projection\.", "input_proj."),
    (r"^decoder\.(layernorm\.)", "norm."),
    (r"^decoder\.(query_scale|ref_point_head)\.", r"\1."),
    (r"^(decoder\.\d+)\.self_attn\.", r"\1.sa_"),
    (r"^(decoder\.\d+)\.encoder_attn\.", r"\1.ca_"),
    (r"_o_proj\.", "_out_proj."),
    (r"_(q|k)_(content|pos)_", r"_\1\2_"),
    (r"^(decoder\.\d+)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"^(decoder\.\d+)\.encoder_attn_layer_norm\.", r"\1.norm2."),
    (r"^class_labels_classifier\.", "class_embed."),
    (r"^bbox_predictor\.", "bbox_embed."),
]
DEFORMABLE = [
    *SHARED,
    (r"^decoder\.(class|bbox)_embed\.", r"\1_embed."),
    (r"^(decoder\.\d+)\.self_attn\.o_proj\.", r"\1.self_attn.out_proj."),
    (r"^(decoder\.\d+)\.self_attn_layer_norm\.", r"\1.norm2."),
    (r"^(decoder\.\d+)\.encoder_attn\.", r"\1.cross_attn."),
    (r"^(decoder\.\d+)\.encoder_attn_layer_norm\.", r"\1.norm1."),
]
THEIRS = {
    "d_model": 64, "num_queries": QUERIES, "num_labels": CLASSES, "encoder_layers": 2, "decoder_layers": LAYERS,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
OURS = {"dim": 64, "queries": QUERIES, "classes": CLASSES, "encoder_layers": 2, "decoder_layers": LAYERS, "heads": 4, "ffn": 48}


def resnet(*stages: str) -> ResNetConfig:
    return ResNetConfig(embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2] * 4, layer_type="basic", out_features=list(stages))


def our_backbone() -> Backbone:
    """ResNet-18 with frozen BatchNorm."""
    return Backbone(recipes.Backbone(name="resnet18", weights="imagenet"))


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights that leave nothing at zero or one; the BatchNorm statistics too."""
    for name, value in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif value.dim() > 1:
            value.normal_(0, value[0].numel() ** -0.5)
        elif value.is_floating_point():
            value.add_(0.1 * torch.randn(value.shape))


def our_state(theirs: nn.Module, renames: list[tuple[str, str]], shared_heads: bool = False) -> dict[str, Tensor]:
    """Their weights under our names."""
    state = {our_name(name, renames): value for name, value in theirs.state_dict().items()}
    # Ours pack the three projections of plain attention into one matrix.
    for name in [name for name in state if re.search(r"\.self_attn\.q_proj\.", name)]:
        parts = [state.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        state[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    if shared_heads:
        state = {name: value for name, value in state.items() if not re.match(r"(class|bbox)_embed\.[1-9]", name)}
    return state


def padded_batch() -> tuple[Tensor, Tensor]:
    height, width = (max(side) for side in zip(*SIZES, strict=True))
    pixels, padding = torch.zeros(len(SIZES), 3, height, width), torch.ones(len(SIZES), height, width, dtype=torch.bool)
    for i, (h, w) in enumerate(SIZES):
        pixels[i, :, :h, :w], padding[i, :h, :w] = torch.randn(3, h, w), False
    return pixels, padding


@torch.no_grad()
def compare(ours: nn.Module, theirs: nn.Module) -> None:
    """Every stage: theirs return the last one only, so their decoder is cut after each layer."""
    pixels, padding = padded_batch()
    ours.eval(), theirs.eval()
    (output,) = ours.decode(ours.encode(pixels, padding))
    layers = theirs.model.decoder.layers
    for stage in range(LAYERS):
        theirs.model.decoder.layers = layers[: stage + 1]
        expected = theirs(pixel_values=pixels, pixel_mask=(~padding).long())
        torch.testing.assert_close(output.logits[stage], expected.logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(output.boxes[stage], expected.pred_boxes, atol=1e-4, rtol=0)


def test_conditional_detr() -> None:
    torch.manual_seed(0)
    # With the auxiliary loss on, the port feeds the normalised state to the next layer, which is not the official function.
    theirs = ConditionalDetrForObjectDetection(ConditionalDetrConfig(backbone_config=resnet("stage4"), auxiliary_loss=False, **THEIRS))
    randomise(theirs)
    ours = ConditionalDETR(our_backbone(), **OURS)
    ours.load_state_dict(our_state(theirs, CONDITIONAL))
    compare(ours, theirs)


VARIANTS = {
    "plain": ("plain", 4),
    "box_refine": ("box_refine", 4),
    "two_stage": ("two_stage", 4),
    "two_levels": ("box_refine", 2),
    "five_levels": ("plain", 5),
    "single_scale": ("plain", 1),
}


@pytest.mark.parametrize("form, levels", VARIANTS.values(), ids=VARIANTS)
def test_deformable_detr(form: str, levels: int) -> None:
    torch.manual_seed(0)
    used = ("stage4",) if levels == 1 else ("stage2", "stage3", "stage4")[:levels]
    config = DeformableDetrConfig(
        backbone_config=resnet(*used), num_feature_levels=levels, with_box_refine=form != "plain", two_stage=form == "two_stage",
        two_stage_num_proposals=QUERIES, **THEIRS,
    )  # fmt: skip
    theirs = DeformableDetrForObjectDetection(config)
    randomise(theirs)
    ours = DeformableDETR(our_backbone(), form=form, levels=levels, **OURS)
    ours.load_state_dict(our_state(theirs, DEFORMABLE, shared_heads=form == "plain"))
    compare(ours, theirs)
