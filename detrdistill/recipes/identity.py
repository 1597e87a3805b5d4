"""When two recipes are one run, what a run is called, and which runs it needs."""

import json
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

from detrdistill.recipes.parts import DetectorWeights, Folder
from detrdistill.recipes.recipe import CropRecipe, Recipe
from detrdistill.recipes.schema import Strict


def parents(recipe: Recipe | CropRecipe) -> dict[str, Recipe | CropRecipe]:
    """The runs whose weights a run needs: "teacher", and "backbone" where that is trained on crops and no `start` brings its own."""
    found: dict[str, Recipe | CropRecipe] = {}
    if isinstance(recipe, Recipe):
        if recipe.teacher is not None:
            found["teacher"] = recipe.teacher
        if recipe.backbone.weights == "crops" and recipe.start is None:
            # Like ImageNet's, these weights are learned with all strides and all stages.
            found["backbone"] = CropRecipe(backbone=recipe.backbone.replace(dilation=False, frozen_stages=None), data=recipe.data)
    return found


def run_id(recipe: Recipe | CropRecipe) -> str:
    """Readable title and eight hexadecimal digits of a hash of all that is not at its default.

    So a field that is added later, at its default, leaves old names valid. Where a data set or a published detector lies does not
    count, its content does.
    """
    return _named(recipe, content=True)


def same_run(one: Recipe | CropRecipe, other: Recipe | CropRecipe) -> bool:
    """Whether two recipes are one run: the same in every field, those at their defaults too, but for where data and weights lie.

    A data folder's content counts where both recipes state it. One that does not state it (a preset, before its folder is looked at)
    stands for whatever content the other has.
    """
    content = all(not isinstance(recipe.data, Folder) or recipe.data.sha256 for recipe in (one, other))
    return type(one) is type(other) and _fields(one, content) == _fields(other, content)


def all_runs(recipes: Iterable[Recipe]) -> dict[str, Recipe | CropRecipe]:
    """The recipes by the names of their runs, and those of the runs that they depend on."""
    waiting: list[Recipe | CropRecipe] = list(recipes)
    found: dict[str, Recipe | CropRecipe] = {}
    while waiting:
        recipe = waiting.pop(0)
        found[run_id(recipe)] = recipe
        waiting += parents(recipe).values()
    return found


def treatment(recipe: Recipe) -> str:
    """What a recipe is but for its seeds and its teacher's: runs of one row, whichever teacher taught them, on whatever content."""
    return _named(_seedless(recipe).replace(teacher=recipe.teacher and _seedless(recipe.teacher)), content=False)


def block(recipe: Recipe) -> str:
    """The plain student of the same seed: what shares start weights, images and their order, and the length of the schedule."""
    return _named(recipe.replace(methods=(), teacher=None, teacher_floor=0.0), content=False)


def _seedless(recipe: Recipe) -> Recipe:
    """A teacher's backbone has a seed of its own, as `Preset.teacher_of` says."""
    return recipe.replace(seed=0, **({"backbone.crops.seed": 0} if recipe.backbone.crops else {}))


def _named(recipe: Recipe | CropRecipe, content: bool) -> str:
    return f"{recipe.title}-{sha256(json.dumps(stated(recipe, content), sort_keys=True).encode()).hexdigest()[:8]}"


def stated(value: Any, content: bool = True) -> Any:
    """All that is not at its default; of a data folder or a detector's weights the content or, before that is known, the path."""
    if isinstance(value, tuple):
        return [stated(item, content) for item in value]
    if not isinstance(value, Strict):
        return str(value) if isinstance(value, Path) else value
    left_out = _left_out(value, content)
    return {
        name: stated(getattr(value, name), content)
        for name, field in type(value).model_fields.items()
        # What kind of thing it is counts even where it is the default of its class.
        if name in ("name", "kind") or (getattr(value, name) != field.default and name not in left_out)
    }


def _left_out(value: Strict, content: bool) -> set[str]:
    if isinstance(value, DetectorWeights):
        return {"path", "source"} if value.sha256 else {"source"}
    if not isinstance(value, Folder):
        return set()
    return value.places if content and value.sha256 else set() if content else {*value.places, "sha256"}


def _fields(value: Any, content: bool) -> Any:
    """Every field; of a data folder its content, or nothing; of a detector's weights their content."""
    if isinstance(value, tuple):
        return [_fields(item, content) for item in value]
    if not isinstance(value, Strict):
        return value
    left_out = (value.places if content else {*value.places, "sha256"}) if isinstance(value, Folder) else _left_out(value, content)
    return {name: _fields(getattr(value, name), content) for name in type(value).model_fields if name not in left_out}
