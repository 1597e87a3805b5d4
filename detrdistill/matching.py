"""Hungarian matching of a whole optimizer step at once: every stage, query group and image, in one device-to-host transfer.

Costs are computed where the predictions are, block by block (an image is only compared with its own targets), travel to the host
together, are solved by scipy, and the index lists travel back together.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detrdistill.errors import NonFiniteError
from detrdistill.process import share_of_cores

WORTH_THREADS = 2**20  # pairs of a problem; matching fewer takes no longer than starting threads


@dataclass(frozen=True)
class Problem:
    """One family of assignment problems: rows (student queries) to columns (targets, or teacher queries), per stage and image.

    Attributes:
        cost: price of each pair.
        counts: how many of the N columns are real, an image; None for all.
        matched_in: another problem's name; only columns that it has matched as its *rows* (for instance the teacher's positive queries).
        unmatched_in: another problem's name; only columns that it has left unmatched as its rows.
    """

    cost: Float[Tensor, "S B Q N"]
    counts: Sequence[int] | None = None
    matched_in: str | None = None
    unmatched_in: str | None = None


@dataclass(frozen=True)
class Pairs:
    """Matched pairs as flat index lists, ready for advanced indexing: `boxes[pairs.stage, pairs.image, pairs.query]`."""

    stage: Int[Tensor, " K"]
    image: Int[Tensor, " K"]
    query: Int[Tensor, " K"]
    target: Int[Tensor, " K"]

    def __len__(self) -> int:
        return len(self.stage)


def match(problems: Mapping[str, Problem]) -> dict[str, Pairs]:
    """Solve all `problems` (in order; `matched_in` and `unmatched_in` may name earlier ones) and return the cheapest pairs of each.

    A problem with more columns than rows matches as many as there are rows. Stages of a problem and of the one it names are paired
    one to one.

    Raises:
        NonFiniteError: a cost is NaN or infinite; names problem, stage and image.
    """
    if not problems:
        return {}
    device = next(iter(problems.values())).cost.device
    # A GPU waits for this, and torchrun tells torch to use one thread. On the CPU whoever started the run has said how many.
    threads = share_of_cores() if device.type == "cuda" else torch.get_num_threads()
    costs = _to_host([problem.cost for problem in problems.values()])
    solved: dict[str, np.ndarray] = {}
    for (name, problem), cost in zip(problems.items(), costs, strict=True):
        solved[name] = _solve(name, problem, cost, solved, threads)

    indices = torch.from_numpy(np.concatenate(list(solved.values()), axis=1))
    if device.type == "cuda":
        indices = indices.pin_memory()
    indices = indices.to(device, non_blocking=True)
    parts = indices.split([pairs.shape[1] for pairs in solved.values()], dim=1)
    return {name: Pairs(*part) for name, part in zip(solved, parts, strict=True)}


def _to_host(costs: Sequence[Tensor]) -> list[np.ndarray]:
    packed = torch.cat([cost.detach().flatten() for cost in costs]).cpu().numpy()
    ends = list(accumulate(prod(cost.shape) for cost in costs))
    return [packed[end - prod(cost.shape) : end].reshape(cost.shape) for cost, end in zip(costs, ends, strict=True)]


def _solve(name: str, problem: Problem, cost: np.ndarray, solved: Mapping[str, np.ndarray], threads: int) -> np.ndarray:
    """Pairs as an array [4, K] of stage, image, query, target."""
    stages, images, queries, width = cost.shape
    usable = np.ones((stages, images, width), dtype=bool)
    if problem.counts is not None:
        usable &= np.arange(width) < np.asarray(problem.counts, dtype=np.int64).reshape(images, 1)
    for earlier, state in ((problem.matched_in, True), (problem.unmatched_in, False)):
        if earlier is not None:
            matched = np.zeros_like(usable)
            stage, image, query, _ = solved[earlier]
            matched[stage, image, query] = True
            usable &= matched == state

    def solve_block(place: tuple[int, int]) -> np.ndarray:
        stage, image = place
        columns = np.flatnonzero(usable[stage, image])
        if not len(columns):
            return np.empty((4, 0), dtype=np.int64)
        block = cost[stage, image] if len(columns) == width else cost[stage, image][:, columns]
        if not np.isfinite(block).all():
            where = f"stage (or pair of stages) {stage + 1}, image {image + 1} of the batch"
            raise NonFiniteError(f"matching '{name}': the cost at {where} is NaN or infinite")
        rows, matches = linear_sum_assignment(block)
        return np.stack([np.full_like(rows, stage), np.full_like(rows, image), rows, columns[matches]])

    places = list(np.ndindex(stages, images))
    if threads == 1 or usable.sum() * queries < WORTH_THREADS:
        return np.concatenate([solve_block(place) for place in places], axis=1)
    with ThreadPoolExecutor(threads) as pool:  # scipy lets other threads run meanwhile
        return np.concatenate(list(pool.map(solve_block, places)), axis=1)
