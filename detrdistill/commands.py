"""The commands of `detrdistill`, a function each: its signature is the command line, its docstring the help.

What they need is imported when they run: torch takes seconds, and a mistyped parameter should not.
"""

import sys
from functools import partial
from json import dumps as to_json
from pathlib import Path
from typing import Annotated

import tyro

from detrdistill.errors import InputError

RowName = Annotated[str, tyro.conf.arg(help="teacher, student, a method such as detrdistill or fgd+mgd, or the id of a run")]


def train(
    preset: tyro.conf.Positional[str],
    row: tyro.conf.Positional[RowName],
    /,
    detector: str | None = None,
    seed: int = 0,
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    data: Path | None = None,
    teacher: str = "",
    start: str = "",
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
        detector: deformable_detr, conditional_detr, adamixer, rt_detr_v2 or d_fine, as far as the preset has recipes for it; without,
            the published detector's, or deformable_detr.
        seed: of the student.
        set: a field of the recipe and its value, such as schedule.lr=1e-4, or a switch of a method, such as detrdistill.variant=released
            or fgd.maps=features; may be repeated. resize, data and precision are the teacher's too; its other fields are
            teacher.schedule.lr and so on.
        data: folder of COCO json and images, instead of the preset's data.
        teacher: a published detector that teaches: a checkpoint file, a Hugging Face folder, a run's folder or id, or a hub id
            (org/name or org/name@revision). What it does not tell: --set teacher.heads=8 and so on.
        start: a detector that the student starts from, named likewise; the student then has its sizes.
        results: folder for runs instead of results/<preset>.
        device: auto, cpu, cuda, or cuda:1 for the second GPU.
        workers: processes that load images; without, up to four beside a GPU, and none on the CPU.
    """
    from detrdistill.checkpoints.presets import choose_presets
    from detrdistill.parameters import assigned, is_run_id, named_run, on_other_data, refuse_models, shared_with_teacher, with_switches
    from detrdistill.recipes.presets import detectors_of
    from detrdistill.runs.store import Store, open_store

    changes = assigned(set)
    refuse_models(changes)
    detectors = [detector] if detector else []
    if is_run_id(row):  # it is looked for in the tables of all
        detectors = [] if teacher or start else detectors_of(preset)
    presets = choose_presets(preset, detectors, teacher, start, changes, say=partial(print, file=sys.stderr))
    recipe, reference = named_run(presets, row, seed) or (presets[0].recipe(row, seed), False)
    if data is not None:
        recipe = on_other_data(recipe, data)
    recipe = with_switches(recipe, changes)
    recipe = recipe.replace(**shared_with_teacher(recipe, changes))
    store = Store(results) if results else open_store(preset)

    from detrdistill.runs.run import run  # only now: torch takes seconds, a mistyped parameter should not

    record = run(recipe, store, device=device, workers=workers, reference=reference and not set and data is None)
    shown = ", ".join(f"{name} {value:.1f}" for name, value in record.metrics.items() if value is not None)
    if record.test:
        shown += "; on the test images " + ", ".join(f"{name} {value:.1f}" for name, value in record.test.items() if value is not None)
    if (taught := record.parents.get("teacher")) is not None:
        shown += f"; taught by {taught['run']} (AP {taught['AP']:.1f})"
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
    from detrdistill.parameters import assigned
    from detrdistill.recipes.parts import Folder
    from detrdistill.recipes.presets import get_preset

    recipe = get_preset(preset, detector).student
    changes = {name.removeprefix("data."): value for name, value in assigned(set).items()}
    found = check_folder(Folder(path=folder).replace(**changes), recipe)
    print(to_json(found) if json else "\n".join(check_lines(found)))
    if unreadable := found["unreadable"]:
        raise InputError("; ".join(unreadable[:10]) + (f"; and {len(unreadable) - 10} more" if len(unreadable) > 10 else ""))


def evaluate(
    model: tyro.conf.Positional[str],
    /,
    data: Path,
    split: str = "val",
    out: Path = Path("evaluation"),
    outputs: tuple[str, ...] = (),
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    batch: int = 1,
    device: str = "auto",
    workers: int | None = None,
) -> None:
    """Measure any detector that the kit reads: the twelve COCO numbers, AP a class, and results.json in COCO's format.

    Images are prepared as the detector wants them. Classes are found by name; the detector may know more than the data has.

    Args:
        model: a checkpoint file, a Hugging Face folder, a run's folder or id, or a hub id.
        data: folder of COCO json and images.
        split: val, train or test.
        out: folder for results.json.
        outputs: names of the classes of the file's outputs, where it does not say them.
        set: what the file does not say, such as heads=8 or points=4, or resize.short=640, or part=student of a file that holds several
            models; may be repeated.
        batch: images at once; padding changes the numbers of some detectors a little.
        device: auto, cpu, cuda, or cuda:1 for the second GPU.
        workers: processes that load images; without, up to four beside a GPU, and none on the CPU.
    """
    from detrdistill.checkpoints.locate import locate
    from detrdistill.parameters import assigned
    from detrdistill.runs.evaluate import evaluate_model

    settings = assigned(set)
    how = {"device": device, "batch": batch, "workers": workers, "outputs": outputs, "settings": settings}
    found = evaluate_model(locate(model).path, data, split, **how)
    print(found.text())
    print(f"\n{found.write(out)}")


def report(
    preset: str = "quick",
    seeds: tuple[int, ...] = (),
    tables: tuple[str, ...] = (),
    detectors: tuple[str, ...] = (),
    figures: tuple[str, ...] = (),
    width: str = "7.2",
    font: str = "sans",
    size: float = 8.5,
    formats: tuple[str, ...] = ("png", "pdf"),
    out: Path | None = None,
    reference: bool = True,
    teacher: str = "",
    start: str = "",
) -> None:
    """Write tables, figures and the page of a preset again, from its stored records; nothing is trained.

    Figures of another look, or some of them alone, are for a paper: they go with their tables to results/<preset>/paper, and the
    report stays as it is.

    Args:
        preset: smoke, quick, mini, bccd or coco.
        seeds: of the students; without, all that have a record.
        tables: names of tables; without, those that are there already and the preset's usual ones.
        detectors: names of detectors; without, all that the preset has recipes for.
        figures: names of figures, such as forest or main_results; without, all.
        width: of the figures: inches, or one-column (3.3) or two-column (7.0).
        font: of the figures: sans or serif.
        size: of the figures' text, in points, when they are included unscaled.
        formats: of the figures: png, pdf, svg.
        out: folder for tables and figures, without a page, instead of the preset's.
        reference: where no run is stored, report the committed ones of results/reference.
        teacher: the published detector that taught, as in train.
        start: the one that the students started from, as in train.
    """
    from detrdistill.figures import style
    from detrdistill.report.write import stored_seeds, write_report
    from detrdistill.runs.reference import to_show
    from detrdistill.runs.store import open_store

    look, store = style.Look(style.read_width(width), font, size), open_store(preset)
    if figures or look != style.Look():
        out = out or store.root / "paper"
    source = to_show(preset, store) if reference else store
    if source is not store:
        print(f"{store.root} has no complete run yet: this is a report of the committed reference, {source.root}", file=sys.stderr)
    seeds = seeds or stored_seeds(preset, tables, detectors, source, teacher=teacher, start=start)
    with style.drawn_as(look):
        paths = write_report(preset, seeds, store.root, tables, detectors, source, formats, figures, out, teacher=teacher, start=start)
    print(*paths, sep="\n")


def plan(
    preset: str = "quick",
    seeds: tuple[int, ...] = (0,),
    tables: tuple[str, ...] = (),
    detectors: tuple[str, ...] = (),
    teacher: str = "",
    start: str = "",
) -> None:
    """List the runs that tables still miss, with the time that they are expected to take; nothing is run.

    Args:
        preset: smoke, quick, mini, bccd or coco.
        seeds: of the students.
        tables: names of tables; the preset's usual ones if none are named.
        detectors: names of detectors; all that the preset has recipes for if none are named.
        teacher: a published detector that teaches, as in train.
        start: one that the students start from, as in train.
    """
    from detrdistill.runs.plan import plan_text

    print(plan_text(preset, seeds, tables, detectors, teacher=teacher, start=start))


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

    from detrdistill.parameters import assigned

    if output.is_dir():
        raise InputError(f"output {output}: is a folder; name the notebook to write")
    execute(source, output, assigned(parameters))


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


COMMANDS = (train, tune, check, evaluate, plan, report, notebook, export)
