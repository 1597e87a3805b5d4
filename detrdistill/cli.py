"""The `detrdistill` command.

Faults of the user's input are one line on standard error and exit code 2. A detector in training that is sent SIGTERM saves where it is
and ends with exit code 143, as a shell calls what SIGTERM ended: schedulers may queue it again, and the same command continues. Whatever
comes before the first step (data, crop training, measuring the teacher) ends at once and is done again.
"""

import logging
import os
import sys
import traceback
from json import dumps as to_json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import tyro

from detrdistill.errors import InputError, NonFiniteError, StoppedError
from detrdistill.process import TERMINATED

if TYPE_CHECKING:
    pass

RowName = Annotated[str, tyro.conf.arg(help="teacher, student, a method such as detrdistill or fgd+mgd, or the id of a run")]


def train(
    preset: tyro.conf.Positional[str],
    row: tyro.conf.Positional[RowName],
    /,
    detector: str = "deformable_detr",
    seed: int = 0,
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    data: Path | None = None,
    results: Path | None = None,
    device: str = "auto",
    workers: int | None = None,
) -> None:
    """Train one row of a preset's tables, and what it depends on; nothing is trained twice.

    Killed at any moment, it continues when called again. At SIGTERM a detector in training ends its step or evaluation, saves, and exits
    with 143; a launcher that waits less long than that kills it, and it continues from the checkpoint before.

    Args:
        preset: smoke, quick, mini, bccd or coco.
        row: a setting of the preset, or the id of a run as the batch names it. Methods: detrdistill, fitnet, fgd, mgd, fkd, fgfi, pkd,
            cwd, kd_detr, d3etr; joined by + their losses add up.
        detector: deformable_detr, conditional_detr or adamixer, as far as the preset has recipes for it.
        seed: of the student.
        set: a field of the recipe and its value, such as schedule.lr=1e-4, or a switch of a method, such as detrdistill.variant=released
            or fgd.maps=features; may be repeated. resize, data and precision are the teacher's too; its other fields are
            teacher.schedule.lr and so on.
        data: folder of COCO json and images, instead of the preset's data.
        results: folder for runs instead of results/<preset>.
        device: auto, cpu, cuda, or cuda:1 for the second GPU.
        workers: processes that load images; without, up to four beside a GPU, and none on the CPU.
    """
    from detrdistill.parameters import named_run, on_other_data, shared_with_teacher, with_switches
    from detrdistill.recipes.presets import get_preset
    from detrdistill.runs.store import Store, open_store

    recipe, reference = named_run(preset, row, seed) or (get_preset(preset, detector).recipe(row, seed), False)
    if data is not None:
        recipe = on_other_data(recipe, data)
    changes = dict(assignment(text) for text in set)
    recipe = with_switches(recipe, changes)
    recipe = recipe.replace(**shared_with_teacher(recipe, changes))
    store = Store(results) if results else open_store(preset)

    from detrdistill.runs.run import run  # only now: torch takes seconds, a mistyped parameter should not

    record = run(recipe, store, device=device, workers=workers, reference=reference and not set and data is None)
    shown = ", ".join(f"{name} {value:.1f}" for name, value in record.metrics.items() if value is not None)
    if record.test:
        shown += "; on the test images " + ", ".join(f"{name} {value:.1f}" for name, value in record.test.items() if value is not None)
    print(f"{record.id}: {shown}" + " (stored: taken from results/reference, not trained here)" * store.is_stored(record))


def tune(
    preset: tyro.conf.Positional[str],
    rows: tyro.conf.Positional[tuple[str, ...]],
    /,
    detector: str = "adamixer",
    results: Path | None = None,
    device: str = "auto",
    workers: int | None = None,
) -> None:
    """Find what a row's weights are best multiplied by, on other digits than the reported ones; what was tried is not tried again.

    Args:
        preset: smoke, quick or mini, whose data is embedded digits.
        rows: methods, or rows of Tables 7 to 9 by their names, such as fgd or "query masks (Eq. 7)"; without, all.
        detector: deformable_detr, conditional_detr or adamixer.
        results: folder for runs instead of results/<preset>.
        device: auto, cpu, cuda, or cuda:1 for the second GPU.
        workers: processes that load images; without, up to four beside a GPU, and none on the CPU.
    """
    from detrdistill.recipes.presets import get_presets
    from detrdistill.runs import tuning
    from detrdistill.runs.store import Store, open_store

    presets, store = get_presets(preset, [detector]), Store(results) if results else open_store(preset)
    wanted = [tuning.find_row(presets, name) for name in rows] or tuning.rows_to_tune(presets)

    from detrdistill.runs.run import run

    for row in wanted:
        tuning.tune(row, store, lambda recipe: run(recipe, store, device=device, workers=workers))
        found = ", ".join(f"x {one.factor:g}: {one.mean:.1f}" for one in tuning.tried(row, store))
        print(f"{row.detector}, {row.name}: {found}; best x {tuning.best_trial(row, store).factor:g}", flush=True)


def check(
    folder: tyro.conf.Positional[Path],
    /,
    preset: str = "quick",
    detector: str = "deformable_detr",
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    json: bool = False,
) -> None:
    """Validate a data folder, list every fault and what would be done about it, and say what the data is like and what to set for it.

    Args:
        preset: whose queries and image size the data is compared with.
        detector: deformable_detr, conditional_detr or adamixer, as far as the preset has recipes for it.
        set: a field of the data, such as data.train=annotations/mine.json; may be repeated.
        json: for machines: one JSON object on standard output.
    """
    from detrdistill.data.check import check_folder, check_lines
    from detrdistill.recipes.parts import Folder
    from detrdistill.recipes.presets import get_preset

    recipe = get_preset(preset, detector).student
    changes = {name.removeprefix("data."): value for name, value in map(assignment, set)}
    found = check_folder(Folder(path=folder).replace(**changes), recipe)
    print(to_json(found) if json else "\n".join(check_lines(found)))
    if unreadable := found["unreadable"]:
        raise InputError("; ".join(unreadable[:10]) + (f"; and {len(unreadable) - 10} more" if len(unreadable) > 10 else ""))


def report(
    preset: str = "quick",
    seeds: tuple[int, ...] = (),
    tables: tuple[str, ...] = (),
    detectors: tuple[str, ...] = (),
    formats: tuple[str, ...] = ("png", "pdf"),
    reference: bool = True,
) -> None:
    """Write tables, figures and the page of a preset again, from its stored records; nothing is trained.

    Args:
        preset: smoke, quick, mini, bccd or coco.
        seeds: of the students; without, all that have a record.
        tables: names of tables; without, those that are there already and the preset's usual ones.
        detectors: names of detectors; without, all that the preset has recipes for.
        formats: of the figures: png, pdf.
        reference: where no run is stored, report the committed ones of results/reference.
    """
    from detrdistill.report.write import stored_seeds, write_report
    from detrdistill.runs.reference import to_show
    from detrdistill.runs.store import open_store

    store = open_store(preset)
    source = to_show(preset, store) if reference else store
    if source is not store:
        print(f"{store.root} has no complete run yet: this is a report of the committed reference, {source.root}", file=sys.stderr)
    seeds = seeds or stored_seeds(preset, tables, detectors, source)
    for path in write_report(preset, seeds, store.root, tables, detectors, source, formats):
        print(path)


def plan(preset: str = "quick", seeds: tuple[int, ...] = (0,), tables: tuple[str, ...] = (), detectors: tuple[str, ...] = ()) -> None:
    """List the runs that tables still miss, with the time that they are expected to take; nothing is run.

    Args:
        preset: smoke, quick, mini, bccd or coco.
        seeds: of the students.
        tables: names of tables; the preset's usual ones if none are named.
        detectors: names of detectors; all that the preset has recipes for if none are named.
    """
    from detrdistill.runs.plan import plan_text

    print(plan_text(preset, seeds, tables, detectors))


def notebook(
    source: tyro.conf.Positional[Path], output: tyro.conf.Positional[Path], /, parameters: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
) -> None:
    """Execute a notebook with papermill and keep the result only if every cell ran.

    Args:
        source: the notebook.
        output: where the executed notebook goes; written when it is complete.
        parameters: name=value for its parameters cell; may be repeated.
    """
    try:
        from detrdistill.notebooks import execute
    except ModuleNotFoundError as error:
        raise InputError(
            f"the command 'notebook' needs {error.name}, which is not installed; install the extra: pip install 'detrdistill[notebooks]'"
        ) from None

    if output.is_dir():
        raise InputError(f"output {output}: is a folder; name the notebook to write")
    execute(source, output, dict(assignment(text) for text in parameters))


def export(run: tyro.conf.Positional[Path], folder: tyro.conf.Positional[Path], /) -> None:
    """Write a run's detector as a folder that transformers opens (AutoModelForObjectDetection, AutoImageProcessor).

    Args:
        run: the run's folder, results/<preset>/runs/<id>.
        folder: where the new folder goes.
    """
    from detrdistill.recipes.recipe import Recipe
    from detrdistill.records import read_record

    if not (run / "record.json").is_file():
        raise InputError(f"run {run}: no record.json, so it is not a complete run; give the folder of one")
    recipe = read_record(run / "record.json").recipe
    if not isinstance(recipe, Recipe):
        raise InputError(f"run {run}: of a backbone that was trained on crops; give the folder of a detector's run")

    from detrdistill.checkpoints.hugging_face import export_hugging_face
    from detrdistill.checkpoints.pretrained import load_pretrained

    detector, about = load_pretrained(run)
    print(export_hugging_face(detector, folder, [name or f"class {i}" for i, name in enumerate(about.names)], recipe.resize))


def assignment(text: str) -> tuple[str, str]:
    """Split "name=value".

    Raises:
        InputError: there is no "=".
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InputError(f"'{text}' is not of the form name=value")
    return name.strip(), value.strip()


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    commands = {"train": train, "tune": tune, "check": check, "plan": plan, "report": report, "notebook": notebook, "export": export}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="detrdistill", description=__doc__)
    except (InputError, NonFiniteError) as error:
        # A process that loads images hands its whole traceback over, and the message at its end.
        leave(2, f"error: {str(error).rpartition('InputError: ')[2].strip()}\n")
    except StoppedError as stopped:  # all processes together
        print(f"stopped: {stopped}", file=sys.stderr)
        sys.exit(TERMINATED)
    except KeyboardInterrupt:
        leave(130)
    except Exception:
        if not of_many():
            raise
        leave(1, traceback.format_exc())


def of_many() -> bool:
    """Whether this process is one of several of torchrun."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def leave(code: int, said: str = "") -> NoReturn:
    """Say it and end this process; under torchrun at once, so that it ends the others, which may wait for this one.

    On GPUs Fabric has Python wait at its exit until all processes have closed their connections (NCCL's), hours for those that wait.
    """
    try:
        sys.stderr.write(said)
        sys.stderr.flush()
        sys.stdout.flush()
    finally:  # nothing can be said on a full disk
        if of_many():
            os._exit(code)
    sys.exit(code)
