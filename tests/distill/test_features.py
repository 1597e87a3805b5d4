"""Eq. 7 to 9 against loops over stages, levels, images, queries and cells."""

from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck
from torchvision.ops import box_convert, box_iou

from detrdistill.distill.features import FeatureDistillation, box_mask, quality_scores, quality_weights, query_masks, released_weights
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
    for feature, weight in zip(teacher.features, quality_weights(teacher.features, teacher.queries, quality), strict=True):
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


def variant(**changes) -> FeatureDistillation:
    found = FeatureDistillation(4, 4, GAMMA, **{"adapter": False} | changes)
    return found.double()


def masked_error(student: DetectorOutput, teacher: DetectorOutput, masks: list[torch.Tensor]) -> float:
    """Eq. 6 for given masks [S B H W] a level, summed over stages and levels, averaged over images."""
    found = 0.0
    for f_t, f_s, psi, padding in zip(teacher.features, student.features, masks, teacher.padding, strict=True):
        for image in range(len(f_t)):
            cells = (~padding[image]).sum().item()
            for stage in range(len(psi)):
                error = (psi[stage, image] * (f_t[image] - f_s[image]) * ~padding[image]).square().sum()
                found += error.item() / (f_t.shape[1] * cells)
    return found / len(teacher.features[0])


def test_plain_query_mask_is_the_mean_of_the_queries_masks():
    """Eq. 7 in Eq. 6; negative and positive masks may cancel, which Eq. 9 does not let them."""
    student, teacher, targets = some_output(), some_output(seed=5), some_targets(2, 1)
    masks = [torch.stack([query_masks(level, queries).mean(1) for queries in teacher.queries]) for level in teacher.features]
    found = variant(mask="query")(student, teacher, targets, {})["features"]
    assert found.item() == pytest.approx(masked_error(student, teacher, masks), rel=1e-9)


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (0, 0)])
def test_mask_of_the_ground_truth(counts):
    student, teacher, targets = some_output(), some_output(seed=5), some_targets(*counts)
    masks = []
    for level, padding in zip(teacher.features, teacher.padding, strict=True):
        mask = torch.zeros(1, *level[:, 0].shape, dtype=torch.float64)
        for image, count in enumerate(counts):
            height, width = (~padding[image, :, 0]).sum().item(), (~padding[image, 0]).sum().item()
            for x0, y0, x1, y1 in box_convert(targets.boxes[image, :count], "cxcywh", "xyxy").tolist():
                for row in range(height):
                    for column in range(width):
                        if y0 < (row + 0.5) / height < y1 and x0 < (column + 0.5) / width < x1:
                            mask[0, image, row, column] = 1
        masks.append(mask)
        assert torch.equal(box_mask(targets, padding) & ~padding, mask[0].bool())
    found = variant(mask="boxes")(student, teacher, targets, {})["features"]
    assert found.item() == pytest.approx(masked_error(student, teacher, masks), rel=1e-9)
    assert (found > 0) == (sum(counts) > 0)


def test_mask_of_ones_is_the_mean_squared_error():
    student, teacher, targets = some_output(), some_output(seed=5), some_targets(2, 1)
    masks = [torch.ones(1, *level[:, 0].shape) for level in teacher.features]
    found = variant(mask="ones")(student, teacher, targets, {})["features"]
    assert found.item() == pytest.approx(masked_error(student, teacher, masks), rel=1e-9)


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (0, 0)])
def test_released_mask(counts):
    """Against the steps that paper.md lists: best pairs of query and class, cosines, clamp, maximum."""
    teacher, targets = some_output(queries=6), some_targets(*counts)
    found = released_weights(teacher.features, teacher.padding, teacher.queries, teacher.logits, teacher.boxes, targets, top=7)
    for level, padding, weight in zip(teacher.features, teacher.padding, found, strict=True):
        for image, count in enumerate(counts):
            wanted = torch.zeros_like(weight[image])
            for stage in range(2):
                scores = teacher.logits[stage, image].sigmoid()
                best = scores.flatten().topk(7)
                mask = torch.zeros_like(wanted)
                for score, index in zip(best.values, best.indices.tolist(), strict=True):
                    query = index // scores.shape[1]
                    own = box_convert(teacher.boxes[stage, image, query][None], "cxcywh", "xyxy")
                    overlap = box_iou(own, box_convert(targets.boxes[image, :count], "cxcywh", "xyxy")).max() if count else 1.0
                    cosine = torch.cosine_similarity(level[image], teacher.queries[stage, image, query][:, None, None], dim=0)
                    mask += score * overlap * cosine
                mask = mask.clamp(min=0.01) * ~padding[image]
                wanted += (mask / mask.max()).square()
            torch.testing.assert_close(weight[image], wanted)


@pytest.mark.parametrize("mask", ["query", "boxes", "ones", "released"])
def test_padding_takes_no_part_under_any_mask(mask):
    student, teacher, targets = some_output(), some_output(seed=5), some_targets(2, 1)
    own = variant(mask=mask)
    found = own(more_padding(student), more_padding(teacher), targets, {})["features"]
    torch.testing.assert_close(found, own(student, teacher, targets, {})["features"])


def test_maps_before_the_encoder():
    student, teacher, targets = some_output(), some_output(seed=5), some_targets(2, 1)
    moved = [replace(output, neck=output.features, features=[]) for output in (student, teacher)]
    torch.testing.assert_close(variant(maps="neck")(*moved, targets, {})["features"], value(student, teacher, targets))


def test_queries_of_the_last_stage_alone():
    student, teacher, targets = some_output(), some_output(seed=5), some_targets(2, 1)
    found = [variant(queries=queries)(student, teacher, targets, {})["features"] for queries in ("stages", "last")]
    torch.testing.assert_close(found[1], value(student, teacher.at([1]), targets))
    assert found[1] < found[0]


@pytest.mark.parametrize("embedded", [True, False])
def test_queries_that_the_decoder_starts_from(embedded):
    student, teacher, targets = some_output(), some_output(seed=5), some_targets(2, 1)
    first = teacher.initial if embedded else replace(teacher.initial, position=None)
    queries = first.content + first.position if embedded else first.content
    wanted = replace(teacher.at([1]), queries=queries[None].expand(1, 2, -1, -1))
    found = variant(queries="initial")(student, replace(teacher, initial=first), targets, {})["features"]
    torch.testing.assert_close(found, value(student, wanted, targets))


def test_the_identity_takes_the_adapter_s_place_where_it_fits():
    assert not list(variant().parameters()) and len(list(FeatureDistillation(4, 4, GAMMA).parameters())) == 2
    assert len(list(FeatureDistillation(6, 4, GAMMA, adapter=False).parameters())) == 2
