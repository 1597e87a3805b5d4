"""Commands on data and on stored results."""

import sys
from json import dumps as to_json
from pathlib import Path

import tyro

from detrdistill.errors import InputError


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
