"""FGFI against loops over images, objects, levels, cells and anchors."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from detrdistill.distill.baselines import fgfi
from detrdistill.distill.baselines.fgfi import FGFILoss, anchors, near_anchors
from detrdistill.models.outputs import DetectorOutput, Targets
from tests.examples import leaves, more_padding, one_image, some_output, some_targets, with_gradient

GRIDS = ((6, 8), (3, 4))
SCALES, RATIOS, THRESHOLD = (1.0, 2.5), (0.5, 2.0), 0.5


def some_fgfi(student_dim: int = 4) -> FGFILoss:
    torch.manual_seed(0)
    return FGFILoss(student_dim, 4, len(GRIDS), "features", THRESHOLD, SCALES, RATIOS).double()


def example(*counts: int, dim: int = 4) -> tuple[DetectorOutput, DetectorOutput, Targets]:
    return (
        some_output(dim=dim, grids=GRIDS, images=len(counts)),
        some_output(grids=GRIDS, images=len(counts), seed=5),
        some_targets(*counts),
    )


def literal_iou(a: list[float], b: list[float]) -> float:
    """Of boxes xyxy that contain their last pixel."""
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    if width <= 0 or height <= 0:
        return 0.0
    area = lambda box: (box[2] - box[0] + 1) * (box[3] - box[1] + 1)  # noqa: E731
    return width * height / (area(a) + area(b) - width * height)


def literal_counts(targets: Targets, padding: list[Tensor], threshold: float) -> list[Tensor]:
    found = [torch.zeros(mask.shape, dtype=torch.long) for mask in padding]
    for image, count in enumerate(targets.counts):
        for cx, cy, w, h in targets.boxes[image, :count].tolist():
            overlaps = {}
            for level, mask in enumerate(padding):
                cells = (~mask[image]).nonzero().tolist()
                rows, columns = max(y for y, _ in cells) + 1, max(x for _, x in cells) + 1
                box = [(cx - w / 2) * columns * 16, (cy - h / 2) * rows * 16, (cx + w / 2) * columns * 16, (cy + h / 2) * rows * 16]
                for y, x in cells:
                    for i, (left, top, right, bottom) in enumerate(anchors(SCALES, RATIOS)):
                        anchor = [left + 16 * x, top + 16 * y, right + 16 * x, bottom + 16 * y]
                        overlaps[level, y, x, i] = literal_iou(box, anchor)
            best = max(overlaps.values())
            for (level, y, x, _), overlap in overlaps.items():
                found[level][image, y, x] += overlap > threshold * best
    return found


@torch.no_grad()
def literal(loss: FGFILoss, student: DetectorOutput, teacher: DetectorOutput, targets: Targets) -> float:
    total, cells = 0.0, 0
    counts = literal_counts(targets, teacher.padding, loss.threshold)
    for adapt, f_s, f_t, padding, count in zip(loss.adapters, student.features, teacher.features, teacher.padding, counts, strict=True):
        adapted = adapt(f_s.masked_fill(padding[:, None], 0))
        for image, y, x in (count > 0).nonzero().tolist():
            total += (f_t[image, :, y, x] - adapted[image, :, y, x]).square().sum().item()
            cells += 1
    return total / (2 * max(cells, 1))


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (0, 0)])
def test_mask_equals_the_definition(counts, threshold):
    _, teacher, targets = example(*counts)
    found, wanted = (
        near_anchors(targets, teacher.padding, anchors(SCALES, RATIOS), threshold),
        literal_counts(targets, teacher.padding, threshold),
    )
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert sum(count.sum() for count in found) >= sum(counts)  # every object has its best anchor


def test_objects_are_imitated_on_the_level_of_their_size():
    boxes = torch.tensor([[[0.5, 0.5, 0.75, 1.0]], [[1 / 16, 1 / 12, 1 / 8, 1 / 6]]], dtype=torch.float64)
    targets = Targets.pack([torch.zeros(1, dtype=torch.long)] * 2, [*boxes])
    fine, coarse = near_anchors(targets, [torch.zeros(2, *grid, dtype=torch.bool) for grid in GRIDS], anchors((1.0, 3.0), (1.0,)), 0.9)
    assert fine[0].sum() == 0 and coarse[0].sum() > 0  # 3 by 3 cells of the coarse map
    assert fine[1].nonzero().tolist() == [[0, 0]] and coarse[1].sum() == 0  # the first cell of the fine map


def test_objects_in_several_rounds(monkeypatch):
    _, teacher, targets = example(5, 3)
    wanted = near_anchors(targets, teacher.padding, anchors(SCALES, RATIOS), THRESHOLD)
    monkeypatch.setattr(fgfi, "AT_ONCE", 2 * 4 * 2 * sum(height * width for height, width in GRIDS))  # two objects
    found = near_anchors(targets, teacher.padding, anchors(SCALES, RATIOS), THRESHOLD)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_anchors_are_those_of_faster_r_cnn():
    found = anchors((8.0, 16.0, 32.0), (0.5, 1.0, 2.0))
    assert found[0] == (-84.0, -40.0, 99.0, 55.0) and found[-1] == (-168.0, -344.0, 183.0, 359.0) and len(found) == 9


@pytest.mark.parametrize("dim", [4, 6])
@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (0, 0)])
def test_equals_the_formula(counts, dim):
    (student, teacher, targets), loss = example(*counts, dim=dim), some_fgfi(dim)
    assert loss(student, teacher, targets, {})["fgfi"].item() == pytest.approx(literal(loss, student, teacher, targets), rel=1e-9)


@pytest.mark.parametrize("maps", ["neck", "features"])
def test_takes_the_maps_it_is_told_to(maps):
    (student, teacher, targets), loss = example(3, 2), some_fgfi()
    student, loss.maps = with_gradient(student), maps
    loss(student, teacher, targets, {})["fgfi"].backward()
    assert {name for name in ("neck", "features") if getattr(student, name)[0].grad is not None} == {maps}


def test_zero_when_adapted_student_equals_teacher():
    _, teacher, targets = example(3, 2)
    student, loss = with_gradient(teacher), some_fgfi()
    loss.adapters = nn.ModuleList(nn.Identity() for _ in GRIDS)
    visible = [level.masked_fill(mask[:, None], 3.0) for level, mask in zip(teacher.features, teacher.padding, strict=True)]
    found = loss(student, replace(teacher, features=visible), targets, {})["fgfi"]
    found.backward()
    assert found == 0 and all((level.grad == 0).all() for level in student.features)


def test_no_objects_leave_a_graph_with_zero_gradient():
    (student, teacher, targets), loss = example(0, 0), some_fgfi()
    student = with_gradient(student)
    found = loss(student, teacher, targets, {})["fgfi"]
    found.backward()
    assert found == 0 and all((level.grad == 0).all() for level in student.features)


def test_gradient_reaches_student_and_adapters_alone():
    (student, teacher, targets), loss = example(3, 2, dim=6), some_fgfi(6)
    student = with_gradient(student)
    loss(student, teacher, targets, {})["fgfi"].backward()
    assert all(level.grad.abs().sum() > 0 for level in student.features)
    assert all((level.grad[-1, :, :, -1] == 0).all() for level in student.features)  # padding
    assert all(parameter.grad.abs().sum() > 0 for parameter in loss.parameters())
    assert student.boxes.grad is None and not any(leaf.requires_grad for leaf in leaves(teacher))


@pytest.mark.parametrize("counts", [(3, 2), (0, 0)])
def test_padding_takes_no_part(counts):
    (student, teacher, targets), loss = example(*counts, dim=6), some_fgfi(6)
    found, padded = (loss(*outputs, targets, {})["fgfi"] for outputs in ((student, teacher), map(more_padding, (student, teacher))))
    torch.testing.assert_close(padded, found)


def test_batches_count_by_their_part_of_the_step():
    """The number of cells is that of a batch, so a step is the mean of its batches."""
    (student, teacher, targets), loss = example(2, 0, 3), some_fgfi()
    whole = loss(student, teacher, targets, {})["fgfi"]
    torch.testing.assert_close(loss(student, teacher, replace(targets, step_images=12.0), {})["fgfi"], whole / 4)
    first = [one_image(x, 0) for x in (student, teacher, targets)]
    torch.testing.assert_close(3 * loss(*first, {})["fgfi"], loss(*first[:2], replace(first[2], step_images=1.0), {})["fgfi"])


def test_gradients():
    (student, teacher, targets), loss = example(1, 0), some_fgfi()
    maps = tuple(with_gradient(student).features)
    assert gradcheck(lambda *maps: loss(replace(student, features=maps), teacher, targets, {})["fgfi"], maps)
