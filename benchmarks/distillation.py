"""What a distillation step costs, part by part, for every method and detector: `make benchmark` runs it after detectors.py.

R101 teaches R50, as in the paper, with random weights: 6/6 layers, 300 queries, 2 images (one padded in half) of 7 objects, float32.
A step is what the trainer does between batch and optimizer: teacher, losses, backward. It is held against a step of the student alone
plus the teacher's forward pass, at most two steps before or after it. Two more comparisons: with the passes and the matching of the
authors' released code, and of the matching alone. All in turn within one process, on a GPU or on one CPU thread. Of the latter it is
the time that the process had a core, which other work on the machine changes little; with more threads it is the clock on the wall.
"""

import argparse
import gc
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter, process_time
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou

import detrdistill.distill.distiller as steps
from detrdistill.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from detrdistill.criterion import ALPHA, CLASS, GAMMA, GIOU, L1, box_cost
from detrdistill.distill.build import build_distiller
from detrdistill.distill.distiller import Distiller
from detrdistill.distill.logits import LogitsDistillation, class_cost
from detrdistill.experiments.methods import METHODS, DETRDistill
from detrdistill.experiments.presets import get_preset
from detrdistill.experiments.recipes import Recipe
from detrdistill.experiments.store import commit
from detrdistill.files import write_text
from detrdistill.matching import Pairs, match
from detrdistill.models import build_detector
from detrdistill.models.attention import sine_position
from detrdistill.models.deformable_detr import Memory, token_centres
from detrdistill.models.outputs import DetectorOutput, Targets

HERE = Path(__file__).parent
CLASSES, QUERIES, OBJECTS, BATCH = 80, 300, 7, 2
DETECTORS = ("conditional_detr", "deformable_detr", "adamixer")
RELEASED = "detrdistill_released"
KNOWN = {name: method() for name, method in METHODS.items()} | {RELEASED: DETRDistill(variant="released")}
PARTS = ("teacher", "student", "guests", "matching", "losses", "backward", "step")
COLUMNS = ("detector", "method", "against", *PARTS, "ratio", "low", "high", "aim")  # of parts: seconds
Batch = tuple[Tensor, Tensor, Targets]


class Clock:
    """Seconds by part. On a GPU it waits until all work is done, before and after; on a CPU it counts what this process used.

    Args:
        wall: on a CPU too, count the time that passes.
    """

    def __init__(self, device: str, wall: bool = False) -> None:
        self.device, self.spent = torch.device(device), {}
        self.read = process_time if self.device.type == "cpu" and not wall else perf_counter

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.read()

    def wrap(self, part: str, call: Callable) -> Callable:
        """The same call, its time added to a part."""

        def timed(*arguments: object, **named: object) -> object:
            start = self.now()
            result = call(*arguments, **named)
            self.spent[part] = self.spent.get(part, 0.0) + self.now() - start
            return result

        return timed

    def seconds(self, action: Callable[[], object]) -> float:
        start = self.now()
        action()
        return self.now() - start


def recipes(detector: str) -> tuple[Recipe, Recipe]:
    """Teacher and student of preset `coco`, with as many queries for all detectors."""
    preset = get_preset("coco", detector)
    return tuple(recipe.replace(queries=QUERIES, dropout=0.0, precision="fp32") for recipe in (preset.teacher, preset.student))


def build(recipe: Recipe, device: str) -> nn.Module:
    """The detector with random weights: layers that start at zero get some too, or all boxes would be the same."""
    detector = build_detector(recipe, CLASSES)
    for parameter in detector.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return detector.to(device, memory_format=torch.channels_last)


def make_batch(side: int, device: str) -> Batch:
    pixels, padding = torch.randn(BATCH, 3, side, side), torch.zeros(BATCH, side, side, dtype=torch.bool)
    pixels[0, :, :, side // 2 :], padding[0, :, side // 2 :] = 0, True
    targets = Targets.pack([torch.randint(0, CLASSES, (OBJECTS,)) for _ in range(BATCH)], [draw_boxes(OBJECTS) for _ in range(BATCH)])
    return pixels.to(device).contiguous(memory_format=torch.channels_last), padding.to(device), targets.to(device)


def draw_boxes(*shape: int) -> Tensor:
    return torch.cat((torch.rand(*shape, 2), torch.rand(*shape, 2) * 0.3 + 0.02), -1)


def total(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack([value.sum() for value in parts.values()]).sum()


def step(distiller: Distiller, teacher: nn.Module, batch: Batch, clock: Clock) -> None:
    """One step; without terms the student's own, and the teacher's forward pass for nothing."""
    pixels, padding, targets = batch
    answers = clock.wrap("teacher", distiller.ask)(teacher, pixels, padding)
    loss = clock.wrap("forward", lambda: total(distiller(pixels, padding, targets, answers)))()
    clock.wrap("backward", loss.backward)()


@contextmanager
def watched(distiller: Distiller, clock: Clock) -> Iterator[None]:
    """The clock runs in encoder, decoder, costs and assignment of the student's forward pass."""
    calls = [(distiller.student, "encode", "encode"), (distiller.student, "decode", "decode"), (steps, "match", "matching")]
    calls += [(loss, "problems", "matching") for loss in (distiller.criterion, *distiller.losses.values())]
    with ExitStack() as stack:
        for owner, name, part in calls:
            stack.enter_context(patch.object(owner, name, clock.wrap(part, getattr(owner, name))))
        yield


def measure(distiller: Distiller, teacher: nn.Module, batch: Batch, device: str) -> dict[str, float]:
    """Seconds of one step and of its parts. On a GPU two steps: waiting for each part would lengthen the whole."""
    clock = Clock(device)
    distiller.zero_grad()
    if clock.device.type == "cuda":
        whole = clock.seconds(lambda: step(distiller, teacher, batch, Clock("cpu")))
        distiller.zero_grad()
    with watched(distiller, clock):
        seconds = clock.seconds(lambda: step(distiller, teacher, batch, clock))
    found = clock.spent | {"step": whole if clock.device.type == "cuda" else seconds}
    found["losses"] = found["forward"] - found["encode"] - found["decode"] - found["matching"]
    return found


def compare(detector: str, methods: Sequence[str], side: int, repeats: int, device: str) -> list[dict[str, object]]:
    """All methods on one pair of detectors; a step of the student alone comes amid each four of them."""
    torch.manual_seed(0)
    taught_by, recipe = recipes(detector)
    teacher, student, batch = build(taught_by, device).eval().requires_grad_(False), build(recipe, device), make_batch(side, device)
    distillers = {"plain": build_distiller(student, recipe)}
    for name in methods:
        distillers[name] = build_distiller(student, recipe.replace(methods=(KNOWN[name],), teacher=taught_by))
    for distiller in distillers.values():
        distiller.to(device, memory_format=torch.channels_last).train()
    # A GPU chooses and loads kernels in the first step of each method. A CPU has to get memory: the most queries need the most.
    largest = max(distillers, key=lambda name: sum(hasattr(term.loss, "guests") for term in distillers[name].terms))
    for name in distillers if torch.device(device).type == "cuda" else (largest, "plain"):
        measure(distillers[name], teacher, batch, device)

    found: dict[str, list[dict[str, float]]] = {name: [] for name in distillers}
    for _ in range(repeats):
        for i in range(0, len(methods), 4):
            turn = (*methods[i : i + 2], "plain", *methods[i + 2 : i + 4])
            of = {name: measure(distillers[name], teacher, batch, device) for name in turn}
            plain = of["plain"]
            for name, parts in of.items():
                more = distillers[name].attention or any(hasattr(term.loss, "guests") for term in distillers[name].terms)
                guests = parts["decode"] - plain["decode"] if more else 0.0
                parts |= {"guests": guests, "student": parts["encode"] + parts["decode"] - guests, "ratio": parts["step"] / plain["step"]}
                found[name].append(parts)
    lines = []
    for name, parts in found.items():
        line = {"detector": detector, "method": name} | {part: statistics.median(one[part] for one in parts) for part in PARTS}
        if name != "plain":
            line |= {"against": "student step + teacher forward", **spread([one["ratio"] for one in parts])}
        lines.append(line | {"aim": "<= 1.15" if name == "detrdistill" else None})
    if detector == "deformable_detr" and RELEASED in methods:
        lines.append(released_design(distillers[RELEASED], teacher, batch, repeats, device))
    return lines


def spread(ratios: Sequence[float]) -> dict[str, float]:
    return {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def released_design(distiller: Distiller, teacher: nn.Module, batch: Batch, repeats: int, device: str) -> dict[str, object]:
    """Our step against one that gets to the same losses in the released code's way."""
    pixels, padding, targets = batch
    clock = Clock(device)

    def ours() -> None:
        distiller.zero_grad()
        step(distiller, teacher, batch, Clock("cpu"))

    def theirs() -> None:
        distiller.zero_grad()
        released_losses(distiller, pixels, padding, targets, *distiller.ask(teacher, pixels, padding)).backward()

    if clock.device.type == "cuda":
        ours(), theirs()
    times = [(clock.seconds(ours), clock.seconds(theirs)) for _ in range(repeats)]
    line = {"detector": "deformable_detr", "method": RELEASED, "against": "released design: two passes, matching one by one"}
    return line | {"step": statistics.median(own for own, _ in times), **spread([own / other for own, other in times])}


def released_losses(distiller: Distiller, pixels: Tensor, padding: Tensor, targets: Targets, teacher: DetectorOutput) -> Tensor:
    """The loss of variant `released` with the released code's passes: the teacher's queries go through encoder and decoder apart.

    The backbone and the neck run once. The teacher's assignment, which that code makes and does not use, is left out.
    """
    student, (logits, features, assignment) = distiller.student, distiller.terms
    memory = student.encode(pixels, padding)
    (own,) = student.decode(memory, student.queries(memory))
    (guest,) = student.decode(encoded_again(student, memory), assignment.loss.guests(teacher))
    parts = list(distiller.criterion(own, targets, {"student": objects_one_by_one(own, targets)}).values())
    joint = one_by_one(own, lambda place: expanded_cost(own, teacher, place))
    parts += [logits.weight * value for value in logits.loss(own, teacher, targets, {"joint": joint}).values()]
    parts += [features.weight * value for value in features.loss(own, teacher, targets, {}).values()]
    found = {"objects": objects_one_by_one(guest, targets)}
    parts += [assignment.weight * value for value in assignment.loss(guest, teacher, targets, found).values()]
    return torch.stack([value.sum() for value in parts]).sum()


def encoded_again(student: nn.Module, memory: Memory) -> Memory:
    """A second pass of Deformable DETR's encoder over the same maps."""
    codes = [sine_position(mask, student.dim // 2, shift=-0.5).flatten(2).transpose(1, 2) for mask in memory.masks()]
    position = torch.cat([code + embed for code, embed in zip(codes, student.level_embed, strict=True)], dim=1)
    reference = token_centres(memory)[:, :, None] * memory.ratios[:, None]
    x = torch.cat([level.flatten(2).transpose(1, 2) for level in memory.neck], dim=1)
    for layer in student.encoder:
        x = layer(x, position, reference, memory.shapes, memory.padding)
    return replace(memory, tokens=x)


def one_by_one(output: DetectorOutput, cost: Callable[[tuple[int, int]], Tensor]) -> Pairs:
    """Match one stage and image after another; `cost` is asked for each."""
    found = []
    for place in np.ndindex(*output.logits.shape[:2]):
        rows, columns = linear_sum_assignment(cost(place).cpu().numpy())
        found.append(np.stack([np.full_like(rows, place[0]), np.full_like(rows, place[1]), rows, columns]))
    return Pairs(*torch.from_numpy(np.concatenate(found, axis=1)).to(output.logits.device))


@torch.no_grad()
def objects_one_by_one(output: DetectorOutput, targets: Targets) -> Pairs:
    """Queries to objects, with the focal cost of all classes."""

    def cost(place: tuple[int, int]) -> Tensor:
        count = targets.counts[place[1]]
        labels, boxes = targets.labels[place[1], :count], targets.boxes[place[1], :count]
        p = output.logits[place].sigmoid()
        focal = ALPHA * (1 - p) ** GAMMA * -(p + 1e-8).log() - (1 - ALPHA) * p**GAMMA * -(1 - p + 1e-8).log()
        return CLASS * focal[:, labels] + textbook_boxes(output.boxes[place], boxes)

    return one_by_one(output, cost)


@torch.no_grad()
def expanded_cost(student: DetectorOutput, teacher: DetectorOutput, place: tuple[int, int]) -> Tensor:
    """Queries to the teacher's queries of one stage and image, with the cross-entropy of each pair and class."""
    z, p = student.logits[place], teacher.logits[place].sigmoid()
    shape = len(z), len(p), z.shape[-1]
    classes = F.binary_cross_entropy_with_logits(z[:, None].expand(shape), p[None].expand(shape), reduction="none").sum(-1)
    return classes + textbook_boxes(student.boxes[place], cut(teacher.boxes[place]))


def cut(boxes: Tensor) -> Tensor:
    """Boxes cut at the border of the image."""
    return xyxy_to_cxcywh(cxcywh_to_xyxy(boxes).clamp(0, 1))


def textbook_boxes(rows: Tensor, columns: Tensor) -> Tensor:
    giou = generalized_box_iou(cxcywh_to_xyxy(rows), cxcywh_to_xyxy(columns))
    return L1 * torch.cdist(rows, columns, p=1) - GIOU * giou


def own_cost(student: DetectorOutput, teacher: DetectorOutput, place: tuple[int, int]) -> Tensor:
    """The same with our cost functions."""
    stage, image = (slice(index, index + 1) for index in place)
    boxes = box_cost(student.boxes[stage, image], cut(teacher.boxes[stage, image]))
    return (boxes + class_cost(student.logits[stage, image], teacher.logits[stage, image]))[0, 0]


def matching(repeats: int, device: str) -> list[dict[str, object]]:
    """Student to teacher queries of 6 stages and 16 images at once, against one stage and image after another."""
    torch.manual_seed(0)
    shape = 6, 16, QUERIES
    logits, boxes = torch.randn(*shape, CLASSES) - 4, draw_boxes(*shape)
    teacher = prediction(logits, boxes, device)
    others = {
        "random student": prediction(torch.randn_like(logits) - 4, draw_boxes(*shape), device),
        "student close to teacher": prediction(
            logits + 0.3 * torch.randn_like(logits), (boxes + 0.01 * torch.randn_like(boxes)).clamp(0.005, 1), device
        ),
    }
    cores, lines = os.cpu_count() or 1, []
    loss, targets = LogitsDistillation("joint"), Targets.pack([torch.zeros(0, dtype=torch.long)] * 16, [torch.zeros(0, 4)] * 16)
    for kind, student in others.items():

        def ours(student: DetectorOutput = student) -> None:
            match(loss.problems(student, teacher, targets))

        def expanded(student: DetectorOutput = student) -> None:
            one_by_one(student, lambda place: expanded_cost(student, teacher, place))

        def own(student: DetectorOutput = student) -> None:
            one_by_one(student, lambda place: own_cost(student, teacher, place))

        for threads in sorted({1, cores}):
            for against, theirs in (("one by one, cross-entropy expanded", expanded), ("one by one, our costs", own)):
                times = in_turn((ours, threads), (theirs, threads), repeats, device)
                lines.append(matching_line(kind, threads, against, times, "<= 0.33"))
        if cores > 1:
            lines.append(matching_line(kind, cores, "ours, 1 thread", in_turn((ours, cores), (ours, 1), repeats, device), None))
    return lines


def prediction(logits: Tensor, boxes: Tensor, device: str) -> DetectorOutput:
    return DetectorOutput(logits.to(device), boxes.to(device), boxes.to(device), [], [])


def in_turn(ours: tuple[Callable, int], theirs: tuple[Callable, int], repeats: int, device: str) -> list[tuple[float, float]]:
    """Seconds of both, each with its number of threads, after a warm-up of ours (theirs is long)."""
    clock, before = Clock(device, wall=max(ours[1], theirs[1]) > 1), torch.get_num_threads()

    def seconds(action: Callable[[], None], threads: int) -> float:
        torch.set_num_threads(threads)
        return clock.seconds(action)

    try:
        seconds(*ours)
        return [(seconds(*ours), seconds(*theirs)) for _ in range(repeats)]
    finally:
        torch.set_num_threads(before)


def matching_line(kind: str, threads: int, against: str, times: Sequence[tuple[float, float]], aim: str | None) -> dict[str, object]:
    line = {"detector": kind, "method": f"matching 300 x 300, threads: {threads}", "against": against, "aim": aim}
    return line | {"matching": statistics.median(own for own, _ in times), **spread([own / other for own, other in times])}


def publish(lines: Sequence[dict[str, object]], about: str) -> pd.DataFrame:
    frame = pd.DataFrame(lines, columns=COLUMNS).round(3)
    write_text(HERE / "distillation.csv", about + frame.to_csv(index=False, lineterminator="\n"))
    return frame


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, default=DETECTORS)
    parser.add_argument("--methods", nargs="+", choices=KNOWN, default=list(KNOWN))
    parser.add_argument("--size", type=int, default=512, help="side of the images in pixels")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = arguments.device
    named = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "CPU"
    about = (
        f"# commit {commit()}; torch {torch.__version__}; {named}, one CPU thread where no other number is named, float32; "
        f"{arguments.size} x {arguments.size} px; seconds and ratios are medians of {arguments.repeats}\n"
    )
    lines = matching(arguments.repeats, device)
    for detector in arguments.detectors:
        lines += compare(detector, arguments.methods, arguments.size, arguments.repeats, device)
        publish(lines, about)  # what took long is not lost
        gc.collect()
        torch.cuda.empty_cache()
    print(publish(lines, about).to_string(index=False, na_rep=""))


if __name__ == "__main__":
    main()
