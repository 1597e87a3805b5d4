"""`run(recipe)` trains, or returns the stored record. What a run depends on (teacher, crop-trained backbone) is run first."""

import logging
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from detrdistill.any_detr.build import build_any
from detrdistill.data.coco import CocoDataset, open_dataset
from detrdistill.data.layout import data_cache, data_hash
from detrdistill.distill.build import build_distiller
from detrdistill.errors import InputError
from detrdistill.files import file_hash, nearby
from detrdistill.models.backbones import imagenet_version
from detrdistill.models.weights import classes_text, save_weights
from detrdistill.process import keep_freed_memory
from detrdistill.recipes.identity import parents, run_id
from detrdistill.recipes.recipe import CropRecipe, Recipe
from detrdistill.records import Record
from detrdistill.runs.continuing import continue_shorter
from detrdistill.runs.load import load_detector, open_split, open_splits, open_test, require_usable, start_backbone, start_detector, tell
from detrdistill.runs.pinned import pinned
from detrdistill.runs.provenance import code, provenance
from detrdistill.runs.reference import take
from detrdistill.runs.store import Store
from detrdistill.runs.watch import Watch
from detrdistill.training.batches import mix
from detrdistill.training.crops import train_on_crops
from detrdistill.training.evaluation import changes, evaluate
from detrdistill.training.fabric import loaders, make_fabric
from detrdistill.training.logging import check_logger, make_loggers
from detrdistill.training.teacher_outputs import Teacher, kept_outputs
from detrdistill.training.trainer import train

LOG = logging.getLogger(__name__)
NOT_TAKEN = ("fresh", "dropped")  # classes that start afresh, and outputs for classes that the data does not have
ON_CUDA = "sums of backward passes, in any order: grid_sample (which has no other form), indexing, interpolation"


def run(
    recipe: Recipe | CropRecipe,
    store: Store,
    *,
    device: str = "auto",
    workers: int | None = None,
    progress: bool = True,
    keep_teacher_outputs: bool = True,
    reference: bool = False,
    logger: str = "",
) -> Record:
    """Train what `recipe` says and evaluate it, or return the record if that has been done.

    An interrupted run continues from its last checkpoint. What the run depends on is run first, or taken from the committed reference.
    Under torchrun all processes call this and train together.

    Args:
        device: "auto" (cuda if there is one), "cpu", "cuda", or "cuda:1" for the second GPU. Not part of the recipe, but in the record.
        workers: processes that load images, which changes no number; 0 loads them in this one. None: as many as `loaders` says.
        keep_teacher_outputs: under `resize.train` "none" or "flip" the teacher's outputs are kept in `teacher_outputs` of the data
            cache; `training.teacher_outputs` says how equal they are. False: the teacher computes them in every step.
        reference: whether this run may be taken from the committed reference (`runs.reference`), as its parents may.
        logger: "tensorboard" for losses, learning rate and AP in `tensorboard/` of the run's folder, while it trains.

    Raises:
        InputError: data, weights or folders are not usable, another process trains this run, the teacher is below its floor, or its
            kept outputs are damaged or another teacher's.
        NonFiniteError: training met a NaN or an infinity.
        StoppedError: SIGTERM came while training.
    """
    if workers is not None and workers < 0:
        raise InputError(f"workers {workers}: a number of processes; give 0 or more")
    check_logger(logger)
    how = {"device": device, "workers": workers, "progress": progress, "keep_teacher_outputs": keep_teacher_outputs}
    return _run(pinned(recipe), store, reference, **how, logger=logger)


def _run(
    recipe: Recipe | CropRecipe,
    store: Store,
    reference: bool,
    *,
    device: str,
    workers: int | None,
    progress: bool,
    keep_teacher_outputs: bool,
    logger: str,
) -> Record:
    """`run` of a recipe that states its data's content. A record is looked up here, once more under the lock, and then handed on."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 and (record := _look_up(recipe, store, reference)) is not None:
        return record
    code()
    precision = recipe.backbone.crops.precision if isinstance(recipe, CropRecipe) else recipe.precision
    fabric = make_fabric(device, precision, [] if isinstance(recipe, CropRecipe) else make_loggers(logger, store.folder(recipe)))
    # The first process looks: what each saw on a shared disk for itself could differ.
    record = fabric.broadcast(_look_up(recipe, store, reference) if fabric.world_size > 1 and fabric.is_global_zero else None)
    if record is not None:
        return record
    workers = loaders(fabric) if workers is None else workers
    if isinstance(recipe, CropRecipe):
        if fabric.is_global_zero:
            with store.hold(recipe):  # another process may have finished it since
                record = store.record(recipe) or _run_crops(fabric, recipe, store, progress)
    else:
        if not all(store.record(parent) for parent in parents(recipe).values()):
            require_usable(recipe)
        how = {"device": device, "workers": workers, "progress": progress, "keep_teacher_outputs": keep_teacher_outputs, "logger": logger}
        records = {}
        for name, parent in parents(recipe).items():
            records[name] = _run(parent, store, True, **how)
            if getattr(parent, "published", False) and parent.data == recipe.data:  # refused now, not after a backbone has been trained
                _require_floor(recipe, records[name].id, records[name].metrics["AP"])
        with store.hold(recipe) if fabric.is_global_zero else nullcontext():
            record = fabric.broadcast(store.record(recipe) if fabric.is_global_zero else None)
            if record is None:
                if recipe.published:
                    record = _run_published(fabric, recipe, store, workers)
                else:
                    record = _run_detector(fabric, recipe, store, records, workers, progress, keep_teacher_outputs)
    fabric.barrier()
    return fabric.broadcast(record)


def _look_up(recipe: Recipe | CropRecipe, store: Store, reference: bool) -> Record | None:
    return stored(recipe, store) or (take(recipe, store) if reference else None)


def stored(recipe: Recipe | CropRecipe, store: Store) -> Record | None:
    """The record, if there is one.

    Raises:
        InputError: the backbone started from other weights than those that now go by that name: a file's path, or torchvision's.
    """
    record = store.record(recipe)
    weights, about = recipe.backbone.weights, (record.parents if record else {}).get("backbone", {})
    if isinstance(weights, Path) and "sha256" in about and nearby(weights).is_file():
        now, then = file_hash(nearby(weights)), about["sha256"]
    elif weights == "imagenet" and "weights" in about:
        now, then = str(imagenet_version(recipe.backbone.name)), about["weights"]
    else:
        return record
    if now != then:
        raise InputError(
            f"backbone weights {weights} are others now ({now}) than run {record.id} started from ({then}); give a new file a name "
            "of its own, or delete the run's folder to train it again"
        )
    return record


def _run_crops(fabric: Fabric, recipe: CropRecipe, store: Store, progress: bool) -> Record:
    # Crops are cut from the images as they are: the transform is never applied.
    train_set, val_set = (open_dataset(recipe.data, split, data_cache(), transform=None) for split in ("train", "val"))
    tell(recipe.data, train_set, {"val": val_set})
    watch = Watch(fabric)
    model, accuracy = train_on_crops(fabric, train_set, val_set, recipe, progress=progress)
    save_weights(store.weights(recipe), model, {"run": run_id(recipe)})
    record = Record(
        id=run_id(recipe),
        recipe=recipe,
        metrics={"accuracy": accuracy},
        curve=[],
        cost=watch.cost(recipe.backbone.crops.steps, watch.seconds(), 0),
        parents={},
        provenance=_provenance(fabric, recipe, store) | {"commit": code()},
    )
    store.write(record)
    return record


def _run_published(fabric: Fabric, recipe: Recipe, store: Store, workers: int) -> Record | None:
    """Convert and measure a detector that others trained; the record, in the first process."""
    val_set, watch = open_split(recipe, "val"), Watch(fabric)
    names = [category.name for category in val_set.categories]
    detector = build_any(recipe, names)
    lineage = {"start": start_detector(detector, recipe, names)}
    detector.to(fabric.device, memory_format=torch.channels_last)
    metrics, held = _evaluate_once(fabric, detector, val_set, recipe, workers)
    if not fabric.is_global_zero:
        return None
    save_weights(store.weights(recipe), detector, {"run": run_id(recipe), "categories": classes_text(names)})
    record = Record(
        id=run_id(recipe),
        recipe=recipe,
        metrics=metrics,
        curve=[{"step": 0, "AP": metrics["AP"]} | changes(held, None)],
        cost=watch.cost(0, watch.seconds(), 0),
        parents=lineage,
        provenance=_provenance(fabric, recipe, store) | {"commit": code()},
    )
    store.write(record)
    return record


def _run_detector(
    fabric: Fabric, recipe: Recipe, store: Store, records: dict[str, Record], workers: int, progress: bool, keep_teacher_outputs: bool
) -> Record | None:
    """The record, in the first process."""
    train_set, val_set = open_splits(recipe)
    test_set = open_test(recipe, train_set)
    if fabric.is_global_zero:
        tell(recipe.data, train_set, {"val": val_set, "test": test_set}, recipe.queries)
    if recipe.schedule.batch % (recipe.schedule.accumulate * fabric.world_size):
        raise InputError(
            f"schedule.batch {recipe.schedule.batch} cannot be shared among {fabric.world_size} processes "
            f"and {recipe.schedule.accumulate} micro-batches; choose a multiple"
        )
    if fabric.device.type == "cpu":
        keep_freed_memory()
    watch = Watch(fabric)

    def measure(detector, dataset=val_set):
        return _evaluate_once(fabric, detector, dataset, recipe, workers)

    lineage: dict[str, dict[str, Any]] = {
        name: {"run": record.id, "weights_sha256": record.provenance["weights_sha256"]} for name, record in records.items()
    }
    names = [category.name for category in train_set.categories]
    student = build_any(recipe, names)
    if recipe.start is not None:
        lineage["start"] = start_detector(student, recipe, names)
        if fabric.is_global_zero and (left := [f"{name}: {lineage['start'][name]}" for name in NOT_TAKEN if name in lineage["start"]]):
            LOG.warning("%s starts from %s; not taken of its head: classes %s", recipe.title, recipe.start.path, "; ".join(left))
    elif about := start_backbone(student, recipe, store):
        lineage["backbone"] = about
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(recipe.seed, 1))  # adapters of the losses; the student has its own stream
        distiller = build_distiller(student, recipe)
    teacher = None
    if recipe.teacher is not None:
        detector = (
            load_detector(recipe.teacher, store, train_set).requires_grad_(False).to(fabric.device, memory_format=torch.channels_last)
        )
        kept, source = None, lineage["teacher"]
        if keep_teacher_outputs:
            root = data_cache() / "teacher_outputs"
            kept = kept_outputs(fabric, distiller, train_set, recipe, source["run"], source["weights_sha256"], root)
        if recipe.teacher.published and records["teacher"].provenance["data_sha256"] == data_hash(recipe.data, data_cache()):
            source |= records["teacher"].parents["start"]
            metrics = records["teacher"].metrics  # measured once, on images as it wants them
        else:
            own = {f"resize.{name}": getattr(recipe.teacher.resize, name) for name in ("mean", "std")}
            seen = recipe.replace(**own)  # as its images are normalised when it teaches
            metrics, _ = measure(detector, val_set if seen.resize == recipe.resize else open_split(seen, "val"))
        source["AP"] = metrics["AP"]
        _require_floor(recipe, source["run"], metrics["AP"])
        teacher = Teacher(detector, distiller, kept, (recipe.resize, recipe.teacher.resize))
    folder = store.folder(recipe)
    if fabric.is_global_zero:
        continue_shorter(recipe, len(train_set), store, lineage)
    fabric.barrier()
    state = train(fabric, distiller, teacher, train_set, recipe, folder, measure, workers=workers, progress=progress, commit=code())
    tested = _evaluate_once(fabric, student, test_set, recipe, workers)[0] if test_set else None
    if not fabric.is_global_zero:
        return None
    save_weights(store.weights(recipe), student, {"run": run_id(recipe), "categories": classes_text(names)})
    record = Record(
        id=run_id(recipe),
        recipe=recipe,
        metrics=state["metrics"],
        test=tested,
        curve=state["curve"],
        cost=watch.cost(state["step"], state["seconds"], state["resumed"], recipe.schedule.batch)
        | {name: state[name] for name in ("teacher_images",) if name in state},
        parents=lineage,
        provenance=_provenance(fabric, recipe, store) | {"commit": ", ".join(state["commits"]) or None},
        kept=state["kept"] | {"split": "val", "of": len(state["curve"])} if "kept" in state else None,
        continued=state.get("continued"),
    )
    store.write(record)
    if not recipe.schedule.open_ended:  # else more steps may follow
        (folder / "checkpoint.pt").unlink(missing_ok=True)
    return record


def _require_floor(recipe: Recipe, teacher: str, measured: float | None) -> None:
    if measured is None or measured <= recipe.teacher_floor:
        found = "no AP that is defined" if measured is None else f"AP {measured:.1f}"
        raise InputError(
            f"the teacher {teacher} has {found} on this data, and must exceed teacher_floor "
            f"{recipe.teacher_floor:.1f} to teach; train it longer, check its weights, or lower the floor"
        )


def _evaluate_once(
    fabric: Fabric, detector: nn.Module, dataset: CocoDataset, recipe: Recipe, workers: int
) -> tuple[dict[str, float | None], torch.Tensor]:
    """Evaluate in one process, without autocast, as many images at once as it trains on, and tell the others.

    Newer GPUs round what convolutions multiply to TF32 all the same: torch's default, left as the official codes leave it.
    """
    found = None
    if fabric.is_global_zero:
        batch = max(1, recipe.schedule.batch // (recipe.schedule.accumulate * fabric.world_size))
        found = evaluate(detector, dataset, batch, fabric.device, workers, top=detector.top)
    return fabric.broadcast(found)


def _provenance(fabric: Fabric, recipe: Recipe | CropRecipe, store: Store) -> dict[str, Any]:
    on_gpu = fabric.device.type == "cuda"
    detectors = [recipe, recipe.teacher] if isinstance(recipe, Recipe) else []
    return (
        provenance(*(["transformers"] if any(one and one.family for one in detectors) else []))
        | {
            "data_sha256": data_hash(recipe.data, data_cache()),
            "weights_sha256": file_hash(store.weights(recipe)),
            "device": torch.cuda.get_device_name(fabric.device) if on_gpu else "cpu",
            "processes": fabric.world_size,
            "threads": torch.get_num_threads(),
            "deterministic": not on_gpu,
        }
        | ({"not_deterministic": ON_CUDA} if on_gpu else {})
    )
