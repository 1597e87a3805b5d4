"""The paper's own numbers, read from `results/published` of this repository; what the columns mean stands in the README there."""

from pathlib import Path

import pandas as pd

from detrdistill.errors import InputError

# In the repository and not in the package: the kit is used from a clone (`pip install -e`).
VALUES = Path(__file__).resolve().parents[1] / "results" / "published"
GUESSED = ("table5", "table6", "table9")
COLUMNS = ["table", "row", "column", "value", "unit", "source", "confidence"]


def in_words(table: str) -> str:
    """ "table3" as "Table 3"; a number that is only a guess (the README there) is said to be one."""
    return f"{'probably ' if table in GUESSED else ''}{table.replace('table', 'Table ')}"


def published(table: str) -> pd.DataFrame:
    """All stated values of a table ("table3", "figure1", "readme"); `value` is NaN where the paper's number was not found.

    Raises:
        InputError: no such table, or the kit is not used from a clone of its repository.
    """
    path = VALUES / f"{table}.csv"
    if not VALUES.is_dir():
        raise InputError(f"published values: folder {VALUES} does not exist; use the kit from a clone of its repository (make setup)")
    if not path.is_file():
        raise InputError(f"published table '{table}' is unknown; known: {', '.join(sorted(file.stem for file in VALUES.glob('*.csv')))}")
    frame = pd.read_csv(path, keep_default_na=False, na_values={"value": [""]}, dtype=dict.fromkeys(COLUMNS, str) | {"value": float})
    if list(frame.columns) != COLUMNS:
        raise InputError(f"published table {path}: columns are {', '.join(frame.columns)}, not {', '.join(COLUMNS)}; restore it with git")
    return frame


def published_value(frame: pd.DataFrame, row: str, column: str) -> float:
    """One value of a published table, NaN if it is not stated there."""
    values = frame.loc[(frame["row"] == row) & (frame["column"] == column), "value"]
    return float(values.iloc[0]) if len(values) else float("nan")
