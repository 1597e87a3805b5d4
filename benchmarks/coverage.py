"""What the intervals of `statistics` cover: simulated tables whose true differences are known. `python -m benchmarks.coverage`.

A table is normal noise on the runs of a detector of preset mini: those of coverage_runs.csv (two or three seeds a row), or six seeds of
each row that has three there. These are the runs on which the choice was made; results/ changes with the preset. Means and blocks are 0,
which changes nothing: the fit takes them out. The rows' true spreads are

- equal: the pooled residual SD of these runs;
- measured: each row's own residual SD of these runs, the pooled one where a row has less than one degree of freedom nearly;
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

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from benchmarks.measure import HERE, Table, make_parser, table_path
from detrdistill.runs.provenance import commit
from detrdistill.statistics import Design, moderated, row_variances, satterthwaite, stand_out

RUNS = HERE / "coverage_runs.csv"  # detector, row, block, AP
COLUMNS = ("detector", "seeds", "rows", "freedom", "spreads", "variance", "pairs", "average", "noisiest", "half")
SEED, SEEDS_PLANNED = 0, 6
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


def main(words: Sequence[str] | None = None) -> None:
    arguments = make_parser(__doc__).parse_args(words)
    runs, random = pd.read_csv(RUNS, comment="#"), np.random.default_rng(SEED)
    tables = {"full": 2000, "quick": 200, "small": 50}[arguments.scale]
    if arguments.scale == "small":
        runs = runs[runs["detector"] == runs["detector"].iloc[0]]
    table = Table(table_path(arguments, "coverage.csv"), COLUMNS)
    table.start(f"commit {commit()}; {tables} simulated tables a line, seed {SEED}; nominal 95 %")
    for detector, of in runs.groupby("detector", sort=False):
        stored, counts = Design(of["row"], of["block"]), of["row"].value_counts()
        planned = [row for row in stored.names if counts[row] == 3]
        larger = Design(np.repeat(planned, SEEDS_PLANNED), np.tile(np.arange(SEEDS_PLANNED), len(planned)))
        places = [stored.names[row] for row in larger.names]
        for name, spreads in scenarios(stored, of["AP"].to_numpy(), random, tables).items():
            for seeds, design, of_rows in (("2 to 3", stored, spreads), (SEEDS_PLANNED, larger, spreads[places])):
                about = {"detector": detector, "seeds": seeds, "rows": len(of_rows), "freedom": round(design.total), "spreads": name}
                for line in coverage(design, of_rows, CHOICES, tables, random).round(3).to_dict("records"):
                    table.add(about | line)


if __name__ == "__main__":
    main()
