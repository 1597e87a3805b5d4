"""When two recipes are one run."""

from pathlib import Path

import pytest

from detrdistill.recipes.identity import block, parents, run_id, same_run, treatment
from detrdistill.recipes.parts import Folder
from detrdistill.recipes.presets import get_preset
from detrdistill.recipes.recipe import CropRecipe, Recipe

STUDENT = get_preset("coco").student


def on(recipe: Recipe, path: str, content: str | None) -> Recipe:
    return recipe.replace(data=Folder(path=Path(path), sha256=content))


def test_where_a_folder_lies_does_not_count_but_its_content_does() -> None:
    here, there, other = (on(STUDENT, path, content * 64) for path, content in (("a", "1"), ("b", "1"), ("a", "2")))
    assert same_run(here, there) and run_id(here) == run_id(there)
    assert not same_run(here, other) and run_id(here) != run_id(other)


def test_content_that_is_not_stated_is_any() -> None:
    open_, here, other = on(STUDENT, "a", None), on(STUDENT, "b", "1" * 64), on(STUDENT, "b", "2" * 64)
    assert same_run(open_, here) and same_run(other, open_) and not same_run(here, other)
    assert not same_run(open_, here.replace(**{"schedule.lr": 1e-3}))


@pytest.mark.parametrize("changes", [{"seed": 1}, {"schedule.lr": 1e-3}, {"backbone.dilation": True}, {"levels": 3}])
def test_every_field_counts(changes: dict) -> None:
    assert not same_run(STUDENT, STUDENT.replace(**changes))


def test_a_backbone_s_run_is_no_detector_s() -> None:
    student = get_preset("smoke").student
    crops = parents(student)["backbone"]
    assert isinstance(crops, CropRecipe) and same_run(crops, crops) and not same_run(crops, student)


def test_runs_of_one_row_have_one_treatment_and_a_block_each() -> None:
    """Seeds 0 and 3 of preset mini have different teachers."""
    preset = get_preset("mini", "adamixer")
    first, later = (preset.recipe("detrdistill", seed) for seed in (0, 3))
    assert first.teacher != later.teacher and treatment(first) == treatment(later)
    assert block(first) == run_id(preset.recipe("student", 0)) != block(later)
    assert treatment(first) != treatment(preset.recipe("fgd", 0))
    moved = [on(get_preset("bccd").recipe("detrdistill"), path, content) for path, content in (("a", None), ("b", "1" * 64))]
    assert len({treatment(one) for one in moved}) == len({block(one) for one in moved}) == 1


@pytest.mark.parametrize(("weights", "stages"), [("imagenet", 1), ("none", -1)])
def test_frozen_stages_stated_at_their_default_are_the_same_run(weights: str, stages: int) -> None:
    unstated = STUDENT.replace(**{"backbone.weights": weights})
    stated = unstated.replace(**{"backbone.frozen_stages": stages})
    assert same_run(stated, unstated) and run_id(stated) == run_id(unstated)
    other = STUDENT.replace(**{"backbone.frozen_stages": 2})
    assert other.backbone.frozen_stages == 2 and run_id(other) != run_id(STUDENT)
