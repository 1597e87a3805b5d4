"""Eq. 3 to 5 against loops over stages, images and pairs."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch.autograd import gradcheck
from torchvision.ops import box_convert, generalized_box_iou

from detrdistill.criterion import target_cost
from detrdistill.distill.logits import LogitsDistillation
from detrdistill.matching import Problem, match
from detrdistill.models.outputs import DetectorOutput, Targets
from tests.examples import leaves, one_image, permuted, some_output, some_targets, with_gradient

loss = LogitsDistillation()


def solve(student: DetectorOutput, teacher: DetectorOutput, targets: Targets):
    return match({"teacher": Problem(target_cost(teacher, targets), targets.counts)} | loss.problems(student, teacher, targets))


def losses(student: DetectorOutput, teacher: DetectorOutput, targets: Targets) -> dict[str, torch.Tensor]:
    return loss(student, teacher, targets, solve(student, teacher, targets))


def total(student: DetectorOutput, teacher: DetectorOutput, targets: Targets) -> torch.Tensor:
    return torch.stack(list(losses(student, teacher, targets).values())).sum()


def giou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return generalized_box_iou(box_convert(a, "cxcywh", "xyxy"), box_convert(b, "cxcywh", "xyxy"))


def bce(z: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return -(p * F.logsigmoid(z) + (1 - p) * F.logsigmoid(-z)).sum()


def literal(student: DetectorOutput, teacher: DetectorOutput, targets: Targets, stage: int, image: int) -> dict[str, float]:
    """L_pos (Eq. 3) and L_neg (Eq. 4) of one stage and image, pair by pair, before they are divided."""
    z, own = student.logits[stage, image], student.boxes[stage, image]
    p, taught = teacher.logits[stage, image].sigmoid(), teacher.boxes[stage, image]
    count = targets.counts[image]
    assigned, _ = linear_sum_assignment(target_cost(teacher, targets)[stage, image, :, :count])
    found = {"class": 0.0, "pos l1": 0.0, "pos giou": 0.0, "neg l1": 0.0, "neg giou": 0.0}
    groups = {"pos": [int(i) for i in assigned], "neg": [i for i in range(len(p)) if i not in assigned]}
    for sign, chosen in groups.items():
        cost = torch.zeros(len(z), len(chosen))
        for j in range(len(z)):
            for n, i in enumerate(chosen):
                cost[j, n] = 5 * (own[j] - taught[i]).abs().sum() - 2 * giou(own[j : j + 1], taught[i : i + 1])
                if sign == "pos":
                    cost[j, n] += bce(z[j], p[i])
        for j, n in zip(*linear_sum_assignment(cost), strict=True):
            i = chosen[n]
            if sign == "pos":
                found["class"] += bce(z[j], p[i]).item()
            found[f"{sign} l1"] += 5 * (own[j] - taught[i]).abs().sum().item()
            found[f"{sign} giou"] += 2 * (1 - giou(own[j : j + 1], taught[i : i + 1])).item()
    return found


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (0, 0)])
@pytest.mark.parametrize("student_queries", [4, 6, 9])
def test_equals_the_printed_equations(counts, student_queries):
    """Also for images without objects, and for fewer and more queries than the teacher's six."""
    student, teacher, targets = some_output(queries=student_queries), some_output(queries=6, seed=5), some_targets(*counts)
    found = losses(student, teacher, targets)
    queries = 2 * 6  # of the teacher, on both images
    for stage in range(2):
        slow = [literal(student, teacher, targets, stage, image) for image in range(2)]
        summed = {name: sum(one[name] for one in slow) for name in slow[0]}
        wanted = {
            "positive/class": summed["class"] / queries,
            "positive/l1": summed["pos l1"] / queries,
            "positive/giou": summed["pos giou"] / queries,
            "negative/l1": summed["neg l1"] / queries,
            "negative/giou": summed["neg giou"] / queries,
        }
        assert wanted == {name: pytest.approx(value[stage].item(), rel=1e-5, abs=1e-9) for name, value in found.items()}


def test_student_equal_to_teacher_leaves_the_teacher_s_entropy():
    teacher, targets = some_output(), some_targets(3, 1)
    found = losses(with_gradient(teacher), teacher, targets)
    pairs = solve(teacher, teacher, targets)["positive"]
    assert torch.equal(pairs.query, pairs.target)
    p = teacher.logits[pairs.stage, pairs.image, pairs.target].sigmoid()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).sum() / teacher.logits[0, ..., 0].numel()
    torch.testing.assert_close(found["positive/class"].sum(), entropy)
    for name, value in found.items():
        if name != "positive/class":
            torch.testing.assert_close(value, torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    student = with_gradient(teacher)
    losses(student, teacher, targets)["positive/class"].sum().backward()
    torch.testing.assert_close(student.logits.grad, torch.zeros_like(teacher.logits), atol=1e-12, rtol=0)


def test_positives_and_negatives_are_all_teacher_queries():
    teacher, targets = some_output(queries=6), some_targets(3, 1)
    pairs = solve(some_output(queries=6, seed=4), teacher, targets)
    for stage in range(2):
        for image in range(2):
            taught = [p.target[(p.stage == stage) & (p.image == image)].tolist() for p in (pairs["positive"], pairs["negative"])]
            assert sorted(taught[0] + taught[1]) == list(range(6)) and len(taught[0]) == targets.counts[image]


def test_negatives_pull_boxes_but_not_classes():
    student, teacher, targets = with_gradient(some_output()), some_output(seed=5), some_targets(0, 0)
    total(student, teacher, targets).backward()
    assert student.logits.grad.abs().sum() == 0 and (student.boxes.grad.abs().sum(-1) > 0).all()


def test_gradient_reaches_the_student_alone():
    student, teacher = with_gradient(some_output()), with_gradient(some_output(seed=5))
    total(student, replace(teacher, logits=teacher.logits.detach(), boxes=teacher.boxes.detach()), some_targets(2, 1)).backward()
    assert student.logits.grad.abs().sum() > 0 and student.boxes.grad.abs().sum() > 0
    assert all(leaf.grad is None for leaf in leaves(teacher)), "queries and features of the teacher are no part of this loss"


def test_order_of_student_queries_does_not_matter():
    student, teacher, targets = some_output(queries=7), some_output(seed=5), some_targets(2, 1)
    torch.testing.assert_close(total(permuted(student, torch.randperm(7)), teacher, targets), total(student, teacher, targets))


def test_images_of_a_step_can_come_one_by_one():
    student, teacher, targets = some_output(images=3), some_output(images=3, seed=5), some_targets(2, 0, 3)
    parts = sum(total(one_image(student, i), one_image(teacher, i), one_image(targets, i)) for i in range(3))
    torch.testing.assert_close(parts, total(student, teacher, targets))


def test_gradients():
    student, teacher, targets = with_gradient(some_output(queries=3)), some_output(queries=3, seed=5), some_targets(1, 2)
    pairs = solve(student, teacher, targets)

    def value(logits, boxes):
        return tuple(loss(replace(student, logits=logits, boxes=boxes), teacher, targets, pairs).values())

    assert gradcheck(value, (student.logits, student.boxes))


def of(matching: str, normaliser: str = "queries") -> LogitsDistillation:
    return LogitsDistillation(matching, normaliser)


def run(chosen: LogitsDistillation, student: DetectorOutput, teacher: DetectorOutput, targets: Targets) -> dict[str, torch.Tensor]:
    return chosen(student, teacher, targets, match(chosen.problems(student, teacher, targets)))


def test_positives_alone_are_the_positive_half():
    student, teacher, targets = some_output(), some_output(seed=5), some_targets(2, 1)
    both, half = run(loss, student, teacher, targets), run(of("positives"), student, teacher, targets)
    assert half.keys() == {"positive/class", "positive/l1", "positive/giou"}
    for name, value in half.items():
        torch.testing.assert_close(value, both[name])


@pytest.mark.parametrize("student_queries", [4, 6, 9])
@pytest.mark.parametrize("normaliser", ["queries", "pairs"])
def test_joint_matching_of_the_released_code(student_queries, normaliser):
    """All queries at once by class and box, the teacher's boxes cut at the border."""
    student, teacher, targets = some_output(queries=student_queries), some_output(queries=6, seed=5), some_targets(2, 0)
    teacher = replace(teacher, boxes=teacher.boxes + torch.tensor([0.3, 0.0, 0.1, 0.0]))
    found = run(of("joint", normaliser), student, teacher, targets)
    divisor = 2 * (6 if normaliser == "queries" else min(6, student_queries))
    for stage in range(2):
        wanted = {"joint/class": 0.0, "joint/l1": 0.0, "joint/giou": 0.0}
        for image in range(2):
            z, own, p = student.logits[stage, image], student.boxes[stage, image], teacher.logits[stage, image].sigmoid()
            cut = box_convert(box_convert(teacher.boxes[stage, image], "cxcywh", "xyxy").clamp(0, 1), "xyxy", "cxcywh")
            terms = torch.zeros(3, len(z), 6)
            for j in range(len(z)):
                for i in range(6):
                    distance, overlap = (own[j] - cut[i]).abs().sum(), giou(own[j : j + 1], cut[i : i + 1])[0, 0]
                    terms[:, j, i] = torch.stack((bce(z[j], p[i]), 5 * distance, 2 * (1 - overlap)))
            for j, i in zip(*linear_sum_assignment(terms.sum(0)), strict=True):
                for name, term in zip(wanted, terms[:, j, i], strict=True):
                    wanted[name] += term.item() / divisor
        assert wanted == {name: pytest.approx(value[stage].item(), rel=1e-5) for name, value in found.items()}


def test_pairs_as_normaliser():
    student, teacher, targets = some_output(), some_output(seed=5), some_targets(3, 1)
    plain, found = run(loss, student, teacher, targets), run(of("split", "pairs"), student, teacher, targets)
    for name, value in found.items():
        pairs = 4 if name.startswith("positive") else 2 * 5 - 4
        torch.testing.assert_close(value, plain[name] * 10 / pairs)
    crowded = some_targets(7, 6)  # more objects than the teacher's ten queries: no negatives, and nothing to divide by
    assert all(value.isfinite().all() for value in run(of("split", "pairs"), student, teacher, crowded).values())
