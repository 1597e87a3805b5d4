"""Measure what the design promises, as ratios within one run: `make benchmark` prints a table and writes benchmarks/results.csv.

Cores are shared and noisy: each line is a median of repeats with its spread, and compares two things timed in turn.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.optimize import linear_sum_assignment
from torchvision.ops import generalized_box_iou

from detrdistill.boxes import cxcywh_to_xyxy
from detrdistill.criterion import ALPHA, CLASS, GAMMA, GIOU, L1, target_cost
from detrdistill.data.coco import Batch
from detrdistill.distill.build import build_distiller
from detrdistill.experiments.presets import get_preset
from detrdistill.experiments.runs import open_split
from detrdistill.experiments.store import Store, commit, open_store
from detrdistill.files import write_text
from detrdistill.matching import Problem, match
from detrdistill.models import build_detector
from detrdistill.models.outputs import DetectorOutput, Targets
from detrdistill.training.batches import Draws, micro_batches
from detrdistill.training.evaluation import coco_metrics

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Line:
    """One measurement: value, its spread over repeats, and the aim it is held against."""

    what: str
    value: float
    low: float
    high: float
    unit: str
    aim: str


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def ratio(what: str, ours: Callable[[], object], theirs: Callable[[], object], aim: str, repeats: int) -> Line:
    """Time of `ours` over time of `theirs`, in turn, after one warm-up each."""
    ours(), theirs()
    ratios = sorted(timed(ours) / timed(theirs) for _ in range(repeats))
    return Line(what, statistics.median(ratios), ratios[0], ratios[-1], "x", aim)


def import_time(repeats: int) -> Line:
    command = [sys.executable, "-c", "import detrdistill"]
    seconds = sorted(timed(lambda: subprocess.run(command, check=True)) for _ in range(repeats))
    return Line("import detrdistill, interpreter included", statistics.median(seconds), seconds[0], seconds[-1], "s", "< 2")


def report_time(repeats: int) -> Line:
    command = [sys.executable, "-c", "from detrdistill.experiments.report import write_report; write_report('quick', (0,))"]
    environment = os.environ | {"DETRDISTILL_RESULTS": str(open_store("quick").root.parent)}
    seconds = sorted(timed(lambda: subprocess.run(command, check=True, env=environment)) for _ in range(repeats))
    return Line("report of preset quick, interpreter included", statistics.median(seconds), seconds[0], seconds[-1], "s", "seconds")


def distillation_step(repeats: int) -> list[Line]:
    """A distilled step against a plain step and the teacher's forward pass, on the quick preset's images."""
    preset = get_preset("quick")
    dataset = open_split(preset.student, "train")
    classes = len(dataset.categories)
    (batch,) = next(iter(micro_batches(dataset, Draws(len(dataset), 16, 0, 0, 1, 1, 0, 1), 0)))
    recipe = preset.recipe("detrdistill")
    teacher = build_detector(recipe.teacher, classes).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    plain = build_distiller(build_detector(preset.student, classes), preset.student).to(memory_format=torch.channels_last)
    distilled = build_distiller(build_detector(recipe, classes), recipe).to(memory_format=torch.channels_last)

    def teach(batch: Batch) -> DetectorOutput:
        with torch.no_grad():
            return teacher.decode(teacher.encode(batch.pixels, batch.padding))[0]

    def plain_and_teacher() -> None:
        teach(batch)
        sum(part.sum() for part in plain(batch.pixels, batch.padding, batch.targets).values()).backward()

    def distil() -> None:
        sum(part.sum() for part in distilled(batch.pixels, batch.padding, batch.targets, teach(batch)).values()).backward()

    return [ratio("distillation step / (student step + teacher forward), quick", distil, plain_and_teacher, "<= 1.15", repeats)]


def matching(repeats: int) -> Line:
    """All stages and images at once against the textbook matcher (all pairs of the batch, one image and stage after another)."""
    stages, images, queries, classes = 6, 16, 300, 80
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.rand(shape, generator=generator)  # noqa: E731
    counts = torch.randint(1, 15, (images,), generator=generator).tolist()
    boxes = lambda *shape: torch.cat((draw(*shape, 2), draw(*shape, 2) * 0.3 + 0.02), -1)  # noqa: E731
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

    return ratio("matching / textbook matcher, 16 images, 6 stages, 300 queries", ours, textbook, "<= 0.33", repeats)


def evaluation(repeats: int) -> Line:
    """faster-coco-eval, as the kit calls it, against pycocotools, on 400 images with 100 detections each."""
    rng = np.random.default_rng(0)
    images = [{"id": i, "width": 640, "height": 480} for i in range(400)]
    box = lambda: [*rng.uniform(0, 400, 2).tolist(), *rng.uniform(8, 200, 2).tolist()]  # noqa: E731
    annotations = [
        {"id": i + 1, "image_id": i % 400, "category_id": int(rng.integers(1, 11)), "bbox": (b := box()), "area": b[2] * b[3], "iscrowd": 0}
        for i in range(2800)
    ]
    dataset = {"info": {}, "images": images, "annotations": annotations, "categories": [{"id": i, "name": str(i)} for i in range(1, 11)]}
    found = [
        {"image_id": i % 400, "category_id": int(rng.integers(1, 11)), "bbox": box(), "score": float(rng.random())} for i in range(40000)
    ]

    def theirs() -> None:
        truth = COCO()
        truth.dataset = dataset
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes([dict(one) for one in found]), "bbox")
        evaluator.evaluate(), evaluator.accumulate(), evaluator.summarize()

    # Measured the other way round: how many times as long pycocotools takes.
    return ratio("pycocotools / our COCO evaluation", theirs, lambda: coco_metrics(dataset, found), ">= 10", repeats)


def stored_runs() -> list[Line]:
    """Seconds, memory and AP of the quick preset's stored runs, and the published gains, from their records."""
    store, preset = open_store("quick"), get_preset("quick")
    lines = []
    for setting in ("teacher", "student", "detrdistill"):
        if record := store.record(preset.recipe(setting)):
            seconds, peak, ap = record.cost["seconds"], record.cost["peak_memory_mib"] / 1024, record.metrics["AP"]
            lines.append(Line(f"quick {setting}: training", seconds, seconds, seconds, "s", "-"))
            lines.append(Line(f"quick {setting}: peak memory", peak, peak, peak, "GiB", "< 4"))
            lines.append(Line(f"quick {setting}: AP", ap, ap, ap, "%", ">= 45" if setting == "teacher" else "-"))
    reference = Store(HERE.parent / "results" / "reference" / "quick")
    runs = [[reference.record(preset.recipe(setting, seed)) for setting in ("student", "detrdistill")] for seed in range(3)]
    gains = [distilled.metrics["AP"] - plain.metrics["AP"] for plain, distilled in runs]
    lines.append(Line("reference: gain of DETRDistill, three seeds", statistics.mean(gains), min(gains), max(gains), "AP", "> 0 each"))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    lines = [import_time(repeats), report_time(3), matching(repeats), evaluation(3), *distillation_step(repeats), *stored_runs()]
    frame = pd.DataFrame([vars(line) for line in lines]).round(3)
    print(frame.to_string(index=False))
    about = f"# commit {commit()}; {platform.system()} {platform.machine()}; torch {torch.__version__}, one thread; medians of {repeats}\n"
    write_text(HERE / "results.csv", about + frame.to_csv(index=False, lineterminator="\n"))


if __name__ == "__main__":
    main()
