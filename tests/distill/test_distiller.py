"""Student, teacher and all losses together, with the embedded presets' detector."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from detrdistill import matching
from detrdistill.distill import distiller as module
from detrdistill.distill.build import build_distiller
from detrdistill.distill.distiller import Distiller, Term, full_precision, prefixed
from detrdistill.distill.logits import LogitsDistillation
from detrdistill.models import build_detector
from detrdistill.models.outputs import Targets
from detrdistill.recipes.methods import DETRDistill
from detrdistill.recipes.presets import smoke
from detrdistill.recipes.recipe import Recipe
from tests.examples import some_output, some_targets

PARTS = {
    "detection/class", "detection/l1", "detection/giou", "features", "assignment/class", "assignment/l1", "assignment/giou",
    "logits/positive/class", "logits/positive/l1", "logits/positive/giou", "logits/negative/l1", "logits/negative/giou",
}  # fmt: skip


def recipe(**changes) -> Recipe:
    return smoke().student.replace(**{"queries": 8} | changes)


def detector(**changes) -> nn.Module:
    """A detector whose every parameter matters: the official initialisation zeroes the box heads, and frozen BatchNorm's are 1."""
    found = build_detector(recipe(**changes), 3)
    with torch.no_grad():
        random = torch.Generator().manual_seed(recipe(**changes).seed)
        for parameter in found.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=random))
    return found.eval()


def images(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    padding = torch.zeros(batch, 64, 64, dtype=torch.bool)
    padding[-1, :, 32:] = True
    return pixels.masked_fill(padding[:, None], 0), padding


def targets(*counts: int) -> Targets:
    found = some_targets(*counts)
    return replace(found, boxes=found.boxes.float())


def distilling(student: nn.Module, teacher: Recipe, **changes) -> Distiller:
    return build_distiller(student, recipe(**changes).replace(methods=(DETRDistill(),), teacher=teacher)).eval()


def losses(distiller: Distiller, teacher: nn.Module, wanted: Targets) -> dict[str, torch.Tensor]:
    pixels, padding = images()
    return distiller(pixels, padding, wanted, distiller.teacher_outputs(teacher, pixels, padding))


def total(found: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([value.sum() for value in found.values()]).sum()


@pytest.mark.parametrize("counts", [(2, 1), (0, 3), (0, 0)])
@pytest.mark.parametrize("other", [{}, {"dim": 64}, {"queries": 5}, {"dim": 64, "queries": 11, "encoder_layers": 0}])
def test_every_part_is_there_and_finite(counts, other):
    """Teachers of another width, with fewer and more queries, and another encoder."""
    student, teacher = detector(), detector(seed=1, **other)
    found = losses(distilling(student, recipe(**other)), teacher, targets(*counts))
    assert found.keys() == PARTS and all(value.isfinite().all() for value in found.values())
    total(found).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_teacher_is_no_part_of_the_module():
    student, teacher = detector(), detector(seed=1)
    distiller = distilling(student, recipe())
    losses(distiller, teacher, targets(1, 2))
    names = {name for name in distiller.state_dict() if not name.startswith("student.")}
    assert names == {"losses.features.adapter.weight", "losses.features.adapter.bias"}, "queries of one width need no adapters"
    known = {id(parameter) for parameter in distiller.parameters()}
    assert not known & {id(parameter) for parameter in teacher.parameters()}
    adapted = distilling(detector(), recipe(dim=64))
    names = {name for name in adapted.state_dict() if not name.startswith("student.")}
    assert {name.rsplit(".", 1)[0] for name in names} == {
        "losses.features.adapter", "losses.assignment.adapter.content", "losses.assignment.adapter.position",
    }  # fmt: skip


def test_a_guest_group_leaves_the_student_s_own_outputs_alone():
    student, teacher = detector(), detector(seed=1, queries=5)
    pixels, padding = images()
    with torch.no_grad():
        memory = student.encode(pixels, padding)
        own, visiting = student.queries(memory), teacher.queries(memory)
        (alone,) = student.decode(memory, own)
        together = student.decode(memory, own, visiting)
        turned = student.decode(memory, visiting, own)
    (guest,) = student.decode(memory, visiting)
    for one in (together, turned[::-1]):
        for name in ("logits", "boxes", "queries"):
            torch.testing.assert_close(getattr(one[0], name), getattr(alone, name), atol=1e-5, rtol=0)
            torch.testing.assert_close(getattr(one[1], name), getattr(guest, name), atol=1e-5, rtol=0)
    assert (guest.logits - alone.logits[:, :, :5]).abs().max() > 1e-3, "the groups differ, so the comparison says something"


def test_groups_of_one_size_share_a_call_with_the_same_result():
    student, teacher = detector(), detector(seed=1)
    pixels, padding = images()
    memory = student.encode(pixels, padding)
    own, visiting = student.queries(memory), teacher.queries(memory)
    both = student.decode(memory, own, visiting)
    for found, group in zip(both, (own, visiting), strict=True):
        torch.testing.assert_close(found.boxes, student.decode(memory, group)[0].boxes, atol=1e-5, rtol=0)


def test_distilling_does_not_change_the_detection_loss():
    student, teacher, wanted = detector(), detector(seed=1), targets(2, 1)
    alone = Distiller(student)(*images(), wanted)
    found = losses(distilling(student, recipe()), teacher, wanted)
    for name, value in alone.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)


def test_order_of_student_queries_does_not_matter():
    student, teacher, wanted = detector(), detector(seed=1), targets(2, 1)
    distiller = distilling(student, recipe())
    before = losses(distiller, teacher, wanted)
    with torch.no_grad():
        student.query_embed.weight.copy_(student.query_embed.weight[torch.randperm(8)])
    for name, value in losses(distiller, teacher, wanted).items():
        torch.testing.assert_close(value, before[name], atol=1e-4, rtol=1e-4)


def test_one_matching_and_one_transfer_a_step(monkeypatch):
    calls, transfer = [], matching._to_host
    monkeypatch.setattr(matching, "_to_host", lambda costs: calls.append(len(costs)) or transfer(costs))
    losses(distilling(detector(), recipe()), detector(seed=1), targets(2, 1))
    assert calls == [5], "student; teacher, positive and negative of the logits; objects of the assignment"


def test_images_are_encoded_once_and_decoded_once(monkeypatch):
    student, calls = detector(), []
    for name in ("encode", "decode"):
        kept = getattr(student, name)
        monkeypatch.setattr(student, name, lambda *inputs, kept=kept, name=name: calls.append(name) or kept(*inputs), raising=False)
    losses(distilling(student, recipe()), detector(seed=1), targets(2, 1))
    assert calls == ["encode", "decode"]


def test_weights_scale_their_parts():
    student, teacher, wanted = detector(), detector(seed=1), targets(2, 1)
    one = losses(distilling(student, recipe()), teacher, wanted)
    method = DETRDistill(logits=3, features=0, assignment="0.5")
    found = losses(build_distiller(student, recipe(methods=(method,), teacher=recipe())).eval(), teacher, wanted)
    assert found.keys() == {name for name in PARTS if not name.startswith("features")}
    for name, value in found.items():
        weight = 3 if name.startswith("logits") else 0.5 if name.startswith("assignment") else 1
        torch.testing.assert_close(value, weight * one[name], atol=1e-5, rtol=1e-5)


def test_losses_are_in_full_precision_under_autocast(monkeypatch):
    student, teacher = detector(), detector(seed=1)
    types, kept = set(), module.match
    monkeypatch.setattr(module, "match", lambda problems: types.update(p.cost.dtype for p in problems.values()) or kept(problems))
    with torch.autocast("cpu", torch.bfloat16):
        found = losses(distilling(student, recipe()), teacher, targets(2, 1))
    assert types == {torch.float32} and {value.dtype for value in found.values()} == {torch.float32}


def test_full_precision_leaves_float64_alone():
    output = some_output()
    assert full_precision(output).logits.dtype == torch.float64
    low = replace(output, logits=output.logits.bfloat16(), features=[level.bfloat16() for level in output.features])
    raised = full_precision(low)
    assert raised.logits.dtype == torch.float32 and {level.dtype for level in raised.features} == {torch.float32}


def test_names_in_the_log():
    one = torch.ones(())
    assert prefixed("features", {"features": one}) == {"features": one}
    assert prefixed("logits", {"positive/class": one}) == {"logits/positive/class": one}
    assert Term("logits", 2.0, LogitsDistillation()).weight == 2.0


def test_padding_more_changes_nothing():
    """Images in a larger batch frame: their own maps are padded further, and the detector's losses stay."""
    student, teacher, wanted = detector(), detector(seed=1), targets(2, 1)
    distiller = distilling(student, recipe())
    features = [torch.randn(2, c, *g) for c, g in zip(student.backbone.channels, ((8, 8), (4, 4), (2, 2)), strict=True)]
    larger = [nn.functional.pad(level, (0, s, 0, s), value=3.0) for level, s in zip(features, (8, 4, 2), strict=True)]

    def value(maps: list[torch.Tensor], size: int) -> torch.Tensor:
        # 3x3 convolutions of the backbone see what lies beside the image; from its maps on, padding must not be seen.
        pixels = torch.zeros(2, 3, size, size)
        padding = torch.ones(2, size, size, dtype=torch.bool)
        padding[:, :64, :64] = False
        for model in (student, teacher):
            model.backbone.forward = lambda _: maps
        return total(distiller(pixels, padding, wanted, distiller.teacher_outputs(teacher, pixels, padding)))

    # GroupNorm of the input projections averages over the whole map, padding included, as in the official code.
    for model in (student, teacher):
        for projection in model.input_proj:
            projection[1] = nn.Identity()
    torch.testing.assert_close(value(larger, 128), value(features, 64), atol=1e-5, rtol=1e-5)
