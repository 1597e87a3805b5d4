"""Checks of what a GPU costs: time and memory of steps, loading images, torch.compile, forms of deformable attention."""

import tempfile
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from benchmarks.detectors import passes, port
from benchmarks.distillation import CLASSES
from benchmarks.gpu_report import Lesson, Report
from benchmarks.loader import write_photographs
from detrdistill.models import attention
from detrdistill.process import share_of_cores
from detrdistill.recipes.parts import Folder
from detrdistill.recipes.presets import get_preset
from detrdistill.runs.load import open_split
from detrdistill.training.batches import Draws, micro_batches


def cost(report: Report, detector: str) -> None:
    """Milliseconds and peak memory of each pass under bf16 autocast, and of transformers' detector with the same weights."""
    lesson = Lesson.prepare(report, detector)
    images = len(lesson.batch[0])
    plain = report.time(f"student's step, {images} images", lambda: lesson.step(lesson.plain, []))
    teacher = report.time("teacher's forward pass", lesson.teacher_outputs)
    distilled = report.time("distillation step", lesson.distil)
    aim = None if report.small or detector == "adamixer" else 1.15
    report.add("distillation step / (student's step + teacher's forward pass)", distilled / (plain + teacher), "x", at_most=aim)
    if detector == "adamixer":
        return
    pixels, padding, _ = lesson.batch
    found = {}
    for name, theirs in (("ours", False), ("transformers", True)):
        with report.trying(f"{name} without losses"):
            model, seen = lesson.student, pixels
            if theirs:
                model, seen = port(lesson.student, CLASSES).to(report.device), pixels.contiguous()
            for kind, action in passes(model, seen, padding, theirs).items():
                found[name, kind] = report.time(f"{name} without losses: {kind}", partial(under, lesson.fabric, action))
    for kind in ("forward", "step") if len(found) == 4 else ():
        aim = None if report.small or kind == "forward" else 0.9
        report.add(f"ours / transformers: {kind}", found["ours", kind] / found["transformers", kind], "x", at_most=aim)


def under(fabric: Fabric, action: Callable[[], object]) -> None:
    with fabric.autocast():
        action()


def loader(report: Report) -> None:
    """Images a second that worker processes load, augment as the DETRs do and put into batches of two, beside nothing else."""
    cores = share_of_cores()
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), *((8, [(80, 60)]) if report.small else (64, [(640, 480)])))
        recipe = get_preset("coco").student.replace(data=Folder(path=Path(folder)))
        if report.small:
            recipe = recipe.replace(**{"resize.short": 64, "resize.long": 96})
        dataset = open_split(recipe, "train")
        for workers in (0,) if report.small else sorted({1, min(4, cores), min(8, cores), cores}):
            steps = 4 + 16 * workers
            draws = Draws(len(dataset), 2, 0, 0, steps, 1, 0, 1)
            stream = micro_batches(dataset, draws, workers, pin=report.cuda)
            for _ in range(1 + 2 * workers):  # what has been loaded ahead
                next(stream)
            start = perf_counter()
            count = sum(len(batch.pixels) for batches in stream for batch in batches)
            report.add(f"{recipe.resize.short} px, {workers} workers of {cores} cores", count / (perf_counter() - start), "images a second")


def compiled(report: Report) -> None:
    """Teacher's forward pass and the student's forward and backward pass, as they are and under torch.compile."""
    backend = "eager" if report.small else "inductor"
    for detector in ("conditional_detr",) if report.small else ("deformable_detr", "conditional_detr"):
        lesson = Lesson.prepare(report, detector)
        for what, model, learns in (("teacher's forward pass", lesson.teacher, False), ("student's step", lesson.student, True)):
            with report.trying(f"{detector}: {what}, compiled"):
                as_it_is, fast = (
                    partial(pass_over, lesson, model, form, learns)
                    for form in (predictions, torch.compile(predictions, dynamic=False, backend=backend))
                )
                before = report.time(f"{detector}: {what}, as it is", as_it_is)
                expected, start = as_it_is(), perf_counter()
                found = fast()
                report.add(f"{detector}: {what}, compiling", perf_counter() - start, "s")
                report.add(f"{detector}: {what}, largest difference of a logit or box", (found - expected).abs().max().item())
                after = report.time(f"{detector}: {what}, compiled", fast)
                report.add(f"{detector}: {what}, compiled / as it is", after / before, "x")
        torch._dynamo.reset()


def predictions(model: nn.Module, pixels: Tensor, padding: Tensor) -> Tensor:
    """Logits and boxes [S B Q C+4]."""
    (output,) = model.decode(model.encode(pixels, padding))
    return torch.cat((output.logits.float(), output.boxes.float()), dim=-1)


def pass_over(lesson: Lesson, model: nn.Module, form: Callable[..., Tensor], learns: bool) -> Tensor:
    with torch.set_grad_enabled(learns):
        with lesson.fabric.autocast():
            found = form(model, *lesson.batch[:2])
        if learns:
            found.sum().backward()
            model.zero_grad()
    return found.detach()


def sampling(report: Report) -> None:
    """Forms of deformable attention's sampling at COCO's sizes, forward and backward: same numbers, which is fastest?"""
    torch.manual_seed(0)
    shapes = [(10, 16), (5, 8)] if report.small else [(100, 167), (50, 84), (25, 42), (13, 21)]
    tokens, heads, points = sum(h * w for h, w in shapes), 8, 4
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float32, device=report.device)[:, None]  # L 1 2
    forms: dict[str, Callable[..., Tensor]] = {
        "grid_sample a level, as it is: queries last, multiply and sum": attention.sample_and_sum,
        "grid_sample a level, queries before points, einsum": sample_and_einsum,
        "one gather of all levels": gather_and_sum,
    }
    for place, queries in (("encoder", tokens), ("decoder", 300)):
        value = torch.randn(2, tokens, 256, device=report.device, requires_grad=True)
        where = 2, queries, heads, len(shapes), points
        # Between two cells, also of the border, and on none: there forms round to either side, and gradients jump.
        cells = (torch.rand(*where, 2, device=report.device) * (sizes + 1)).floor() - 1
        locations = ((cells + 0.55 + 0.9 * torch.rand(*where, 2, device=report.device)) / sizes).requires_grad_()
        weights = torch.rand(*where, device=report.device, requires_grad=True)
        upstream = torch.randn(2, queries, 256, device=report.device)
        expected = None
        for name, form in forms.items():
            once = partial(both_ways, form, upstream, value, shapes, locations, weights, heads)
            with report.trying(f"{place}: {name}"):
                found = once()
                expected = expected or found
                apart = max(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))
                report.add(f"{place}: {name}, difference of outputs and gradients", apart, "relative", at_most=1e-4)
                del found
                report.time(f"{place}: {name}", once)


def both_ways(form: Callable[..., Tensor], upstream: Tensor, *given: object) -> list[Tensor]:
    """The output of a form, and the gradients of all that has one."""
    out = form(*given)
    learned = [one for one in given if isinstance(one, Tensor) and one.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, learned, upstream)]


def sample_and_einsum(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor, heads: int) -> Tensor:
    """As `attention.sample_and_sum`, with the points of a query side by side, which `einsum` sums as products of matrices."""
    batch, queries = locations.shape[:2]
    grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # L, B*M, Q, K, 2
    weights = weights.permute(3, 0, 2, 1, 4).flatten(1, 2)  # L, B*M, Q, K
    maps = value.transpose(1, 2).unflatten(1, (heads, -1)).flatten(0, 1)  # B*M, D/M, T
    total = None
    for (h, w), level, grid, weight in zip(shapes, maps.split([h * w for h, w in shapes], dim=-1), grids, weights, strict=True):
        sampled = F.grid_sample(level.unflatten(-1, (h, w)), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        summed = torch.einsum("ndqk,nqk->ndq", sampled, weight)
        total = summed if total is None else total + summed
    return total.reshape(batch, -1, queries).transpose(1, 2)


def gather_and_sum(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor, heads: int) -> Tensor:
    """As `attention.sample_and_sum`: the four cells around each point of all levels, in one weighted sum of rows of a table."""
    batch, queries = locations.shape[:2]
    sizes = attention.constants([(w, h) for h, w in shapes], locations)[:, None]  # L 1 2
    firsts = attention.constants([0, *accumulate(h * w for h, w in shapes[:-1])], locations).long()[:, None, None, None]
    place = locations * sizes - 0.5
    low = place.detach().floor()
    cells = torch.stack((low, low + 1), dim=-1)  # B Q M L K 2 2, as the next: x and y, low and high
    parts = torch.stack((low + 1 - place, place - low), dim=-1)
    inside = (cells >= 0) & (cells < sizes[..., None])
    x, y = torch.where(inside, cells, 0).long().unbind(-2)
    share_x, share_y = (parts * inside).unbind(-2)
    tokens = firsts + y[..., :, None] * sizes[..., :1, None].long() + x[..., None, :]
    shares = weights[..., None, None] * share_y[..., :, None] * share_x[..., None, :]
    starts = torch.arange(batch * heads, device=value.device).view(batch, 1, heads, 1, 1, 1, 1) * value.shape[1]
    rows = value.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 2)  # B M T, D / M
    places, shares = (part.flatten(3).flatten(0, 2) for part in (tokens + starts, shares))  # B Q M and everything else
    summed = F.embedding_bag(places, rows, per_sample_weights=shares, mode="sum")
    return summed.view(batch, queries, -1)
