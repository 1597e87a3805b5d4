"""A recipe refuses what its detector does not have, and what its teacher cannot teach."""

import pytest

from detrdistill.errors import InputError
from detrdistill.recipes.identity import run_id
from detrdistill.recipes.methods import DETRDistill
from tests.models.small import small_recipe


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("conditional", {"levels": 3}, r"conditional_detr has no 'levels' \(that is of deformable_detr, rt_detr, .*\); leave it at 4"),
        ("conditional", {"form": "two_stage"}, "conditional_detr has no 'form'"),
        ("conditional", {"groups": 2}, r"conditional_detr has no 'groups' \(that is of adamixer\)"),
        ("deformable", {"in_points": 16}, "deformable_detr has no 'in_points'"),
        ("adamixer", {"encoder_layers": 1}, r"adamixer has no 'encoder_layers' \(that is of deformable_detr, conditional_detr\)"),
        ("deformable", {"temperature": 20}, r"deformable_detr has no 'temperature' \(that is of conditional_detr\)"),
        ("adamixer", {"dim": 36, "feature_dim": 32}, "must be a multiple of 8"),
        ("adamixer", {"groups": 3}, "its feature channels 32 of 'groups' 3"),
        ("adamixer", {"feature_dim": 40}, "choose a multiple of 32"),
        ("deformable", {"dim": 40}, "choose a multiple of 32"),
    ],
)
def test_refused(kind: str, change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        small_recipe(kind, **change)


def test_any_width_that_heads_divide_suits_conditional_detr() -> None:
    assert small_recipe("conditional", dim=40).feature_width == 40


def test_another_family_teaches_logits_only() -> None:
    teacher = small_recipe("deformable")
    with pytest.raises(InputError, match="take a teacher whose queries have the same form"):
        small_recipe("conditional", teacher=teacher, methods=(DETRDistill(),))
    small_recipe("conditional", teacher=teacher, methods=(DETRDistill(features=0, assignment=0),))


def test_feature_distillation_needs_features_as_wide_as_queries() -> None:
    teacher = small_recipe("adamixer", feature_dim=64)
    with pytest.raises(InputError, match=r"features \(64 channels\) with its queries \(32\)"):
        small_recipe("adamixer", teacher=teacher, methods=(DETRDistill(),))
    student = small_recipe("adamixer", feature_dim=64, teacher=small_recipe("adamixer"), methods=(DETRDistill(),))
    assert student.feature_width == 64


def test_runs_of_other_detectors_have_other_names() -> None:
    names = {run_id(small_recipe(kind)) for kind in ("conditional", "deformable", "deformable-refine", "adamixer")}
    assert len(names) == 4
