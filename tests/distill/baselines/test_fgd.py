"""FGD against loops over images, objects, cells and channels."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from detrdistill.distill.baselines.fgd import FGDLoss, object_masks
from detrdistill.distill.levels import LevelByLevel
from detrdistill.models.outputs import DetectorOutput, Targets
from tests.examples import leaves, more_padding, one_image, some_output, some_targets, with_gradient

ALPHA, BETA, GAMMA, LAMBDA, TEMPERATURE = 0.3, 0.7, 1.1, 1.9, 0.5
PARTS = ("foreground", "background", "attention", "relation")
GRID = ((5, 7),)
DIM = 8  # half of it is normalised: of 2 channels nothing but signs would be left


def some_fgd(student_dim: int = DIM, grids: tuple = GRID) -> LevelByLevel:
    """Weights that are not 0, so that relations matter."""
    torch.manual_seed(0)
    losses = LevelByLevel([FGDLoss(student_dim, DIM, ALPHA, BETA, GAMMA, LAMBDA, TEMPERATURE) for _ in grids], "features").double()
    for parameter in losses.parameters():
        nn.init.normal_(parameter)
    return losses


def example(*counts: int, dim: int = DIM, grids: tuple = GRID) -> tuple[DetectorOutput, DetectorOutput, Targets]:
    student, teacher = (some_output(dim=width, grids=grids, images=len(counts), seed=seed) for width, seed in ((dim, 0), (DIM, 5)))
    return student, teacher, some_targets(*counts)


def literal_masks(targets: Targets, padding: Tensor) -> tuple[Tensor, Tensor]:
    foreground, background = torch.zeros(padding.shape).double(), torch.zeros(padding.shape).double()
    for image, mask in enumerate(padding):
        cells = (~mask).nonzero().tolist()
        rows, columns = max(y for y, _ in cells) + 1, max(x for _, x in cells) + 1
        for cx, cy, w, h in targets.boxes[image, : targets.counts[image]].tolist():
            left, right = math.floor((cx - w / 2) * columns), math.ceil((cx + w / 2) * columns)
            top, bottom = math.floor((cy - h / 2) * rows), math.ceil((cy + h / 2) * rows)
            for y, x in cells:
                if top <= y <= bottom and left <= x <= right:
                    share = 1 / ((bottom + 1 - top) * (right + 1 - left))
                    foreground[image, y, x] = max(foreground[image, y, x].item(), share)
        free = [(y, x) for y, x in cells if foreground[image, y, x] == 0]
        for y, x in free:
            background[image, y, x] = 1 / len(free)
    return foreground, background


def softmax(values: list[float]) -> list[float]:
    """Times the number of values."""
    powers = [math.exp(value / TEMPERATURE) for value in values]
    return [len(powers) * power / sum(powers) for power in powers]


def literal_relation(own: nn.Module, level: Tensor, cells: list) -> dict[tuple, Tensor]:
    """F + W2 ReLU(LN(W1 sum_j softmax(w F_j) F_j))."""
    powers = {(y, x): math.exp((own.score.weight[0, :, 0, 0] @ level[:, y, x] + own.score.bias[0]).item()) for y, x in cells}
    context = sum(power / sum(powers.values()) * level[:, y, x] for (y, x), power in powers.items())
    first, norm, _, last = own.transform
    hidden = first.weight @ context + first.bias
    hidden = (hidden - hidden.mean()) / (hidden.var(correction=0) + norm.eps).sqrt() * norm.weight + norm.bias
    added = last.weight @ hidden.clamp(min=0) + last.bias
    return {(y, x): level[:, y, x] + added for y, x in cells}


@torch.no_grad()
def literal(losses: LevelByLevel, student: DetectorOutput, teacher: DetectorOutput, targets: Targets) -> dict[str, float]:
    found = dict.fromkeys(PARTS, 0.0)
    (own,), (f_t,), (padding,) = losses.losses, teacher.features, teacher.padding
    f_s = own.align(student.features[0])
    images, dim = f_t.shape[:2]
    masks = dict(zip(PARTS, literal_masks(targets, padding), strict=False))
    for image in range(images):
        cells = [(y, x) for y, x in (~padding[image]).nonzero().tolist()]
        spatial, channel = {}, {}
        for name, maps in (("s", f_s), ("t", f_t)):
            spatial[name] = softmax([maps[image, :, y, x].abs().mean().item() for y, x in cells])
            channel[name] = softmax([sum(abs(maps[image, c, y, x].item()) for y, x in cells) / len(cells) for c in range(dim)])
        for name, mask in masks.items():
            for i, (y, x) in enumerate(cells):
                for c in range(dim):
                    square = (f_t[image, c, y, x] - f_s[image, c, y, x]).item() ** 2
                    found[name] += mask[image, y, x].item() * spatial["t"][i] * channel["t"][c] * square / images
        for attention in (spatial, channel):
            found["attention"] += sum(abs(a - b) for a, b in zip(attention["s"], attention["t"], strict=True)) / images
        related = literal_relation(own.student_context, f_s[image], cells), literal_relation(own.teacher_context, f_t[image], cells)
        found["relation"] += sum((related[0][cell] - related[1][cell]).square().sum().item() for cell in cells) / images
    return {name: weight * found[name] for name, weight in zip(PARTS, (ALPHA, BETA, GAMMA, LAMBDA), strict=True)}


@pytest.mark.parametrize("dim", [DIM, 6])
@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (0, 0)])
def test_equals_the_formula(counts, dim):
    (student, teacher, targets), losses = example(*counts, dim=dim), some_fgd(dim)
    found = {name: value.item() for name, value in losses(student, teacher, targets, {}).items()}
    assert found == pytest.approx(literal(losses, student, teacher, targets), rel=1e-9)


def test_masks_of_objects_that_overlap_touch_borders_and_fill_the_image():
    boxes = [[[0.5, 0.5, 1.0, 1.0]], [[0.9, 0.9, 0.2, 0.2], [0.1, 0.2, 0.2, 0.4], [0.15, 0.3, 0.3, 0.6]], []]
    boxes = [torch.tensor(found, dtype=torch.float64).view(-1, 4) for found in boxes]
    targets = Targets.pack([torch.zeros(len(found), dtype=torch.long) for found in boxes], boxes)
    padding = torch.zeros(3, 6, 12, dtype=torch.bool)
    padding[1, 5:], padding[1, :, 10:] = True, True
    foreground, background = object_masks(targets, padding)
    wanted = literal_masks(targets, padding)
    torch.testing.assert_close(foreground, wanted[0])
    torch.testing.assert_close(background, wanted[1])
    # The whole image: cells beyond the map count, and no background is left.
    assert (foreground[0] == 1 / (7 * 13)).all() and (background[0] == 0).all()
    # Rows 4 to 5 and columns 8 to 10 of a valid 5 x 10, that is 2 x 3 cells of which 1 x 2 are on the image.
    assert (foreground[1, 4, 8:10] == 1 / 6).all() and foreground[1, 5].max() == 0 and foreground[1, :, 10:].max() == 0
    assert (foreground[2] == 0).all() and (background[2] == 1 / 72).all()


def test_an_edge_on_the_border_does_not_depend_on_rounding():
    box = torch.tensor([[1 - 0.225 + 1e-7, 0.5, 0.45, 1 + 1e-7]])  # float32: ends just beyond the image
    foreground, _ = object_masks(Targets.pack([torch.zeros(1, dtype=torch.long)], [box]), torch.zeros(1, 4, 9, dtype=torch.bool))
    assert (foreground[0, :, 4:] == foreground.max()).all() and foreground.max().item() == pytest.approx(1 / (5 * 6))


def test_zero_when_a_new_loss_compares_equals():
    losses = LevelByLevel([FGDLoss(DIM, DIM, ALPHA, BETA, GAMMA, LAMBDA, TEMPERATURE)], "features").double()
    _, teacher, targets = example(3, 2)
    student = with_gradient(teacher)
    total = sum(losses(student, teacher, targets, {}).values())
    total.backward()
    assert total == 0 and (student.features[0].grad == 0).all()


def test_gradient_reaches_student_and_this_losses_parameters_alone():
    (student, teacher, targets), losses = example(3, 2, dim=6), some_fgd(6)
    student = with_gradient(student)
    sum(losses(student, teacher, targets, {}).values()).backward()
    assert student.features[0].grad.abs().sum() > 0 and student.neck[0].grad is None and student.boxes.grad is None
    assert (student.features[0].grad[-1, :, :, -1] == 0).all()  # padding
    for name, parameter in losses.named_parameters():
        # Softmax does not see a constant.
        assert name.endswith("score.bias") or parameter.grad.abs().sum() > 1e-9, name
    assert not any(leaf.requires_grad for leaf in leaves(teacher))


@pytest.mark.parametrize("counts", [(3, 2), (0, 0)])
def test_padding_takes_no_part(counts):
    grids = ((4, 6), (2, 3))
    (student, teacher, targets), losses = example(*counts, dim=6, grids=grids), some_fgd(6, grids)
    found, padded = losses(student, teacher, targets, {}), losses(more_padding(student), more_padding(teacher), targets, {})
    for name, value in found.items():
        torch.testing.assert_close(padded[name], value)


def test_images_of_a_step_can_come_one_by_one():
    (student, teacher, targets), losses = example(2, 0, 3, dim=6), some_fgd(6)
    parts = [losses(*(one_image(x, i) for x in (student, teacher, targets)), {}) for i in range(3)]
    for name, value in losses(student, teacher, targets, {}).items():
        torch.testing.assert_close(sum(part[name] for part in parts), value)


def test_gradients():
    (student, teacher, targets), losses = example(2, 0, grids=((2, 3),)), some_fgd()
    maps = with_gradient(student).features
    assert gradcheck(lambda *maps: tuple(losses(replace(student, features=maps), teacher, targets, {}).values()), tuple(maps))
