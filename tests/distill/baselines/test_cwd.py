"""CWD against a loop over images, channels and valid cells."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from detrdistill.distill.baselines.cwd import CWDLoss
from detrdistill.distill.levels import LevelByLevel
from detrdistill.models.outputs import DetectorOutput, Targets
from tests.examples import leaves, more_padding, one_image, some_output, some_targets, with_gradient

GRID = ((4, 6),)
TEMPERATURE = 1.7
loss = CWDLoss(4, 4, TEMPERATURE)


def value(student: DetectorOutput, teacher: DetectorOutput, targets: Targets, own: nn.Module = loss) -> Tensor:
    return LevelByLevel([own], "features")(student, teacher, targets, {})["cwd"]


def softmax(channel: Tensor, cells: list[list[int]]) -> list[float]:
    powers = [math.exp(channel[y, x].item() / TEMPERATURE) for y, x in cells]
    return [power / sum(powers) for power in powers]


def literal(student: DetectorOutput, teacher: DetectorOutput) -> float:
    """tau^2 / (C N) sum KL(teacher || student)."""
    found = 0.0
    (f_s,), (f_t,), (padding,) = student.features, teacher.features, teacher.padding
    images, dim = f_t.shape[:2]
    for image in range(images):
        cells = (~padding[image]).nonzero().tolist()
        for channel in range(dim):
            own, other = softmax(f_s[image, channel], cells), softmax(f_t[image, channel], cells)
            found += sum(p * math.log(p / q) for p, q in zip(other, own, strict=True))
    return TEMPERATURE**2 * found / (dim * images)


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (0, 0)])
def test_equals_the_formula_whatever_the_objects(counts):
    student, teacher = some_output(grids=GRID), some_output(seed=5, grids=GRID)
    assert value(student, teacher, some_targets(*counts)).item() == pytest.approx(literal(student, teacher), rel=1e-9)


def test_zero_when_student_equals_teacher_but_for_a_shift():
    teacher = some_output(grids=GRID)
    same = with_gradient(teacher)
    found = value(same, teacher, some_targets(2, 1))
    found.backward()
    assert found == 0
    torch.testing.assert_close(same.features[0].grad, torch.zeros_like(same.features[0]), atol=1e-12, rtol=0)
    shift = torch.tensor([5.0, -1.0, 2.0, 0.0], dtype=torch.float64)[:, None, None]
    other = replace(teacher, features=[teacher.features[0] + shift])
    assert value(other, teacher, some_targets(2, 1)).item() == pytest.approx(0, abs=1e-12)


def test_padding_takes_no_part():
    student, teacher, targets = some_output(grids=GRID), some_output(seed=5, grids=GRID), some_targets(2, 1)
    torch.testing.assert_close(value(more_padding(student), more_padding(teacher), targets), value(student, teacher, targets))


def test_images_of_a_step_can_come_one_by_one():
    student, teacher, targets = some_output(images=3, grids=GRID), some_output(images=3, seed=5, grids=GRID), some_targets(2, 0, 3)
    parts = sum(value(one_image(student, i), one_image(teacher, i), one_image(targets, i)) for i in range(3))
    torch.testing.assert_close(parts, value(student, teacher, targets))


def test_gradient_reaches_student_and_adapter_alone():
    own, student, teacher = CWDLoss(3, 4, 1.0).double(), with_gradient(some_output(dim=3, grids=GRID)), some_output(seed=5, grids=GRID)
    value(student, teacher, some_targets(2, 1), own).backward()
    assert student.features[0].grad.abs().sum() > 0
    assert (student.features[0].grad[-1, :, :, -1] == 0).all(), "gradient on padding"
    assert own.adapter.weight.grad.abs().sum() > 0
    assert student.logits.grad is None and student.boxes.grad is None and student.queries.grad is None
    assert all(leaf.grad is None for leaf in leaves(teacher))


def test_gradients():
    grids = ((2, 3),)
    student, teacher = with_gradient(some_output(grids=grids, dim=3)), some_output(grids=grids, seed=5)
    own, targets = CWDLoss(3, 4, TEMPERATURE).double(), some_targets(2, 0)
    assert gradcheck(lambda level: value(replace(student, features=[level]), teacher, targets, own), student.features[0])
