"""Tables, figures and the page of a preset from whatever runs are stored; in seconds, without training and without torch."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from detrdistill.experiments.claims import NOTE, claim_cells, weigh, write_claims
from detrdistill.experiments.page import Section, write_page
from detrdistill.experiments.paper_tables import TABLES, make_table, usual_tables
from detrdistill.experiments.plan import records
from detrdistill.experiments.presets import get_presets
from detrdistill.experiments.published import published
from detrdistill.experiments.recipes import Recipe, run_id
from detrdistill.experiments.store import Store, open_store
from detrdistill.experiments.tables import NOTES, Row, Table, cells, collect, find, provenance_line, summarise, write_table
from detrdistill.figures import style
from detrdistill.figures.bars import bars
from detrdistill.figures.comparison import comparison
from detrdistill.figures.convergence import convergence
from detrdistill.figures.loss_parts import loss_parts
from detrdistill.training.logging import read_log

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


def write_report(
    preset_name: str,
    seeds: Sequence[int],
    store_root: Path | str | None = None,
    tables: Sequence[str] = (),
    detectors: Sequence[str] = (),
) -> list[Path]:
    """Write tables to `tables/`, figures to `figures/` and a page with everything, `index.html`; what is missing is "not run".

    Args:
        store_root: the preset's results folder; by default that of `store.open_store`.
        tables: those to write; by default the preset's usual ones. Tables that are there already are written again.
        detectors: those to compare; by default all that the preset has.

    Returns:
        The files written, the same bytes for the same records.

    Raises:
        InputError: an unknown preset or table, no seeds, or records that were edited or do not belong together.
    """
    presets = get_presets(preset_name, detectors)
    store = open_store(preset_name) if store_root is None else Store(store_root)
    wanted = {name: make_table(name, presets, seeds) for name in tables or usual_tables(preset_name)}
    there = {name for name in TABLES if (store.root / "tables" / f"{name}.csv").exists()}
    made = [wanted.get(name) or make_table(name, presets, seeds) for name in TABLES if name in wanted or name in there]
    frames = [collect(table, store) for table in made]
    paths, sections = [], []
    for table, frame in zip(made, frames, strict=True):
        written, section = write_one(table, frame, store)
        paths += written
        sections.append(section)
    about = f"Preset {preset_name}. {provenance_line(pd.concat(frames))}"  # of all tables, which may differ in code and seeds
    weighed = weigh(made, store)
    if files := write_claims(weighed, f"{about} {NOTE}", store.root / "tables"):
        paths += files
        named = [path.relative_to(store.root).as_posix() for path in files]
        sections.insert(0, Section("claims", "Claims", claim_cells(weighed), NOTE, files=named))
    sections += beside(sections, store.root)
    return [*paths, write_page(store.root, f"detrdistill: {preset_name}", f"{about} {NOTES}", sections)]


def stored_seeds(preset_name: str, detectors: Sequence[str] = (), store: Store | None = None) -> tuple[int, ...]:
    """The seeds of all students that have a record; 0 if there are none."""
    teachers = {run_id(preset.pinned().teacher) for preset in get_presets(preset_name, detectors)}
    stored = records([(store or open_store(preset_name)).root])
    return tuple(sorted({one.recipe.seed for one in stored if isinstance(one.recipe, Recipe) and one.id not in teachers})) or (0,)


def beside(sections: Sequence[Section], root: Path) -> list[Section]:
    """A section for the notebooks that make no table, and their figures, as far as they are there."""
    shown = {Path(path).name for section in sections for path in (*section.notebooks, *section.figures)}
    there = lambda pattern: [path for path in sorted(root.glob(pattern)) if path.name not in shown]  # noqa: E731
    notebooks = [path for path in there("notebooks/[0-9]*.ipynb") if not path.name.endswith(".failed.ipynb")]
    inside = [[path.relative_to(root).as_posix() for path in found] for found in (there("figures/*.png"), notebooks)]
    return [Section("inside", "Inside the detectors", figures=inside[0], notebooks=inside[1])] if any(inside) else []


def write_one(table: Table, frame: pd.DataFrame, store: Store) -> tuple[list[Path], Section]:
    """One table with its figures, and its part of the page."""
    summary, note = summarise(table, frame), provenance_line(frame)
    files = write_table(table, frame, store.root / "tables")
    figures = {table.name: comparison(frame, summary, note)}
    if table.name == "main_results":
        figures |= main_figures(table, frame, summary, store)
    drawn = {name: style.save(figure, store.root / "figures" / name) for name, figure in figures.items()}
    inside = lambda path: path.relative_to(store.root).as_posix()  # noqa: E731
    section = Section(
        name=table.name,
        title=f"{table.title} ({table.published.replace('table', 'Table ')})" if table.published else table.title,
        table=cells(summary),
        note=f"{note} {NOTES}",
        figures=[inside(path) for made in drawn.values() for path in made if path.suffix == ".png"],
        notebooks=[f"notebooks/{path.name}" for path in sorted(NOTEBOOKS.glob(f"[0-9]*_{table.name}.ipynb"))],
        files=[inside(path) for path in files],
    )
    return [*files, *(path for made in drawn.values() for path in made)], section


def main_figures(table: Table, frame: pd.DataFrame, summary: pd.DataFrame, store: Store) -> dict[str, Figure]:
    """AP while training, the paper's Figure 1 beside ours, and the parts of a distilled student's loss."""
    found = {"figure1": bars(published("figure1"), summary, provenance_line(frame))}
    detectors = list(dict.fromkeys(row.detector for row in table.rows))
    for detector in detectors:
        rows = {row.setting: row for row in table.rows if row.detector == detector}
        suffix = "" if len(detectors) == 1 else f"_{next(iter(rows['student'].recipes.values())).detector}"
        note = provenance_line(frame[frame["detector"] == detector])
        log, title = _first_log(rows["detrdistill"], store)
        about_run = provenance_line(frame[frame["run"] == title]) if log else note
        found[f"convergence{suffix}"] = convergence({setting: _curves(row, store) for setting, row in rows.items()}, note)
        found[f"loss_parts{suffix}"] = loss_parts(log, title, about_run)
    return found


def _curves(row: Row, store: Store) -> list[list[dict[str, float | None]]]:
    records = [find(store, recipe) for recipe in row.recipes.values()]
    return [record.curve for record in records if record]


def _first_log(row: Row, store: Store) -> tuple[list[dict[str, float]], str]:
    """Log and name of the row's first complete run."""
    for recipe in row.recipes.values():
        if record := find(store, recipe):
            return read_log(store.folder(record.recipe) / "log.jsonl"), record.id
    return [], ""
