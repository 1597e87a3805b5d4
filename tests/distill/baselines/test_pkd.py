"""PKD against a loop over channels and valid cells, and against Pearson's r."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from detrdistill.distill.baselines.pkd import PKDLoss
from detrdistill.distill.levels import LevelByLevel
from detrdistill.models.outputs import DetectorOutput, Targets
from tests.examples import leaves, more_padding, some_output, some_targets, with_gradient

GRID = ((4, 6),)
loss = PKDLoss(4, 4)


def value(student: DetectorOutput, teacher: DetectorOutput, targets: Targets, own: nn.Module = loss) -> Tensor:
    return LevelByLevel([own], "features")(student, teacher, targets, {})["pkd"]


def channels(output: DetectorOutput) -> list[Tensor]:
    """The numbers of each channel in the valid cells of all images."""
    (features,), (padding,) = output.features, output.padding
    cells = (~padding).nonzero().tolist()
    return [torch.stack([features[image, channel, y, x] for image, y, x in cells]) for channel in range(features.shape[1])]


def literal(student: DetectorOutput, teacher: DetectorOutput) -> float:
    """Half the mean squared error of standardised channels."""
    found = []
    for own, other in zip(channels(student), channels(teacher), strict=True):
        own, other = (own - own.mean()) / (own.std() + 1e-6), (other - other.mean()) / (other.std() + 1e-6)
        found.append((own - other).square().mean().item() / 2)
    return sum(found) / len(found)


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (0, 0)])
def test_equals_the_formula_whatever_the_objects(counts):
    student, teacher = some_output(grids=GRID), some_output(seed=5, grids=GRID)
    assert value(student, teacher, some_targets(*counts)).item() == pytest.approx(literal(student, teacher), rel=1e-9)


def test_is_one_minus_the_correlation():
    student, teacher = some_output(grids=GRID), some_output(seed=5, grids=GRID)
    pairs = [torch.stack(pair) for pair in zip(channels(student), channels(teacher), strict=True)]
    cells = pairs[0].shape[1]
    wanted = torch.stack([1 - pair.corrcoef()[0, 1] for pair in pairs]).mean() * (cells - 1) / cells
    assert value(student, teacher, some_targets(2, 1)).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_zero_when_student_equals_teacher_but_for_scale_and_shift():
    teacher = some_output(grids=GRID)
    same = with_gradient(teacher)
    found = value(same, teacher, some_targets(2, 1))
    found.backward()
    assert found == 0 and (same.features[0].grad == 0).all()
    scale, shift = torch.tensor([[1.0, 2.0, 0.5, 3.0], [5.0, -1.0, 2.0, 0.0]], dtype=torch.float64)[:, :, None, None]
    other = replace(teacher, features=[teacher.features[0] * scale + shift])
    assert value(other, teacher, some_targets(2, 1)).item() == pytest.approx(0, abs=1e-10)


def test_constant_channels_have_a_finite_gradient():
    student, teacher = some_output(grids=GRID), some_output(seed=5, grids=GRID)
    student.features[0][:, 1] = 0
    student = with_gradient(student)
    found = value(student, teacher, some_targets(2, 1))
    found.backward()
    assert found.isfinite() and student.features[0].grad.isfinite().all()


def test_a_single_cell_has_nothing_to_correlate():
    student, teacher = some_output(grids=((1, 1),), images=1), some_output(grids=((1, 1),), images=1, seed=5)
    for output in (student, teacher):
        output.padding[0][:] = False
    assert value(student, teacher, some_targets(1)) == 0


def test_padding_takes_no_part():
    student, teacher, targets = some_output(grids=GRID), some_output(seed=5, grids=GRID), some_targets(2, 1)
    torch.testing.assert_close(value(more_padding(student), more_padding(teacher), targets), value(student, teacher, targets))


def test_micro_batches_are_averaged():
    student, teacher, targets = some_output(grids=GRID), some_output(seed=5, grids=GRID), some_targets(2, 1)
    third = replace(targets, step_images=6.0)
    torch.testing.assert_close(3 * value(student, teacher, third), value(student, teacher, targets))


def test_gradient_reaches_student_and_adapter_alone():
    own, student, teacher = PKDLoss(3, 4).double(), with_gradient(some_output(dim=3, grids=GRID)), some_output(seed=5, grids=GRID)
    value(student, teacher, some_targets(2, 1), own).backward()
    assert student.features[0].grad.abs().sum() > 0
    assert (student.features[0].grad[-1, :, :, -1] == 0).all(), "gradient on padding"
    assert own.adapter.weight.grad.abs().sum() > 0
    assert student.logits.grad is None and student.boxes.grad is None and student.queries.grad is None
    assert all(leaf.grad is None for leaf in leaves(teacher))


def test_gradients():
    grids = ((2, 3),)
    student, teacher = with_gradient(some_output(grids=grids, dim=3)), some_output(grids=grids, seed=5)
    own, targets = PKDLoss(3, 4).double(), some_targets(2, 0)
    assert gradcheck(lambda level: value(replace(student, features=[level]), teacher, targets, own), student.features[0])
