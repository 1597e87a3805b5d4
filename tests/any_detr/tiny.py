"""A small model of each family, with random weights that spread: of transformers' own, boxes hardly differ."""

import torch
from transformers import AutoConfig, AutoModelForObjectDetection

from detrdistill.any_detr.build import initialise
from detrdistill.recipes.families import FAMILIES
from detrdistill.recipes.parts import Resize, Schedule
from detrdistill.recipes.recipe import Recipe
from tests.models.small import randomise

CLASSES, QUERIES, LAYERS, SIDE = 3, 6, 3, 64

_BACKBONE = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 24], "depths": [1, 1, 1, 1], "layer_type": "basic"}
_STAGES = {"out_features": ["stage2", "stage3", "stage4"]}
_RT = {
    "backbone_config": {"model_type": "rt_detr_resnet", **_BACKBONE, **_STAGES},
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [8, 16, 24],
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "d_model": 32,
    "num_queries": QUERIES,
    "decoder_in_channels": [32, 32, 32],
    "decoder_ffn_dim": 32,
    "decoder_layers": LAYERS,
    "decoder_attention_heads": 2,
    "num_denoising": 12,
    "initializer_range": 0.1,
}
_HGNET = {
    "model_type": "hgnet_v2",
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 8, 16, 24],
    "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [8, 16, 24, 24],
    "hidden_sizes": [8, 16, 24, 24],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [2, 2, 2, 2],
    **_STAGES,
}
_FINE = _RT | {"backbone_config": _HGNET, "encoder_in_channels": [16, 24, 24], "max_num_bins": 8, "lqe_hidden_dim": 8}
_WINDOWS = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
_GROUPS = {
    "d_model": 32,
    "num_queries": QUERIES,
    "decoder_layers": LAYERS,
    "decoder_ffn_dim": 32,
    "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 2,
    "group_detr": 3,
    "c2f_num_blocks": 1,
    "dropout": 0.0,
}
_FIRST = {
    "use_timm_backbone": False,
    "backbone_config": {"model_type": "resnet", **_BACKBONE, "out_features": ["stage4"]},
    "num_queries": QUERIES,
    "encoder_layers": 1,
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_layers": LAYERS,
    "decoder_ffn_dim": 32,
    "decoder_attention_heads": 2,
    "dropout": 0.0,
}
CONFIGS = {
    "rt_detr": _RT,
    "rt_detr_v2": _RT,
    "d_fine": _FINE,
    "deimv2": _FINE,
    "rf_detr": _GROUPS
    | {
        "backbone_config": {
            "model_type": "rf_detr_dinov2",
            **_WINDOWS,
            "patch_size": 16,
            "num_windows": 2,
            "image_size": 64,
            "out_features": ["stage1", "stage3"],
        }
    },
    "lw_detr": _GROUPS
    | {
        "backbone_config": {
            "model_type": "lw_detr_vit",
            **_WINDOWS,
            "patch_size": 16,
            "image_size": 64,
            "pretrain_image_size": 64,
            "num_windows": 4,
            "window_block_indices": [0, 2],
            "out_indices": [1, 3],
        },
        "projector_scale_factors": [1.0],
    },
    "dab_detr": _FIRST | {"hidden_size": 32},
    "detr": _FIRST | {"d_model": 32},
}


def tiny(family: str, seed: int = 0, **changes) -> torch.nn.Module:
    config = AutoConfig.for_model(FAMILIES[family].model_type, **(CONFIGS[family] | {"num_labels": CLASSES} | changes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForObjectDetection.from_config(config).eval()
        if FAMILIES[family].queries == "logits":  # in which two images hardly differ at first
            initialise(model, FAMILIES[family])
    if family in ("dab_detr", "detr"):  # whose queries are alike at first, and whose boxes are the anchors
        randomise(model, seed)
    return model


def tiny_recipe(family: str, **changes) -> Recipe:
    """The recipe of `tiny`; `changes` as `Recipe.replace` takes them."""
    facts, config = FAMILIES[family], dict(CONFIGS[family])
    sizes = {"dim": config.pop(facts.dim), "queries": config.pop("num_queries"), "decoder_layers": config.pop("decoder_layers")}
    levels = 3 if facts.queries == "logits" else 1
    base = Recipe(
        detector=family,
        **sizes,
        levels=levels,
        config=config,
        schedule=Schedule(steps=1),
        resize=Resize(short=SIDE, long=SIDE, stretch=True),
    )
    return base.replace(**changes)
