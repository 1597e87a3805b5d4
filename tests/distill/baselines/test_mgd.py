"""MGD against its formula, image by image, on maps that are cut to their valid part."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck

from detrdistill.distill.baselines.mgd import MGDLoss, hide
from detrdistill.distill.levels import LevelByLevel
from detrdistill.models.outputs import DetectorOutput, Targets
from tests.examples import leaves, more_padding, one_image, some_output, some_targets, with_gradient

MASKED = 0.4
GRID = ((4, 6),)
loss = MGDLoss(3, 4, MASKED).double()


def value(student: DetectorOutput, teacher: DetectorOutput, targets: Targets, own: nn.Module = loss) -> Tensor:
    return LevelByLevel([own], "features")(student, teacher, targets, {})["mgd"]


def draw(monkeypatch: pytest.MonkeyPatch, noise: Tensor) -> None:
    """Let the loss draw these numbers."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: noise.view(shape))


def some_noise(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def literal(student: DetectorOutput, teacher: DetectorOutput, noise: Tensor) -> float:
    """||F_T - G(f(F_S) M)||^2 / B; the last column of the last image is padding, which is cut off."""
    found = 0.0
    (f_s,), (f_t,), (padding,) = student.features, teacher.features, teacher.padding
    inner, _, outer = loss.generation
    for image in range(len(f_s)):
        width = (~padding[image, 0]).sum()
        shown = loss.align(f_s[image, None, :, :, :width]).clone()
        for y in range(f_s.shape[2]):
            for x in range(width):
                if noise[image, 0, y, x] > 1 - MASKED:
                    shown[:, :, y, x] = 0
        made = F.conv2d(shown, inner.weight, inner.bias, padding=1).clamp(min=0)
        made = F.conv2d(made, outer.weight, outer.bias, padding=1)
        found += (made[0] - f_t[image, :, :, :width]).square().sum().item()
    return found / len(f_s)


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (0, 0)])
def test_equals_the_formula_whatever_the_objects(counts, monkeypatch):
    student, teacher, targets = some_output(dim=3, grids=GRID), some_output(seed=5, grids=GRID), some_targets(*counts)
    noise = some_noise(2, 1, 4, 6)
    draw(monkeypatch, noise)
    assert value(student, teacher, targets).item() == pytest.approx(literal(student, teacher, noise), rel=1e-9)


def test_zero_when_the_generator_hands_the_teacher_on():
    own = MGDLoss(4, 4, masked=0.0).double()
    for parameter in own.parameters():
        nn.init.zeros_(parameter) if parameter.dim() == 1 else nn.init.dirac_(parameter)
    teacher = some_output(grids=GRID)
    teacher.features[0].abs_()  # for the ReLU
    student = with_gradient(teacher)
    found = value(student, teacher, some_targets(2, 1), own)
    found.backward()
    assert found == 0 and (student.features[0].grad == 0).all()


def test_nothing_is_seen_of_hidden_cells():
    student, other, teacher = (some_output(dim=dim, seed=seed, grids=GRID) for dim, seed in ((3, 0), (3, 1), (4, 5)))
    own, targets = MGDLoss(3, 4, masked=1.0).double(), some_targets(2, 1)
    assert value(student, teacher, targets, own) == value(other, teacher, targets, own) > 0


def test_cells_are_hidden_as_often_as_asked():
    hidden = hide(some_noise(5, 1, 100, 100), 0.65)
    assert hidden.double().mean() == pytest.approx(0.65, abs=0.01)


def test_mask_follows_the_global_generator_and_changes_with_every_call():
    student, teacher, targets = some_output(dim=3, grids=GRID), some_output(seed=5, grids=GRID), some_targets(2, 1)
    torch.manual_seed(0)
    first, second = value(student, teacher, targets), value(student, teacher, targets)
    torch.manual_seed(0)
    assert value(student, teacher, targets) == first != second


def test_padding_takes_no_part(monkeypatch):
    student, teacher, targets = some_output(dim=3, grids=GRID), some_output(seed=5, grids=GRID), some_targets(2, 1)
    noise = some_noise(2, 1, 4, 6)
    draw(monkeypatch, noise)
    wanted = value(student, teacher, targets)
    draw(monkeypatch, F.pad(noise, (0, 3, 0, 2)))
    torch.testing.assert_close(value(more_padding(student), more_padding(teacher), targets), wanted)


def test_images_of_a_step_can_come_one_by_one(monkeypatch):
    student, teacher, noise = some_output(images=3, dim=3, grids=GRID), some_output(images=3, seed=5, grids=GRID), some_noise(3, 1, 4, 6)
    targets = some_targets(2, 0, 3)
    draw(monkeypatch, noise)
    whole, parts = value(student, teacher, targets), 0
    for i in range(3):
        draw(monkeypatch, noise[i])
        parts = parts + value(one_image(student, i), one_image(teacher, i), one_image(targets, i))
    torch.testing.assert_close(parts, whole)


def test_gradient_reaches_student_and_modules_alone():
    own, student, teacher = MGDLoss(3, 4, MASKED).double(), with_gradient(some_output(dim=3, grids=GRID)), some_output(seed=5, grids=GRID)
    value(student, teacher, some_targets(2, 1), own).backward()
    assert student.features[0].grad.abs().sum() > 0
    assert (student.features[0].grad[-1, :, :, -1] == 0).all(), "gradient on padding"
    assert all(parameter.grad.abs().sum() > 0 for parameter in own.parameters())
    assert student.logits.grad is None and student.boxes.grad is None and student.queries.grad is None
    assert all(leaf.grad is None for leaf in leaves(teacher))


def test_gradients(monkeypatch):
    grids = ((2, 3),)
    student, teacher = with_gradient(some_output(grids=grids, dim=3)), some_output(grids=grids, seed=5)
    targets = some_targets(2, 0)
    draw(monkeypatch, some_noise(2, 1, 2, 3))
    assert gradcheck(lambda level: value(replace(student, features=[level]), teacher, targets), student.features[0])
