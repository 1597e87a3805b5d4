"""Detectors that share one contract: `encode(pixels, padding) -> memory`, `decode(memory, *query_groups) -> one output a group`.

`queries(memory)` are a detector's own; `query_position` says whether queries carry an embedding beside content and reference, and
`top` how many detections an image the official evaluation keeps. `most_objects` is how many objects of an image count where losses are
divided by objects: all (None) in the DETRs' codes, as many as there are queries where the official code counts matched queries.
`own_loss` is None, or stands in the place of `criterion.SetCriterion`; `encode` then takes targets as well.
"""

import torch

from detrdistill.models.adamixer import AdaMixer
from detrdistill.models.backbones import Backbone
from detrdistill.models.conditional_detr import ConditionalDETR
from detrdistill.models.deformable_detr import DeformableDETR
from detrdistill.models.outputs import DetectorOutput, Queries, Targets
from detrdistill.recipes.recipe import Recipe

__all__ = ["AdaMixer", "Backbone", "ConditionalDETR", "DeformableDETR", "DetectorOutput", "Queries", "Targets", "build_detector"]


def build_detector(recipe: Recipe, classes: int) -> ConditionalDETR | DeformableDETR | AdaMixer:
    """The recipe's detector with fresh weights, a pure function of the recipe's seed; the backbone's weights are loaded by the run."""
    shared = {name: getattr(recipe, name) for name in ("dim", "heads", "ffn", "decoder_layers", "queries", "dropout")}
    shared["classes"] = classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        if recipe.detector == "adamixer":
            own = {"in_points": recipe.in_points, "out_points": recipe.out_points, "groups": recipe.groups}
            return AdaMixer(Backbone(recipe.backbone, first_level=2), channels=recipe.feature_dim, **own, **shared)
        shared["encoder_layers"] = recipe.encoder_layers
        if recipe.detector == "conditional_detr":
            return ConditionalDETR(Backbone(recipe.backbone), temperature=recipe.temperature, **shared)
        detector = DeformableDETR(Backbone(recipe.backbone), form=recipe.form, levels=recipe.levels, points=recipe.points, **shared)
        if recipe.levels > 1:  # one level is the last map, which needs all before it
            detector.backbone.freeze_after(len(detector.used))  # DDP waits in vain for gradients that never come
        return detector
