"""Our detectors against their ports in transformers: random weights, really padded batches, every stage's logits and boxes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    PreTrainedModel,
    ResNetConfig,
)

from detrdistill.checkpoints.pretrained import load_pretrained

SIZES = [(96, 118), (71, 128), (128, 60)]
LAYERS, CLASSES, QUERIES = 3, 7, 11
THEIRS = {
    "d_model": 64, "num_queries": QUERIES, "num_labels": CLASSES, "encoder_layers": 2, "decoder_layers": LAYERS,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip


def resnet(*stages: str) -> ResNetConfig:
    return ResNetConfig(embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2] * 4, layer_type="basic", out_features=list(stages))


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


def padded_batch() -> tuple[Tensor, Tensor]:
    height, width = (max(side) for side in zip(*SIZES, strict=True))
    pixels, padding = torch.zeros(len(SIZES), 3, height, width), torch.ones(len(SIZES), height, width, dtype=torch.bool)
    for i, (h, w) in enumerate(SIZES):
        pixels[i, :, :h, :w], padding[i, :h, :w] = torch.randn(3, h, w), False
    return pixels, padding


@torch.no_grad()
def compare(theirs: PreTrainedModel, folder: Path) -> None:
    """Ours get their weights from a folder. Every stage: theirs return the last one only, so their decoder is cut after each layer."""
    randomise(theirs)
    theirs.save_pretrained(folder)
    ours, _ = load_pretrained(folder)
    pixels, padding = padded_batch()
    theirs.eval()
    (output,) = ours.decode(ours.encode(pixels, padding))
    layers = theirs.model.decoder.layers
    for stage in range(LAYERS):
        theirs.model.decoder.layers = layers[: stage + 1]
        expected = theirs(pixel_values=pixels, pixel_mask=(~padding).long())
        torch.testing.assert_close(output.logits[stage], expected.logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(output.boxes[stage], expected.pred_boxes, atol=1e-4, rtol=0)


def test_conditional_detr(tmp_path: Path) -> None:
    torch.manual_seed(0)
    # With the auxiliary loss on, the port feeds the normalised state to the next layer, which is not the official function.
    config = ConditionalDetrConfig(backbone_config=resnet("stage4"), auxiliary_loss=False, **THEIRS)
    compare(ConditionalDetrForObjectDetection(config), tmp_path)


VARIANTS = {
    "plain": ("plain", 4),
    "box_refine": ("box_refine", 4),
    "two_stage": ("two_stage", 4),
    "two_levels": ("box_refine", 2),
    "five_levels": ("plain", 5),
    "single_scale": ("plain", 1),
}


@pytest.mark.parametrize("form, levels", VARIANTS.values(), ids=VARIANTS)
def test_deformable_detr(form: str, levels: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    used = ("stage4",) if levels == 1 else ("stage2", "stage3", "stage4")[:levels]
    config = DeformableDetrConfig(
        backbone_config=resnet(*used), num_feature_levels=levels, with_box_refine=form != "plain", two_stage=form == "two_stage",
        two_stage_num_proposals=QUERIES, **THEIRS,
    )  # fmt: skip
    compare(DeformableDetrForObjectDetection(config), tmp_path)
