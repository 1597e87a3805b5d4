"""Verdicts of the committed pages, computed anew from the records' JSON: no code of the package, and other routines of numpy and scipy.

Only which run stands in which row is read from the committed tables. docs/results.md is the specification.
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

# Preset, detector, claim: five that ask different things of the statistics.
FIVE = [
    ("mini", "Deformable DETR", "DETRDistill helps the student"),
    ("mini", "AdaMixer", "DETRDistill is ahead of methods made for convolutional detectors"),
    ("mini", "AdaMixer", "DETRDistill is ahead of methods that its paper does not compare with"),
    ("mini", "Deformable DETR", "The paper's form is ahead of the released code's"),
    ("mini", "D-FINE", "DETRDistill helps the student"),
]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def runs_of(preset: str, detector: str) -> tuple[dict[str, set[str]], dict[tuple[str, str], str]]:
    """The detector's runs by row, and the row's key of each (table, setting): rows that share a run are one."""
    members: dict[tuple[str, str], set[str]] = defaultdict(set)
    for path in sorted((REFERENCE / preset / "tables").glob("*.csv")):
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


class Anew:
    """value = row + block + noise, and what each row's noise is taken to be."""

    def __init__(self, preset: str, detector: str) -> None:
        rows, self.row_of = runs_of(preset, detector)
        self.names = sorted(rows)
        lines = [(name, json.loads(record(preset, run))) for name in self.names for run in sorted(rows[name])]
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
        left = 1 - (linalg.orth(self.design, rcond=1e-9) ** 2).sum(1)  # 1 - leverage
        degrees, sums = left @ self.of_row, squares @ self.of_row
        degrees[degrees < 1e-9] = 0
        self.total, pooled = degrees.sum(), sums.sum() / degrees.sum()
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
        assert np.allclose(weights @ self.design, wanted), "the rows share no block"
        parts = [(weights**2 @ self.of_row[:, i]) * v for i, v in enumerate(self.variance)]
        freedom = sum(parts) ** 2 / sum(part**2 / d for part, d in zip(parts, self.freedom, strict=True) if part)
        return float(weights @ self.values), math.sqrt(sum(parts)), min(freedom, self.total)


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


def record(preset: str, run: str) -> str:
    """A run of mini may be one of quick."""
    places = [REFERENCE / one / "runs" / run / "record.json" for one in (preset, "quick")]
    return next(place for place in places if place.is_file()).read_text(encoding="utf-8")


def flat(recipe: dict, inside: str = "") -> Iterator[tuple[str, object]]:
    """What a recipe states, by names such as "backbone.width"."""
    for name, value in recipe.items():
        if isinstance(value, dict):
            yield from flat(value, f"{inside}{name}.")
        else:
            yield inside + name, value


def word(mean: float, error: float, freedom: float, divisor: int, margin: float) -> str:
    half = stats.t.ppf(1 - 0.05 / divisor / 2, freedom) * error
    if mean - half > 0 or mean + half < 0:
        return ("holds" if mean > 0 else "against") + (" (small)" if abs(mean) + half < margin else "")
    low, high = stats.t.interval(0.90, freedom, mean, error)
    if high < margin:
        return "no effect above the margin" if low > -margin else "no gain above the margin"
    return "undecided"


@pytest.mark.parametrize(("preset", "detector", "claim"), FIVE)
def test_a_verdict_comes_out_the_same(preset: str, detector: str, claim: str) -> None:
    columns = ("preset", "detector", "claim", "measure")
    asked, said = (
        [line for line in read(path) if tuple(line[column] for column in columns) == (preset, detector, claim, "AP")]
        for path in (REFERENCE.parent / "claims_register.csv", REFERENCE / preset / "tables" / "claims.csv")
    )
    anew = Anew(preset, detector)
    pairs = [(one, other) for one, other in zip(asked, said, strict=True) if other["status"] != "not run"]
    assert pairs
    found = [anew.difference(*(anew.row_of[one["table"], one[side]] for side in ("ahead", "than"))) for one, _ in pairs]
    p = [2 * stats.t.sf(abs(mean) / error, freedom) for mean, error, freedom in found]
    divisors, rejecting = [0] * len(p), True
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        if rejecting:
            divisor = len(p) - rank
            rejecting = p[i] <= 0.05 / divisor
        divisors[i] = divisor
    for (_, line), (mean, error, freedom), divisor in zip(pairs, found, divisors, strict=True):
        half = stats.t.ppf(0.975, freedom) * error
        assert (mean, half) == pytest.approx((float(line["difference"]), float(line["half"])), abs=2e-6)
        assert divisor == int(line["family"])
        assert word(mean, error, freedom, divisor, float(line["margin"])) == line["status"].split(" (about")[0].split(" (over")[0]
