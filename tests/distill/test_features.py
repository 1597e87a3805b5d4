"""Eq. 7 to 9 against loops over stages, levels, images, queries and cells."""

from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck
from torchvision.ops import box_convert, box_iou

from detrdistill.distill.features import FeatureDistillation, mask_weights, quality_scores, query_masks
from detrdistill.models.outputs import DetectorOutput, Targets
from tests.examples import leaves, more_padding, one_image, permuted, some_output, some_targets, with_gradient

GAMMA = 0.3
loss = FeatureDistillation(4, 4, GAMMA)
loss.adapter = torch.nn.Identity()  # the equations without phi; tests of phi make their own


def value(student: DetectorOutput, teacher: DetectorOutput, targets: Targets) -> torch.Tensor:
    return loss(student, teacher, targets, {})["features"]


def literal_quality(teacher: DetectorOutput, targets: Targets, stage: int, image: int, query: int, gamma: float) -> float:
    """Eq. 8."""
    c = teacher.logits[stage, image, query].sigmoid().max().item()
    count = targets.counts[image]
    if count == 0:
        return c
    own = box_convert(teacher.boxes[stage, image, query][None], "cxcywh", "xyxy")
    overlap = box_iou(own, box_convert(targets.boxes[image, :count], "cxcywh", "xyxy")).max().item()
    return c**gamma * overlap ** (1 - gamma)


def literal(student: DetectorOutput, teacher: DetectorOutput, targets: Targets, gamma: float) -> float:
    """Eq. 9, summed over stages and levels, averaged over images; H W counts the cells that are no padding."""
    found = 0.0
    stages, images, queries, dim = teacher.queries.shape
    for image in range(images):
        for f_t, f_s, padding in zip(teacher.features, student.features, teacher.padding, strict=True):
            cells = [(y, x) for y in range(f_t.shape[2]) for x in range(f_t.shape[3]) if not padding[image, y, x]]
            for stage in range(stages):
                for i in range(queries):
                    q = literal_quality(teacher, targets, stage, image, i, gamma)
                    for y, x in cells:
                        psi = f_t[image, :, y, x] @ teacher.queries[stage, image, i]  # Eq. 7
                        difference = f_t[image, :, y, x] - f_s[image, :, y, x]
                        found += q / (queries * dim * len(cells)) * (psi * difference).square().sum().item()
    return found / images


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (0, 0)])
def test_equals_the_printed_equations(counts):
    student, teacher, targets = some_output(queries=3), some_output(seed=5), some_targets(*counts)
    assert value(student, teacher, targets).item() == pytest.approx(literal(student, teacher, targets, GAMMA), rel=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (0, 0)])
def test_quality_scores(counts, gamma):
    teacher, targets = some_output(), some_targets(*counts)
    found = quality_scores(teacher.logits, teacher.boxes, targets, gamma)
    for stage, image, query in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(5)).tolist():
        assert found[stage, image, query].item() == pytest.approx(literal_quality(teacher, targets, stage, image, query, gamma), rel=1e-9)


def test_quality_of_a_perfect_and_of_a_hopeless_query():
    targets = some_targets(1, 1)
    teacher = some_output(queries=2)
    teacher.boxes[:, :, 0], teacher.logits[:, :, 0] = targets.boxes[:, 0], 40.0
    teacher.boxes[:, :, 1] = torch.tensor([5.0, 5.0, 0.1, 0.1])
    found = quality_scores(teacher.logits, teacher.boxes, targets, 0.5)
    torch.testing.assert_close(found[..., 0], torch.ones(2, 2, dtype=torch.float64))
    assert (found[..., 1] == 0).all()


def test_quadratic_form_is_the_sum_over_queries():
    teacher, targets = some_output(stages=3, queries=7), some_targets(2, 0)
    quality = quality_scores(teacher.logits, teacher.boxes, targets, GAMMA)
    for feature, weight in zip(teacher.features, mask_weights(teacher.features, teacher.queries, quality), strict=True):
        masks = [query_masks(feature, queries) for queries in teacher.queries]
        explicit = sum((q[..., None, None] * mask.square()).sum(1) / 7 for q, mask in zip(quality, masks, strict=True))
        torch.testing.assert_close(weight, explicit)
        assert (weight >= 0).all()


def test_zero_when_student_equals_teacher():
    teacher, targets = some_output(), some_targets(2, 1)
    student = with_gradient(teacher)
    found = value(student, teacher, targets)
    found.backward()
    assert found == 0 and all((level.grad == 0).all() for level in student.features)


def test_padding_takes_no_part():
    student, teacher, targets = some_output(), some_output(seed=5), some_targets(2, 1)
    assert value(more_padding(student), more_padding(teacher), targets).item() == pytest.approx(value(student, teacher, targets).item())


def test_gradient_reaches_student_and_adapter_alone():
    adapted = FeatureDistillation(6, 4, GAMMA).double()
    student, teacher = with_gradient(some_output(dim=6)), some_output(seed=5)
    adapted(student, teacher, some_targets(2, 1), {})["features"].backward()
    assert all(level.grad.abs().sum() > 0 for level in student.features)
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapted.parameters())
    assert student.logits.grad is None and student.boxes.grad is None and student.queries.grad is None
    assert not any(leaf.requires_grad for leaf in leaves(teacher))


def test_adapter_is_applied_before_the_difference():
    adapted = FeatureDistillation(6, 4, GAMMA).double()
    student, teacher, targets = some_output(dim=6), some_output(seed=5), some_targets(2, 1)
    features = [torch.einsum("bdhw,ed->behw", level, adapted.adapter.weight[..., 0, 0]) for level in student.features]
    features = [level + adapted.adapter.bias[:, None, None] for level in features]
    wanted = value(replace(some_output(), features=features), teacher, targets)
    torch.testing.assert_close(adapted(student, teacher, targets, {})["features"], wanted)


def test_order_of_queries_does_not_matter():
    student, teacher, targets = some_output(), some_output(seed=5), some_targets(2, 1)
    same = value(student, teacher, targets)
    torch.testing.assert_close(value(permuted(student, torch.randperm(5)), teacher, targets), same)
    torch.testing.assert_close(value(student, permuted(teacher, torch.randperm(5)), targets), same)


def test_images_of_a_step_can_come_one_by_one():
    student, teacher, targets = some_output(images=3), some_output(images=3, seed=5), some_targets(2, 0, 3)
    parts = sum(value(one_image(student, i), one_image(teacher, i), one_image(targets, i)) for i in range(3))
    torch.testing.assert_close(parts, value(student, teacher, targets))


def test_gradients():
    grids = ((2, 3), (1, 2))
    student, teacher = with_gradient(some_output(grids=grids, dim=3)), some_output(grids=grids, seed=5)
    adapted, targets = FeatureDistillation(3, 4, GAMMA).double(), some_targets(2, 0)
    assert gradcheck(lambda *maps: adapted(replace(student, features=maps), teacher, targets, {})["features"], tuple(student.features))
