"""Small detectors of every family with random weights, and batches for them."""

from collections.abc import Iterator
from contextlib import contextmanager

import jaxtyping
import torch
from torch import Tensor, nn

from detrdistill.models import build_detector
from detrdistill.recipes.parts import BackboneRecipe, Schedule
from detrdistill.recipes.recipe import Recipe

# What each detector needs beside the sizes they share.
KINDS = {
    "conditional": {"detector": "conditional_detr", "encoder_layers": 1},
    "deformable": {"detector": "deformable_detr", "encoder_layers": 1, "levels": 3, "points": 2},
    "deformable-refine": {"detector": "deformable_detr", "form": "box_refine", "encoder_layers": 1, "levels": 3, "points": 2},
    "deformable-two-stage": {"detector": "deformable_detr", "form": "two_stage", "encoder_layers": 1, "levels": 3, "points": 2},
    "adamixer": {"detector": "adamixer", "in_points": 4, "out_points": 6, "groups": 2},
}
CLASSES, QUERIES, STAGES, DIM = 3, 5, 2, 32


def small_recipe(kind: str, **changes) -> Recipe:
    """A recipe of a few thousand parameters; `changes` as `Recipe.replace` takes them."""
    base = Recipe(
        **KINDS[kind],
        backbone=BackboneRecipe(name="thin_resnet", width=8, weights="none"),
        dim=DIM,
        heads=4,
        ffn=32,
        decoder_layers=STAGES,
        queries=QUERIES,
        dropout=0.0,
        schedule=Schedule(steps=1),
    )
    return base.replace(**changes)


def small_detector(kind: str, seed: int = 0, **changes) -> nn.Module:
    """In evaluation mode, with weights that leave nothing at zero or one."""
    detector = build_detector(small_recipe(kind, **changes), CLASSES)
    randomise(detector, seed)
    return detector.eval()


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Random weights everywhere, BatchNorm statistics included."""
    random = torch.Generator().manual_seed(seed)
    for name, value in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=random)
        elif name == "init_boxes":
            value.uniform_(0.2, 0.8, generator=random)
        elif value.dim() > 1:
            value.normal_(0, value[0].numel() ** -0.5, generator=random)
        elif value.is_floating_point():
            value.add_(0.1 * torch.randn(value.shape, generator=random))


def batch(*sizes: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random images of the given heights and widths, padded to one size, and their padding mask."""
    height, width = (max(side) for side in zip(*sizes, strict=True))
    random = torch.Generator().manual_seed(seed)
    pixels, padding = torch.zeros(len(sizes), 3, height, width), torch.ones(len(sizes), height, width, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        pixels[i, :, :h, :w], padding[i, :h, :w] = torch.randn(3, h, w, generator=random), False
    return pixels, padding


@contextmanager
def untyped() -> Iterator[None]:
    """Without the types that tests check, for torch.export: a tracer's sizes are no `int`."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
