"""Every method on every family of transformers: it trains the student alone, or is refused in one line; and which pairs can teach."""

from collections.abc import Sequence
from copy import deepcopy
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from detrdistill.any_detr.adapter import AnyDETR
from detrdistill.distill.build import build_distiller
from detrdistill.distill.distiller import Distiller
from detrdistill.errors import InputError
from detrdistill.recipes.families import FAMILIES
from detrdistill.recipes.methods import D3ETR, METHODS, DETRDistill, Method
from detrdistill.recipes.recipe import Recipe
from tests.any_detr.checks import PADDED, WHOLE, adapted, some_targets
from tests.any_detr.tiny import CLASSES, tiny, tiny_recipe
from tests.distill.test_every_method import EVERY, PARTS
from tests.models.small import KINDS, batch, small_detector, small_recipe
from tests.recipes.test_recipe import SWITCHES
from workflow.any_detr import METHODS_SHOWN, refused, shown_recipe

WALKED = EVERY | {"detrdistill-released-teacher": DETRDistill(variant="released", references="teacher")}
LOGITS_ALONE = DETRDistill(features=0, assignment=0)
every_family = pytest.mark.parametrize("family", FAMILIES)


@cache
def teacher_of(detector: str) -> nn.Module:
    """Another than the student, shared by all tests."""
    if detector in KINDS:
        return small_detector(detector, seed=1).requires_grad_(False)
    return AnyDETR(tiny(detector, seed=1), FAMILIES[detector]).eval().requires_grad_(False)


def recipe_of(detector: str, **changes) -> Recipe:
    changes |= {"resize.short": 64, "resize.long": 64, "resize.stretch": True}
    return small_recipe(detector, **changes) if detector in KINDS else tiny_recipe(detector, **changes)


def student_of(detector: str) -> nn.Module:
    return small_detector(detector) if detector in KINDS else deepcopy(adapted(detector))


def step(student: str, teacher: str, methods: Sequence[Method], sizes: tuple = WHOLE) -> tuple[Distiller, dict[str, Tensor]]:
    """A student after the backward pass of one step, and the parts of its loss.

    Raises:
        InputError: the recipe is refused.
    """
    recipe = recipe_of(student, methods=tuple(methods), teacher=recipe_of(teacher, seed=1))
    torch.manual_seed(0)
    distiller, master = build_distiller(student_of(student), recipe).train(), teacher_of(teacher)
    images, targets = batch(*sizes), some_targets(2, 1)
    parts = distiller(*images, targets, distiller.teacher_outputs(master, *images))
    torch.stack([value.sum() for value in parts.values()]).sum().backward()
    assert not master.training and all(p.grad is None for p in master.parameters())
    return distiller, parts


def learns(distiller: Distiller, parts: dict[str, Tensor], wanted: set[str]) -> None:
    """The parts are there and finite, and all that trains has a gradient."""
    assert {part.split("/")[0] for part in parts} == {"detection"} | wanted
    assert all(value.isfinite().all() for value in parts.values())
    without = [name for name, p in distiller.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())]
    assert not without


@every_family
@pytest.mark.parametrize("name", WALKED)
def test_a_method_runs_or_is_refused(name: str, family: str) -> None:
    """As the table of docs/any_detr.md says of it."""
    method = WALKED[name]
    if method.needs_own_layers:
        assert refused(shown_recipe(family), method)
        with pytest.raises(
            InputError, match=rf"{method.name}: {method.needs_own_layers} cannot be had .* {FAMILIES[family].title}; "
        ) as no:
            step(family, family, [method])
        assert "\n" not in str(no.value)
    else:
        assert not refused(shown_recipe(family), method)
        learns(*step(family, family, [method]), PARTS[name.removesuffix("-teacher")])


def test_the_table_shows_every_method_and_the_forms_that_differ() -> None:
    assert {type(method) for method in METHODS_SHOWN.values()} == set(METHODS.values())
    assert all(method in WALKED.values() for method in METHODS_SHOWN.values())
    assert {bool(method.needs_own_layers) for method in METHODS_SHOWN.values()} == {True, False}


@pytest.mark.parametrize("family", ["rt_detr_v2", "rf_detr", "dab_detr", "detr"])
@pytest.mark.parametrize("switch", [name for name in SWITCHES["detrdistill"] if name not in DETRDistill.weights])
def test_each_switch_of_detrdistill(switch: str, family: str) -> None:
    """On a family of each form of queries; alone, so that none hides another."""
    method = DETRDistill(**{switch: SWITCHES["detrdistill"][switch]})
    if switch == "references":
        with pytest.raises(InputError, match=r"reference points that the student makes cannot be had from .*; leave references at teacher"):
            step(family, family, [method])
    else:
        learns(*step(family, family, [method]), {"logits", "features", "assignment"})


@pytest.mark.parametrize(
    "student, teacher", [("rt_detr_v2", "d_fine"), ("d_fine", "rt_detr"), ("deimv2", "rt_detr_v2"), ("lw_detr", "rf_detr")]
)
def test_families_whose_queries_have_one_form_teach_each_other_everything(student: str, teacher: str) -> None:
    learns(*step(student, teacher, [DETRDistill(normalised=True)], PADDED), {"logits", "features", "assignment"})
    learns(*step(student, teacher, [EVERY["kd_detr"], EVERY["fgd"]]), {"kd_detr", "fgd"})


PAIRS = [
    ("rf_detr", "detr"),
    ("deformable-refine", "rt_detr_v2"),
    ("d_fine", "adamixer"),
    ("dab_detr", "d_fine"),
    ("conditional", "lw_detr"),
]


@pytest.mark.parametrize("student, teacher", PAIRS)
def test_any_pair_can_teach_logits_alone(student: str, teacher: str) -> None:
    learns(*step(student, teacher, [LOGITS_ALONE], PADDED if "rf_detr" not in (student, teacher) else WHOLE), {"logits"})
    for method in (DETRDistill(), EVERY["fgd"], EVERY["kd_detr"]):
        with pytest.raises(InputError, match=r"mean something else to .*; take a teacher whose queries have the same form, or compare"):
            step(student, teacher, [method])


def test_attention_maps_of_a_teacher_of_transformers_are_refused_too() -> None:
    """D3ETR without its shared queries and cross-attention fits any pair by the forms of queries."""
    with pytest.raises(InputError, match="attention maps cannot be had from transformers' RT-DETR v2; take another method"):
        step("deformable-refine", "rt_detr_v2", [D3ETR(fixed=0, cross_attention=0)])


@pytest.mark.parametrize("student, teacher", [("rt_detr_v2", "d_fine"), ("d_fine", "d_fine")])
def test_maps_before_encoders_of_unlike_widths_are_refused(student: str, teacher: str) -> None:
    """Where the encoder is wider than the decoder (RT-DETR of ResNet-101), the maps before it are none that the decoder could attend to."""
    wide = recipe_of(teacher, seed=1).replace(**{"config.encoder_hidden_dim": 48})
    with pytest.raises(InputError, match=r"fgd: .*take fgd.maps=features"):
        recipe_of(student, methods=(EVERY["fgd"],), teacher=wide)
    assert recipe_of(student, methods=(EVERY["fgd"].replace(maps="features"),), teacher=wide)


WIDE = {
    "rt_detr_v2": {"d_model": 64, "encoder_hidden_dim": 64, "decoder_in_channels": [64, 64, 64]}, "rf_detr": {"d_model": 64},
    "dab_detr": {"hidden_size": 64}, "detr": {"d_model": 64},
}  # fmt: skip


@pytest.mark.parametrize("family", WIDE)
def test_a_teacher_of_another_width_depth_and_number_of_queries(family: str) -> None:
    """Its queries are adapted to the student's width by learned maps."""
    sizes = {"num_queries": 9, "decoder_layers": 2} | WIDE[family]
    teacher = AnyDETR(tiny(family, **sizes), FAMILIES[family]).eval()
    dim = sizes.pop(FAMILIES[family].dim)
    recipe = tiny_recipe(family, dim=dim, queries=9, decoder_layers=2)
    recipe = recipe.replace(config=recipe.config | {name: value for name, value in sizes.items() if name in recipe.config})
    student = tiny_recipe(family, methods=(DETRDistill(normalised=True), EVERY["kd_detr"]), teacher=recipe)
    distiller = build_distiller(student_of(family), student).train()
    images, targets = batch(*WHOLE), some_targets(2, 1)
    parts = distiller(*images, targets, distiller.teacher_outputs(teacher, *images))
    torch.stack([value.sum() for value in parts.values()]).sum().backward()
    learns(distiller, parts, {"logits", "features", "assignment", "kd_detr"})


@every_family
def test_the_own_loss_is_what_a_plain_student_trains_by(family: str) -> None:
    distiller = Distiller(deepcopy(adapted(family)).train())
    assert distiller.criterion is distiller.student.own_loss and not distiller.criterion.problems(None, None)
    torch.manual_seed(0)
    parts = distiller(*batch(*WHOLE), some_targets(2, 1))
    (found,) = distiller.student.decode(distiller.student.encode(*batch(*WHOLE)))
    assert all(name.startswith("detection/loss_") for name in parts) and found.logits.shape[-1] == CLASSES


@every_family
def test_under_autocast(family: str) -> None:
    """As recipes of precision bf16 train: maps and queries may be lowered on the way, losses are of full precision."""
    with torch.autocast("cpu", torch.bfloat16):
        distiller, parts = step(family, family, [DETRDistill(normalised=True), EVERY["fgd"]])
    learns(distiller, parts, {"logits", "features", "assignment", "fgd"})
    assert {value.dtype for value in parts.values()} == {torch.float32}
