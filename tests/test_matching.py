"""The matcher against brute force, and what it promises about transfers, shared columns and faults."""

from dataclasses import astuple
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from detrdistill import matching
from detrdistill.errors import NonFiniteError
from detrdistill.matching import Pairs, Problem, match


def random_cost(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cheapest(cost: np.ndarray) -> float:
    """Price of the best of all assignments of rows to columns."""
    if cost.shape[0] < cost.shape[1]:
        cost = cost.T
    rows, columns = cost.shape
    return min(sum(cost[r, c] for c, r in enumerate(chosen)) for chosen in permutations(range(rows), columns))


def block(pairs: Pairs, stage: int, image: int) -> list[tuple[int, int]]:
    """(query, target) of one stage and image."""
    here = (pairs.stage == stage) & (pairs.image == image)
    return list(zip(pairs.query[here].tolist(), pairs.target[here].tolist(), strict=True))


@given(rows=st.integers(1, 5), columns=st.integers(1, 5), seed=st.integers(0, 2**20), ties=st.booleans())
def test_equals_brute_force(rows, columns, seed, ties):
    cost = random_cost(1, 1, rows, columns, seed=seed)
    cost = cost.round() if ties else cost
    found = block(match({"a": Problem(cost)})["a"], 0, 0)
    assert len(found) == min(rows, columns), "with more columns than rows, as many as there are rows"
    assert len({r for r, _ in found}) == len({c for _, c in found}) == len(found)
    assert sum(cost[0, 0, r, c].item() for r, c in found) == pytest.approx(cheapest(cost[0, 0].numpy()), abs=1e-5)


def test_a_batch_is_its_blocks():
    cost, counts = random_cost(3, 4, 6, 5), [5, 0, 2, 3]
    together = match({"a": Problem(cost, counts)})["a"]
    assert len(together) == 3 * sum(counts)
    for stage, image in np.ndindex(3, 4):
        alone = match({"a": Problem(cost[stage, image, :, : counts[image]][None, None])})["a"]
        assert block(together, stage, image) == block(alone, 0, 0)


def test_threads_find_what_one_finds(monkeypatch):
    problems = {"a": Problem(random_cost(3, 4, 6, 5), [5, 0, 2, 3]), "b": Problem(random_cost(3, 4, 6, 6, seed=1), unmatched_in="a")}
    alone = match(problems)
    used, pool = [], matching.ThreadPoolExecutor
    monkeypatch.setattr(matching, "ThreadPoolExecutor", lambda threads: used.append(threads) or pool(threads))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    match(problems)
    assert not used, "matching so few takes no longer than starting threads"
    monkeypatch.setattr(matching, "WORTH_THREADS", 0)
    for name, pairs in match(problems).items():
        assert torch.equal(torch.stack(astuple(pairs)), torch.stack(astuple(alone[name])))
    assert used == [3, 3]
    problems["b"].cost[2, 1] = torch.nan
    with pytest.raises(NonFiniteError, match=r"'b'.* stage \(or pair of stages\) 3, image 2 of the batch"):
        match(problems)


def test_padded_columns_are_never_chosen_nor_looked_at():
    cost = random_cost(1, 2, 4, 3)
    cost[0, 0, :, 1:] = -1e9
    cost[0, 1, :, 2] = torch.nan
    pairs = match({"a": Problem(cost, [1, 2])})["a"]
    assert pairs.image.tolist() == [0, 1, 1] and sorted(pairs.target.tolist()) == [0, 0, 1]


def test_ties_are_settled_the_same_way_every_time():
    cost = torch.zeros(2, 2, 4, 4)
    first, again = (match({"a": Problem(cost)})["a"] for _ in range(2))
    assert torch.equal(first.query, again.query) and torch.equal(first.target, again.target)


def test_among_and_besides_share_out_the_columns():
    teacher = Problem(random_cost(2, 2, 6, 3, seed=1), [3, 1])
    student = random_cost(2, 2, 5, 6, seed=2)
    positive, negative = Problem(student, matched_in="teacher"), Problem(student, unmatched_in="teacher")
    solved = match({"teacher": teacher, "positive": positive, "negative": negative})
    for stage, image in np.ndindex(2, 2):
        taken = {row for row, _ in block(solved["teacher"], stage, image)}
        assert {column for _, column in block(solved["positive"], stage, image)} == taken
        columns = sorted(set(range(6)) - taken)
        rest = block(solved["negative"], stage, image)
        assert {column for _, column in rest} <= set(columns) and len(rest) == min(5, len(columns))
        price = sum(student[stage, image, r, c].item() for r, c in rest)
        assert price == pytest.approx(cheapest(student[stage, image][:, columns].numpy()), abs=1e-5)


def test_no_targets():
    for cost, counts in ((torch.zeros(2, 3, 4, 0), [0, 0, 0]), (torch.zeros(2, 3, 4, 2), [0, 0, 0]), (torch.zeros(2, 3, 4, 0), None)):
        pairs = match({"a": Problem(cost, counts)})["a"]
        assert len(pairs) == 0 and pairs.query.dtype == torch.long
    assert match({}) == {}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_cost_names_problem_stage_and_image(value):
    cost = random_cost(2, 3, 4, 2)
    cost[1, 2, 3, 0] = value
    with pytest.raises(NonFiniteError, match=r"'positive'.* stage \(or pair of stages\) 2, image 3 of the batch"):
        match({"student": Problem(random_cost(2, 3, 4, 2)), "positive": Problem(cost)})


def test_one_transfer_to_the_host(monkeypatch):
    """Whatever the number of problems, stages and images; and no other way of reading a tensor is used."""
    transfers, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: transfers.append(tensor.shape) or cpu(tensor))
    for reading in ("item", "tolist", "__bool__", "__array__"):
        monkeypatch.setattr(torch.Tensor, reading, lambda *_: pytest.fail("a tensor was read outside the one transfer"))
    solved = match({name: Problem(random_cost(6, 4, 10, 3, seed=seed), [3, 2, 0, 1]) for seed, name in enumerate("abc")})
    assert transfers == [(3 * 6 * 4 * 10 * 3,)]
    assert [len(pairs) for pairs in solved.values()] == [36, 36, 36]


def test_order_of_problems_does_not_mix_their_costs():
    costs = {"a": random_cost(1, 2, 3, 2, seed=1), "b": random_cost(1, 2, 5, 5, seed=2), "c": random_cost(1, 2, 2, 4, seed=3)}
    for names in combinations(costs, 2):
        solved = match({name: Problem(costs[name]) for name in reversed(names)})
        for name in names:
            alone = match({name: Problem(costs[name])})[name]
            assert torch.equal(solved[name].query, alone.query) and torch.equal(solved[name].target, alone.target)


def test_costs_carry_no_gradient_and_may_be_of_any_precision():
    cost = random_cost(1, 1, 4, 2).double().requires_grad_()
    pairs = match({"a": Problem(cost), "b": Problem(cost.float())})
    assert torch.equal(pairs["a"].query, pairs["b"].query) and matching._to_host([cost])[0].dtype == np.float64
