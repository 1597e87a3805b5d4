"""Recipes with the hashes of what they name filled in: runs are called by content, not by folders. No torch here."""

from dataclasses import replace
from typing import Any, TypeVar

from detrdistill.checkpoints.locate import pinned_weights
from detrdistill.data.layout import data_cache, data_hash
from detrdistill.recipes.parts import Folder
from detrdistill.recipes.presets import Preset
from detrdistill.recipes.recipe import CropRecipe, Recipe

R = TypeVar("R", Recipe, CropRecipe, Recipe | CropRecipe)


def pinned(recipe: R) -> R:
    """The recipe with the hashes of its data folder and of the detector it starts from, its teacher's too.

    Raises:
        InputError: the folder is missing or not laid out as expected, weights are missing, or the recipe states another hash.
    """
    changes: dict[str, Any] = {}
    if isinstance(recipe.data, Folder):
        changes["data"] = recipe.data.replace(sha256=data_hash(recipe.data, data_cache()))
    if isinstance(recipe, Recipe):
        if recipe.start is not None:
            changes["start"] = pinned_weights(recipe.start)
        if recipe.teacher is not None:
            changes["teacher"] = pinned(recipe.teacher)
    return recipe.replace(**changes) if changes else recipe


def pinned_preset(preset: Preset) -> Preset:
    """The preset with these hashes filled in: its runs then have the names that `runs.run` gives them.

    Raises:
        InputError: as `pinned`.
    """
    return replace(preset, teacher=pinned(preset.teacher), student=pinned(preset.student))
