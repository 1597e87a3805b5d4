"""When two recipes are one run, what a run is called, and which runs it needs."""

import json
import re
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

from detrdistill.recipes.recipe import CropRecipe, Folder, Recipe
from detrdistill.recipes.schema import Strict


def parents(recipe: Recipe | CropRecipe) -> dict[str, Recipe | CropRecipe]:
    """The runs whose weights a run needs: "teacher", and "backbone" where that is trained on crops."""
    found: dict[str, Recipe | CropRecipe] = {}
    if isinstance(recipe, Recipe):
        if recipe.teacher is not None:
            found["teacher"] = recipe.teacher
        if recipe.backbone.weights == "crops":
            # Like ImageNet's, these weights are learned with all strides.
            found["backbone"] = CropRecipe(backbone=recipe.backbone.replace(dilation=False), data=recipe.data)
    return found


def run_id(recipe: Recipe | CropRecipe) -> str:
    """Readable title and eight hexadecimal digits of a hash of all that is not at its default.

    So a field that is added later, at its default, leaves old names valid. The folder a data set lies in does not count, its
    content does.
    """
    return f"{recipe.title}-{sha256(json.dumps(_essence(recipe), sort_keys=True).encode()).hexdigest()[:8]}"


def _essence(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_essence(item) for item in value]
    if not isinstance(value, Strict):
        return str(value) if isinstance(value, Path) else value
    told = {}
    for name, field in type(value).model_fields.items():
        held = getattr(value, name)
        elsewhere = name == "path" and value.sha256 is not None
        # What kind of thing it is counts even where it is the default of its class.
        if name in ("name", "kind") or (held != field.get_default() and not elsewhere):
            told[name] = _essence(held)
    return told


def all_runs(recipes: Iterable[Recipe]) -> dict[str, Recipe | CropRecipe]:
    """The recipes by the names of their runs, and those of the runs that they depend on."""
    waiting: list[Recipe | CropRecipe] = list(recipes)
    found: dict[str, Recipe | CropRecipe] = {}
    while waiting:
        recipe = waiting.pop(0)
        found[run_id(recipe)] = recipe
        waiting += parents(recipe).values()
    return found


def any_content(recipe: Recipe) -> Recipe:
    """The recipe with its data folder's place and hash blotted out, so that runs on whatever content compare equal."""
    if not isinstance(recipe.data, Folder):
        return recipe
    return recipe.replace(data=recipe.data.replace(sha256="any"), teacher=recipe.teacher and any_content(recipe.teacher))


def treatment(recipe: Recipe) -> str:
    """What a recipe is but for its seeds and its teacher's: runs of one row, whichever teacher taught them."""
    return run_id(any_content(_seedless(recipe).replace(teacher=recipe.teacher and _seedless(recipe.teacher))))


def block(recipe: Recipe) -> str:
    """The plain student of the same seed: what shares start weights, images and their order, and the length of the schedule."""
    return run_id(any_content(recipe.replace(methods=(), teacher=None, teacher_floor=0.0)))


def _seedless(recipe: Recipe) -> Recipe:
    """A teacher's backbone has a seed of its own, as `Preset.teacher_of` says."""
    return recipe.replace(seed=0, **({"backbone.crops.seed": 0} if recipe.backbone.crops else {}))


def _placeless(recipe: Recipe | CropRecipe) -> str:
    """The recipe without the paths of data folders, which may move."""
    return re.sub(r'"path": *"[^"]*"', "", json.dumps(recipe.model_dump(mode="json")))
