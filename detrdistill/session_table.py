"""A table in a notebook: train its runs, draw it, show it, and say what its claims come to."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from detrdistill.checkpoints.presets import report_folder
from detrdistill.figures import style
from detrdistill.figures.bars import bars
from detrdistill.figures.comparison import comparison
from detrdistill.figures.convergence import convergence
from detrdistill.figures.loss_parts import loss_parts
from detrdistill.figures.weights import weight_trials
from detrdistill.published import published
from detrdistill.recipes.identity import run_id
from detrdistill.recipes.presets import Preset
from detrdistill.recipes.recipe import Recipe
from detrdistill.recipes.rows import Row
from detrdistill.recipes.tables import WEIGHTS, all_compared, make_table, only_parents
from detrdistill.records import Record
from detrdistill.report.claims import board, weigh
from detrdistill.report.comparisons import Comparisons
from detrdistill.report.register import planned_seeds
from detrdistill.report.tables import collect, provenance_line, styled, summarise
from detrdistill.report.weights import NOTE, tuning_cells, tuning_frame
from detrdistill.runs.reference import run_log
from detrdistill.runs.store import Store
from detrdistill.runs.tuning import find_row, rows_to_tune, tune

LEFT = [{"selector": "th, td", "props": "text-align: left"}, {"selector": "caption", "props": "text-align: left; caption-side: bottom"}]
Train = Callable[[Recipe, bool], Record]


class SessionTable:
    """One of `recipes.tables.TABLES`, or what `BESIDE` compares, for the detectors and seeds of a session.

    What it shows is read from the store once, and again after `run`.

    Attributes:
        rows: the runs, by row.
    """

    def __init__(self, name: str, presets: Sequence[Preset], seeds: Sequence[int], store: Store, train: Train) -> None:
        """Name the runs; read nothing yet.

        Args:
            train: trains a recipe, or returns what is stored; the second argument says whether the committed reference will do.

        Raises:
            InputError: an unknown table.
        """
        self._table = make_table(name, presets, seeds)
        # A verdict depends on all runs of a detector, in whichever table they are.
        self._tables = all_compared(presets, seeds)
        self._store, self._train = store, train
        self._root = report_folder(store.root, presets)
        self.rows = self._table.rows

    def run(self) -> None:
        """Train every run that is not stored yet; a teacher of others is taken from the committed reference, if it is there."""
        takable = only_parents(self._tables)
        for name, recipe in {run_id(recipe): recipe for recipe in self._table.recipes()}.items():
            self._train(recipe, name in takable)
        for name in ("frame", "comparisons", "summary"):
            self.__dict__.pop(name, None)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """A line a run, as `report.tables.collect` has it."""
        return collect(self._table, self._store)

    @cached_property
    def comparisons(self) -> Comparisons:
        """Differences between rows, from the stored runs of all tables."""
        return Comparisons(self._tables, self._store)

    @cached_property
    def summary(self) -> pd.DataFrame:
        """A line a row, as `report.tables.summarise` has it."""
        return summarise(self._table, self.frame, self.comparisons, planned_seeds(self._tables))

    @property
    def provenance(self) -> str:
        """What was measured, on which data and by which commits, in one line."""
        return provenance_line(self.frame)

    def show(self) -> Styler:
        """The table, with its provenance as caption."""
        return styled(self._table, self.summary, self.frame)

    def verdicts(self) -> Styler:
        """A line a claim of this table: its source, how many of its parts hold, and its verdict as a sentence.

        Claims are weighed as the report does it: with all runs of the detectors, and against the seeds that were planned.
        """
        weighed = weigh(self._tables, self.comparisons, planned_seeds(self._tables))
        own = weighed[weighed["table"] == self._table.name] if len(weighed) else weighed
        if own.empty:
            return pd.DataFrame({"Claim": ["none that these rows can decide"]}).style.hide(axis="index").set_table_styles(LEFT)
        caption = f"{self.provenance} How to read a verdict: docs/results.md."
        return board(own).style.hide(axis="index").set_caption(caption).set_table_styles(LEFT)

    def plot(self) -> Figure:
        """The table as a picture, saved in the preset's `figures/` under the table's name."""
        return _saved(comparison(self.frame, self.summary, self.provenance), self._root, self._table.name)

    def curves(self) -> Figure:
        """AP while training, of the first detector's rows at the end of the schedule."""
        rows = [row for row in self.rows if row.at == 1 and row.detector == self.rows[0].detector]
        families = [row.family for row in rows]
        # A family of one row has its usual name and colour; rows of the same family are told apart by title.
        names = [row.family if row.family and families.count(row.family) == 1 else row.title for row in rows]
        runs = {name: self._stored(row) for name, row in zip(names, rows, strict=True)}
        note = provenance_line(self.frame[self.frame["detector"] == self.rows[0].detector])
        return convergence({name: [record.curve for record in records] for name, records in runs.items()}, note)

    def figure1(self) -> Figure:
        """The paper's Figure 1 beside the student, distilled student and teacher of this table."""
        return bars(published("figure1"), self.summary, self.provenance)

    def loss_parts(self) -> Figure:
        """What the loss of the first detector's first distilled run is made of, step by step."""
        records = self.records().get("detrdistill", [])
        if not records:
            return loss_parts([], note=self.provenance)
        first = records[0]
        return loss_parts(run_log(self._store, first), first.id, provenance_line(self.frame[self.frame["run"] == first.id]))

    def records(self) -> dict[str, list[Record]]:
        """The stored runs of the first detector, a list over seeds by the name of the row."""
        return {row.name: self._stored(row) for row in self.rows if row.detector == self.rows[0].detector}

    def _stored(self, row: Row) -> list[Record]:
        return [record for recipe in row.recipes.values() if (record := self._store.record(recipe))]


class SessionWeights:
    """The trials of weights, for the detectors of a session: run, drawn and shown as a table is."""

    def __init__(self, presets: Sequence[Preset], rows: Sequence[str], store: Store, train: Train) -> None:
        """Check the names; read nothing yet.

        Args:
            rows: names of rows whose missing trials `run` runs; all that is stored is shown.
            train: trains a recipe, or returns what is stored.

        Raises:
            InputError: no detector has a row of such a name, or the preset's data is a folder.
        """
        for name in rows:
            find_row(presets, name)
        self._presets, self._rows, self._store, self._train = presets, rows, store, train

    def run(self) -> None:
        """Run the trials that the rows still miss, for each detector that has such a row."""
        for row in rows_to_tune(self._presets):
            if row.name in self._rows:
                tune(row, self._store, lambda recipe: self._train(recipe, False))
        self.__dict__.pop("frame", None)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """A line a trial, as `report.weights.tuning_frame` has it."""
        return tuning_frame(self._presets, self._store)

    def show(self) -> Styler:
        """AP by multiplier, a line a row."""
        return tuning_cells(self.frame).style.hide(axis="index").set_caption(NOTE).set_table_styles(LEFT)

    def plot(self) -> Figure:
        """AP by multiplier as a picture, saved in the preset's `figures/` as "weights"."""
        return _saved(weight_trials(self.frame, NOTE), self._store.root, WEIGHTS)


def _saved(figure: Figure, root: Path, name: str) -> Figure:
    style.save(figure, root / "figures" / name)
    return figure
