"""FKD against loops over images, cells, pairs of cells and channels."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck

from detrdistill.distill.baselines.fkd import FKDLoss, MaskedBatchNorm, NonLocal
from detrdistill.distill.levels import LevelByLevel
from detrdistill.models.outputs import DetectorOutput, Targets
from tests.examples import leaves, more_padding, one_image, some_output, some_targets, with_gradient

WEIGHTS = {"feature": 0.3, "channel": 0.7, "spatial": 1.1, "relation": 1.9}
TEMPERATURE = 0.5
GRID = ((4, 5),)


def some_fkd(student_dim: int = 4, grids: tuple = GRID, pool: int | None = None) -> LevelByLevel:
    """Weights that are not 0, so that relations matter."""
    torch.manual_seed(0)
    losses = [FKDLoss(student_dim, 4, **WEIGHTS, temperature=TEMPERATURE, pool=pool) for _ in grids]
    for loss in losses:
        for parameter in loss.parameters():
            nn.init.normal_(parameter)
    return LevelByLevel(losses, "features").double()


def example(*counts: int, dim: int = 4, grids: tuple = GRID) -> tuple[DetectorOutput, DetectorOutput, Targets]:
    return (
        some_output(dim=dim, grids=grids, images=len(counts)),
        some_output(grids=grids, images=len(counts), seed=5),
        some_targets(*counts),
    )


def literal_attention(level: Tensor, cells: list) -> list[float]:
    powers = [math.exp(level[:, y, x].abs().mean().item() / TEMPERATURE) for y, x in cells]
    return [len(cells) * power / sum(powers) for power in powers]


def conv(layer: nn.Conv2d, vector: Tensor) -> Tensor:
    """A 1x1 convolution of one cell."""
    found = layer.weight[..., 0, 0] @ vector
    return found if layer.bias is None else found + layer.bias


def literal_relation(block: NonLocal, maps: Tensor, cells: list[list]) -> list[list[Tensor]]:
    """x_i + BN(out(1/keys sum_j (theta_i . phi_j) g_j)), an image a list, with the statistics of the whole batch."""
    found = []
    for level, own in zip(maps, cells, strict=True):
        found.append([])
        for y, x in own:
            theta = conv(block.theta, level[:, y, x])
            told = sum((theta @ conv(block.phi, level[:, v, u])) * conv(block.g, level[:, v, u]) for v, u in own) / len(own)
            found[-1].append(conv(block.out, told))
    everything = torch.stack([vector for image in found for vector in image])
    mean, variance = everything.mean(0), everything.var(0, correction=0)
    if not block.training:
        mean, variance = block.norm.running_mean, block.norm.running_var
    weight, bias = block.norm.weight, block.norm.bias
    normed = [[(vector - mean) / (variance + block.norm.eps).sqrt() * weight + bias for vector in image] for image in found]
    return [
        [level[:, y, x] + vector for (y, x), vector in zip(own, image, strict=True)]
        for level, own, image in zip(maps, cells, normed, strict=True)
    ]


@torch.no_grad()
def literal(loss: FKDLoss, f_s: Tensor, f_t: Tensor, padding: Tensor) -> dict[str, float]:
    squares = dict.fromkeys(WEIGHTS, 0.0)
    cells = [(~mask).nonzero().tolist() for mask in padding]
    relations = literal_relation(loss.student_relation, f_s, cells), literal_relation(loss.teacher_relation, f_t, cells)
    for image, own in enumerate(cells):
        s, t = f_s[image], f_t[image]
        masks = zip(literal_attention(s, own), literal_attention(t, own), strict=True)
        for (y, x), (a, b) in zip(own, masks, strict=True):
            squares["feature"] += (a + b) / 2 * (t[:, y, x] - conv(loss.adapt, s[:, y, x])).square().sum().item()
        means = [sum(level[:, y, x] for y, x in own) / len(own) for level in (s, t)]
        squares["channel"] += (means[1] - loss.adapt_channels.weight @ means[0] - loss.adapt_channels.bias).square().sum().item()
        for y, x in own:
            around = [(v, u) for v, u in own if abs(v - y) <= 1 and abs(u - x) <= 1]
            mixed = sum(loss.adapt_cells.weight[0, 0, v - y + 1, u - x + 1] * s[:, v, u].mean() for v, u in around)
            squares["spatial"] += (t[:, y, x].mean() - mixed - loss.adapt_cells.bias[0]).item() ** 2
        for a, b in zip(relations[0][image], relations[1][image], strict=True):
            squares["relation"] += (b - conv(loss.adapt_relation, a)).square().sum().item()
    return {name: WEIGHTS[name] * square**0.5 for name, square in squares.items()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dim", [4, 6])
@pytest.mark.parametrize("counts", [(3, 2), (0, 0)])
def test_equals_the_formula_whatever_the_objects(counts, dim, training):
    (student, teacher, targets), losses = example(*counts, dim=dim), some_fkd(dim).train(training)
    found = {name: value.item() for name, value in losses(student, teacher, targets, {}).items()}
    wanted = literal(losses.losses[0], student.features[0], teacher.features[0], teacher.padding[0])
    assert found == pytest.approx(wanted, rel=1e-9)


def test_pooled_relation_has_fewer_keys():
    block = NonLocal(4, 2, pool=3).double().eval()
    nn.init.ones_(block.norm.weight)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 7, 13, generator=random, dtype=torch.float64)
    # 2 x 2, then 3 x 3: one row of two keys, of the cells 0 to 5 each way and 6 to 11 across.
    windows = [(slice(0, 6), slice(0, 6)), (slice(0, 6), slice(6, 12))]
    phi, g = ([layer(x)[0, :, rows, columns].amax((1, 2)) for rows, columns in windows] for layer in (block.phi, block.g))
    theta = block.theta(x)[0]
    told = sum(torch.einsum("ihw,i->hw", theta, a) * b[:, None, None] for a, b in zip(phi, g, strict=True)) / 2
    wanted = x + block.out(told[None]) / math.sqrt(1 + block.norm.eps)
    torch.testing.assert_close(block(x, torch.zeros(1, 7, 13, dtype=torch.bool)), wanted)


def test_pooling_fits_small_maps_and_does_not_see_padding():
    block = NonLocal(4, 2, pool=3).double().train()
    nn.init.normal_(block.norm.weight)
    x = torch.randn(2, 4, 2, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for columns in (5, 6):  # within a window, and between two
        padding = torch.zeros(2, 2, 12, dtype=torch.bool)
        padding[:, :, columns:] = True
        found = block(x, padding)[..., :columns]
        torch.testing.assert_close(block(x.masked_fill(padding[:, None], 1e6), padding)[..., :columns], found)
    torch.testing.assert_close(block(x[..., :6], padding[..., :6]), found)


def test_batch_norm_is_torchs_without_padding_and_ignores_it():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 5, 6, generator=random, dtype=torch.float64) + 2
    padding = torch.zeros(3, 5, 6, dtype=torch.bool)
    ours, official, padded = MaskedBatchNorm(4).double(), nn.BatchNorm2d(4).double(), MaskedBatchNorm(4).double()
    wider, hidden = F.pad(x, (0, 2, 0, 1), value=9.0), F.pad(padding, (0, 2, 0, 1), value=True)
    for _ in range(2):
        wanted = official(x)
        torch.testing.assert_close(ours(x, padding), wanted)
        torch.testing.assert_close(padded(wider, hidden)[:, :, :5, :6], wanted)
    for name, value in official.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
        torch.testing.assert_close(padded.state_dict()[name], value)
    torch.testing.assert_close(ours.eval()(x, padding), official.eval()(x))


def test_a_new_relation_is_the_identity():
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(NonLocal(4, 2)(x, torch.zeros(2, 3, 3, dtype=torch.bool)), x)


def test_zero_and_without_gradient_when_adapted_student_equals_teacher():
    losses = LevelByLevel([FKDLoss(4, 4, **WEIGHTS, temperature=TEMPERATURE)], "features").double()
    loss = losses.losses[0]
    for layer in (loss.adapt, loss.adapt_channels, loss.adapt_cells, loss.adapt_relation):
        nn.init.zeros_(layer.bias)
    with torch.no_grad():
        loss.adapt_channels.weight.copy_(torch.eye(4))
    for layer in (loss.adapt, loss.adapt_cells, loss.adapt_relation):
        nn.init.dirac_(layer.weight)
    _, teacher, targets = example(3, 2)
    student = with_gradient(teacher)
    parts = losses(student, teacher, targets, {})
    sum(parts.values()).backward()
    assert all(value == 0 for value in parts.values())
    assert (student.features[0].grad == 0).all() and all((parameter.grad == 0).all() for parameter in losses.parameters())


def test_gradient_reaches_student_and_this_losses_parameters_alone():
    (student, teacher, targets), losses = example(3, 2, dim=6), some_fkd(6)
    student = with_gradient(student)
    sum(losses(student, teacher, targets, {}).values()).backward()
    assert student.features[0].grad.abs().sum() > 0 and student.neck[0].grad is None and student.boxes.grad is None
    assert (student.features[0].grad[-1, :, :, -1] == 0).all()  # padding
    for name, parameter in losses.named_parameters():  # the teacher's non-local block among them
        assert parameter.grad.abs().sum() > 1e-9, name
    assert not any(leaf.requires_grad for leaf in leaves(teacher))


@pytest.mark.parametrize("counts", [(3, 2), (0, 0)])
def test_padding_takes_no_part(counts):
    grids = ((4, 6), (2, 3))
    (student, teacher, targets), losses = example(*counts, dim=6, grids=grids), some_fkd(6, grids)
    found, padded = losses(student, teacher, targets, {}), losses(more_padding(student), more_padding(teacher), targets, {})
    for name, value in found.items():
        torch.testing.assert_close(padded[name], value)


def test_batches_count_by_their_part_of_the_step():
    """Norms span a batch, so a step is the mean of its batches."""
    (student, teacher, targets), losses = example(2, 0, 3), some_fkd()
    whole = losses(student, teacher, targets, {})
    for name, value in losses(student, teacher, replace(targets, step_images=12.0), {}).items():
        torch.testing.assert_close(value, whole[name] / 4)
    first = [one_image(x, 0) for x in (student, teacher, targets)]
    alone = losses(*first[:2], replace(first[2], step_images=1.0), {})
    for name, value in losses(*first, {}).items():
        torch.testing.assert_close(value, alone[name] / 3)


@pytest.mark.parametrize("pool", [None, 2])
def test_gradients(pool):
    (student, teacher, targets), losses = example(2, 0, grids=((2, 4),)), some_fkd(pool=pool)
    loss, maps = losses.losses[0], with_gradient(student).features[0]
    padding = teacher.padding[0]
    # The mask of the feature part is a constant: that part is checked by the test below.
    checked = ("channel", "spatial", "relation")
    assert gradcheck(lambda x: tuple(loss(x, teacher.features[0], padding, targets)[name] for name in checked), (maps,))


def test_attention_is_a_constant():
    (student, teacher, targets), losses = example(2, 0), some_fkd()
    student, loss = with_gradient(student), losses.losses[0]
    value = losses(student, teacher, targets, {})["feature"]
    value.backward()
    f_s, f_t, padding = student.features[0].detach(), teacher.features[0], teacher.padding[0]
    wanted = torch.zeros_like(f_s)
    for image, mask in enumerate(padding):
        cells = (~mask).nonzero().tolist()
        attentions = zip(literal_attention(f_s[image], cells), literal_attention(f_t[image], cells), strict=True)
        for (y, x), (a, b) in zip(cells, attentions, strict=True):
            difference = conv(loss.adapt, f_s[image, :, y, x]) - f_t[image, :, y, x]
            wanted[image, :, y, x] = (a + b) / 2 * loss.adapt.weight[..., 0, 0].T.detach() @ difference.detach()
    # d ||v|| = v . dv / ||v||, with ||v|| = value / weight
    torch.testing.assert_close(student.features[0].grad, WEIGHTS["feature"] ** 2 * wanted / value.detach())
