"""How the cost of a distillation step grows with queries, image, objects and teacher: `make benchmark` runs it after distillation.py.

DETRDistill teaches an R50 of random weights: 6/6 layers, one image, float32. One thing grows at a time, from a base that is the same for
all. Every step has a fresh process, so that nothing that an earlier one left behind is in its memory. Memory is the most that process
held beyond its libraries: weights, gradients, and what the step keeps; no optimizer. Seconds are those that the process had its one core.
Rounds go through all points, and a point's time is the median of its rounds.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import torch

from benchmarks import distillation
from benchmarks.detectors import DETECTORS, FRESH, resident
from benchmarks.distillation import build, make_batch, measure, recipes
from benchmarks.measure import Table, make_parser, spread, table_path
from detrdistill.distill.build import build_distiller
from detrdistill.recipes.methods import DETRDistill
from detrdistill.recipes.parts import BackboneRecipe
from detrdistill.runs.provenance import commit

ALONE = "none"  # the student without a teacher
PARTS = {  # what they are called in the table and by `measure`
    "teacher": "teacher",
    "encoder": "encode",
    "decoder": "decode",
    "matching": "matching",
    "losses": "losses",
    "backward": "backward",
}
COLUMNS = ("detector", "grows", "value", *PARTS, "step", "low", "high", "MiB")  # of parts and step: seconds


@dataclass(frozen=True)
class Point:
    """What a step is given. `side` in pixels, `objects` an image, `teacher` a backbone or `ALONE`."""

    queries: int = 300
    side: int = 512
    objects: int = 7
    teacher: str = "resnet101"


@dataclass(frozen=True)
class Scale:
    """What is measured: `grown` has the values of each thing, the base's among them."""

    preset: str
    base: Point
    grown: Mapping[str, Sequence[int | str]]
    rounds: int


SCALES = {
    "full": Scale(
        "coco",
        Point(),
        {
            "queries": (100, 300, 600, 900),
            "side": (320, 512, 800, 1333),
            "objects": (1, 7, 100, 300),
            "teacher": (ALONE, "resnet18", "resnet50", "resnet101"),
        },
        2,
    ),
    "quick": Scale("coco", Point(side=256), {"queries": (100, 300), "side": (128, 256)}, 1),
    "small": Scale("smoke", Point(20, 64, 7, "resnet18"), {"queries": (20, 40), "teacher": (ALONE, "resnet18")}, 1),
}


def cost(detector: str, preset: str, point: Point) -> dict[str, float]:
    """Seconds of one step and its parts, and MiB, in a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    before = resident("VmRSS")
    taught_by, recipe = recipes(detector, replace(distillation.SCALES["full"], preset=preset, queries=point.queries))
    student, teacher = build(recipe, "cpu"), None
    if point.teacher != ALONE:
        taught_by = taught_by.replace(backbone=BackboneRecipe(name=point.teacher, dilation=recipe.backbone.dilation))
        teacher = build(taught_by, "cpu").eval().requires_grad_(False)
        recipe = recipe.replace(methods=(DETRDistill(),), teacher=taught_by)
    distiller = build_distiller(student, recipe).to(memory_format=torch.channels_last).train()
    pixels, padding, targets = make_batch(point.side, point.side, "cpu", 1, point.objects)
    found = measure(distiller, teacher, (pixels, padding.zero_(), targets), "cpu")
    parts = {part: found.get(called, 0.0) for part, called in PARTS.items()}
    return parts | {"step": found["step"], "MiB": resident("VmHWM") - before}


def grow(detector: str, scale: Scale) -> Iterator[dict[str, object]]:
    """A row for each value of each thing; the base, which all of them share, is measured once a round."""
    points = {(name, value): replace(scale.base, **{name: value}) for name, values in scale.grown.items() for value in values}
    found: dict[Point, list[dict[str, float]]] = {point: [] for point in points.values()}
    for _ in range(scale.rounds):
        for point, rounds in found.items():
            with ProcessPoolExecutor(1, FRESH) as pool:
                rounds.append(pool.submit(cost, detector, scale.preset, point).result())
    for (name, value), point in points.items():
        medians = {part: statistics.median(one[part] for one in found[point]) for part in (*PARTS, "MiB")}
        yield {"detector": detector, "grows": name, "value": value} | medians | spread([one["step"] for one in found[point]], "step")


def main(words: Sequence[str] | None = None) -> None:
    arguments = make_parser(__doc__).parse_args(words)
    scale = SCALES[arguments.scale]
    FRESH.set_forkserver_preload(["benchmarks.detectors", "benchmarks.distillation"])
    table = Table(table_path(arguments, "growth.csv"), COLUMNS)
    base = f"{scale.base.queries} queries, {scale.base.side} px, {scale.base.objects} objects, teacher {scale.base.teacher}"
    table.start(f"commit {commit()}; torch {torch.__version__}, one CPU thread; one image; base: {base}; medians of {scale.rounds}")
    for detector in DETECTORS:
        for row in grow(detector, scale):
            table.add(row)


if __name__ == "__main__":
    main()
