"""What a batch would run, and how long that is expected to take, judged by runs that were made before. No torch here."""

from collections.abc import Container, Iterable, Sequence
from pathlib import Path

from detrdistill.checkpoints.presets import choose_presets
from detrdistill.recipes.identity import parents, run_id
from detrdistill.recipes.presets import Preset
from detrdistill.recipes.recipe import CropRecipe, Recipe
from detrdistill.recipes.tables import WEIGHTS, make_table, named_runs, only_parents, possible_tables, usual_tables
from detrdistill.records import Record, read_record
from detrdistill.runs.pinned import pinned_preset
from detrdistill.runs.reference import FOLDER, has
from detrdistill.runs.store import Store, open_store
from detrdistill.runs.tuning import next_trials, rows_to_tune, runs_before_tuning


def plan_text(
    preset: str,
    seeds: Sequence[int],
    tables: Sequence[str] = (),
    detectors: Sequence[str] = (),
    store: Store | None = None,
    *,
    teacher: str = "",
    start: str = "",
) -> str:
    """A line a missing run, and their sum; of rows that are tuned (`weights`) the trials that are known by now to be wanted.

    Args:
        teacher, start: as in `choose_presets`.

    Raises:
        InputError: an unknown preset or table, no seeds, a published detector that cannot be read, or a record that was edited.
    """
    store = store or open_store(preset)
    presets = [pinned_preset(one) for one in choose_presets(preset, detectors, teacher, start)]
    names = [name for name in tables or usual_tables(presets) if name != WEIGHTS]
    wanted = [recipe for name in names for recipe in make_table(name, presets, seeds).recipes()]
    for row in rows_to_tune(presets) if WEIGHTS in tables else ():
        wanted += [row.trial(*trial) for trial in next_trials(row, store)]
    missing = missing_runs(wanted, store, takable(presets, seeds))
    known = list(records((store.root, FOLDER / preset)))
    expected = {name: expected_seconds(recipe, known) for name, recipe in missing.items()}
    lines = [f"{name}: {duration(expected[name])}" for name in missing]
    total = duration(sum(filter(None, expected.values())))
    unknown = sum(seconds is None for seconds in expected.values())
    if not missing:
        return "All runs are stored."
    beside = f", and {unknown} of unknown length" if unknown else ""
    judged = "as measured with one process a core on the machine of the stored runs"
    return "\n".join([*lines, f"{len(missing)} runs are missing: {total} of one core{beside} ({judged})."])


def takable(presets: Sequence[Preset], seeds: Sequence[int]) -> set[str]:
    """Names of the runs that can be taken from the committed reference instead of trained, whichever tables are asked for."""
    tables = possible_tables(presets)
    runs = named_runs(tables, presets, seeds) | runs_before_tuning(presets)
    allowed = only_parents(make_table(name, presets, seeds) for name in tables) | set(runs_before_tuning(presets))
    return {name for name, recipe in runs.items() if name in allowed and has(recipe)}


def missing_runs(wanted: Iterable[Recipe | CropRecipe], store: Store, takable: Container[str] = ()) -> dict[str, Recipe | CropRecipe]:
    """By id, the runs that are neither stored nor `takable`, and what they depend on; a run that is there asks for nothing."""
    found: dict[str, Recipe | CropRecipe] = {}
    waiting = list(wanted)
    while waiting:
        recipe = waiting.pop(0)
        if store.record(recipe) is None and run_id(recipe) not in takable:
            found[run_id(recipe)] = recipe
            waiting += parents(recipe).values()
    return found


def records(roots: Iterable[Path]) -> Iterable[Record]:
    for root in roots:
        yield from (read_record(path) for path in sorted((root / "runs").glob("*/record.json")))


def expected_seconds(recipe: Recipe | CropRecipe, known: Sequence[Record]) -> float | None:
    """Steps times the seconds a step of the most similar run; None if there is none of the same detector."""
    if isinstance(recipe, CropRecipe):
        steps, rates = recipe.backbone.crops.steps, [rate(one) for one in known if isinstance(one.recipe, CropRecipe)]
        return steps * max(rates) if rates else None
    like = [one for one in known if isinstance(one.recipe, Recipe) and one.recipe.detector == recipe.detector and one.cost["steps"]]
    # What costs most decides: whether there is a teacher, then the backbone.
    for same in (
        lambda one: (one.methods, one.backbone) == (recipe.methods, recipe.backbone),
        lambda one: (bool(one.methods), one.backbone) == (bool(recipe.methods), recipe.backbone),
        lambda one: bool(one.methods) == bool(recipe.methods),
    ):
        rates = [rate(one) for one in like if same(one.recipe)]
        if rates and recipe.schedule.steps:
            return recipe.schedule.steps * sum(rates) / len(rates)
    return None


def rate(record: Record) -> float:
    return record.cost["seconds"] / record.cost["steps"]


def duration(seconds: float | None) -> str:
    """In words, rounded."""
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
