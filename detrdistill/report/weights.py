"""What was tried to tune weights, as a table. No torch here."""

import math
from pathlib import Path

import pandas as pd

from detrdistill.files import write_text
from detrdistill.recipes.rows import Presets
from detrdistill.recipes.tables import WEIGHTS
from detrdistill.recipes.words import NOT_RUN
from detrdistill.report.formats import to_markdown
from detrdistill.runs.store import Store
from detrdistill.runs.tuning import FIRST_SEED, PLAIN, best_trial, rows_to_tune, tried

NOTE = (
    "AP on other digits than the reported ones, by the multiplier of a row's weights; of both seeds their mean, in the table marked (2). "
    "Each row has the same trials: four multipliers with one seed, further ones while the best is at an end, smaller ones while even the "
    "best is below the plain student of the first seed, the best two with a second seed."
)


def tuning_frame(presets: Presets, store: Store) -> pd.DataFrame:
    """A line a trial: detector, row, multiplier, AP with both seeds, whether it was chosen, how many trials the row had, runs, commits.

    `AP_plain` is the plain student's with the first seed, the same in all lines of a detector. Rows that have no trials have one line,
    with the multiplier and all numbers of trials empty.
    """
    lines = []
    for row in rows_to_tune(presets):
        trials, best = tried(row, store), best_trial(row, store)
        plain = store.record(row.trial(PLAIN, FIRST_SEED))
        about = {"detector": row.detector, "row": row.name, "title": row.title, "trials": len(trials)}
        about |= {"AP_plain": plain.metrics["AP"] if plain else math.nan}
        for trial in trials:
            line = about | {"multiplier": trial.factor, "AP_100": trial.first.metrics["AP"]}
            line |= {"AP_101": trial.second.metrics["AP"] if trial.second else math.nan, "chosen": best == trial}
            lines.append(line | {"run": trial.first.id, "commit": trial.first.provenance["commit"]})
        if not trials:
            empty = {"multiplier": math.nan, "AP_100": math.nan, "AP_101": math.nan, "chosen": False}
            lines.append(about | empty | {"run": NOT_RUN, "commit": NOT_RUN})
    return pd.DataFrame(lines)


def tuning_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """A line a row as text: AP by multiplier (of both seeds their mean, marked (2)), how many trials, what was chosen."""
    lines = []
    for (detector, _), trials in frame.groupby(["detector", "row"], sort=False):
        plain = trials["AP_plain"].iloc[0]
        line = {"Detector": detector, "Row": trials["title"].iloc[0], "Plain student": "-" if math.isnan(plain) else f"{plain:.1f}"}
        for factor in sorted(frame["multiplier"].dropna().unique()):
            of_factor = trials[trials["multiplier"] == factor]
            line[f"x {factor:g}"] = "-" if of_factor.empty else _ap(of_factor.iloc[0])
        picked = trials.loc[trials["chosen"], "multiplier"]
        line |= {"Trials": str(trials["trials"].iloc[0])}
        lines.append(line | {"Multiplier": NOT_RUN if picked.empty else f"{picked.iloc[0]:g}"})
    return pd.DataFrame(lines)


def write_tuning(frame: pd.DataFrame, note: str, folder: Path) -> list[Path]:
    """Write `weights.csv` (a line a trial) and `weights.md` (a line a row); the same bytes for the same records."""
    numbers = ["AP_plain", "multiplier", "AP_100", "AP_101"]
    written = frame.drop(columns="title").round(dict.fromkeys(numbers, 6)).astype(object)
    for column in numbers:
        written[column] = written[column].where(frame[column].notna(), NOT_RUN)
    forms = {
        "csv": written.to_csv(index=False, lineterminator="\n"),
        "md": to_markdown(tuning_cells(frame), "Weights that were tried", note),
    }
    for suffix, content in forms.items():
        write_text(folder / f"{WEIGHTS}.{suffix}", content)
    return [folder / f"{WEIGHTS}.{suffix}" for suffix in forms]


def _ap(line: pd.Series) -> str:
    found = [value for value in (line["AP_100"], line["AP_101"]) if not math.isnan(value)]
    return f"{sum(found) / len(found):.1f}" + (" (2)" if len(found) == 2 else "")
