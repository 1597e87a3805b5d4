"""What a distillation step costs, part by part, for every method and detector: `make benchmark` runs it after detectors.py.

R101 teaches R50, as in the paper, with random weights: 6/6 layers, 300 queries, 2 images (one padded in half) of 7 objects, float32.
A step is what the trainer does between batch and optimizer: teacher, losses, backward. It is held against a step of the student alone
plus the teacher's forward pass, at most four steps before or after it. A method that decodes more groups of queries is held as well
against the same with these groups, forward and backward, of which nothing is made: what is left is its losses and its matching.

Two more comparisons: with the passes and the matching of the authors' released code, and of the matching alone. All in turn within one
process, on a GPU or on one CPU thread. Of the latter it is the time that the process had a core, which other work on the machine
changes little; with more threads it is the clock on the wall.
"""

import gc
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou

import detrdistill.distill.distiller as steps
from benchmarks.measure import Clock, Table, make_parser, spread, table_path
from detrdistill.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from detrdistill.criterion import ALPHA, CLASS, GAMMA, GIOU, L1, box_cost
from detrdistill.distill.build import build_distiller
from detrdistill.distill.distiller import Distiller, Term
from detrdistill.distill.logits import LogitsDistillation, class_cost
from detrdistill.distill.loss import DistillationLoss
from detrdistill.matching import Pairs, match
from detrdistill.models import build_detector
from detrdistill.models.attention import sine_position
from detrdistill.models.deformable_detr import Memory, token_centres
from detrdistill.models.outputs import DetectorOutput, Targets
from detrdistill.process import keep_freed_memory
from detrdistill.recipes.methods import METHODS, DETRDistill
from detrdistill.recipes.presets import get_preset
from detrdistill.recipes.recipe import Recipe
from detrdistill.runs.provenance import commit

CLASSES, OBJECTS, BATCH = 80, 7, 2
DETECTORS = ("conditional_detr", "deformable_detr", "adamixer")
RELEASED = "detrdistill_released"
KNOWN = {name: method() for name, method in METHODS.items()} | {RELEASED: DETRDistill(variant="released")}
PARTS = ("teacher", "student", "guests", "matching", "losses", "backward", "step")
COLUMNS = ("detector", "method", "against", *PARTS, "ratio", "low", "high", "aim")  # of parts: seconds
ALONE, WITH_GROUPS = "student step + teacher forward", "student step with as many groups + teacher forward"
Batch = tuple[Tensor, Tensor, Targets]
Row = dict[str, object]


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        preset: whose teacher and student are timed, with `queries` queries, on images of `side` pixels.
        matched: images whose queries are matched at 6 stages.
        repeats: of DETRDistill's step, and of all else.
    """

    preset: str
    side: int
    queries: int
    matched: int
    repeats: tuple[int, int]
    methods: Sequence[str]


SCALES = {
    "full": Scale("coco", 512, 300, 16, (5, 2), tuple(KNOWN)),
    "quick": Scale("coco", 256, 300, 4, (1, 1), ("detrdistill", "kd_detr")),
    "small": Scale("smoke", 64, 20, 2, (1, 1), ("detrdistill", "kd_detr", RELEASED)),
}


class Groups(DistillationLoss):
    """Student and teacher decode the groups of queries of a loss, with attention maps where it wants some; nothing is made of them."""

    def __init__(self, loss: DistillationLoss) -> None:
        super().__init__()
        self.loss, self.attention = loss, loss.attention
        self.student_queries, self.teacher_queries = loss.student_queries, loss.teacher_queries

    def forward(self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets, pairs: Mapping[str, Pairs]) -> dict[str, Tensor]:
        return {"nothing": 0 * (student.logits.sum() + student.boxes.sum())}


def groups_of(distiller: Distiller) -> Distiller:
    """The student's own step with all groups of queries and attention maps that the distiller's methods add."""
    adding = (*distiller.with_student_queries, *distiller.with_teacher_queries)
    terms = [term for term in distiller.terms if term in adding or term.loss.attention]
    return Distiller(distiller.student, [Term(term.name, 1.0, Groups(term.loss)) for term in terms])


def recipes(detector: str, scale: Scale) -> tuple[Recipe, Recipe]:
    """Teacher and student, with as many queries for all detectors."""
    preset = get_preset(scale.preset, detector)
    return tuple(recipe.replace(queries=scale.queries, dropout=0.0, precision="fp32") for recipe in (preset.teacher, preset.student))


def build(recipe: Recipe, device: str) -> nn.Module:
    """The detector with random weights: layers that start at zero get some too, or all boxes would be the same."""
    detector = build_detector(recipe, CLASSES)
    for parameter in detector.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return detector.to(device, memory_format=torch.channels_last)


def make_batch(height: int, width: int, device: str, images: int = BATCH, objects: int = OBJECTS) -> Batch:
    pixels, padding = torch.randn(images, 3, height, width), torch.zeros(images, height, width, dtype=torch.bool)
    pixels[0, :, :, width // 2 :], padding[0, :, width // 2 :] = 0, True
    targets = Targets.pack([torch.randint(0, CLASSES, (objects,)) for _ in range(images)], [draw_boxes(objects) for _ in range(images)])
    return pixels.to(device).contiguous(memory_format=torch.channels_last), padding.to(device), targets.to(device)


def draw_boxes(*shape: int) -> Tensor:
    return torch.cat((torch.rand(*shape, 2), torch.rand(*shape, 2) * 0.3 + 0.02), -1)


def total(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack([value.sum() for value in parts.values()]).sum()


def step(distiller: Distiller, teacher: nn.Module | None, batch: Batch, clock: Clock) -> None:
    """One step; without terms the student's own, and the teacher's forward pass, where there is one, for nothing."""
    pixels, padding, targets = batch
    outputs = clock.wrap("teacher", distiller.teacher_outputs)(teacher, pixels, padding) if teacher is not None else ()
    loss = clock.wrap("forward", lambda: total(distiller(pixels, padding, targets, outputs)))()
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


def measure(distiller: Distiller, teacher: nn.Module | None, batch: Batch, device: str) -> dict[str, float]:
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


def compare(detector: str, scale: Scale, device: str) -> Iterator[Row]:
    """All methods on one pair of detectors: DETRDistill, then four at a time; a step of the student alone comes amid them, and one with
    a method's groups of queries right after the method's.
    """
    torch.manual_seed(0)
    taught_by, recipe = recipes(detector, scale)
    teacher, student = build(taught_by, device).eval().requires_grad_(False), build(recipe, device)
    batch, methods = make_batch(scale.side, scale.side, device), scale.methods
    distillers = {"plain": build_distiller(student, recipe)}
    for name in methods:
        distillers[name] = build_distiller(student, recipe.replace(methods=(KNOWN[name],), teacher=taught_by))
        if distillers[name].with_student_queries:
            distillers[floor_of(name)] = groups_of(distillers[name])
    for distiller in distillers.values():
        distiller.to(device, memory_format=torch.channels_last).train()
    # A GPU chooses and loads kernels in the first step of each method. A CPU has to get memory: the most queries need the most.
    largest = max(distillers, key=lambda name: len(distillers[name].with_student_queries))
    for name in distillers if torch.device(device).type == "cuda" else (largest, "plain"):
        measure(distillers[name], teacher, batch, device)

    alone: list[dict[str, float]] = []
    others = [name for name in methods if name != "detrdistill"]
    turns = [(["detrdistill"], scale.repeats[0])] + [(others[i : i + 4], scale.repeats[1]) for i in range(0, len(others), 4)]
    for names, repeats in turns:
        pairs = [[one for one in (name, floor_of(name)) if one in distillers] for name in names]
        turn = [*chain(*pairs[:2]), "plain", *chain(*pairs[2:])]
        found: dict[str, list[dict[str, float]]] = {name: [] for name in turn}
        for _ in range(repeats):
            of = {name: measure(distillers[name], teacher, batch, device) for name in turn}
            plain = of["plain"]
            for name, parts in of.items():
                more = distillers[name].attention or distillers[name].with_student_queries
                guests = parts["decode"] - plain["decode"] if more else 0.0
                parts |= {"guests": guests, "student": parts["encode"] + parts["decode"] - guests}
                found[name].append(parts)
        alone += found["plain"]
        for name in names:
            for against, floor, aim in ((ALONE, "plain", "<= 1.15"), (WITH_GROUPS, floor_of(name), "<= 1.05")):
                if floor in found:
                    ratios = [one["step"] / other["step"] for one, other in zip(found[name], found[floor], strict=True)]
                    row = medians(detector, name, found[name]) | {"against": against, "aim": aim if name == "detrdistill" else None}
                    yield row | spread(ratios, "ratio")
    yield medians(detector, "plain", alone)
    if detector == "deformable_detr" and RELEASED in methods:
        yield released_design(distillers[RELEASED], teacher, batch, scale.repeats[1], device)


def floor_of(method: str) -> str:
    return f"groups of {method}"


def medians(detector: str, method: str, found: Sequence[dict[str, float]]) -> Row:
    return {"detector": detector, "method": method} | {part: statistics.median(one[part] for one in found) for part in PARTS}


def released_design(distiller: Distiller, teacher: nn.Module, batch: Batch, repeats: int, device: str) -> Row:
    """Our step against one that gets to the same losses in the released code's way."""
    pixels, padding, targets = batch
    clock = Clock(device)

    def ours() -> None:
        distiller.zero_grad()
        step(distiller, teacher, batch, Clock("cpu"))

    def theirs() -> None:
        distiller.zero_grad()
        released_losses(distiller, pixels, padding, targets, *distiller.teacher_outputs(teacher, pixels, padding)).backward()

    if clock.device.type == "cuda":
        ours(), theirs()
    times = [(clock.seconds(ours), clock.seconds(theirs)) for _ in range(repeats)]
    line = {"detector": "deformable_detr", "method": RELEASED, "against": "released design: two passes, matching one by one"}
    return line | {"step": statistics.median(own for own, _ in times), **spread([own / other for own, other in times], "ratio")}


def released_losses(distiller: Distiller, pixels: Tensor, padding: Tensor, targets: Targets, teacher: DetectorOutput) -> Tensor:
    """The loss of variant `released` with the released code's passes: the teacher's queries go through encoder and decoder apart.

    The backbone and the neck run once. The teacher's assignment, which that code makes and does not use, is left out.
    """
    student, (logits, features, assignment) = distiller.student, distiller.terms
    memory = student.encode(pixels, padding)
    (own,) = student.decode(memory, student.queries(memory))
    (guest,) = student.decode(encoded_again(student, memory), assignment.loss.student_queries(teacher))
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


def matching(scale: Scale, device: str) -> Iterator[Row]:
    """Student to teacher queries of 6 stages and all images at once, against one stage and image after another."""
    torch.manual_seed(0)
    shape = 6, scale.matched, scale.queries
    logits, boxes = torch.randn(*shape, CLASSES) - 4, draw_boxes(*shape)
    teacher = prediction(logits, boxes, device)
    others = {
        "random student": prediction(torch.randn_like(logits) - 4, draw_boxes(*shape), device),
        "student close to teacher": prediction(
            logits + 0.3 * torch.randn_like(logits), (boxes + 0.01 * torch.randn_like(boxes)).clamp(0.005, 1), device
        ),
    }
    cores, repeats, size = os.cpu_count() or 1, scale.repeats[1], f"{scale.queries} x {scale.queries}"
    loss = LogitsDistillation("joint")
    targets = Targets.pack([torch.zeros(0, dtype=torch.long)] * scale.matched, [torch.zeros(0, 4)] * scale.matched)
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
                yield matching_row(kind, size, threads, against, times, "<= 0.33")
        if cores > 1:
            yield matching_row(kind, size, cores, "ours, 1 thread", in_turn((ours, cores), (ours, 1), repeats, device), None)


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


def matching_row(kind: str, size: str, threads: int, against: str, times: Sequence[tuple[float, float]], aim: str | None) -> Row:
    row = {"detector": kind, "method": f"matching {size}, threads: {threads}", "against": against, "aim": aim}
    return row | {"matching": statistics.median(own for own, _ in times), **spread([own / other for own, other in times], "ratio")}


def main(words: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args(words)
    scale, device = SCALES[arguments.scale], arguments.device
    torch.set_num_threads(1)
    keep_freed_memory()  # as the trainer does on a CPU
    named = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "CPU"
    table = Table(table_path(arguments, "distillation.csv"), COLUMNS)
    table.start(
        f"commit {commit()}; torch {torch.__version__}; {named}, one CPU thread where no other number is named, float32; "
        f"{scale.side} x {scale.side} px; seconds and ratios are medians of {scale.repeats[0]} (DETRDistill) and {scale.repeats[1]}"
    )
    for row in matching(scale, device):
        table.add(row)
    for detector in DETECTORS:
        for row in compare(detector, scale, device):
            table.add(row)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
