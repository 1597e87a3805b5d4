"""The training loop, on one page: data by step number, teacher, losses, gradient, step, log, evaluation, checkpoint."""

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from tqdm.auto import tqdm

from detrdistill.data.coco import Batch, CocoDataset
from detrdistill.distill.distiller import Distiller
from detrdistill.errors import NonFiniteError, StoppedError
from detrdistill.process import on_sigterm
from detrdistill.recipes.parts import Schedule
from detrdistill.recipes.recipe import Recipe
from detrdistill.training.batches import Draws, micro_batches, mix
from detrdistill.training.checkpointing import Checkpoint, Stopwatch
from detrdistill.training.evaluation import changes
from detrdistill.training.guards import TEACHER, images_of, kept_for_inspection, refuse_non_finite, teacher_zeros
from detrdistill.training.keeping import Kept
from detrdistill.training.logging import Log, is_logged
from detrdistill.training.optimizer import make_optimizer, set_lr
from detrdistill.training.teacher_outputs import Teacher


def train(
    fabric: Fabric,
    distiller: Distiller,
    teacher: Teacher | None,
    dataset: CocoDataset,
    recipe: Recipe,
    folder: Path,
    evaluate: Callable[[nn.Module], tuple[dict[str, float | None], Tensor]],
    *,
    workers: int = 0,
    progress: bool = True,
    commit: str | None = None,
) -> dict[str, Any]:
    """Train `distiller.student` as `recipe` says, continuing from `folder`'s checkpoint if there is one.

    Writes `checkpoint.pt` and `log.jsonl` into `folder`; the batch that a NaN stopped at, as `stopped-step<n>-process<rank>.pt`.
    Afterwards the student has the weights that its schedule keeps (`keeping`).

    Returns:
        `curve` (AP and `changes` by step), `metrics` (of the weights that are kept), `seconds` (in training, over all sittings),
        `resumed` (how often), `commits` (of the code of all sittings); with a teacher, `teacher_images` (that passed it in all
        sittings); where the best weights are kept, `kept` (their step and AP).

    Raises:
        InputError: the checkpoint is damaged or not of this run, or `folder` has no space for it.
        NonFiniteError: a prediction, a loss part or the gradient is NaN or infinite; raised before the optimizer step, naming step,
            images, part, and where the batch is.
        StoppedError: at SIGTERM, after the step and the evaluation it came in; a checkpoint has been saved.
    """
    schedule, total = recipe.schedule, recipe.schedule.total_steps(len(dataset))
    distiller.to(memory_format=torch.channels_last)
    module, optimizer = fabric.setup(distiller, make_optimizer(distiller, schedule))
    kept = Kept(distiller.student, schedule)
    checkpoint = Checkpoint(fabric, folder / "checkpoint.pt", distiller, optimizer, kept)
    state = checkpoint.resume(total)
    if teacher is not None:
        teacher.images = state.get("teacher_images", 0)
    commits = state.get("commits", [])
    state["commits"] = commits + [commit] * (commit is not None and commit not in commits)

    draws = Draws(
        len(dataset), schedule.batch, recipe.seed, state["step"], total, schedule.accumulate, fabric.global_rank, fabric.world_size
    )
    evaluations = schedule.evaluation_steps(total)
    quiet = not progress or fabric.global_rank > 0
    stopwatch = Stopwatch(state["seconds"])
    signals: list[str] = []
    with (
        Log(folder / "log.jsonl" if fabric.is_global_zero else None, state["step"], fabric.loggers) as log,
        tqdm(total=total, initial=state["step"], desc=recipe.title, unit="step", disable=quiet, mininterval=1) as bar,
        on_sigterm(lambda: signals.append("stop")),
        closing(micro_batches(dataset, draws, workers, pin=fabric.device.type == "cuda")) as stream,
    ):
        for step, batches in enumerate(stream, start=state["step"] + 1):
            # Randomness that is left (dropout, what methods draw) is seeded by step: resuming is exact without saving generators.
            torch.manual_seed(mix(recipe.seed, step, fabric.global_rank))
            rate = set_lr(optimizer, schedule, step, total)
            module.train()
            with kept_for_inspection(folder / f"stopped-step{step}-process{fabric.global_rank}.pt", step, batches):
                try:
                    parts = accumulate_gradients(fabric, module, teacher, batches, schedule)
                except NonFiniteError as error:
                    raise NonFiniteError(f"step {step}, {error}") from None
                norm = nn.utils.clip_grad_norm_(distiller.parameters(), schedule.clip_norm or math.inf)
                # With the losses, processes tell each other that they must stop: they all do so after the same step.
                values = to_host(fabric, parts | {"stop": norm.new_full((), len(signals))}, norm)
                stopping = values.pop("stop") > 0
                refuse_non_finite(values, step, images_of(batches, fabric.world_size))
            optimizer.step()
            optimizer.zero_grad()
            kept.stepped()
            state["step"] = step
            if teacher is not None:
                state["teacher_images"] = teacher.images

            values = {name: value for name, value in values.items() if not name.startswith(TEACHER)}
            loss = sum(value for name, value in values.items() if name != "gradient norm")
            bar.set_postfix(loss=f"{loss:.3f}", lr=f"{rate:.1e}", refresh=False)
            bar.update()
            if is_logged(step, total, schedule.open_ended) or step in evaluations:
                log.write(step=step, lr=rate, loss=loss, **values)
            if step in evaluations:
                with stopwatch.stopped():
                    metrics, held = evaluate(kept.model)
                kept.evaluated(step, metrics, state)
                log.evaluated(step, metrics)
                point = {"step": step, "AP": metrics["AP"]} | changes(held, state.get("held"))
                state["curve"], state["held"] = [*state["curve"], point], held[-1].clone()  # not the storage of all stages
            if step in evaluations or stopping or checkpoint.due:
                state["seconds"] = stopwatch.seconds
                checkpoint.save(state)
            # Processes hear of a SIGTERM that came since with the next step's losses, and after the last step by a sum of its own.
            if stopping or (step == total and fabric.all_reduce(norm.new_full((), len(signals)), reduce_op="sum") > 0):
                fabric.barrier()  # torchrun ends all processes as soon as one has ended
                raise StoppedError(f"{recipe.title}: SIGTERM after step {step} of {total}; saved in {folder}, run it again to continue")
    kept.give_to_student()
    return state


def accumulate_gradients(
    fabric: Fabric, module: nn.Module, teacher: Teacher | None, batches: list[Batch], schedule: Schedule
) -> dict[str, Tensor]:
    """Gradient of one optimizer step, as if all its micro-batches and processes were one batch.

    Returns:
        the parts of the loss, and the teacher's zeros (`guards.teacher_zeros`).

    Raises:
        NonFiniteError: a prediction is NaN or infinite, found when it is matched; names the images of its micro-batch.
    """
    boxes = float(sum(batch.targets.objects(module.student.most_objects) for batch in batches))
    if fabric.world_size > 1:
        boxes = fabric.all_reduce(torch.tensor(boxes, device=fabric.device), reduce_op="sum").item()
    boxes = max(boxes, 1.0)
    parts: dict[str, Tensor] = {}
    for i, batch in enumerate(batches):
        pixels = fabric.to_device(batch.pixels).contiguous(memory_format=torch.channels_last)
        padding = fabric.to_device(batch.padding)
        targets = replace(batch.targets.to(fabric.device), step_boxes=boxes, step_images=float(schedule.batch))
        with fabric.autocast():
            teacher_outputs = teacher(batch, pixels, padding) if teacher is not None else []
        with fabric.no_backward_sync(module, enabled=i < len(batches) - 1):
            try:
                losses = module(pixels, padding, targets, teacher_outputs)
            except NonFiniteError as error:
                raise NonFiniteError(f"images {batch.image_ids}: {error}") from None
            # Processes average their gradients; the normalisers already count all of them.
            fabric.backward(torch.stack([value.sum() for value in losses.values()]).sum() * fabric.world_size)
        values = {name: value.detach().sum() for name, value in losses.items()} | teacher_zeros(teacher_outputs)
        for name, value in values.items():
            parts[name] = parts.get(name, 0) + value
    return parts


def to_host(fabric: Fabric, parts: dict[str, Tensor], norm: Tensor) -> dict[str, float]:
    """All loss parts, summed over processes, and the gradient norm, in one transfer."""
    packed = fabric.all_reduce(torch.stack(list(parts.values())), reduce_op="sum")
    return dict(zip([*parts, "gradient norm"], torch.cat((packed, norm[None].to(packed))).tolist(), strict=True))
