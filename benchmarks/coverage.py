"""What the intervals of `experiments.statistics` cover: simulated tables whose true differences are known. `python benchmarks/coverage.py`.

A table is normal noise on the runs of a detector of preset mini: the stored runs (two or three seeds a row), or six seeds of each row
that has three now. Means and blocks are 0, which changes nothing: the fit takes them out. The rows' true spreads are

- equal: the pooled residual SD of the stored runs;
- measured: each row's own residual SD of the stored runs, the pooled one where a row has less than one degree of freedom nearly;
- measured, all: the same for every row. A pair of rows that share no block with others has half a degree of freedom a row;
- drawn: pooled variance times a scaled inverse chi-square of 3 degrees of freedom, drawn anew for each table.

How a row's variance is estimated is the choice to make:

- pooled: one variance for all; own: each row's own (Welch);
- welch: pooled, but own for rows that stand out by an F-test at 5 %, or at 10 %;
- moderated: Smyth (2004), as in limma; moderated + welch: the same with the rows that stand out at 5 % on their own;
- kit: `statistics.row_variances`.

`average` is the mean over rows of how often the 95 % interval of a row against each other row holds the true difference; `noisiest` is
that of the row with the largest true spread. Wanted are 94 to 97 % and at least 85 %. `half` is the median half-width in AP.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from detrdistill.experiments.comparisons import Comparisons
from detrdistill.experiments.paper_tables import TABLES, make_table
from detrdistill.experiments.presets import get_presets
from detrdistill.experiments.statistics import Design, moderated, row_variances, satterthwaite, stand_out
from detrdistill.experiments.store import Store, commit
from detrdistill.files import write_text

ROOT = Path(__file__).resolve().parents[1]
TABLES_SIMULATED, SEED, SEEDS_PLANNED = 2000, 0, 6
KNOWN_FROM = 0.85  # degrees of freedom of a row of two seeds among many rows
Choice = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def pooled(own: np.ndarray, common: np.ndarray, freedom: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.broadcast_to(common, own.shape), np.full(own.shape, freedom.sum())


def alone(of: Choice, level: float) -> Choice:
    """The same, but for rows that stand out: these have their own variance and degrees of freedom."""

    def choice(own: np.ndarray, common: np.ndarray, freedom: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        variances, known = of(own, common, freedom)
        chosen = stand_out(own, common, freedom, level) if level < 1 else np.broadcast_to(freedom[:, None] > 0, own.shape)
        return np.where(chosen, own, variances), np.where(chosen, np.maximum(freedom, 1e-9)[:, None], known)

    return choice


CHOICES: dict[str, Choice] = {
    "pooled": pooled,
    "own": alone(pooled, 1),
    "welch": alone(pooled, 0.05),
    "welch, 10 %": alone(pooled, 0.10),
    "moderated": moderated,
    "moderated + welch": alone(moderated, 0.05),
    "kit": row_variances,
}


def coverage(design: Design, spreads: np.ndarray, choices: dict[str, Choice], tables: int, random: np.random.Generator) -> pd.DataFrame:
    """A line a choice: average, noisiest, half.

    Args:
        spreads: true SD of each row, [rows] or [rows, tables].
    """
    spreads = np.broadcast_to(spreads.reshape(len(spreads), -1), (len(spreads), tables))
    values = (design.rows @ spreads) * random.standard_normal((len(design.rows), tables))
    several = np.flatnonzero(design.rows.sum(0) > 1)
    pairs = [(a, b, weights) for a in several for b in several if a < b and (weights := design.contrast(a, b)) is not None]
    first, second = np.array([pair[:2] for pair in pairs]).T
    weights = np.array([pair[2] for pair in pairs])
    member = np.zeros((len(spreads), len(pairs)))
    member[first, np.arange(len(pairs))] = member[second, np.arange(len(pairs))] = 1
    compared = member.sum(1) > 0
    noisiest = np.where(compared[:, None], spreads, -1).argmax(0)
    own, common = design.variances(values)
    lines = []
    for name, choice in choices.items():
        variances, known = choice(own, common, design.freedom)
        variance, freedom = satterthwaite(weights**2 @ design.rows, variances, known)
        half = stdtrit(np.minimum(freedom, design.total), 0.975) * np.sqrt(variance)
        by_row = member @ (np.abs(weights @ values) <= half) / np.maximum(member.sum(1), 1)[:, None]
        found = {"average": by_row[compared].mean(), "noisiest": by_row[noisiest, np.arange(tables)].mean(), "half": np.median(half)}
        lines.append({"variance": name, "pairs": len(pairs)} | found)
    return pd.DataFrame(lines)


def scenarios(fit_design: Design, values: np.ndarray, random: np.random.Generator, tables: int) -> dict[str, np.ndarray]:
    """True spreads of the rows, as measured."""
    own, common = fit_design.variances(values)
    return {
        "equal": np.full(len(own), np.sqrt(common)),
        "measured": np.sqrt(np.where(fit_design.freedom > KNOWN_FROM, own, common)),
        "measured, all": np.sqrt(np.where(fit_design.freedom > 0, own, common)),
        "drawn": np.sqrt(common * 3 / random.chisquare(3, (len(own), tables))),
    }


def main() -> None:
    presets, random, found = get_presets("mini"), np.random.default_rng(SEED), []
    stored = Comparisons([make_table(name, presets, [0, 1, 2]) for name in TABLES], Store(ROOT / "results" / "mini"))
    for detector in stored.detectors:
        fit = stored.fit(detector)
        runs = fit.runs["treatment"].value_counts()
        planned = [name for name in fit.design.names if runs[name] == 3]
        rows = np.repeat(planned, SEEDS_PLANNED)
        larger = Design(rows, np.tile(np.arange(SEEDS_PLANNED), len(planned)))
        for name, spreads in scenarios(fit.design, fit.values, random, TABLES_SIMULATED).items():
            places = [fit.design.names[row] for row in larger.names]
            for seeds, design, of_rows in (("2 to 3", fit.design, spreads), (str(SEEDS_PLANNED), larger, spreads[places])):
                lines = coverage(design, of_rows, CHOICES, TABLES_SIMULATED, random)
                about = {"detector": detector, "seeds": seeds, "rows": len(of_rows), "freedom": round(design.total), "spreads": name}
                found.append(pd.concat([pd.DataFrame([about] * len(lines)), lines], axis=1))
                print(found[-1].round(3).to_string(index=False, header=len(found) == 1), flush=True)
    head = f"# commit {commit()}; {TABLES_SIMULATED} simulated tables a line, seed {SEED}; nominal 95 %\n"
    write_text(ROOT / "benchmarks" / "coverage.csv", head + pd.concat(found).round(3).to_csv(index=False, lineterminator="\n"))


if __name__ == "__main__":
    main()
