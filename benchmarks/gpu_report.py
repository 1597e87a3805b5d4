"""What the checks of gpu_check.py share: how they report, and detectors of the paper's size under bf16."""

import gc
import os
import statistics
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, perf_counter
from typing import Self

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from benchmarks.distillation import Batch, build, make_batch, total
from benchmarks.measure import Table
from detrdistill.distill.build import build_distiller
from detrdistill.distill.distiller import Distiller
from detrdistill.models.outputs import DetectorOutput
from detrdistill.recipes.parts import BackboneRecipe
from detrdistill.recipes.presets import get_preset
from detrdistill.training.fabric import make_fabric

COLUMNS = ("check", "what", "value", "unit", "aim", "passed", "seconds", "note")
GPUS = 8  # that share the paper's batch
PIXELS = (800, 1333)
LONG = 3.0  # seconds after which nothing more is repeated


@dataclass
class Report:
    """Where a check's rows go, and what it may use.

    Attributes:
        check: the name in the first column.
        small: tiny sizes on the CPU, only to see that the check works.
        oracles: folder of the official implementations' numbers.
        last: when the last row was written.
    """

    table: Table
    check: str
    device: str
    small: bool
    oracles: Path
    last: float = field(default_factory=monotonic)

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def add(
        self,
        what: str,
        value: float | None = None,
        unit: str = "",
        *,
        at_most: float | None = None,
        exactly: float | None = None,
        note: str = "",
        failed: bool = False,
    ) -> None:
        """A row; it passes or fails if there is something that it is held against."""
        aim, passed = "", "no" if failed else ""
        if at_most is not None:
            aim, passed = f"<= {at_most:g}", "yes" if value <= at_most else "no"
        if exactly is not None:
            aim, passed = f"{exactly:g}", "yes" if value == exactly else "no"
        spent, self.last = monotonic() - self.last, monotonic()
        found = (self.check, what, value, unit, aim, passed, spent, note)
        self.table.add(dict(zip(COLUMNS, found, strict=True)))

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """An error becomes a row, and the check goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.add(what, note=one_line(error), failed=True)

    def time(self, what: str, action: Callable[[], object], repeats: int = 10, warm_up: int = 3) -> float:
        """Median milliseconds of an action, as a row; on a GPU its peak of memory too, over what was held before."""
        if self.small:
            repeats, warm_up = 1, 1
        held, start = 0, monotonic()
        for _ in range(warm_up):
            if monotonic() - start < LONG:
                action()
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        start, times = monotonic(), [self.milliseconds(action)]
        while len(times) < repeats and monotonic() - start < LONG:
            times.append(self.milliseconds(action))
        found = statistics.median(times)
        self.add(what, found, "ms")
        if self.cuda:
            self.add(what, (torch.cuda.max_memory_allocated() - held) / 2**20, "MiB at the peak")
        return found

    def milliseconds(self, action: Callable[[], object]) -> float:
        if not self.cuda:
            start = perf_counter()
            action()
            return 1e3 * (perf_counter() - start)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        action()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@dataclass(frozen=True)
class Check:
    """A check, and its time box: the most seconds that it may take, its start included."""

    name: str
    box: int
    action: Callable[..., None]
    given: tuple[object, ...] = ()


def carry_out(report: Report, check: Check) -> None:
    """What the check's process does. It leads a group of processes, so that all that it starts ends with it."""
    os.setsid()
    if report.small:
        torch.set_num_threads(1)
    try:
        check.action(report, *check.given)
    except BaseException as error:
        traceback.print_exc()
        report.add("the check itself", note=one_line(error), failed=True)


@dataclass
class Lesson:
    """A teacher, its student alone and under DETRDistill, and a batch: at the paper's size, or tiny."""

    fabric: Fabric
    teacher: nn.Module
    student: nn.Module
    plain: Distiller
    distiller: Distiller
    batch: Batch

    @classmethod
    def prepare(cls, report: Report, detector: str) -> Self:
        torch.manual_seed(0)
        preset = get_preset("smoke" if report.small else "coco", detector)
        changes = {"backbone": BackboneRecipe(name="resnet18"), "teacher.backbone": BackboneRecipe(name="resnet18")} if report.small else {}
        recipe = preset.recipe("detrdistill").replace(dropout=0.0, precision="bf16", **changes)
        teacher = build(recipe.teacher, report.device).eval().requires_grad_(False)
        student = build(recipe, report.device)
        both = [build_distiller(student, one) for one in (recipe.replace(methods=(), teacher=None, teacher_floor=0.0), recipe)]
        plain, distiller = (one.to(report.device, memory_format=torch.channels_last).train() for one in both)
        images = 2 if report.small else recipe.schedule.batch // GPUS
        batch = make_batch(*((64, 64) if report.small else PIXELS), report.device, images)
        return cls(make_fabric(report.device, "bf16"), teacher, student, plain, distiller, batch)

    def teacher_outputs(self) -> list[DetectorOutput]:
        with self.fabric.autocast():
            return self.distiller.teacher_outputs(self.teacher, *self.batch[:2])

    def losses(self, distiller: Distiller, outputs: list[DetectorOutput]) -> dict[str, Tensor]:
        with self.fabric.autocast():
            return distiller(*self.batch, outputs)

    def step(self, distiller: Distiller, outputs: list[DetectorOutput]) -> None:
        """Losses and gradients, which are thrown away."""
        total(self.losses(distiller, outputs)).backward()
        distiller.zero_grad()

    def distil(self) -> None:
        self.step(self.distiller, self.teacher_outputs())
