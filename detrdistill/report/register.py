"""The committed list of claims, with margins and planned seeds: `results/claims_register.csv`.

A line says when it was listed: before the runs that it judges; after a part of its planned seeds were stored ("in part"); or after all.

To write it again from the code: `python -m detrdistill.report.register`. No torch here.
"""

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from detrdistill.errors import InputError
from detrdistill.files import write_text
from detrdistill.recipes.claims import CLAIMS, MARGINS, Claim, claims_of
from detrdistill.recipes.family_presets import SMALL
from detrdistill.recipes.presets import PRESETS, detectors_of, get_presets
from detrdistill.recipes.rows import Table
from detrdistill.recipes.tables import BESIDE, TABLES, make_table, usual_tables
from detrdistill.recipes.words import DETECTORS, NAMES

# In the repository and not in the package, as the published values are.
PATH = Path(__file__).resolve().parents[2] / "results" / "claims_register.csv"
REGISTERED = ("mini", "bccd")
COLUMNS = ("preset", "table", "detector", "claim", "source", "ahead", "than", "measure", "margin", "seeds", "listed")
Key = tuple[str, str, str, str, str, str]  # preset, table, detector, ahead, than, measure
# Seeds planned for the next runs; 0 for a table that is not planned for a detector.
SIX = ("main_results", "prior_methods", "components", "logits", "feature_masks", "follow_ups", "discrepancies")
FOUR = ("light_backbones", "self_distillation")
PLANNED = (
    {("mini", table, detector): 6 for table in SIX for detector in ("deformable_detr", "adamixer")}
    | {("mini", table, detector): 4 for table in FOUR for detector in ("deformable_detr", "adamixer")}
    | {("mini", "main_results", "conditional_detr"): 4}
    | {("mini", "main_results", detector): 3 for detector in SMALL}
    | {("mini", table, "conditional_detr"): 3 for table in ("encoder_decoder", "stage_mapping")}
    | {("mini", "full_schedule", "deformable_detr"): 2}
    | {("bccd", "main_results", "deformable_detr"): 5}
    | {("bccd", "main_results", detector): 3 for detector in ("adamixer", "conditional_detr")}
    | {(preset, "where_to_look", detector): count for preset, count in (("mini", 2), ("bccd", 1)) for detector in DETECTORS}  # teachers
)
BEFORE, IN_PART, AFTER = "before", "in part", "after"
# Of history: of preset mini most runs of the first seeds were stored before there was a list, but for Conditional DETR's of one layer.
ALL_STORED = (("mini", "full_schedule", "deformable_detr"), ("mini", "where_to_look", "adamixer"))


def listed(preset: str, table: str, detector: str) -> str:
    """When a line was listed."""
    if (preset, table, detector) in ALL_STORED:
        return AFTER
    return IN_PART if preset == "mini" and detector in ("deformable_detr", "adamixer") else BEFORE


def register() -> pd.DataFrame:
    """A line a comparison of the registered presets, from the code.

    Raises:
        InputError: a claim names a row that no preset has, or a measure that is not known.
    """
    refuse_unknown_rows()
    names = {title: name for name, title in NAMES.items()}
    lines = []
    for preset in REGISTERED:
        presets = get_presets(preset, detectors_of(preset))
        for table in (*usual_tables(presets), *BESIDE):
            made = make_table(table, presets, [0])
            for detector in dict.fromkeys(row.detector for row in made.rows):
                for claim in claims_of(made, detector):
                    place = (preset, table, names[detector])
                    margin, seeds = MARGINS[claim.measure], PLANNED.get(place, 0)
                    about = (claim.text, claim.source, claim.ahead, claim.than, claim.measure)
                    lines.append((preset, table, detector, *about, "none" if margin is None else f"{margin:g}", str(seeds), listed(*place)))
    return pd.DataFrame(lines, columns=COLUMNS)


def refuse_unknown_rows(claims: dict[str, Sequence[Claim]] = CLAIMS) -> None:
    """Raise InputError where a claim could be decided by no preset, or by no measure."""
    for name, of_table in claims.items():
        known = {row.name for preset in PRESETS for row in make_table(name, get_presets(preset), [0]).rows}
        for claim in of_table:
            where = f"claim '{claim.text}' of table {name}"
            for row in (claim.ahead, claim.than):
                if row not in known:
                    raise InputError(f"{where}: no preset has a row '{row}'; known: {', '.join(sorted(known))}")
            if claim.measure not in MARGINS:
                raise InputError(f"{where}: measure '{claim.measure}' is unknown; known: {', '.join(MARGINS)}")


def planned_seeds(tables: Iterable[Table], path: Path = PATH) -> dict[Key, int]:
    """Seeds planned for the comparisons of these tables, of the committed list; empty where there is none for the preset.

    Raises:
        InputError: a line names a row that its table has not, states a margin for a measure that has none (or another than the measure's),
            or a number of seeds that is none.
    """
    if not path.is_file():
        return {}
    made = {(table.preset, table.name): table for table in tables}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise InputError(f"{path}: columns are {', '.join(reader.fieldnames or ())}, not {', '.join(COLUMNS)}; restore it with git")
        lines = list(reader)
    found: dict[Key, int] = {}
    for number, line in enumerate(lines, start=2):
        known = {"preset": REGISTERED, "table": TABLES | BESIDE, "detector": NAMES.values(), "listed": (BEFORE, IN_PART, AFTER)}
        for name in known:
            if line[name] not in known[name]:
                raise InputError(f"{path.name}, line {number}: {name} '{line[name]}' is unknown; known: {', '.join(known[name])}")
        table = made.get((line["preset"], line["table"]))
        rows = {row.name for row in table.rows if row.detector == line["detector"]} if table else set()
        if not rows:
            continue  # another preset's, or of a detector that is not shown
        where = f"{path.name}, line {number}"
        for row in (line["ahead"], line["than"]):
            if row not in rows:
                known = ", ".join(sorted(rows))
                raise InputError(f"{where}: table {line['table']} has no row '{row}' of {line['detector']}; known: {known}")
        _check_margin(line["measure"], line["margin"], where)
        if not line["seeds"].isdecimal():
            raise InputError(f"{where}: seeds '{line['seeds']}' is no number; state how many are planned, such as 6")
        found[tuple(line[name] for name in ("preset", "table", "detector", "ahead", "than", "measure"))] = int(line["seeds"])
    return found


def _check_margin(measure: str, stated: str, where: str) -> None:
    if measure not in MARGINS:
        raise InputError(f"{where}: measure '{measure}' is unknown; known: {', '.join(MARGINS)}")
    margin = MARGINS[measure]
    if margin is None and stated != "none":
        raise InputError(f"{where}: measure '{measure}' has no margin, but {stated} is stated; write 'none'")
    try:
        value = math.nan if margin is None else float(stated)
    except ValueError:
        value = math.inf
    if margin is not None and value != margin:
        raise InputError(f"{where}: the margin of '{measure}' is {margin:g}, but {stated} is stated; write {margin:g}")


def write_register(path: Path = PATH) -> None:
    write_text(path, register().to_csv(index=False, lineterminator="\n"))


if __name__ == "__main__":
    write_register()
