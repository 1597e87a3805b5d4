"""The released code's contrastive head against a loop over pairs."""

import pytest
import torch
from torch.nn.functional import normalize

from detrdistill.distill.contrast import ContrastiveHead
from detrdistill.distill.logits import LogitsDistillation
from detrdistill.matching import match
from detrdistill.recipes.methods import DETRDistill
from tests.examples import permuted, some_output, some_targets, with_gradient


@pytest.fixture
def head() -> ContrastiveHead:
    torch.manual_seed(0)
    return ContrastiveHead(6, 4).double()


def test_every_query_must_recognise_its_partner(head):
    student, teacher, targets = some_output(dim=6, queries=4), some_output(seed=5), some_targets(2, 1)
    loss = LogitsDistillation("joint", contrast=head, contrast_weight=0.2)
    pairs = match(loss.problems(student, teacher, targets))
    found = loss(student, teacher, targets, pairs)["contrast"]
    chosen = pairs["joint"]
    for stage in range(2):
        at = chosen.stage == stage
        own = normalize(head.student(student.queries[stage, chosen.image[at], chosen.query[at]]), dim=1)
        other = normalize(head.teacher(teacher.queries[stage, chosen.image[at], chosen.target[at]]), dim=1)
        assert len(own) == 8, "four queries of the student in each of two images"
        wanted = 0.0
        for i in range(8):
            scores = torch.stack([(other[i] @ own[j] / 0.07).exp() for j in range(8)])
            wanted -= (scores[i] / scores.sum()).log().item() / 8
        assert found[stage].item() == pytest.approx(0.2 * wanted, rel=1e-9)


def test_order_of_queries_does_not_matter_and_gradient_reaches_both_sides_of_the_head(head):
    student, teacher, targets = with_gradient(some_output(dim=6)), some_output(seed=5), some_targets(2, 1)
    loss = LogitsDistillation("joint", contrast=head, contrast_weight=1.0)
    run = lambda own: loss(own, teacher, targets, match(loss.problems(own, teacher, targets)))["contrast"].sum()  # noqa: E731
    value = run(student)
    torch.testing.assert_close(run(permuted(student, torch.randperm(5))), value)
    value.backward()
    assert student.queries.grad.abs().sum() > 0 and not teacher.queries.requires_grad
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())
    assert all(layer.weight.grad.abs().sum() > 0 for layer in (head.student[0], head.teacher[0]))


def test_it_needs_pairs():
    with pytest.raises(ValueError, match="compares the pairs of matching='joint'"):
        DETRDistill(contrast=0.2)
    with pytest.raises(ValueError, match="'logits' above 0"):
        DETRDistill(variant="released", logits=0)
