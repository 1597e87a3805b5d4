"""What the set criterion must not depend on. Its numbers are compared with the official code's in tests/parity."""

from dataclasses import replace

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.autograd import gradcheck
from torchvision.ops import box_convert, generalized_box_iou

from detrdistill.criterion import SetCriterion, set_losses, target_cost
from detrdistill.data.coco import Batch
from detrdistill.data.digits import MOST_OBJECTS
from detrdistill.matching import match
from detrdistill.models.outputs import DetectorOutput, Queries, Targets
from detrdistill.recipes.parts import Schedule
from detrdistill.recipes.presets import get_presets
from detrdistill.training.fabric import make_fabric
from detrdistill.training.trainer import accumulate_gradients
from tests.examples import leaves, one_image, permuted, some_boxes, some_output, some_targets, with_gradient
from tests.models.small import small_detector

criterion = SetCriterion()


def losses(output: DetectorOutput, targets: Targets) -> dict[str, torch.Tensor]:
    return criterion(output, targets, match(criterion.problems(output, targets)))


def total(output: DetectorOutput, targets: Targets) -> torch.Tensor:
    return torch.stack([value.sum() for value in losses(output, targets).values()]).sum()


def literal(output: DetectorOutput, targets: Targets, stage: int) -> dict[str, float]:
    """Costs and losses written out, pair by pair."""
    found = {"class": 0.0, "l1": 0.0, "giou": 0.0}
    for image, count in enumerate(targets.counts):
        p, boxes = output.logits[stage, image].sigmoid(), output.boxes[stage, image]
        truth, labels = targets.boxes[image, :count], targets.labels[image, :count]
        l1 = torch.cdist(boxes, truth, p=1)
        giou = generalized_box_iou(box_convert(boxes, "cxcywh", "xyxy"), box_convert(truth, "cxcywh", "xyxy"))
        present, absent = 0.25 * (1 - p) ** 2 * -p.log(), 0.75 * p**2 * -(1 - p).log()
        pairs = list(zip(*linear_sum_assignment(2 * (present - absent)[:, labels] + 5 * l1 - 2 * giou), strict=True))
        classes = {(query, labels[n].item()) for query, n in pairs}
        for query, label in torch.cartesian_prod(torch.arange(p.shape[0]), torch.arange(p.shape[1])).tolist():
            found["class"] += 2 * (present if (query, label) in classes else absent)[query, label].item()
        found["l1"] += sum(5 * l1[query, n].item() for query, n in pairs)
        found["giou"] += sum(2 * (1 - giou[query, n].item()) for query, n in pairs)
    return {name: value / max(sum(targets.counts), 1) for name, value in found.items()}


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (0, 0), (8, 1)])
def test_equals_a_loop_over_pairs(counts):
    output, targets = some_output(queries=6), some_targets(*counts)
    found = losses(output, targets)
    for stage in range(2):
        assert {name: value[stage].item() for name, value in found.items()} == pytest.approx(literal(output, targets, stage), rel=1e-9)


def test_cost_of_classes_decides_between_equal_boxes():
    """Focal cost as in the official code: what the loss would change if the class were present."""
    output, targets = some_output(stages=1, images=1, queries=2, classes=2), Targets.pack([torch.tensor([0])], [some_boxes(1)])
    output = replace(output, boxes=targets.boxes[None].expand(1, 1, 2, 4), logits=torch.tensor([[[[1.0, 0.0], [-1.0, 0.0]]]]).double())
    p = torch.tensor([1.0, -1.0]).sigmoid()
    cost = 2 * (0.25 * (1 - p) ** 2 * -p.log() - 0.75 * p**2 * -(1 - p).log()) - 2
    torch.testing.assert_close(target_cost(output, targets).flatten(), cost, atol=1e-5, rtol=1e-5)


def test_order_of_queries_does_not_matter():
    output, targets = some_output(queries=7), some_targets(3, 2)
    torch.testing.assert_close(total(output, targets), total(permuted(output, torch.randperm(7)), targets))


def test_order_of_targets_does_not_matter():
    output, targets = some_output(), some_targets(3, 0)
    turned = Targets.pack([targets.labels[0].flip(0), targets.labels[1, :0]], [targets.boxes[0].flip(0), targets.boxes[1, :0]])
    torch.testing.assert_close(total(output, targets), total(output, turned))


def test_images_of_a_step_can_come_one_by_one():
    """The normalisers count the optimizer step, so losses and gradients of micro-batches sum up to the batch's."""
    targets = some_targets(3, 0, 1)
    whole, parts = (with_gradient(some_output(images=3)) for _ in range(2))
    total(whole, targets).backward()
    some = sum(total(one_image(parts, image), one_image(targets, image)) for image in range(3))
    some.backward()
    torch.testing.assert_close(some, total(whole, targets))
    torch.testing.assert_close(parts.logits.grad, whole.logits.grad)
    torch.testing.assert_close(parts.boxes.grad, whole.boxes.grad)


def test_padded_targets_take_no_part():
    output, targets = some_output(), some_targets(3, 1)
    other = replace(targets, labels=targets.labels.clone(), boxes=targets.boxes.clone())
    other.labels[1, 1:], other.boxes[1, 1:] = 2, 0.3
    torch.testing.assert_close(total(output, targets), total(output, other))


def test_without_objects_only_the_class_loss_is_left():
    output, targets = with_gradient(some_output()), some_targets(0, 0)
    found = losses(output, targets)
    assert (found["class"] > 0).all() and (found["l1"] == 0).all() and (found["giou"] == 0).all()
    total(output, targets).backward()
    assert output.logits.grad.abs().sum() > 0 and output.boxes.grad.abs().sum() == 0


def test_more_objects_than_queries():
    output, targets = some_output(queries=2), some_targets(5, 4)
    pairs = match(criterion.problems(output, targets))["student"]
    assert len(pairs) == 2 * 2 * 2
    assert total(output, targets).isfinite()


def test_perfect_boxes_cost_nothing_in_any_order():
    targets = some_targets(3, 3)
    output = replace(some_output(queries=3), boxes=targets.boxes[:, [2, 0, 1]].expand(2, -1, -1, -1))
    found = losses(output, targets)
    torch.testing.assert_close(found["l1"] + found["giou"], torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)


def test_gradients():
    targets = some_targets(2, 1)
    output = with_gradient(some_output(queries=3))
    pairs = match(criterion.problems(output, targets))["student"]

    def value(logits, boxes):
        found = set_losses(replace(output, logits=logits, boxes=boxes), targets, pairs)
        return tuple(found.values())

    assert gradcheck(value, (output.logits, output.boxes))


def test_cost_of_a_pair_has_no_gradient():
    output = with_gradient(some_output())
    assert not target_cost(output, some_targets(2, 1)).requires_grad
    assert all(leaf.grad is None for leaf in leaves(output))


def test_proposals_of_two_stages_are_matched_as_objects_of_any_class():
    output, targets = some_output(), some_targets(2, 1)
    proposals = replace(some_output(stages=1, queries=9, seed=3), initial=None)
    nothing = output.queries[0]
    two_stage = replace(output, initial=Queries(nothing, nothing, output.boxes[0], proposals))
    found = losses(two_stage, targets)
    assert found["proposals/class"].shape == (1,) and found["class"].shape == (2,)
    same = replace(targets, labels=torch.zeros_like(targets.labels))
    for name, value in losses(proposals_alone(proposals), same).items():
        torch.testing.assert_close(found[f"proposals/{name}"], value)
    for name, value in losses(output, targets).items():
        torch.testing.assert_close(found[name], value)


def proposals_alone(proposals: DetectorOutput) -> DetectorOutput:
    nothing = proposals.queries[0]
    return replace(proposals, initial=Queries(nothing, nothing, proposals.boxes[0]))


def test_out_of_range_boxes_stay_finite():
    """Empty, huge and inverted boxes come out of untrained detectors."""
    output, targets = with_gradient(some_output()), some_targets(2, 2)
    wild = some_boxes(2, 2, 5)
    wild[..., 0, 2:], wild[..., 1, 2:], wild[..., 2, :] = 0, 1e-30, 1e4
    output = replace(output, boxes=wild.requires_grad_())
    value = total(output, targets)
    value.backward()
    assert value.isfinite() and wild.grad.isfinite().all()


@pytest.mark.parametrize("count", [0, 3])
def test_normaliser_is_at_least_one(count):
    assert some_targets(count, 0).step_boxes == max(count, 1)


@pytest.mark.parametrize(("kind", "divisor"), [("adamixer", 5 + 2), ("conditional", 9 + 2), ("deformable", 9 + 2)])
def test_an_image_of_more_objects_than_queries_counts_as_the_official_codes_count(kind, divisor):
    """mmdetection's codes divide by matched queries, the DETRs' by objects; nine objects meet five queries here."""
    seen = []

    class Distiller(torch.nn.Module):
        student = small_detector(kind, queries=5)

        def forward(self, pixels, padding, targets, _):
            seen.append(targets.step_boxes)
            return {"loss": torch.zeros(1, requires_grad=True)}

    batch = Batch(torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.bool), some_targets(9, 2), [1, 2], [(8, 8)] * 2)
    schedule = Schedule(steps=1, batch=4, accumulate=2)
    fabric = make_fabric("cpu", "fp32")
    accumulate_gradients(fabric, fabric.setup_module(Distiller()), None, [batch, batch], schedule)
    assert seen == [2 * divisor] * 2


def test_no_preset_s_data_has_more_objects_than_queries():
    """So the two ways to count give the same numbers in all that is stored."""
    presets = [preset for name in ("smoke", "quick", "mini") for preset in get_presets(name)]
    assert min(recipe.queries for preset in presets for recipe in (preset.student, preset.teacher)) >= MOST_OBJECTS
