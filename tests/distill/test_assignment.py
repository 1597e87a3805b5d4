"""Eq. 10 against a loop over stages, images and objects."""

from dataclasses import replace

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.autograd import gradcheck
from torchvision.ops import box_convert, generalized_box_iou, sigmoid_focal_loss

from detrdistill.criterion import set_losses, target_cost
from detrdistill.distill.assignment import AssignmentDistillation
from detrdistill.matching import Pairs, Problem, match
from detrdistill.models.outputs import DetectorOutput, Targets
from tests.examples import leaves, one_image, some_output, some_targets, with_gradient

loss = AssignmentDistillation(4, 4)


def assigned(teacher: DetectorOutput, targets: Targets) -> dict[str, Pairs]:
    """sigma^T: the teacher's own assignment."""
    return match({"objects": Problem(target_cost(teacher, targets), targets.counts)})


def losses(student: DetectorOutput, teacher: DetectorOutput, targets: Targets) -> dict[str, torch.Tensor]:
    return loss(student, teacher, targets, match(loss.problems(student, teacher, targets)))


def literal(student: DetectorOutput, teacher: DetectorOutput, targets: Targets, stage: int) -> dict[str, float]:
    found = {"class": 0.0, "l1": 0.0, "giou": 0.0}
    for image, count in enumerate(targets.counts):
        cost = target_cost(teacher, targets)[stage, image, :, :count]
        wanted = torch.zeros_like(student.logits[stage, image])
        for query, n in zip(*linear_sum_assignment(cost), strict=True):
            wanted[query, targets.labels[image, n]] = 1
            box, truth = student.boxes[stage, image, query][None], targets.boxes[image, n][None]
            found["l1"] += 5 * (box - truth).abs().sum().item()
            overlap = generalized_box_iou(box_convert(box, "cxcywh", "xyxy"), box_convert(truth, "cxcywh", "xyxy"))
            found["giou"] += 2 * (1 - overlap.item())
        found["class"] += 2 * sigmoid_focal_loss(student.logits[stage, image], wanted, alpha=0.25, gamma=2, reduction="sum").item()
    return {name: value / max(sum(targets.counts), 1) for name, value in found.items()}


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (0, 0), (5, 5)])
def test_equals_the_printed_equation(counts):
    student, teacher, targets = some_output(), some_output(seed=5), some_targets(*counts)
    found = losses(student, teacher, targets)
    for stage in range(2):
        assert literal(student, teacher, targets, stage) == {n: pytest.approx(v[stage].item(), rel=1e-9) for n, v in found.items()}


def test_matching_anew_is_the_released_code_s():
    student, teacher, targets = some_output(), some_output(seed=5), some_targets(3, 2)
    anew = AssignmentDistillation(4, 4, pairing="student")
    found = anew(student, teacher, targets, match(anew.problems(student, teacher, targets)))
    wanted = set_losses(student, targets, match({"student": Problem(target_cost(student, targets), targets.counts)})["student"])
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)
    own = sum(value.sum() for value in losses(student, teacher, targets).values())
    assert own > sum(value.sum() for value in found.values()), "the student's own assignment is the cheapest"


def test_reference_points_may_be_the_student_s():
    queries = AssignmentDistillation(4, 4, references="student").student_queries(some_output())
    assert queries.reference is None and torch.equal(queries.content, some_output().initial.content)


def test_student_equal_to_teacher_has_the_teacher_s_own_loss():
    teacher, targets = some_output(), some_targets(3, 2)
    wanted = set_losses(teacher, targets, assigned(teacher, targets)["objects"])
    found = losses(with_gradient(teacher), teacher, targets)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])


def test_gradient_reaches_the_student_alone():
    student, teacher = with_gradient(some_output()), with_gradient(some_output(seed=5))
    sum(value.sum() for value in losses(student, teacher, some_targets(2, 1)).values()).backward()
    assert student.logits.grad.abs().sum() > 0 and student.boxes.grad.abs().sum() > 0
    assert all(leaf.grad is None for leaf in leaves(teacher))


def test_guests_are_the_teacher_s_queries_as_they_are_or_adapted():
    teacher = some_output(dim=6)
    same = AssignmentDistillation(6, 6).student_queries(teacher)
    for name in ("content", "position", "reference"):
        assert torch.equal(getattr(same, name), getattr(teacher.initial, name))
    adapted = AssignmentDistillation(4, 6).double()
    queries = adapted.student_queries(teacher)
    assert queries.content.shape == queries.position.shape == (1, 5, 4) and torch.equal(queries.reference, teacher.initial.reference)
    (queries.content.sum() + queries.position.sum()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapted.parameters())


def test_first_stage_of_a_two_stage_teacher_is_left_out():
    teacher = some_output()
    teacher = replace(teacher, initial=replace(teacher.initial, proposals=replace(some_output(stages=1), initial=None)))
    assert loss.student_queries(teacher).proposals is None


def test_images_of_a_step_can_come_one_by_one():
    student, teacher, targets = some_output(images=3), some_output(images=3, seed=5), some_targets(2, 0, 3)
    together = torch.stack(list(losses(student, teacher, targets).values()))
    parts = [losses(one_image(student, i), one_image(teacher, i), one_image(targets, i)).values() for i in range(3)]
    torch.testing.assert_close(sum(torch.stack(list(part)) for part in parts), together)


def test_gradients():
    student, teacher, targets = with_gradient(some_output(queries=3)), some_output(queries=3, seed=5), some_targets(2, 0)
    pairs = assigned(teacher, targets)

    def value(logits, boxes):
        return tuple(loss(replace(student, logits=logits, boxes=boxes), teacher, targets, pairs).values())

    assert gradcheck(value, (student.logits, student.boxes))
