"""Tables and figures of a preset from whatever runs are stored; in seconds, without training and without torch."""

from collections.abc import Sequence
from pathlib import Path

from detrdistill.experiments.presets import get_preset
from detrdistill.experiments.published import published
from detrdistill.experiments.store import Store, open_store
from detrdistill.experiments.tables import Row, collect, find, main_results, provenance_line, summarise, write_table
from detrdistill.figures import style
from detrdistill.figures.bars import bars
from detrdistill.figures.convergence import convergence
from detrdistill.figures.loss_parts import loss_parts
from detrdistill.training.logging import read_log


def write_report(preset_name: str, seeds: Sequence[int], store_root: Path | str | None = None) -> list[Path]:
    """Write all tables to `tables/` and figures to `figures/` of the preset's results; what is missing is shown as "not run".

    Args:
        store_root: the preset's results folder; by default that of `store.open_store`.

    Returns:
        The files written, the same bytes for the same records.

    Raises:
        InputError: an unknown preset, no seeds, or records that were edited or do not belong together.
    """
    preset = get_preset(preset_name)
    store = open_store(preset_name) if store_root is None else Store(store_root)
    table = main_results(preset, seeds)
    frame = collect(table, store)
    note = provenance_line(frame)
    paths = write_table(table, frame, store.root / "tables")

    rows = {row.setting: row for row in table.rows}
    log, title = _first_log(rows["detrdistill"], store)
    figures = {
        "convergence": convergence({setting: _curves(row, store) for setting, row in rows.items()}, note),
        "figure1": bars(published("figure1"), summarise(table, frame), note),
        "loss_parts": loss_parts(log, title, provenance_line(frame[frame["run"] == title]) if log else note),
    }
    for name, figure in figures.items():
        paths += style.save(figure, store.root / "figures" / name)
    return paths


def _curves(row: Row, store: Store) -> list[list[dict[str, float | None]]]:
    records = [find(store, recipe) for recipe in row.recipes.values()]
    return [record.curve for record in records if record]


def _first_log(row: Row, store: Store) -> tuple[list[dict[str, float]], str]:
    """Log and name of the row's first complete run."""
    for recipe in row.recipes.values():
        if record := find(store, recipe):
            return read_log(store.folder(record.recipe) / "log.jsonl"), record.id
    return [], ""
