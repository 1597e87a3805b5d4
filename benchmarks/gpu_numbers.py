"""Checks of what a GPU computes: the official numbers, bf16 steps, waits of the host, resuming, DDP."""

import multiprocessing
import signal
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copytree, ignore_patterns
from time import sleep
from typing import Self

import pytest
import torch
import torch.distributed
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment
from lightning_fabric.strategies import DDPStrategy
from torch import Tensor, nn

from benchmarks.distillation import total
from benchmarks.gpu_report import Lesson, Report, one_line
from detrdistill.distill.build import build_distiller
from detrdistill.models import build_detector
from detrdistill.recipes.identity import run_id
from detrdistill.recipes.presets import get_preset
from detrdistill.recipes.recipe import Recipe
from detrdistill.runs.load import open_split
from detrdistill.runs.run import run
from detrdistill.runs.store import Store
from detrdistill.training.fabric import make_fabric
from detrdistill.training.logging import read_log
from detrdistill.training.teacher_outputs import Teacher
from detrdistill.training.trainer import train
from tests.parity.checks import CHECKS as REPLAYS
from tests.parity.oracle import Oracle, kind_of, paths

WAITED = "called a synchronizing CUDA operation"  # torch's words


class OnDevice(Oracle):
    """An oracle whose tensors lie on torch's default device."""

    @classmethod
    def read(cls, path: Path, dtype: torch.dtype) -> Self:
        oracle, device = super().read(path, dtype), torch.empty(0).device
        oracle.tensors = {name: value.to(device) for name, value in oracle.tensors.items()}
        return oracle


def parity(report: Report, tf32: bool) -> None:
    """Every oracle, outputs and gradients. TF32 rounds too much for these tolerances: then it is only counted how many still hold."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    chosen = [path for path in paths(report.oracles) if kind_of(path) in REPLAYS][:: 8 if report.small else 1]
    for dtype in (torch.float32,) if tf32 or report.small else (torch.float32, torch.float64):
        name, wrong = str(dtype).removeprefix("torch."), 0
        for path in chosen:
            try:
                with pytest.MonkeyPatch.context() as monkeypatch, torch.device(report.device):
                    REPLAYS[kind_of(path)](OnDevice.read(path, dtype), monkeypatch)
            except Exception as error:
                wrong += 1
                report.add(f"{path.stem}, {name}", note=one_line(error), failed=not tf32)
        aim = None if tf32 else len(chosen)
        report.add(f"oracles that hold in {name}, of {len(chosen)}", len(chosen) - wrong, exactly=aim)


def step(report: Report, detector: str) -> None:
    """A distillation step under bf16 autocast has finite losses and gradients, and makes the host wait once, for matching."""
    lesson = Lesson.prepare(report, detector)
    parts = lesson.losses(lesson.distiller, lesson.teacher_outputs())
    loss = total(parts)
    loss.backward()
    report.add("loss", loss.item())
    strange = [name for name, value in parts.items() if not value.isfinite().all()]
    report.add("parts of the loss that are not finite", len(strange), exactly=0, note=", ".join(strange))
    gradients = {name: value.grad for name, value in lesson.distiller.named_parameters() if value.grad is not None}
    strange = [name for name, value in gradients.items() if not value.isfinite().all()]
    report.add(f"gradients that are not finite, of {len(gradients)}", len(strange), exactly=0, note=", ".join(strange[:5]))
    lesson.distiller.zero_grad()

    if report.cuda:
        lesson.distil()  # what is prepared once has been prepared
    with waits(report, "waits in the teacher's forward pass", 0):
        outputs = lesson.teacher_outputs()
    with waits(report, "waits in the student's forward pass and the losses: matching", 1):
        loss = total(lesson.losses(lesson.distiller, outputs))
    with waits(report, "waits in the backward pass", None):
        loss.backward()


@contextmanager
def waits(report: Report, what: str, exactly: int | None) -> Iterator[None]:
    """Count how often the host waits for the GPU, and note the lines where it does."""
    if not report.cuda:
        yield
        report.add(what, note="needs CUDA")
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [f"{Path(one.filename).name}:{one.lineno}" for one in caught if WAITED in str(one.message)]
    report.add(what, len(found), exactly=exactly, note=", ".join(dict.fromkeys(found)))


def resume(report: Report) -> None:
    """A run that is killed by SIGKILL continues from its checkpoint, and its log is that of a run that was not killed.

    A GPU adds up in any order: two runs that are not killed differ too, and how much is the measure.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    steps = 12 if report.small else 30
    recipe = get_preset("smoke", "conditional_detr").recipe("detrdistill").replace(**{"schedule.steps": steps})
    with tempfile.TemporaryDirectory() as folder:
        stores = {name: Store(Path(folder) / name) for name in ("killed", "whole", "again")}
        killed_at = train_and_kill(report, recipe, stores["killed"])
        for name in ("whole", "again"):  # with the same teacher
            copytree(stores["killed"].root, stores[name].root, ignore=ignore_patterns(run_id(recipe)))
        records = {name: run(recipe, store, device=report.device, progress=False) for name, store in stores.items()}
        logs = {name: read_log(store.folder(recipe) / "log.jsonl") for name, store in stores.items()}
    report.add(f"times resumed, killed after step {killed_at} of {steps}", records["killed"].cost["resumed"], exactly=1)
    natural = difference(logs["whole"], logs["again"])
    report.add("largest difference of a loss between two runs", natural, "relative")
    aim = max(1e-3, 10 * natural)
    report.add("the same, after the kill", difference(logs["whole"], logs["killed"]), "relative", at_most=aim)


def train_and_kill(report: Report, recipe: Recipe, store: Store) -> int:
    """Train in another process until there is a checkpoint; returns the last step that the log knows."""
    # Forked on the CPU, before anything here has computed: a start takes longer than the run.
    context = multiprocessing.get_context("spawn" if report.cuda else "fork")
    process = context.Process(target=run, args=(recipe, store), kwargs={"device": report.device, "progress": False})
    process.start()
    while process.is_alive() and not (store.folder(recipe) / "checkpoint.pt").exists():
        sleep(0.002)
    process.kill()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        raise RuntimeError(f"the run ended with exit code {process.exitcode} before it could be killed")
    return read_log(store.folder(recipe) / "log.jsonl")[-1]["step"]


def difference(log: list[dict[str, float]], other: list[dict[str, float]]) -> float:
    pairs = zip(log, other, strict=True)
    return max(abs(one["loss"] - another["loss"]) / abs(one["loss"]) for one, another in pairs)


def one_process(report: Report) -> None:
    """A distilled run of one process under DDP, over NCCL on a GPU, has the log of a run without."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    recipe = get_preset("smoke", "conditional_detr").recipe("detrdistill")
    dataset, logs = open_split(recipe, "train"), {}
    alone = make_fabric(report.device, "fp32")
    together = Fabric(accelerator=report.device, devices=1, strategy=DDPStrategy(), plugins=[LightningEnvironment()])
    together.launch()
    report.add(f"processes under {torch.distributed.get_backend()}", together.world_size, exactly=1)
    for name, fabric in {"alone": alone, "again": alone, "together": together}.items():
        torch.manual_seed(0)
        distiller = build_distiller(build_detector(recipe, len(dataset.categories)), recipe)
        teacher = build_detector(recipe.teacher, len(dataset.categories)).eval().requires_grad_(False).to(fabric.device)
        with tempfile.TemporaryDirectory() as folder:
            train(fabric, distiller, Teacher(teacher, distiller), dataset, recipe, Path(folder), no_evaluation, progress=False)
            logs[name] = read_log(Path(folder) / "log.jsonl")
    natural = difference(logs["alone"], logs["again"])
    report.add("largest difference of a loss between two runs without", natural, "relative")
    report.add("the same, with DDP", difference(logs["alone"], logs["together"]), "relative", at_most=max(1e-4, 10 * natural))
    torch.distributed.destroy_process_group()


def no_evaluation(detector: nn.Module) -> tuple[dict[str, float | None], Tensor]:
    return {"AP": None}, torch.zeros(1, 1, 1, dtype=torch.int32)
