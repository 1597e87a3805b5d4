"""Detectors that share one contract: `encode(pixels, padding) -> memory`, `decode(memory, *query_groups) -> one output a group`."""

import torch

from detrdistill.experiments.recipes import Recipe
from detrdistill.models.backbones import Backbone
from detrdistill.models.deformable_detr import DeformableDETR
from detrdistill.models.outputs import DetectorOutput, Queries, Targets

__all__ = ["Backbone", "DeformableDETR", "DetectorOutput", "Queries", "Targets", "build_detector"]


def build_detector(recipe: Recipe, classes: int) -> DeformableDETR:
    """The recipe's detector with fresh weights, a pure function of the recipe's seed; the backbone's weights are loaded by the run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return DeformableDETR(
            Backbone(recipe.backbone),
            classes=classes,
            form=recipe.form,
            dim=recipe.dim,
            heads=recipe.heads,
            ffn=recipe.ffn,
            encoder_layers=recipe.encoder_layers,
            decoder_layers=recipe.decoder_layers,
            queries=recipe.queries,
            levels=recipe.levels,
            points=recipe.points,
            dropout=recipe.dropout,
        )
