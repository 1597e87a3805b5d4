"""Measure what the design promises, as ratios within one run: `make benchmark` writes benchmarks/results.csv.

Cores are shared and noisy: each line is a median of repeats with its spread, and compares two things timed in turn.
"""

import contextlib
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from faster_coco_eval import COCOeval_faster
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.optimize import linear_sum_assignment
from torchvision.ops import generalized_box_iou

from benchmarks.measure import ROOT, Clock, Table, make_parser, seconds, spread, table_path
from detrdistill.boxes import cxcywh_to_xyxy
from detrdistill.criterion import ALPHA, CLASS, GAMMA, GIOU, L1, target_cost
from detrdistill.distill.build import build_distiller
from detrdistill.matching import Problem, match
from detrdistill.models import build_detector
from detrdistill.models.outputs import DetectorOutput, Targets
from detrdistill.process import keep_freed_memory
from detrdistill.recipes.presets import get_preset
from detrdistill.runs.load import open_split
from detrdistill.runs.provenance import commit
from detrdistill.runs.store import Store
from detrdistill.training.batches import Draws, micro_batches
from detrdistill.training.evaluation import coco_metrics

REFERENCE = ROOT / "results" / "reference" / "quick"
FRESH = "make reproduce from a fresh clone, set-up included, 2 cores"
Row = dict[str, object]


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        repeats: of what takes a moment, and of what takes seconds.
        preset: whose distillation step is timed.
        shape: stages, images and queries that are matched.
        images: that are evaluated, with 100 detections each.
    """

    repeats: tuple[int, int]
    preset: str
    shape: tuple[int, int, int]
    images: int


SCALES = {
    "full": Scale((7, 3), "quick", (6, 16, 300), 5000),
    "quick": Scale((3, 1), "quick", (6, 16, 300), 400),
    "small": Scale((1, 1), "smoke", (2, 2, 20), 10),
}


def ratio(what: str, ours: Callable[[], object], theirs: Callable[[], object], aim: str, repeats: int) -> Row:
    """Time of `ours` over time of `theirs`, in turn, after one warm-up each."""
    ours(), theirs()
    return {"what": what, **spread([seconds(ours) / seconds(theirs) for _ in range(repeats)]), "unit": "x", "aim": aim}


def import_time(scale: Scale) -> Row:
    return {"what": "import detrdistill, interpreter included", **command_time("import detrdistill", scale.repeats[0]), "aim": "< 2"}


def help_time(scale: Scale) -> Row:
    code = "import sys; from detrdistill.cli import main; sys.argv = ['detrdistill', '--help']; main()"
    return {"what": "detrdistill --help, interpreter included", **command_time(code, scale.repeats[0]), "aim": "< 0.5"}


def first_cell_time(scale: Scale) -> Row:
    """What all notebooks begin with, in a fresh interpreter; a kernel's own start comes on top."""
    cells = json.loads((ROOT / "notebooks" / "00_quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    first = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return {"what": "first cell of a notebook, interpreter included", **command_time(first, scale.repeats[0]), "aim": "< 2"}


def report_time(scale: Scale) -> Row:
    """Of the runs that are committed, copied: the report is written beside them."""
    few = ", formats=['png'], figures=['main_results']" if scale.preset == "smoke" else ""
    code = f"from detrdistill.report.write import write_report; write_report('quick', (0,){few})"
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(REFERENCE / "runs", Path(folder) / "quick" / "runs")
        found = command_time(code, scale.repeats[1], DETRDISTILL_RESULTS=folder)
    return {"what": "report of preset quick, interpreter included", **found, "aim": "seconds"}


def command_time(code: str, repeats: int, **environment: str) -> Row:
    command = [sys.executable, "-c", code]
    options = {"check": True, "cwd": ROOT, "env": os.environ | environment, "stdout": subprocess.DEVNULL}
    times = [seconds(lambda: subprocess.run(command, **options)) for _ in range(repeats)]
    return {**spread(times), "unit": "s"}


def distillation_step(scale: Scale) -> Row:
    """A distilled step against a plain step and the teacher's forward pass, on the preset's images."""
    preset = get_preset(scale.preset)
    dataset = open_split(preset.student, "train")
    classes = len(dataset.categories)
    (batch,) = next(iter(micro_batches(dataset, Draws(len(dataset), 16, 0, 0, 1, 1, 0, 1), 0)))
    recipe = preset.recipe("detrdistill")
    teacher = build_detector(recipe.teacher, classes).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    plain = build_distiller(build_detector(preset.student, classes), preset.student).to(memory_format=torch.channels_last)
    distilled = build_distiller(build_detector(recipe, classes), recipe).to(memory_format=torch.channels_last)

    def plain_and_teacher() -> None:
        distilled.teacher_outputs(teacher, batch.pixels, batch.padding)
        backward(plain(batch.pixels, batch.padding, batch.targets))

    def distil() -> None:
        outputs = distilled.teacher_outputs(teacher, batch.pixels, batch.padding)
        backward(distilled(batch.pixels, batch.padding, batch.targets, outputs))

    what = f"distillation step / (student step + teacher forward), {scale.preset}"
    return ratio(what, distil, plain_and_teacher, "<= 1.15", scale.repeats[0])


def backward(parts: dict[str, torch.Tensor]) -> None:
    torch.stack([part.sum() for part in parts.values()]).sum().backward()


def matching(scale: Scale) -> Row:
    """All stages and images at once against the textbook matcher (all pairs of the batch, one image and stage after another)."""
    (stages, images, queries), classes = scale.shape, 80
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    def boxes(*shape: int) -> torch.Tensor:
        return torch.cat((draw(*shape, 2), draw(*shape, 2) * 0.3 + 0.02), -1)

    counts = torch.randint(1, 15, (images,), generator=generator).tolist()
    targets = Targets.pack([torch.randint(0, classes, (n,), generator=generator) for n in counts], [boxes(n) for n in counts])
    logits, states = draw(stages, images, queries, classes), draw(stages, images, queries, 4)
    output = DetectorOutput(logits, boxes(stages, images, queries), states, [], [])

    def ours() -> None:
        match({"student": Problem(target_cost(output, targets), targets.counts)})

    def textbook() -> None:
        everything = torch.cat([targets.boxes[i, :n] for i, n in enumerate(counts)])
        labels = torch.cat([targets.labels[i, :n] for i, n in enumerate(counts)])
        for stage in range(stages):
            p, found = output.logits[stage].flatten(0, 1).sigmoid(), output.boxes[stage].flatten(0, 1)
            focal = ALPHA * (1 - p) ** GAMMA * -(p + 1e-8).log() - (1 - ALPHA) * p**GAMMA * -(1 - p + 1e-8).log()
            giou = generalized_box_iou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(everything))
            cost = CLASS * focal[:, labels] + L1 * torch.cdist(found, everything, p=1) - GIOU * giou
            for image, block in enumerate(cost.view(images, queries, -1).split(counts, -1)):
                linear_sum_assignment(block[image].cpu().numpy())

    what = f"matching / textbook matcher, {images} images, {stages} stages, {queries} queries"
    return ratio(what, ours, textbook, "<= 0.33", scale.repeats[0])


def evaluation(scale: Scale) -> Iterator[Row]:
    """pycocotools against faster-coco-eval as the kit calls it, with seven objects and 100 detections an image.

    A second row holds pycocotools against that library's own part: what the kit would reach if nothing stood around it.
    """
    rng, count = np.random.default_rng(0), scale.images
    images = [{"id": i, "width": 640, "height": 480} for i in range(count)]

    def box() -> list[float]:
        return [*rng.uniform(0, 400, 2).tolist(), *rng.uniform(8, 200, 2).tolist()]

    annotations = [
        {
            "id": i + 1,
            "image_id": i % count,
            "category_id": int(rng.integers(1, 11)),
            "bbox": (b := box()),
            "area": b[2] * b[3],
            "iscrowd": 0,
        }
        for i in range(7 * count)
    ]
    dataset = {"info": {}, "images": images, "annotations": annotations, "categories": [{"id": i, "name": str(i)} for i in range(1, 11)]}
    found = [
        {"image_id": i % count, "category_id": int(rng.integers(1, 11)), "bbox": box(), "score": float(rng.random())}
        for i in range(100 * count)
    ]

    def theirs() -> list[float]:
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO()
            truth.dataset = dataset
            truth.createIndex()
            evaluator = COCOeval(truth, truth.loadRes([dict(one) for one in found]), "bbox")
            evaluator.evaluate(), evaluator.accumulate(), evaluator.summarize()
            return [100 * float(value) for value in evaluator.stats]

    # Measured the other way round: how many times as long pycocotools takes.
    clock, whole, inside = Clock("cpu", wall=True), [], []
    with patch.object(COCOeval_faster, "run", clock.wrap("inside", COCOeval_faster.run)):
        pairs = zip(theirs(), coco_metrics(dataset, found).values(), strict=True)
        apart = max(abs(one - (-100 if other is None else other)) for one, other in pairs)  # pycocotools says -1 where nothing is defined
        for _ in range(scale.repeats[1]):
            of_pycocotools = seconds(theirs)
            clock.spent.clear()
            whole.append(of_pycocotools / seconds(lambda: coco_metrics(dataset, found)))
            inside.append(of_pycocotools / clock.spent["inside"])
    sizes = f"({count:,} images, {len(found):,} detections)"
    yield {"what": f"pycocotools / our COCO evaluation {sizes}", **spread(whole), "unit": "x", "aim": ">= 10"}
    yield {"what": f"pycocotools / faster-coco-eval's own part of it {sizes}", **spread(inside), "unit": "x", "aim": "-"}
    yield once(f"largest difference of the twelve numbers {sizes}", apart, "%", "0")


# Nothing of this benchmark's own call may reach the new one: neither make's variables nor where caches and results lie.
NOT_PASSED_ON = ("OMP_NUM_THREADS", "MAKE", "MFLAGS", "PYTHON", "DETRDISTILL_")
PLAIN = ("PRESET=quick", "SEEDS=0", "TABLE=", "DETECTORS=", "TEACHER=", "START=", "GPUS=", "DRY=", "ARGS=", "PYTHON=python3")


def fresh_clone(folder: Path) -> Row:
    """`make reproduce` as a newcomer calls it, from a clone, set-up included. Only pip's cache is warm. It is done once.

    Raises:
        RuntimeError: a command failed; with the last of what it said.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(NOT_PASSED_ON)}
    environment |= {"DETRDISTILL_DATA": str(folder / "cache")}
    clone = folder / "clone"

    def reproduce() -> None:
        for command in (["git", "clone", "--quiet", ROOT, clone], ["make", "--directory", clone, "reproduce", "CORES=2", *PLAIN]):
            ended = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
            if ended.returncode:
                raise RuntimeError(f"{' '.join(map(str, command))}: {ended.stderr[-2000:]}")

    return once(FRESH, seconds(reproduce), "s", "< 360")


def stored_runs(store: Store) -> Iterator[Row]:
    """Seconds, memory and AP of the quick preset's runs, and the published gains, from their records."""
    preset = get_preset("quick")
    for setting in ("teacher", "student", "detrdistill"):
        if record := store.record(preset.recipe(setting)):
            yield once(f"quick {setting}: training", record.cost["seconds"], "s", "-")
            yield once(f"quick {setting}: peak memory", record.cost["peak_memory_mib"] / 1024, "GiB", "< 4")
            yield once(f"quick {setting}: AP", record.metrics["AP"], "%", ">= 45" if setting == "teacher" else "-")
    reference = Store(REFERENCE)
    runs = [[reference.record(preset.recipe(setting, seed)) for setting in ("student", "detrdistill")] for seed in range(3)]
    gains = [distilled.metrics["AP"] - plain.metrics["AP"] for plain, distilled in runs]
    found = {"value": statistics.mean(gains), "low": min(gains), "high": max(gains)}
    yield {"what": "reference: gain of DETRDistill, three seeds", **found, "unit": "AP", "aim": "> 0 each"}


def once(what: str, value: float, unit: str, aim: str) -> Row:
    return {"what": what, "value": value, "low": value, "high": value, "unit": unit, "aim": aim}


def main(words: Sequence[str] | None = None) -> None:
    arguments = make_parser(__doc__).parse_args(words)
    scale = SCALES[arguments.scale]
    torch.set_num_threads(1)
    keep_freed_memory()  # as the trainer does on a CPU
    table = Table(table_path(arguments, "results.csv"), ("what", "value", "low", "high", "unit", "aim"))
    repeats = " and ".join(map(str, scale.repeats))
    about = f"commit {commit()}; {platform.system()} {platform.machine()}; torch {torch.__version__}, one thread; medians of {repeats}"
    table.start(about)
    for measure in (import_time, help_time, first_cell_time, report_time, matching, distillation_step):
        table.add(measure(scale))
    for row in evaluation(scale):
        table.add(row)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.scale == "full":
            table.add(fresh_clone(Path(folder)))
        for row in stored_runs(Store(Path(folder) / "clone" / "results" / "quick")):
            table.add(row)


if __name__ == "__main__":
    main()
