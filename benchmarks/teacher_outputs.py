"""What keeping the teacher's outputs saves on preset bccd: `python -m benchmarks.teacher_outputs`.

It needs data/bccd (docs/real_photographs.md); without, it says so and measures nothing.

A step is the trainer's, between batch and optimizer: the teacher, the losses, the backward pass. Five kinds in turn within one process:
the student alone; the student alone, but decoding the method's further groups of queries, forward and backward, for nothing; and
distillation with the teacher's outputs computed, read from disk, and taken from memory. Weights are random, images are the data set's,
drawn as in training. On one CPU thread time is what the process had a core for, which other work on the machine changes little.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter, process_time

import torch
from lightning_fabric import Fabric

from benchmarks.distillation import groups_of
from benchmarks.measure import Table, make_parser, spread, table_path
from detrdistill.data.coco import Batch, CocoDataset
from detrdistill.distill.build import build_distiller
from detrdistill.distill.distiller import Distiller
from detrdistill.errors import InputError
from detrdistill.models import build_detector
from detrdistill.process import keep_freed_memory
from detrdistill.recipes.presets import DETECTORS_OF, get_preset
from detrdistill.recipes.recipe import Recipe
from detrdistill.recipes.words import DETECTORS
from detrdistill.runs.load import open_split
from detrdistill.runs.provenance import commit
from detrdistill.training.batches import Draws, micro_batches
from detrdistill.training.fabric import make_fabric
from detrdistill.training.teacher_outputs import KeptOutputs, Teacher, kept_outputs
from detrdistill.training.trainer import accumulate_gradients

METHODS = ("detrdistill", "fgd")  # with a second group of queries, and without
KINDS = ("student", "student and decoding", "computed", "disk", "memory")
COLUMNS = ("detector", "method", "step", "milliseconds", "low", "high", "of student and decoding", "ratio low", "ratio high", "aim")


def distillers(recipe: Recipe, classes: int) -> dict[str, Distiller]:
    """For the student alone, with a second group of queries where the method has one, and under the method."""
    student = build_detector(recipe, classes)
    found = {"student": Distiller(student), "method": build_distiller(student, recipe)}
    return found | {"student and decoding": groups_of(found["method"])}


def step(fabric: Fabric, distiller: Distiller, teacher: Callable | None, batch: Batch, recipe: Recipe) -> float:
    """Seconds of one step."""
    on_gpu = fabric.device.type == "cuda"
    clock = perf_counter if on_gpu else process_time
    distiller.zero_grad()
    if on_gpu:
        torch.cuda.synchronize(fabric.device)
    start = clock()
    accumulate_gradients(fabric, distiller, teacher, [batch], recipe.schedule)
    if on_gpu:
        torch.cuda.synchronize(fabric.device)
    return clock() - start


def measure(fabric: Fabric, recipe: Recipe, data: CocoDataset, repeats: int, folder: Path) -> list[dict[str, object]]:
    """All kinds of steps for one method, `repeats` times in turn, each time with another batch."""
    torch.manual_seed(0)
    made = distillers(recipe, len(data.categories))
    detector = build_detector(recipe.teacher, len(data.categories)).eval().requires_grad_(False)
    detector.to(fabric.device, memory_format=torch.channels_last)
    for distiller in made.values():
        distiller.to(fabric.device, memory_format=torch.channels_last).train()
    modules = {name: fabric.setup_module(distiller) for name, distiller in made.items()}

    def kept() -> KeptOutputs:
        return kept_outputs(fabric, made["method"], data, recipe, "teacher", "0" * 64, folder)

    with_outputs = {kind: Teacher(detector, made["method"], kept() if kind in ("disk", "memory") else None) for kind in KINDS}
    draws = Draws(len(data), recipe.schedule.batch, recipe.seed, 0, repeats + 1, 1, 0, 1)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for (batch,) in micro_batches(data, draws, workers=0):
        given = fabric.to_device(batch.pixels).contiguous(memory_format=torch.channels_last), fabric.to_device(batch.padding)
        with fabric.autocast():
            held = with_outputs["memory"](batch, *given)  # so that it is kept, in memory and on disk
        with_outputs["disk"].kept = kept()  # knows nothing yet: reads and checks the files
        teachers = with_outputs | {"student": None, "student and decoding": lambda *_, held=held: held}
        for kind in KINDS:
            seconds = step(fabric, modules.get(kind, modules["method"]), teachers[kind], batch, recipe)
            times[kind].append(seconds)
    return [row(recipe, kind, {name: some[1:] for name, some in times.items()}) for kind in KINDS]  # the first one warms up


def row(recipe: Recipe, kind: str, times: dict[str, list[float]]) -> dict[str, object]:
    ratios = [one / other for one, other in zip(times[kind], times["student and decoding"], strict=True)]
    return {
        "detector": recipe.detector,
        "method": recipe.methods[0].name,
        "step": kind,
        **{name: round(1000 * seconds, 1) for name, seconds in spread(times[kind], "milliseconds").items()},
        **dict(zip(("of student and decoding", "ratio low", "ratio high"), spread(ratios).values(), strict=True)),
        "aim": "<= 1.15" if kind in ("disk", "memory") else None,
    }


def main(words: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cpu", help="cpu (one thread) or cuda")
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    keep_freed_memory()  # as the trainer does on a CPU
    repeats, methods = (7, METHODS) if arguments.scale == "full" else (3, METHODS[:1])
    name = "smoke" if arguments.scale == "small" else "bccd"
    pairs = [(detector, method) for detector in DETECTORS_OF.get(name, DETECTORS) for method in methods]
    recipes = [get_preset(name, detector).recipe(method).replace(**{"resize.train": "flip"}) for detector, method in pairs]
    try:
        splits = [open_split(recipe, "train") for recipe in recipes]
    except InputError as missing:
        print(f"not measured: {missing}")
        return
    device = "one CPU thread" if arguments.device == "cpu" else torch.cuda.get_device_name()
    table = Table(table_path(arguments, "teacher_outputs.csv"), COLUMNS)
    table.start(f"commit {commit()}; torch {torch.__version__}; {device}; preset {name}; medians of {repeats} steps with their range")
    with tempfile.TemporaryDirectory() as folder:
        for recipe, data in zip(recipes, splits, strict=True):
            fabric = make_fabric(arguments.device, recipe.precision)
            for found in measure(fabric, recipe, data, repeats, Path(folder) / recipe.detector):
                table.add(found)


if __name__ == "__main__":
    main()
