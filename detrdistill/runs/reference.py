"""What we measured, committed in `results/reference/<preset>`. No torch here.

A user's own results take parents from it (teachers, backbones trained on crops), marked "stored", and measure everything else anew.
`python -m detrdistill.runs.reference PRESET ROOT [RUN ...]` brings complete runs from the results folder ROOT into it; weights only of
the runs that are named, since they are what makes a clone heavy. What `analysis.where_to_look` and `compare.costs` measured of a run goes
with its record.
"""

import gzip
import json
import shutil
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from detrdistill.errors import InputError
from detrdistill.files import atomic
from detrdistill.recipes.identity import run_id
from detrdistill.recipes.presets import PRESETS
from detrdistill.recipes.recipe import CropRecipe, Recipe
from detrdistill.records import Record, read_record
from detrdistill.runs.store import Store
from detrdistill.training.logging import read_log

# In the repository and not in the package, as the published values are.
FOLDER = Path(__file__).resolve().parents[2] / "results" / "reference"
LOGS = "logs.jsonl.gz"  # of all runs of a preset
EVERY, DIGITS = 10, 5  # of a log's lines one in so many is kept, and so many digits of its numbers


def has(recipe: Recipe | CropRecipe) -> bool:
    """Whether the run is committed with its weights, so that it can be taken."""
    return bool(_folders(recipe))


def take(recipe: Recipe | CropRecipe, store: Store) -> Record | None:
    """Copy a run whose weights are committed into `store`, marked as stored; None where there is none.

    For runs that others learn or start from: nobody need spend an hour on a teacher again.

    Raises:
        InputError: the committed run is damaged, another process trains the run, or `store` cannot be written to.
    """
    for folder in _folders(recipe):
        source = Store(folder.parents[1])
        if source.root.resolve() == store.root.resolve():
            continue
        record = source.record(recipe)
        source.check_weights(record)
        with store.hold(recipe):
            if (own := store.record(recipe)) is not None:  # another process has been faster
                return own
            for left in ("log.jsonl", "checkpoint.pt"):  # of a training that was not finished here
                (store.folder(recipe) / left).unlink(missing_ok=True)
            with atomic(store.weights(recipe)) as temporary:
                shutil.copyfile(source.weights(recipe), temporary)
            if (inside := source.inside_objects(record)) is not None:
                store.write_inside(recipe, inside)
            if (cost := source.cost(record)) is not None:
                store.write_cost(recipe, cost)
            store.mark_stored(recipe, f"taken from results/reference/{source.root.name}, not trained here")
            store.write(record)  # last: with it the run is complete
        return record
    return None


def _folders(recipe: Recipe | CropRecipe) -> list[Path]:
    return sorted(
        path.parent for path in FOLDER.glob(f"*/runs/{run_id(recipe)}/weights.safetensors") if (path.parent / "record.json").exists()
    )


def to_show(preset: str, store: Store) -> Store:
    """`store` if it has a complete run, else what is committed for the preset; `store` where nothing is."""
    reference = Store(FOLDER / preset)
    return store if store.has_runs or not reference.has_runs else reference


def run_log(store: Store, record: Record) -> list[dict[str, Any]]:
    """The log of a run, whole or thinned; empty where none was kept. A record is valid without."""
    return read_log(store.folder(record.recipe) / "log.jsonl") or read_packed(store.root / LOGS).get(record.id, [])


def read_packed(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The thinned logs of a preset, by run.

    Raises:
        InputError: the file is damaged.
    """
    if not path.exists():
        return {}
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                entry = json.loads(line)
                found.setdefault(entry.pop("run"), []).append(entry)
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise InputError(f"logs {path}: damaged ({error}); restore the file with git") from None
    return found


def write_packed(path: Path, logs: dict[str, list[dict[str, Any]]]) -> None:
    """The same bytes for the same logs."""
    lines = (json.dumps({"run": run} | entry) + "\n" for run in sorted(logs) for entry in logs[run])
    with atomic(path) as temporary, temporary.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0) as file:
        file.write("".join(lines).encode())


def thinned(log: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every tenth line and the last, with five digits."""
    entries = list(log)
    kept = [entry for i, entry in enumerate(entries) if i % EVERY == 0 or i == len(entries) - 1]
    return [{name: float(f"{x:.{DIGITS}g}") if isinstance(x, float) else x for name, x in entry.items()} for entry in kept]


def bring(preset: str, root: Path, weights: Collection[str] = ()) -> list[str]:
    """Copy complete runs of the results folder `root` that are not committed yet; their logs thinned.

    Args:
        weights: names of the runs whose weights are copied too.

    Returns:
        names of the runs that were copied.

    Raises:
        InputError: an unknown preset or run, a record or shares by code that differs from every commit, one that is damaged, or weights
            that are missing or not those that are committed already.
    """
    if preset not in PRESETS:
        raise InputError(f"preset '{preset}' is unknown; known: {', '.join(PRESETS)}")
    target, own = FOLDER / preset, {path.parent.name: read_record(path) for path in sorted((root / "runs").glob("*/record.json"))}
    if unknown := sorted(set(weights) - own.keys()):
        raise InputError(f"run '{unknown[0]}' is not complete in {root}; its complete runs are {', '.join(own) or 'none'}")
    source, committed = Store(root), Store(target)
    shares = {name: found for name, record in own.items() if (found := source.inside_objects(record))}
    costs = {name: found for name, record in own.items() if (found := source.cost(record))}
    for what, made in (("run", own), ("shares of run", shares), ("costs of run", costs)):
        for name, one in made.items():
            if not (commit := one.provenance["commit"]) or "+changes" in commit:
                raise InputError(f"{what} {name}: made by code that is in no commit ({commit}); make it again from a clone")
    for name in weights:
        source.check_weights(own[name])
        there = committed.record(own[name].recipe)
        if there and there.provenance["weights_sha256"] != own[name].provenance["weights_sha256"]:
            raise InputError(f"run {name} is committed with other weights, which other runs learned from; leave it as it is")
    new = {name: record for name, record in own.items() if not source.is_stored(record) and committed.record(record.recipe) is None}
    # Logs first: a run whose record is there is not looked at again.
    logs = {name: thinned(log) for name in new if (log := read_log(root / "runs" / name / "log.jsonl"))}
    write_packed(target / LOGS, read_packed(target / LOGS) | logs)
    for name in weights:
        with atomic(committed.weights(own[name].recipe)) as temporary:
            shutil.copyfile(source.weights(own[name].recipe), temporary)
    for record in new.values():
        committed.write(record)
    for found, write in (
        *((one, committed.write_inside) for one in shares.values()),
        *((one, committed.write_cost) for one in costs.values()),
    ):
        there = committed.record(own[found.run].recipe)
        if there and there.provenance["weights_sha256"] == found.weights_sha256:
            write(there.recipe, found)
    return list(new)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python -m detrdistill.runs.reference PRESET ROOT [RUN ...]")
    try:
        print("\n".join(bring(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])))
    except InputError as error:
        sys.exit(f"error: {error}")
