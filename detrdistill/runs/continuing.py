"""More steps for a complete run: the longer schedule starts from its last checkpoint, where it can."""

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from detrdistill.errors import InputError
from detrdistill.recipes.identity import same_run
from detrdistill.recipes.recipe import Recipe
from detrdistill.records import Record, read_record
from detrdistill.runs.store import Store
from detrdistill.training.checkpointing import load_checkpoint, save_checkpoint
from detrdistill.training.logging import is_logged, read_log, write_log

LOG = logging.getLogger(__name__)
OF_LENGTH = {"schedule.steps": 1, "schedule.epochs": None, "schedule.evaluations": 2}  # the same for all that differ in length alone
# What says which weights a parent has. Where they lay, and what the teacher's AP was measured to be, may differ.
ORIGIN = ("run", "weights_sha256", "sha256", "entry", "classes", "fresh", "dropped", "weights")


class _Obstacle(Exception):
    """Why a run cannot be continued."""


def continue_shorter(recipe: Recipe, images: int, store: Store, parents: dict[str, dict[str, Any]]) -> None:
    """Begin a run where a complete one ended, of the same recipe with fewer steps: the longest that can be continued.

    The run then ends as if it had been trained from its first step, byte for byte on the CPU. That needs an open-ended schedule
    (`Schedule.open_ended`), evaluations after the same steps, or none so far, and the checkpoint that such a run leaves. Where there is a
    shorter run and none can be continued, one line says why. A run that has a checkpoint of its own is left alone.

    Args:
        images: in the training set.
        parents: of the run that begins, as its record will have them.

    Raises:
        InputError: the disk is full, or the run's folder cannot be written to.
    """
    folder, total = store.folder(recipe), recipe.schedule.total_steps(images)
    if (folder / "checkpoint.pt").exists():
        return
    reason = ""
    for record in shorter_runs(recipe, total, store):
        try:
            saved = _continuable(record, recipe, total, store, parents)
        except _Obstacle as obstacle:
            reason = reason or f"run {record.id} of {record.cost['steps']} steps cannot be continued: {obstacle}"
            continue
        entries = read_log(store.folder(record.recipe) / "log.jsonl")
        evaluations = recipe.schedule.evaluation_steps(total)
        write_log(folder / "log.jsonl", [one for one in entries if is_logged(one["step"], total, True) or one["step"] in evaluations])
        save_checkpoint(folder / "checkpoint.pt", saved)  # last: with it the run has begun
        LOG.info("%s: continues run %s after step %d of %d", recipe.title, record.id, record.cost["steps"], total)
        return
    if reason:
        LOG.warning("%s: trains from its first step; %s; a run that starts from its weights needs --start", recipe.title, reason)


def shorter_runs(recipe: Recipe, total: int, store: Store) -> list[Record]:
    """Complete runs of the recipe with fewer steps than `total`, however often they were evaluated; the longest first."""
    found = []
    for path in sorted((store.root / "runs").glob(f"{recipe.title}-{'[0-9a-f]' * 8}/record.json")):
        with suppress(InputError):  # a damaged record is refused where its own run is wanted
            found.append(read_record(path))
    alike = [one for one in found if same_run(one.recipe.replace(**OF_LENGTH), recipe.replace(**OF_LENGTH)) and one.cost["steps"] < total]
    return sorted(alike, key=_steps, reverse=True)


def _steps(record: Record) -> int:
    return record.cost["steps"]


def _continuable(record: Record, recipe: Recipe, total: int, store: Store, parents: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The checkpoint of a complete run, as the longer run's own at that step.

    Raises:
        _Obstacle: there is none.
    """
    schedule, steps = recipe.schedule, record.cost["steps"]
    if not schedule.open_ended:
        falls = "as a cosine" if schedule.decay == "cosine" else f"after parts {', '.join(map(str, schedule.drops))} of all steps"
        raise _Obstacle(f"its learning rate fell {falls} (schedule.decay=step with schedule.drops= can be continued)")
    if changed := [name for name in parents if _origin(parents, name) != _origin(record.parents, name)]:
        raise _Obstacle(f"its {changed[0]} had other weights")
    measured = {step for step in record.recipe.schedule.evaluation_steps(steps) if step}
    wanted = {step for step in schedule.evaluation_steps(total) if 0 < step <= steps}
    if wanted and wanted != measured:
        even = total * len(measured) / steps
        remedy = f"; schedule.evaluations={even:.0f} would be" if even.is_integer() else ""
        raise _Obstacle(f"it was evaluated after other steps than every {total / schedule.evaluations:g}{remedy}")
    saved = _last_checkpoint(store.folder(record.recipe) / "checkpoint.pt", steps)
    if not wanted:  # as if it had not been evaluated yet
        saved = {name: value for name, value in saved.items() if name != "best"}
        saved["state"] = {name: value for name, value in saved["state"].items() if name not in ("held", "metrics", "kept")} | {"curve": []}
    saved["state"] |= {"continued": {"run": record.id, "step": steps}}
    return saved


def _origin(parents: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    return {key: value for key, value in parents.get(name, {}).items() if key in ORIGIN}


def _last_checkpoint(path: Path, step: int) -> dict[str, Any]:
    if not path.exists():
        raise _Obstacle(f"{path} is not there")
    try:
        saved = load_checkpoint(path)
    except InputError as error:
        raise _Obstacle(str(error).partition(";")[0]) from None
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict) or saved["state"].get("step") != step:
        raise _Obstacle(f"{path} is not of its last step")
    return saved
