"""The stored runs of a preset as one block design a detector, and differences between rows of its tables. No torch here."""

import math
from collections.abc import Iterable

import pandas as pd

from detrdistill.recipes.claims import AP, CHANGES, HALFWAY, INSIDE
from detrdistill.recipes.identity import block, run_id, treatment
from detrdistill.recipes.rows import Row, Table
from detrdistill.records import Record, refuse_mixed
from detrdistill.report.tables import metrics_at
from detrdistill.runs.store import Store
from detrdistill.statistics import BlockFit, Difference


class Comparisons:
    """All runs of some tables, each counted once although tables share them.

    The verdict of a row depends on all runs of its detector: give all tables of the preset, also to show one of them.
    """

    def __init__(self, tables: Iterable[Table], store: Store) -> None:
        """Read the records.

        Raises:
            InputError: a record was edited, or they do not belong together.
        """
        lines: dict[str, dict[str, object]] = {}
        # A run is called as where it is a student at the end of its schedule, if it is one somewhere.
        rows = sorted(((table, row) for table in tables for row in table.rows), key=lambda one: (one[1].family == "teacher", -one[1].at))
        for table, row in rows:
            for recipe in row.recipes.values():
                name = run_id(recipe)
                if name not in lines and (record := store.record(recipe)):
                    lines[name] = {"detector": row.detector, "treatment": treatment(recipe), "block": block(recipe)}
                    lines[name] |= {"title": row.title, "table": table.title, "record": record}
        refuse_mixed([line["record"] for line in lines.values()])
        self.runs = pd.DataFrame(lines.values(), columns=["detector", "treatment", "block", "title", "table", "record"])
        self._store = store
        self._fits: dict[tuple[str, str, float], BlockFit] = {}

    @property
    def detectors(self) -> list[str]:
        return list(self.runs["detector"].unique())

    def fit(self, detector: str, measure: str = AP, at: float = 1.0) -> BlockFit:
        """All runs of a detector with this measure, at one point of their schedules (1 is the end)."""
        key = (detector, measure, 0.5 if measure == HALFWAY else at)
        if key not in self._fits:
            of_detector = self.runs[self.runs["detector"] == detector]
            values = [value_of(record, measure, at) for record in of_detector["record"]]
            self._fits[key] = BlockFit(of_detector.drop(columns="record").assign(value=values).dropna(subset="value"))
        return self._fits[key]

    def difference(self, ahead: Row, than: Row, measure: str = AP) -> Difference:
        """One row of a table minus another of the same detector. An interval needs two runs of each; of a teacher, one.

        Raises:
            InputError: a file of shares was edited, or belongs to other weights than its run's.
        """
        if measure == INSIDE:
            return self._inside(ahead, than)
        fit = self.fit(ahead.detector, measure, ahead.at)
        names = [treatment(next(iter(row.recipes.values()))) for row in (ahead, than)]
        found = fit.difference(*names)
        counts = [(fit.runs["treatment"] == name).sum() for name in names]
        once = any(count < 2 for row, count in zip((ahead, than), counts, strict=True) if row.family != "teacher")
        return Difference(found.mean, seeds=min(found.seeds, 1)) if once else found

    def _inside(self, ahead: Row, than: Row) -> Difference:
        """One map minus another of the same runs, with a t-interval over the images that all runs were measured on.

        On each image the mean over runs counts; what sets these apart is not in the interval, but in `Difference.by_run`.
        """
        records = [record for recipe in ahead.recipes.values() if (record := self._store.record(recipe))]
        measured = [found for record in records if (found := self._store.inside_objects(record))]
        columns = [pd.DataFrame(found.percent, index=found.images, dtype=float) for found in measured]
        if not columns:
            return Difference()
        by_image = pd.DataFrame({i: one[ahead.name] - one[than.name] for i, one in enumerate(columns)}).dropna()
        values, by_run = by_image.mean(axis=1), tuple(map(float, by_image.mean()))
        count, spread = len(values), float(values.std(ddof=1))
        return Difference(
            float(values.mean()), spread / math.sqrt(count or 1), count - 1, spread, len(columns), images=count, by_run=by_run
        )


def value_of(record: Record, measure: str, at: float) -> float:
    """NaN where it was not measured."""
    if measure == CHANGES:
        value = record.curve[-1].get("changes_between_stages") if record.curve else None
    else:
        value = metrics_at(record, 0.5 if measure == HALFWAY else at)["AP"]
    return math.nan if value is None else value
