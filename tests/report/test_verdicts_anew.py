"""Verdicts of the committed page, computed anew from the records' JSON: no code of the package, and other routines of numpy and scipy.

What stands in which row, and which margin, is read from the committed tables. That these are made by the package from the same records
is what `test_reference` compares.
"""

import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy import linalg, optimize, special, stats

REFERENCE = Path(__file__).resolve().parents[2] / "results" / "reference"

PRESET = "mini"


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def runs_of(detector: str) -> tuple[dict[str, set[str]], dict[tuple[str, str], str]]:
    """The detector's runs by row, and the row's key of each (table, setting): rows that share a run are one."""
    members: dict[tuple[str, str], set[str]] = defaultdict(set)
    for path in sorted((REFERENCE / PRESET / "tables").glob("*.csv")):
        for line in read(path):
            if line["detector"] == detector and "setting" in line and line["AP"] != "not run":
                members[path.stem, line["setting"]].add(line["run"])
    key: dict[str, str] = {}
    for runs in members.values():
        names = {key[run] for run in runs if run in key} | {min(runs)}
        for run in [*runs, *(run for run, name in key.items() if name in names)]:
            key[run] = min(names)
    rows: dict[str, set[str]] = defaultdict(set)
    for run, name in key.items():
        rows[name].add(run)
    return rows, {place: key[min(runs)] for place, runs in members.items()}


class BlockFitAnew:
    """value = row + block + noise, and what each row's noise is taken to be."""

    def __init__(self, detector: str) -> None:
        rows, self.row_of = runs_of(detector)
        self.names = sorted(rows)
        lines = [(name, json.loads(record(run))) for name in self.names for run in sorted(rows[name])]
        students = [dict(flat(line["recipe"])) for _, line in lines]
        # Older records do not state what was an option only later.
        stated = sorted(set.intersection(*map(set, students)) - {"methods", "teacher_floor"})
        blocks = [json.dumps([one[name] for name in stated if not name.startswith("teacher.")]) for one in students]
        self.of_row = np.array([[name == one for one in self.names] for name, _ in lines], float)
        of_block = np.array([[block == one for one in sorted(set(blocks))] for block in blocks], float)
        self.design = np.hstack([self.of_row, of_block])
        self.values = np.array([line["metrics"]["AP"] for _, line in lines])
        self.noise()

    def noise(self) -> None:
        fitted = linalg.lstsq(self.design, self.values, cond=1e-9)[0]
        squares = (self.values - self.design @ fitted) ** 2
        leverage = (linalg.orth(self.design, rcond=1e-9) ** 2).sum(1)
        degrees, sums = (1 - leverage) @ self.of_row, squares @ self.of_row
        degrees[degrees < 1e-9] = 0
        self.total, self.pooled = degrees.sum(), sums.sum() / degrees.sum()
        pooled = self.pooled
        own = np.array([s / d if d else 0.0 for s, d in zip(sums, degrees, strict=True)])
        prior, common = smyth(own[degrees > 0], degrees[degrees > 0], pooled)
        self.variance, self.freedom = [], []
        for one, d in zip(own, degrees, strict=True):
            drawn = (prior * common + d * one) / (prior + d)
            known = min(prior + d, self.total)
            others = (self.total * pooled - d * one) / (self.total - d) if self.total > d else 0
            if d and others > 0 and stats.f.sf(one / others, d, self.total - d) < 0.10:
                known = min(known, d)
            self.variance.append(max(one, drawn))
            self.freedom.append(known)

    def difference(self, ahead: str, than: str) -> tuple[float, float, float]:
        """Mean, standard error, degrees of freedom."""
        wanted = np.zeros(self.design.shape[1])
        wanted[self.names.index(ahead)], wanted[self.names.index(than)] = 1, -1
        weights = linalg.lstsq(self.design.T, wanted, cond=1e-9)[0]
        if not np.allclose(weights @ self.design, wanted):
            return self.welch(ahead, than)
        parts = [(weights**2 @ self.of_row[:, i]) * v for i, v in enumerate(self.variance)]
        freedom = sum(parts) ** 2 / sum(part**2 / d for part, d in zip(parts, self.freedom, strict=True) if part)
        return float(weights @ self.values), math.sqrt(sum(parts)), min(freedom, self.total)

    def welch(self, ahead: str, than: str) -> tuple[float, float, float]:
        """The rows share no block. A single run is given the noise of all."""
        samples = [self.values[self.of_row[:, self.names.index(name)] == 1] for name in (ahead, than)]
        known = [(one.var(ddof=1), len(one) - 1) if len(one) > 1 else (self.pooled, self.total) for one in samples]
        parts = [(variance / len(one), d) for one, (variance, d) in zip(samples, known, strict=True)]
        whole = sum(part for part, _ in parts)
        return samples[0].mean() - samples[1].mean(), math.sqrt(whole), whole**2 / sum(part**2 / d for part, d in parts)


def smyth(own: np.ndarray, degrees: np.ndarray, pooled: float) -> tuple[float, float]:
    """The common variance that rows are drawn to, and the degrees of freedom it counts as: four at most."""
    floor = 1e-5 * np.median(own)
    logs = np.log(np.maximum(own, floor)) - special.digamma(degrees / 2) + np.log(degrees / 2)
    excess = logs.var(ddof=1) - special.polygamma(1, degrees / 2).mean()
    if excess <= 0:
        return 4.0, pooled
    half = optimize.brentq(lambda x: special.polygamma(1, x) - excess, 1e-6, 1e6)
    if 2 * half > 4:
        return 4.0, pooled
    return 2 * half, math.exp(logs.mean() + special.digamma(half) - math.log(half))


def record(run: str) -> str:
    """A run of mini may be one of quick."""
    places = [REFERENCE / one / "runs" / run / "record.json" for one in (PRESET, "quick")]
    return next(place for place in places if place.is_file()).read_text(encoding="utf-8")


def flat(recipe: dict, inside: str = "") -> Iterator[tuple[str, object]]:
    """What a recipe states, by names such as "backbone.width"."""
    for name, value in recipe.items():
        if isinstance(value, dict):
            yield from flat(value, f"{inside}{name}.")
        else:
            yield inside + name, value


def verdict(mean: float, adjusted: float, equivalence: float, margin: float) -> str:
    if abs(mean) > adjusted:
        return ("holds" if mean > 0 else "against") + (" (small)" if abs(mean) + adjusted < margin else "")
    if mean + equivalence < margin:
        return "no effect above the margin" if mean - equivalence > -margin else "no gain above the margin"
    return "undecided"


def has_interval(line: dict[str, str]) -> bool:
    return line["half"] not in ("not run", "none")


def claims() -> list[tuple[str, str]]:
    """Detectors and claims about AP that have an interval."""
    lines = read(REFERENCE / PRESET / "tables" / "claims.csv")
    return sorted({(line["detector"], line["claim"]) for line in lines if line["measure"] == "AP" and has_interval(line)})


@pytest.fixture(scope="module")
def fits() -> dict[str, BlockFitAnew]:
    return {detector: BlockFitAnew(detector) for detector in {detector for detector, _ in claims()}}


def test_there_are_claims_to_compute() -> None:
    assert len(claims()) >= 5


@pytest.mark.parametrize(("detector", "claim"), claims())
def test_a_verdict_comes_out_the_same(detector: str, claim: str, fits: dict[str, BlockFitAnew]) -> None:
    columns = ("preset", "detector", "claim", "measure")
    registered, reported = (
        [line for line in read(path) if tuple(line[column] for column in columns) == (PRESET, detector, claim, "AP")]
        for path in (REFERENCE.parent / "claims_register.csv", REFERENCE / PRESET / "tables" / "claims.csv")
    )
    fit = fits[detector]
    parts = [(one, other) for one, other in zip(registered, reported, strict=True) if has_interval(other)]
    found = [fit.difference(*(fit.row_of[one["table"], one[side]] for side in ("ahead", "than"))) for one, _ in parts]
    p = [2 * stats.t.sf(abs(mean) / error, freedom) for mean, error, freedom in found]
    divisors, rejecting = [0] * len(p), True
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):  # Holm (1979)
        if rejecting:
            divisor = len(p) - rank
            rejecting = p[i] <= 0.05 / divisor
        divisors[i] = divisor
    for (_, line), (mean, error, freedom), divisor in zip(parts, found, divisors, strict=True):
        half, adjusted, equivalence = (stats.t.ppf(1 - level / 2, freedom) * error for level in (0.05, 0.05 / divisor, 0.10))
        wanted = [float(line[column]) for column in ("difference", "half", "adjusted_half", "equivalence_half")]
        assert (mean, half, adjusted, equivalence) == pytest.approx(wanted, abs=2e-6)
        assert divisor == int(line["family"])
        assert verdict(mean, adjusted, equivalence, float(line["margin"])) == line["status"].split(" (about")[0].split(" (over")[0]
