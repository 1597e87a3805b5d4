"""Which stage teaches which, for equal and unequal decoders."""

import pytest
import torch

from detrdistill.distill.distiller import Distiller, Term, align
from detrdistill.distill.logits import LogitsDistillation
from detrdistill.distill.stages import pair_stages
from detrdistill.errors import InputError
from tests.examples import some_output, some_targets

STRATEGIES = ("grouped", "first", "last", "uniform", "last_to_all", "last_only")


def pairs(student: int, teacher: int, strategy: str) -> list[tuple[int, int]]:
    """(student, teacher), counted from 1 as in Fig. 5."""
    found = pair_stages(student, teacher, strategy)
    return [(own + 1, other + 1) for own, other in zip(found.student, found.teacher, strict=True)]


@pytest.mark.parametrize(
    ("strategy", "wanted"),
    [
        ("grouped", [(1, 1), (1, 2), (2, 3), (2, 4), (3, 5), (3, 6)]),  # Fig. 5
        ("first", [(1, 1), (2, 2), (3, 3)]),
        ("last", [(1, 4), (2, 5), (3, 6)]),
        ("uniform", [(1, 2), (2, 4), (3, 6)]),
        ("last_to_all", [(1, 6), (2, 6), (3, 6)]),
        ("last_only", [(3, 6)]),
    ],
)
def test_six_stages_teach_three(strategy, wanted):
    assert pairs(3, 6, strategy) == wanted


def test_an_unknown_strategy_is_refused():
    with pytest.raises(InputError, match="stages 'groupd' is unknown; known: grouped, first, last, uniform, last_to_all, last_only"):
        pair_stages(3, 6, "groupd")


@pytest.mark.parametrize("strategy", STRATEGIES[:4])
def test_equal_depths_pair_stage_with_stage(strategy):
    assert pairs(6, 6, strategy) == [(k, k) for k in range(1, 7)]


@pytest.mark.parametrize(
    ("strategy", "wanted"),
    [
        ("grouped", [(1, 1), (2, 1), (3, 2), (4, 2)]),
        ("first", [(1, 1), (2, 2)]),
        ("last", [(3, 1), (4, 2)]),
        ("uniform", [(1, 1), (2, 1), (3, 2), (4, 2)]),
        ("last_to_all", [(1, 2), (2, 2), (3, 2), (4, 2)]),
        ("last_only", [(4, 2)]),
    ],
)
def test_a_shallow_teacher(strategy, wanted):
    assert pairs(4, 2, strategy) == wanted


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("teacher", range(1, 8))
@pytest.mark.parametrize("student", range(1, 8))
def test_any_depths(student, teacher, strategy):
    found = pair_stages(student, teacher, strategy)
    assert all(0 <= own < student for own in found.student) and all(0 <= other < teacher for other in found.teacher)
    assert list(found.student) == sorted(found.student) and list(found.teacher) == sorted(found.teacher), "in order"
    assert found.student[-1] == student - 1 or strategy == "first"
    assert found.teacher[-1] == teacher - 1 or strategy == "first", "the teacher's best stage teaches"
    for stage in set(found.student):
        assert sum(w for w, own in zip(found.weight, found.student, strict=True) if own == stage) == pytest.approx(1)
    if strategy == "grouped":
        assert (set(found.student) == set(range(student)) and set(found.teacher) == set(range(teacher))) or student > teacher


def test_outputs_are_aligned_and_weighted():
    student, teacher = some_output(stages=2), some_output(stages=4, seed=5)
    own, other, weight = align(student, teacher, "grouped")
    assert torch.equal(own.logits, student.logits[[0, 0, 1, 1]]) and torch.equal(other.boxes, teacher.boxes)
    assert weight.tolist() == [0.5] * 4 and other is teacher
    same = align(student, some_output(seed=5), "grouped")
    assert same[0] is student and same[2] is None, "nothing is copied for equal depths"


class Fixed(torch.nn.Module):
    """A detector that always says the same."""

    own_loss = None

    def __init__(self, output):
        super().__init__()
        self.output = output

    def encode(self, pixels, padding):
        return None

    def queries(self, memory):
        return self.output.initial

    def decode(self, memory, *groups, **_):
        return [self.output]


def test_a_group_is_averaged():
    """Two teacher stages that say the same teach what one of them would."""

    student, teacher, targets = Fixed(some_output(stages=2)), some_output(stages=2, seed=5), some_targets(2, 1)
    distiller = Distiller(student, [Term("logits", 3.0, LogitsDistillation(), "grouped")])
    images = torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.bool)
    once = distiller(*images, targets, [teacher])
    twice = distiller(*images, targets, [teacher.at([0, 0, 1, 1])])
    for name, value in once.items():
        torch.testing.assert_close(twice[name].sum(), value.sum())
