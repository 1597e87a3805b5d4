"""How certain a difference between two rows is: a randomised block design, its intervals, and the words for what they say.

Rows (settings) are treatments. A block is the students that start from the same weights and see the same images in the same order: one
seed of one architecture. All runs of a detector are fitted together (value ~ row + block), so that each row's noise is known from more
runs than its own. docs/results.md explains it in plain words; benchmarks/coverage.py shows what the intervals cover. No torch here.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
from scipy.special import digamma, fdtrc, polygamma, stdtr, stdtrit

HOLDS, AGAINST, SMALL = "holds", "against", " (small)"
NO_EFFECT, NO_GAIN = "no effect above the margin", "no gain above the margin"
UNDECIDED, ONE_SEED = "undecided", "one seed"
VERDICTS = (HOLDS, HOLDS + SMALL, AGAINST, AGAINST + SMALL, NO_EFFECT, NO_GAIN, UNDECIDED, ONE_SEED)
LEVEL, EQUIVALENCE = 0.05, 0.10  # of the intervals that say "holds" or "against", and of those held against the margin
PRIOR_AT_MOST, STANDS_OUT = 4.0, 0.10  # degrees of freedom, and level of a test: chosen with benchmarks/coverage.py
SEEDS_AT_MOST = 99
EXACT = 1e-9  # what is smaller is rounding


@dataclass(frozen=True)
class Difference:
    """One row minus another.

    Attributes:
        mean: the difference; NaN where nothing was measured.
        error: its standard error; NaN where a row was run once.
        freedom: degrees of freedom of `error`.
        spread: standard deviation of the difference of one run of each.
        seeds: runs of the row that has fewer.
        family: Holm's divisor of the level; 1 for a comparison that stands alone.
        images: how many images it was taken over, one by one; 0 where it is taken over seeds.
        by_run: of what is taken over images, the mean of each run.
    """

    mean: float = math.nan
    error: float = math.nan
    freedom: float = math.nan
    spread: float = math.nan
    seeds: int = 0
    family: int = 1
    images: int = 0
    by_run: tuple[float, ...] = ()

    def half(self, level: float = LEVEL) -> float:
        """Half the width of the interval that misses with probability `level`."""
        return float(stdtrit(self.freedom, 1 - level / 2) * self.error) if self.error > 0 else math.nan

    @property
    def adjusted_half(self) -> float:
        return self.half(LEVEL / self.family)

    @property
    def divided(self) -> bool:
        """Whether runs point opposite ways. An interval over images does not know of it: it is about these runs' mean."""
        return any(one * self.mean < 0 for one in self.by_run)

    @property
    def p(self) -> float:
        """Two-sided, against no difference."""
        return float(2 * stdtr(self.freedom, -abs(self.mean) / self.error)) if self.error > 0 else math.nan


class Design:
    """Which run belongs to which row and block, and what follows from that alone.

    Args:
        rows, blocks: of each run.
    """

    def __init__(self, rows: Sequence[Hashable], blocks: Sequence[Hashable]) -> None:
        of_rows, of_blocks = (pd.get_dummies(pd.Series(list(one), dtype=object)) for one in (rows, blocks))
        self.names = {name: i for i, name in enumerate(of_rows.columns)}
        self.rows = of_rows.to_numpy(float)
        self.matrix = np.hstack([self.rows, of_blocks.to_numpy(float)])
        self.inverse = np.linalg.pinv(self.matrix)
        self.residual = np.eye(len(self.rows)) - self.matrix @ self.inverse
        # What a row's own residuals know of its noise: rows and blocks have taken the rest.
        self.freedom = np.diag(self.residual) @ self.rows
        self.freedom[self.freedom < EXACT] = 0
        self.total = float(self.freedom.sum())

    def contrast(self, first: int, second: int) -> np.ndarray | None:
        """Weights of the runs in the difference of two rows; None where no chain of blocks joins them."""
        wanted = np.zeros(self.matrix.shape[1])
        wanted[first], wanted[second] = 1, -1
        weights = wanted @ self.inverse
        return weights if np.allclose(weights @ self.matrix, wanted, atol=1e-8) else None

    def variances(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Residual variance of each row, 0 where it has no degree of freedom, and that of all together.

        Args:
            values: [runs], or [runs, tables] for many tables at once, as all that follows.
        """
        squares = self.rows.T @ (self.residual @ values) ** 2
        freedom = _column(self.freedom, squares)
        return np.where(freedom > 0, squares / np.maximum(freedom, EXACT), 0.0), squares.sum(0) / max(self.total, EXACT)


def moderated(own: np.ndarray, pooled: np.ndarray, freedom: np.ndarray, at_most: float = math.inf) -> tuple[np.ndarray, np.ndarray]:
    """Variances of rows drawn towards their common one, and their degrees of freedom.

    Smyth (2004), "Linear models and empirical Bayes methods", Section 6.2: the common variance and what it weighs are fitted to the
    moments of the logarithms. Where these show no more than chance, the common variance is the pooled one.

    Args:
        own, freedom: of each row; [rows] or [rows, tables].
        at_most: degrees of freedom that the common variance may count as.
    """
    counts, known = _column(freedom, own), freedom > 0
    weight, common = np.full(pooled.shape, at_most), np.array(pooled, float)
    if known.sum() > 1:
        seen, half = own[known], counts[known] / 2
        logs = np.log(np.maximum(seen, 1e-5 * np.median(seen, axis=0)) + EXACT**2) - digamma(half) + np.log(half)
        excess = logs.var(0, ddof=1) - polygamma(1, half).mean(0)  # beyond what chance alone gives
        fitted = 2 * trigamma_inverse(np.maximum(excess, 1e-6))
        trusted = (excess > 0) & (fitted <= at_most)
        weight = np.where(trusted, fitted, at_most)
        common = np.where(trusted, np.exp(logs.mean(0) + digamma(fitted / 2) - np.log(fitted / 2)), pooled)
    share = counts / (weight + counts)
    return common + share * (own - common), np.minimum(weight + counts, freedom.sum())


def trigamma_inverse(values: np.ndarray) -> np.ndarray:
    """Newton's method on 1 / trigamma, which is convex: Smyth (2004), appendix."""
    found = 0.5 + 1 / np.asarray(values, float)
    for _ in range(50):
        trigamma = polygamma(1, found)
        found = found + trigamma * (1 - trigamma / values) / polygamma(2, found)
    return found


def stand_out(own: np.ndarray, pooled: np.ndarray, freedom: np.ndarray, level: float) -> np.ndarray:
    """Rows whose variance is larger than that of all others by an F-test."""
    total, counts = freedom.sum(), _column(freedom, own)
    rest = total - counts
    others = (total * pooled - counts * own) / np.maximum(rest, EXACT)
    tested = (counts > 0) & (rest > EXACT) & (others > 0)
    ratio = own / np.where(tested, others, 1.0)
    return tested & (fdtrc(np.maximum(counts, EXACT) + 0 * own, np.maximum(rest, EXACT) + 0 * own, ratio) < level)


def row_variances(own: np.ndarray, pooled: np.ndarray, freedom: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The variance each row is given, and its degrees of freedom.

    The moderated one, whose prior counts as four degrees of freedom at most, but never less than the row's own. A row that stands out
    has its own degrees of freedom alone, as in Welch's interval.
    """
    variances, known = moderated(own, pooled, freedom, PRIOR_AT_MOST)
    alone = stand_out(own, pooled, freedom, STANDS_OUT)
    return np.maximum(np.maximum(own, variances), EXACT**2), np.where(alone, np.minimum(_column(freedom, own), known), known)


def satterthwaite(weights: np.ndarray, variances: np.ndarray, freedom: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variance of a weighted sum of independent variances, and its degrees of freedom (Welch, Satterthwaite)."""
    parts = weights @ variances
    return parts, parts**2 / (weights**2 @ (variances**2 / freedom))


class BlockFit:
    """Values of runs, fitted by row and block.

    Args:
        runs: a line a run: treatment, block, value.
    """

    def __init__(self, runs: pd.DataFrame) -> None:
        self.runs = runs.reset_index(drop=True)
        self.design = Design(self.runs["treatment"], self.runs["block"])
        self.values = self.runs["value"].to_numpy(float)

    @cached_property
    def _residual_variances(self) -> tuple[np.ndarray, np.ndarray]:
        return self.design.variances(self.values)

    @cached_property
    def _variances(self) -> tuple[np.ndarray, np.ndarray, float]:
        own, pooled = self._residual_variances
        return *row_variances(own, pooled, self.design.freedom), float(pooled)

    @property
    def residual_sd(self) -> float:
        """Of all rows together; NaN without a degree of freedom."""
        return math.sqrt(self._variances[2]) if self.design.total > EXACT else math.nan

    @property
    def residuals(self) -> pd.DataFrame:
        """The runs with their residuals, and whether their row's spread stands out; rows without a residual are left out."""
        own, pooled = self._residual_variances
        place = self.runs["treatment"].map(self.design.names)
        alone = stand_out(own, pooled, self.design.freedom, STANDS_OUT)[place]
        found = self.runs.assign(residual=self.design.residual @ self.values, stands_out=alone)
        return found[self.design.freedom[place] > 0]

    def difference(self, first: Hashable, second: Hashable) -> Difference:
        """The first row minus the second: within blocks where blocks join them, else Welch's unpaired one.

        A single run that no block joins to the other row (a teacher) has no spread of its own and is given the residual one.
        """
        samples = [self.values[self.runs["treatment"] == name] for name in (first, second)]
        seeds = min(map(len, samples))
        if not seeds:
            return Difference()
        places = [self.design.names[name] for name in (first, second)]
        weights = self.design.contrast(*places)
        if weights is None:
            return self._unpaired(samples)
        variances, freedom, _ = self._variances
        mean = float(weights @ self.values)
        if self.design.total <= EXACT:
            return Difference(mean, seeds=seeds)
        variance, known = satterthwaite(weights**2 @ self.design.rows, variances, np.maximum(freedom, EXACT))
        error, spread = math.sqrt(variance), math.sqrt(variances[places].sum())
        return Difference(mean, error, float(min(known, self.design.total)), spread, seeds)

    def _unpaired(self, samples: Sequence[np.ndarray]) -> Difference:
        pooled = self.residual_sd**2
        variances = np.array([sample.var(ddof=1) if len(sample) > 1 else pooled for sample in samples])
        freedom = np.array([len(sample) - 1 if len(sample) > 1 else self.design.total for sample in samples])
        mean, counts = float(samples[0].mean() - samples[1].mean()), np.array([len(sample) for sample in samples])
        several = max(counts) if min(counts) == 1 else min(counts)  # a single run is a teacher's, which stands beside every seed
        if not np.isfinite(variances).all():
            return Difference(mean, seeds=int(several))
        variances = np.maximum(variances, EXACT**2)
        variance, known = satterthwaite(1 / counts, variances, np.maximum(freedom, EXACT))
        return Difference(mean, math.sqrt(variance), float(known), math.sqrt(variances.sum()), int(several))


def holm(differences: Sequence[Difference]) -> list[Difference]:
    """The comparisons of one family, each with Holm's divisor: its adjusted interval excludes 0 where Holm rejects, and only there.

    Holm (1979) tests in the order of the p-values, at the level divided by how many are left, until one is not rejected. Those after
    it share its divisor. A comparison without an interval takes no part.
    """
    tested = [i for i, one in enumerate(differences) if one.error > 0]
    if not tested:
        return list(differences)
    from statsmodels.stats.multitest import multipletests  # takes longer to import than all else here

    p = np.array([differences[i].p for i in tested])
    rejected = multipletests(p, LEVEL, method="holm")[0] if len(p) > 1 else p <= LEVEL
    ranks = np.argsort(np.argsort(p, kind="stable"), kind="stable")
    left = np.where(rejected, len(p) - ranks, len(p) - rejected.sum())
    found = list(differences)
    for i, family in zip(tested, left, strict=True):
        found[i] = replace(found[i], family=int(family))
    return found


def verdict(difference: Difference, margin: float | None) -> str:
    """What may be said of a difference, in the order in which it is asked; "" where nothing was measured.

    "holds" or "against": the adjusted interval excludes 0, and no run points the other way (`Difference.divided`); "(small)" is added
    where it lies within the margin. "no effect above the margin": the 90 % interval lies within it. "no gain above the margin": its upper
    end lies below it. Else "undecided", or "one seed".

    Args:
        margin: the smallest difference that matters; None where none is stated.
    """
    mean, half = difference.mean, difference.adjusted_half
    if math.isnan(half):  # run once; or, with more seeds, nothing is left that could tell how large the noise is
        return "" if math.isnan(mean) else ONE_SEED if difference.seeds < 2 else UNDECIDED
    if abs(mean) > half and not difference.divided:
        small = margin is not None and abs(mean) + half < margin
        return (HOLDS if mean > 0 else AGAINST) + SMALL * small
    half = difference.half(EQUIVALENCE)
    if margin is not None and mean + half < margin:
        return NO_EFFECT if mean - half > -margin else NO_GAIN
    return UNDECIDED


def seeds_to_decide(difference: Difference, margin: float | None) -> int:
    """With how many seeds of both rows the verdict would no longer be "undecided", if means and spreads stayed as they are.

    Returns:
        0 where it is decided already, has no interval, or none over seeds; `SEEDS_AT_MOST` + 1 where even that many would not do.
    """
    if verdict(difference, margin) != UNDECIDED or math.isnan(difference.half()) or difference.images:
        return 0
    for seeds in range(difference.seeds + 1, SEEDS_AT_MOST + 1):
        # Each further seed of a pair adds at least one degree of freedom.
        freedom = difference.freedom + seeds - difference.seeds
        more = replace(difference, error=difference.spread / math.sqrt(seeds), freedom=freedom)
        if verdict(more, margin) != UNDECIDED:
            return seeds
    return SEEDS_AT_MOST + 1


def verdict_words(word: str, seeds: int) -> str:
    """A verdict with the seeds that would decide it: "undecided (about 9 seeds)"."""
    if not seeds:
        return word
    return f"{word} ({seeds_words(seeds)})"


def seeds_words(seeds: int) -> str:
    return f"over {SEEDS_AT_MOST} seeds" if seeds > SEEDS_AT_MOST else f"about {seeds} seeds"


def _column(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """[rows] as [rows, 1] beside [rows, tables]."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def mean_and_half(values: pd.Series) -> tuple[float, float]:
    """Mean of what is there, and half the width of its 95 % t-interval (NaN for fewer than two values)."""
    values = values.dropna().to_numpy(float)
    if len(values) < 2:
        return (float(values[0]) if len(values) else math.nan), math.nan
    return float(values.mean()), float(stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / math.sqrt(len(values)))
