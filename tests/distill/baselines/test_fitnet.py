"""FitNet against a loop over images and valid cells."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from detrdistill.distill.baselines.fitnet import FitNetLoss
from detrdistill.distill.levels import LevelByLevel
from detrdistill.models.outputs import DetectorOutput, Targets
from tests.examples import leaves, more_padding, one_image, some_output, some_targets, with_gradient

loss = FitNetLoss(3, 4).double()


def value(student: DetectorOutput, teacher: DetectorOutput, targets: Targets, own: nn.Module = loss) -> Tensor:
    return LevelByLevel([own, own], "features", average=True)(student, teacher, targets, {})["fitnet"]


def literal(student: DetectorOutput, teacher: DetectorOutput) -> float:
    """||F_T - f(F_S)||^2 with psi = 1, averaged over levels, images, valid cells and channels."""
    found = 0.0
    weight, bias = loss.adapter.weight[:, :, 0, 0], loss.adapter.bias
    images = len(student.features[0])
    for f_s, f_t, padding in zip(student.features, teacher.features, teacher.padding, strict=True):
        for image in range(images):
            cells = (~padding[image]).nonzero().tolist()
            for y, x in cells:
                difference = f_t[image, :, y, x] - (weight @ f_s[image, :, y, x] + bias)
                found += difference.square().sum().item() / (len(f_t[image]) * len(cells))
    return found / images / len(student.features)


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (0, 0)])
def test_equals_the_formula_whatever_the_objects(counts):
    student, teacher = some_output(dim=3), some_output(seed=5)
    assert value(student, teacher, some_targets(*counts)).item() == pytest.approx(literal(student, teacher), rel=1e-9)


def test_zero_when_the_adapted_student_equals_the_teacher():
    student = with_gradient(some_output(dim=3))
    teacher = replace(some_output(seed=5), features=[loss.adapter(level).detach() for level in student.features])
    found = value(student, teacher, some_targets(2, 1))
    found.backward()
    assert found == 0 and all((level.grad == 0).all() for level in student.features)


def test_adapter_is_learned_also_where_widths_agree():
    assert [parameter.shape for parameter in FitNetLoss(4, 4).parameters()] == [(4, 4, 1, 1), (4,)]


def test_padding_takes_no_part():
    student, teacher, targets = some_output(dim=3), some_output(seed=5), some_targets(2, 1)
    torch.testing.assert_close(value(more_padding(student), more_padding(teacher), targets), value(student, teacher, targets))


def test_images_of_a_step_can_come_one_by_one():
    student, teacher, targets = some_output(images=3, dim=3), some_output(images=3, seed=5), some_targets(2, 0, 3)
    parts = sum(value(one_image(student, i), one_image(teacher, i), one_image(targets, i)) for i in range(3))
    torch.testing.assert_close(parts, value(student, teacher, targets))


def test_gradient_reaches_student_and_adapter_alone():
    own, student, teacher = FitNetLoss(3, 4).double(), with_gradient(some_output(dim=3)), some_output(seed=5)
    value(student, teacher, some_targets(2, 1), own).backward()
    assert all(level.grad.abs().sum() > 0 for level in student.features)
    assert all((level.grad[-1, :, :, -1] == 0).all() for level in student.features), "gradient on padding"
    assert all(parameter.grad.abs().sum() > 0 for parameter in own.parameters())
    assert student.logits.grad is None and student.boxes.grad is None and student.queries.grad is None
    assert all(leaf.grad is None for leaf in leaves(teacher))


def test_gradients():
    grids = ((2, 3), (1, 2))
    student, teacher = with_gradient(some_output(grids=grids, dim=3)), some_output(grids=grids, seed=5)
    targets = some_targets(2, 0)
    assert gradcheck(lambda *maps: value(replace(student, features=maps), teacher, targets), tuple(student.features))
