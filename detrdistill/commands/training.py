"""Commands that train."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

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
    logger: str = "",
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
        logger: tensorboard, to watch: tensorboard --logdir results/<preset>/runs. No number depends on it.
    """
    from detrdistill.checkpoints.presets import choose_presets
    from detrdistill.parameters import assigned, is_run_id, named_run, on_other_data, refuse_models, shared_with_teacher, with_switches
    from detrdistill.recipes.presets import detectors_of
    from detrdistill.runs.store import Store, open_store
    from detrdistill.training.logging import check_logger

    check_logger(logger)
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

    taken = reference and not set and data is None
    record = run(recipe, store, device=device, workers=workers, reference=taken, logger=logger)
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
