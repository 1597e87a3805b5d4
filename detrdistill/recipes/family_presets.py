"""Small detectors of transformers' families for the presets: the same digits, crop-trained backbones and lengths of schedules as the
kit's own. No torch here. `presets` has them where they are named.
"""

from typing import Any

from detrdistill.recipes.parts import BackboneRecipe, Digits, Resize, Schedule
from detrdistill.recipes.recipe import Recipe

RT_DETR_V2, D_FINE = "rt_detr_v2", "d_fine"
SMALL = (RT_DETR_V2, D_FINE)  # that presets have recipes for
FLOORS = {RT_DETR_V2: 45.0, D_FINE: 40.0}  # what teachers had after a sixth of their steps


def mini_family(detector: str, teacher: BackboneRecipe, student: BackboneRecipe) -> tuple[Recipe, Recipe]:
    """Teacher and student of preset mini, with these backbones: 4,000 and 600 steps, as Deformable DETR and AdaMixer there."""
    small = Recipe(
        detector=detector,
        backbone=student,
        dim=64,
        decoder_layers=3,
        queries=20,
        levels=3,
        config=sizes(detector, dim=64),
        data=Digits(size=96, train=4000, val=400),
        resize=Resize(train="jitter", short=96, long=96),
        schedule=Schedule(steps=600, batch=16, lr=1e-3, backbone_lr=1.0, warmup=30, decay="cosine", clip_norm=1.0, evaluations=6),
    )
    # The weights of the backbone with seed 0 were not kept; seed 1 is that of the other detectors' second teacher.
    return small.replace(backbone=teacher.replace(**{"crops.seed": 1}), **{"schedule.steps": 4000}), small


def smoke_family(detector: str, backbone: BackboneRecipe) -> tuple[Recipe, Recipe]:
    """Teacher and student of preset smoke."""
    small = Recipe(
        detector=detector,
        backbone=backbone,
        dim=32,
        decoder_layers=2,
        queries=20,
        levels=3,
        config=sizes(detector, dim=32),
        data=Digits(size=64, train=32, val=8),
        resize=Resize(train="jitter", short=64, long=64),
        schedule=Schedule(steps=6, batch=4, lr=1e-3, backbone_lr=1.0, decay="cosine", evaluations=3),
    )
    return small.replace(seed=1), small


def sizes(detector: str, dim: int) -> dict[str, Any]:
    """Widths that go with `dim`, few denoising queries, and for D-FINE few bins and the short encoder blocks of its smallest models."""
    config = {
        "encoder_hidden_dim": dim,
        "encoder_ffn_dim": 2 * dim,
        "encoder_attention_heads": 4,
        "decoder_in_channels": [dim] * 3,
        "decoder_ffn_dim": 2 * dim,
        "decoder_attention_heads": 4,
        "num_denoising": 20,
    }
    return config | ({"max_num_bins": 16, "lqe_hidden_dim": dim // 2, "depth_mult": 0.34} if detector == D_FINE else {})
