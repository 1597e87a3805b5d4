"""KD-DETR against loops over stages, images and queries, and with detectors that decode the same queries."""

import math
from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck
from torchvision.ops import box_convert, generalized_box_iou

from detrdistill.distill.baselines.kd_detr import GeneralSampling, SpecificSampling
from detrdistill.distill.distiller import Distiller, Term
from detrdistill.distill.loss import DistillationLoss
from detrdistill.models.outputs import DetectorOutput, Queries, Targets
from tests.examples import leaves, more_padding, one_image, permuted, some_boxes, some_output, some_targets, with_gradient
from tests.models.small import KINDS, batch, small_detector

FORMS = pytest.mark.parametrize("form", ["released", "tprd"])
TEMPERATURE = 3.0


def values(student: DetectorOutput, teacher: DetectorOutput, targets: Targets, form: str = "released") -> dict[str, torch.Tensor]:
    return SpecificSampling(4, 4, True, form, TEMPERATURE)(student, teacher, targets, {})


def divergence(own: torch.Tensor, other: torch.Tensor) -> list[float]:
    """T^2 KL(teacher || student), class by class."""
    softmax = lambda z: [math.exp(x / TEMPERATURE) / sum(math.exp(y / TEMPERATURE) for y in z) for x in z]  # noqa: E731
    pairs = zip(softmax(other.tolist()), softmax(own.tolist()), strict=True)
    return [TEMPERATURE**2 * p * math.log(p / q) for p, q in pairs]


def literal(student: DetectorOutput, teacher: DetectorOutput, form: str, l1: str = "cxcywh") -> dict[str, list[float]]:
    stages, images, queries, classes = student.logits.shape
    found = {"class": [], "l1": [], "giou": []}
    for stage in range(stages):
        parts = []  # image, weight, class, L1, 1 - GIoU
        for image in range(images):
            for query in range(queries):
                own, other = (output.boxes[stage, image, query] for output in (student, teacher))
                a, b = (box_convert(box, "cxcywh", "xyxy")[None] for box in (own, other))
                overlap = generalized_box_iou(a, b).item()
                distance = (own - other if l1 == "cxcywh" else a - b).abs().sum().item()
                weight = teacher.logits[stage, image, query].sigmoid().max().item()
                kl = sum(divergence(student.logits[stage, image, query], teacher.logits[stage, image, query]))
                parts.append((image, weight, kl, distance, 1 - overlap))
        if form == "released":
            total = sum(weight for _, weight, *_ in parts)
            found["class"].append(8 * sum(w * kl / classes for _, w, kl, _, _ in parts) / images)
            found["l1"].append(5 * sum(w * distance / 4 for _, w, _, distance, _ in parts) / total)
            found["giou"].append(2 * sum(w * giou for _, w, _, _, giou in parts) / total)
        else:
            totals = [sum(weight for i, weight, *_ in parts if i == image) for image in range(images)]
            shares = [weight / totals[image] / images for image, weight, *_ in parts]
            for name, factor, column in (("class", 2, 2), ("l1", 5, 3), ("giou", 2, 4)):
                found[name].append(factor * sum(share * part[column] for share, part in zip(shares, parts, strict=True)))
    return found


@FORMS
@pytest.mark.parametrize("l1", ["cxcywh", "xyxy"])
@pytest.mark.parametrize("counts", [(3, 2), (0, 0)])
def test_equals_the_formula_whatever_the_objects(form: str, l1: str, counts: tuple[int, int]):
    student, teacher = replace(some_output(), l1=l1), replace(some_output(seed=5), l1=l1)
    found, wanted = values(student, teacher, some_targets(*counts), form), literal(student, teacher, form, l1)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert value.tolist() == pytest.approx(wanted[name], rel=1e-9), name


@FORMS
def test_zero_when_student_equals_teacher(form: str):
    teacher = some_output()
    student = with_gradient(teacher)
    found = values(student, teacher, some_targets(2, 1), form)
    sum(value.sum() for value in found.values()).backward()
    for value in found.values():
        torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-12, rtol=0)
    for leaf in (student.logits, student.boxes):
        torch.testing.assert_close(leaf.grad, torch.zeros_like(leaf), atol=1e-12, rtol=0)


@FORMS
def test_the_teachers_confidence_weighs_queries(form: str):
    """A query that the teacher sees nothing with has no say; the student's own confidence does not matter."""
    student, teacher, targets = some_output(), some_output(seed=5), some_targets(2, 1)
    teacher.logits[:, :, 0] = -50.0
    other = replace(student, boxes=student.boxes.clone())
    other.boxes[:, :, 0] = some_boxes(2, 2, seed=9)
    for name, value in values(other, teacher, targets, form).items():
        torch.testing.assert_close(value, values(student, teacher, targets, form)[name])


@FORMS
def test_order_of_queries_does_not_matter_if_it_is_the_same(form: str):
    student, teacher, targets, order = some_output(), some_output(seed=5), some_targets(2, 1), torch.tensor([3, 0, 4, 1, 2])
    same, both = values(student, teacher, targets, form), values(permuted(student, order), permuted(teacher, order), targets, form)
    one = values(permuted(student, order), teacher, targets, form)
    for name, value in same.items():
        torch.testing.assert_close(both[name], value)
        assert not torch.allclose(one[name], value)


@FORMS
def test_padding_takes_no_part(form: str):
    student, teacher, targets = some_output(), some_output(seed=5), some_targets(2, 1)
    for name, value in values(more_padding(student), more_padding(teacher), targets, form).items():
        torch.testing.assert_close(value, values(student, teacher, targets, form)[name], atol=0, rtol=0)


def one_by_one(form: str, images: int = 3) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A step at once, and as the sum over its images."""
    student, teacher, targets = some_output(images=images), some_output(images=images, seed=5), some_targets(2, 0, 3)
    parts = [values(one_image(student, i), one_image(teacher, i), one_image(targets, i), form) for i in range(images)]
    return values(student, teacher, targets, form), {name: sum(part[name] for part in parts) for name in parts[0]}


@pytest.mark.parametrize("form, names", [("tprd", ("class", "l1", "giou")), ("released", ("class",))])
def test_images_of_a_step_can_come_one_by_one(form: str, names: tuple[str, ...]):
    together, apart = one_by_one(form)
    for name in names:
        torch.testing.assert_close(apart[name], together[name])


def test_released_means_count_by_their_part_of_the_step():
    student, teacher, targets = some_output(), some_output(seed=5), some_targets(2, 1)
    whole, half = (values(student, teacher, replace(targets, step_images=n)) for n in (2.0, 4.0))
    for name in ("l1", "giou"):
        torch.testing.assert_close(half[name], whole[name] / 2)


@FORMS
def test_gradient_reaches_the_student_alone(form: str):
    student, teacher = with_gradient(some_output()), some_output(seed=5)
    sum(value.sum() for value in values(student, teacher, some_targets(2, 1), form).values()).backward()
    assert student.logits.grad.abs().sum() > 0 and student.boxes.grad.abs().sum() > 0
    assert student.queries.grad is None and all(level.grad is None for level in student.features)
    assert all(leaf.grad is None for leaf in leaves(teacher))


@FORMS
def test_gradients(form: str):
    student, teacher, targets = some_output(queries=2), some_output(queries=2, seed=5), some_targets(1, 0)

    def loss(logits: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(values(replace(student, logits=logits, boxes=boxes), teacher, targets, form).values())

    assert gradcheck(loss, (student.logits.requires_grad_(), student.boxes.requires_grad_()))


def test_student_queries_are_the_teachers_in_the_students_width():
    loss, teacher = SpecificSampling(6, 4).double(), some_output()
    queries = loss.student_queries(teacher)
    assert queries.content.shape == queries.position.shape == (1, 5, 6) and queries.reference is teacher.initial.reference
    torch.testing.assert_close(queries.content, loss.adapter.content(teacher.initial.content))
    same = SpecificSampling(4, 4).student_queries(teacher)
    assert same.content is teacher.initial.content and same.position is teacher.initial.position


def test_only_general_sampling_gives_the_teacher_queries():
    assert SpecificSampling(4, 4).teacher_queries is None and GeneralSampling(4, 4).teacher_queries is not None


def test_random_queries_have_the_teachers_mean_and_spread():
    random = torch.Generator().manual_seed(0)
    scale, shift = torch.tensor([0.0, 0.5, 3.0]), torch.tensor([4.0, -2.0, 0.0])
    draw = lambda: scale * torch.randn(2, 2000, 3, generator=random) + shift  # noqa: E731
    own = Queries(draw(), draw(), draw())
    torch.manual_seed(0)
    queries = GeneralSampling(4, 4, queries=3000).teacher_queries(own)
    for drawn, given in ((queries.content, own.content), (queries.position, own.position), (queries.reference, own.reference)):
        assert drawn.shape == (2, 3000, 3)
        torch.testing.assert_close(drawn.mean(1), given.mean(1), atol=0.15, rtol=0)
        torch.testing.assert_close(drawn.std(1), given.std(1), atol=0.15, rtol=0)
    assert not torch.equal(queries.content, queries.position) and not torch.equal(queries.content[0], queries.content[1])


def test_random_queries_are_new_in_every_step_and_functions_of_the_seed():
    own, loss = some_output().initial, GeneralSampling(4, 4)
    torch.manual_seed(0)
    first, second = loss.teacher_queries(own), loss.teacher_queries(own)
    torch.manual_seed(0)
    again = loss.teacher_queries(own)
    assert len(first) == len(own) == 5 and first.content.dtype == torch.float64
    assert torch.equal(first.content, again.content) and torch.equal(first.reference, again.reference)
    assert not torch.equal(first.content, second.content) and not torch.equal(first.reference, second.reference)


def test_random_queries_stay_where_references_are_valid():
    """Sizes, for example, are positive."""
    own = Queries(torch.randn(1, 50, 4), None, torch.rand(1, 50, 4))
    queries = GeneralSampling(4, 4, queries=1000).teacher_queries(own)
    assert queries.position is None
    low, high = own.reference.amin(1, keepdim=True), own.reference.amax(1, keepdim=True)
    assert (queries.reference >= low).all() and (queries.reference <= high).all()


def test_unusable_proposals_do_not_spoil_the_random_ones():
    """A two-stage detector marks them by infinite references; more queries than usable tokens have to take them."""
    student, teacher = (small_detector("deformable-two-stage", seed=seed, queries=150) for seed in (0, 1))
    distiller = Distiller(student, [Term("general", 1.0, GeneralSampling(32, 32), "last_to_all")])
    pixels, padding = batch((64, 96), (96, 50))
    outputs = distiller.teacher_outputs(teacher, pixels, padding)
    assert outputs[0].initial.reference.isinf().any() and outputs[1].initial.reference.isfinite().all()
    targets = some_targets(2, 1)
    parts = distiller(pixels, padding, replace(targets, boxes=targets.boxes.float()), outputs)
    assert all(value.isfinite().all() for name, value in parts.items() if name.startswith("general"))


class Listening(DistillationLoss):
    """A loss that remembers what it was called with."""

    def __init__(self, loss: DistillationLoss) -> None:
        super().__init__()
        self.loss, self.student_queries, self.teacher_queries = loss, loss.student_queries, loss.teacher_queries

    def forward(self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets, pairs: dict) -> dict[str, torch.Tensor]:
        self.student, self.teacher = student, teacher
        return self.loss(student, teacher, targets, pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_both_models_decode_the_same_queries(kind: str):
    student, teacher = small_detector(kind), small_detector(kind, seed=1, dim=64, queries=8, decoder_layers=3)
    position = student.query_position
    specific, general = Listening(SpecificSampling(32, 64, position)), Listening(GeneralSampling(32, 64, position, "tprd", queries=6))
    distiller = Distiller(student, [Term("specific", 1.0, specific, "last_to_all"), Term("general", 0.5, general, "grouped")])
    pixels, padding = batch((64, 96), (96, 50))
    targets = some_targets(2, 1)
    targets = replace(targets, boxes=targets.boxes.float())
    parts = distiller(pixels, padding, targets, distiller.teacher_outputs(teacher, pixels, padding))
    sum(value.sum() for value in parts.values()).backward()
    for loss, queries in ((specific, 8), (general, 6)):
        assert loss.student.logits.shape[:3] == loss.teacher.logits.shape[:3] == (len(loss.student.logits), 2, queries)
        assert torch.equal(loss.student.initial.reference, loss.teacher.initial.reference)
        torch.testing.assert_close(loss.student.initial.content, loss.loss.adapter.content(loss.teacher.initial.content))
        # A content of zeros gives the weights of its adapter no gradient.
        assert loss.loss.adapter.content.bias.grad.any()
        assert not position or loss.loss.adapter.position.weight.grad.any()
    assert len(specific.student.logits) == 2 and torch.equal(specific.teacher.logits[0], specific.teacher.logits[1])
    assert {f"{name}/{part}" for name in ("specific", "general") for part in ("class", "l1", "giou")} < parts.keys()
    assert all(value.isfinite().all() for value in parts.values())
    assert all(parameter.grad is None for parameter in teacher.parameters())
