"""MixMatcher against loops over stages, images, queries and cells."""

from dataclasses import replace

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.autograd import gradcheck
from torchvision.ops import box_convert, generalized_box_iou

from detrdistill.distill.baselines.d3etr import AdaptiveMatching, FixedMatching, OneToOne, chosen
from detrdistill.distill.distiller import Distiller, Term
from detrdistill.distill.logits import LogitsDistillation
from detrdistill.matching import match
from detrdistill.models.outputs import DetectorOutput, Targets
from tests.examples import leaves, more_padding, one_image, permuted, some_output, some_targets, with_gradient
from tests.models.small import KINDS, batch, small_detector

SELF, CROSS = 7.0, 3.0
adaptive, fixed = AdaptiveMatching(SELF, CROSS), FixedMatching(4, 4, True, SELF, CROSS)
BOTH = pytest.mark.parametrize("loss", [adaptive, fixed], ids=["adaptive", "fixed"])


def values(loss: OneToOne, student: DetectorOutput, teacher: DetectorOutput, targets: Targets) -> dict[str, Tensor]:
    return loss(student, teacher, targets, match(loss.problems(student, teacher, targets)))


def price(student: DetectorOutput, teacher: DetectorOutput, place: tuple[int, int], i: int, j: int) -> dict[str, float]:
    """Weighted class, L1 and GIoU losses of student query i and teacher query j."""
    z, p = student.logits[place][i], teacher.logits[place][j].sigmoid()
    own, other = student.boxes[place][i], teacher.boxes[place][j]
    corners = [box_convert(box, "cxcywh", "xyxy")[None] for box in (own, other)]
    return {
        "class": -(p * z.sigmoid().log() + (1 - p) * (1 - z.sigmoid()).log()).sum().item(),
        "l1": 5 * (own - other).abs().sum().item(),
        "giou": 2 * (1 - generalized_box_iou(*corners).item()),
    }


def literal(student: DetectorOutput, teacher: DetectorOutput, matched: bool) -> dict[str, list[float]]:
    stages, images, queries = student.logits.shape[:3]
    found = {name: [0.0] * stages for name in ("class", "l1", "giou", "self_attention", "cross_attention")}
    for stage, image in torch.cartesian_prod(torch.arange(stages), torch.arange(images)).tolist():
        place = stage, image
        pairs = [(i, i) for i in range(queries)]
        if matched:
            others = teacher.logits.shape[2]
            costs = [[sum(price(student, teacher, place, i, j).values()) for j in range(others)] for i in range(queries)]
            pairs = list(zip(*linear_sum_assignment(costs), strict=True))
        for i, j in pairs:
            for name, value in price(student, teacher, place, i, j).items():
                found[name][stage] += value / (len(pairs) * images)
        own, other = student.self_attention[place], teacher.self_attention[place]
        for i, j in pairs:
            for k, n in pairs:
                found["self_attention"][stage] += SELF * (own[i, k] - other[j, n]).item() ** 2 / (300**2 * images)
        own, other = student.cross_attention[place], teacher.cross_attention[place]
        cells = [cell for cell, hidden in enumerate(torch.cat([mask[image].flatten() for mask in student.padding]).tolist()) if not hidden]
        for i, j in pairs:
            for cell in cells:
                found["cross_attention"][stage] += CROSS * (own[i, cell] - other[j, cell]).item() ** 2 / (len(cells) * images)
    return found


@pytest.mark.parametrize("queries", [5, 3, 7])
@pytest.mark.parametrize("counts", [(3, 2), (0, 0)])
def test_adaptive_matching_equals_a_loop(queries: int, counts: tuple[int, int]):
    student, teacher = some_output(queries=queries), some_output(seed=5)
    found, wanted = values(adaptive, student, teacher, some_targets(*counts)), literal(student, teacher, matched=True)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert value.tolist() == pytest.approx(wanted[name], rel=1e-9), name


@pytest.mark.parametrize("counts", [(3, 2), (0, 0)])
def test_fixed_matching_equals_a_loop(counts: tuple[int, int]):
    student, teacher = some_output(), some_output(seed=5)
    found, wanted = values(fixed, student, teacher, some_targets(*counts)), literal(student, teacher, matched=False)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert value.tolist() == pytest.approx(wanted[name], rel=1e-9), name


@pytest.mark.parametrize("l1", ["cxcywh", "xyxy"])
def test_predictions_are_those_of_joint_pairs(l1: str):
    """Boxes inside the image are not cut."""
    student, teacher, targets = replace(some_output(queries=3), l1=l1), some_output(seed=5), some_targets(2, 1)
    found, joint = values(adaptive, student, teacher, targets), LogitsDistillation("joint", "pairs")
    for name, value in joint(student, teacher, targets, match(joint.problems(student, teacher, targets))).items():
        torch.testing.assert_close(found[name.removeprefix("joint/")], value)


@BOTH
def test_least_when_student_equals_teacher(loss: OneToOne):
    teacher, targets = some_output(), some_targets(2, 1)
    student = with_gradient(teacher)
    found = values(loss, student, teacher, targets)
    sum(value.sum() for value in found.values()).backward()
    p = teacher.logits.sigmoid()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).sum(-1).mean((1, 2))
    for name, value in found.items():
        torch.testing.assert_close(value, entropy if name == "class" else torch.zeros_like(value), atol=1e-12, rtol=0)
    for leaf in (student.logits, student.boxes, student.self_attention, student.cross_attention):
        torch.testing.assert_close(leaf.grad, torch.zeros_like(leaf), atol=1e-12, rtol=0)


def test_order_of_queries_matters_to_fixed_matching_alone():
    student, teacher, targets, order = some_output(), some_output(seed=5), some_targets(2, 1), torch.tensor([3, 0, 4, 1, 2])
    for loss, same in ((adaptive, True), (fixed, False)):
        first, second = values(loss, student, teacher, targets), values(loss, permuted(student, order), teacher, targets)
        assert all(torch.allclose(first[name], second[name]) == same for name in first)


def test_chosen_queries_differ_by_stage_and_image():
    output = some_output(queries=4)
    index = torch.tensor([[[2, 0, 3], [1, 3, 0]], [[0, 1, 2], [3, 2, 1]]])
    found = chosen(output, index)
    for stage, image in ((0, 0), (0, 1), (1, 0), (1, 1)):
        order = index[stage, image]
        for name in ("logits", "boxes", "queries", "cross_attention"):
            assert torch.equal(getattr(found, name)[stage, image], getattr(output, name)[stage, image, order])
        assert torch.equal(found.self_attention[stage, image], output.self_attention[stage, image][order][:, order])


@BOTH
def test_padding_takes_no_part(loss: OneToOne):
    student, teacher, targets = some_output(), some_output(seed=5), some_targets(2, 1)
    for name, value in values(loss, more_padding(student), more_padding(teacher), targets).items():
        torch.testing.assert_close(value, values(loss, student, teacher, targets)[name])


@BOTH
def test_images_of_a_step_can_come_one_by_one(loss: OneToOne):
    student, teacher, targets = some_output(images=3), some_output(images=3, seed=5), some_targets(2, 0, 3)
    parts = [values(loss, one_image(student, i), one_image(teacher, i), one_image(targets, i)) for i in range(3)]
    for name, value in values(loss, student, teacher, targets).items():
        torch.testing.assert_close(sum(part[name] for part in parts), value)


@BOTH
def test_gradient_reaches_the_student_alone(loss: OneToOne):
    student, teacher = with_gradient(some_output()), some_output(seed=5)
    sum(value.sum() for value in values(loss, student, teacher, some_targets(2, 1)).values()).backward()
    for leaf in (student.logits, student.boxes, student.self_attention, student.cross_attention):
        assert leaf.grad.abs().sum() > 0
    assert student.queries.grad is None and all(level.grad is None for level in (*student.features, *student.neck))
    assert all(leaf.grad is None for leaf in leaves(teacher))


@BOTH
def test_gradients(loss: OneToOne):
    grids = ((1, 2),)
    student, teacher = some_output(queries=2, grids=grids), some_output(queries=2, grids=grids, seed=5)
    names, targets = ("logits", "boxes", "self_attention", "cross_attention"), some_targets(1, 0)

    def loss_of(*given: Tensor) -> tuple[Tensor, ...]:
        return tuple(values(loss, replace(student, **dict(zip(names, given, strict=True))), teacher, targets).values())

    assert gradcheck(loss_of, tuple(getattr(student, name).requires_grad_() for name in names))


@pytest.mark.parametrize("weights, asked, parts", [((0.0, 0.0), False, set()), ((1.0, 0.0), True, {"self"}), ((0.0, 1.0), True, {"cross"})])
def test_attention_is_asked_for_and_compared_where_it_has_a_weight(weights: tuple[float, float], asked: bool, parts: set[str]):
    student, teacher, targets = some_output(), some_output(seed=5), some_targets(2, 1)
    for loss in (AdaptiveMatching(*weights), FixedMatching(4, 4, True, *weights)):
        assert loss.attention == asked
        assert values(loss, student, teacher, targets).keys() == {"class", "l1", "giou", *(f"{part}_attention" for part in parts)}


@BOTH
def test_without_maps_predictions_remain(loss: OneToOne):
    student, teacher = some_output(), some_output(seed=5)
    bare = replace(teacher, self_attention=None, cross_attention=None)
    assert values(loss, student, bare, some_targets(2, 1)).keys() == {"class", "l1", "giou"}


@pytest.mark.parametrize("kind", KINDS)
def test_detectors_are_compared_with_their_attention(kind: str):
    student, teacher = small_detector(kind), small_detector(kind, seed=1, dim=64, queries=8, decoder_layers=4)
    terms = [
        Term("adaptive", 1.0, AdaptiveMatching(), "grouped"),
        Term("fixed", 1.0, FixedMatching(32, 64, student.query_position), "grouped"),
    ]
    distiller = Distiller(student, terms)
    pixels, padding = batch((64, 96), (96, 50))
    targets = some_targets(2, 1)
    targets = replace(targets, boxes=targets.boxes.float())
    parts = distiller(pixels, padding, targets, distiller.teacher_outputs(teacher, pixels, padding))
    for name in ("adaptive", "fixed"):
        for part in ("class", "l1", "giou", "self_attention", "cross_attention"):
            assert parts[f"{name}/{part}"].shape == (4,) and (parts[f"{name}/{part}"] > 0).all()
    sum(value.sum() for value in parts.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters() if p.requires_grad)
    assert terms[1].loss.adapter.content.bias.grad.any() and all(parameter.grad is None for parameter in teacher.parameters())
