"""The training loop, on one page: data by step number, losses, gradient, step, log, evaluation, checkpoint."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from lightning_fabric import Fabric
from torch import Tensor, nn
from tqdm.auto import tqdm

from detrdistill.data.coco import Batch, CocoDataset
from detrdistill.distill.distiller import Distiller
from detrdistill.errors import InputError, NonFiniteError, StoppedError
from detrdistill.process import on_sigterm
from detrdistill.recipes.recipe import Recipe, Schedule
from detrdistill.training.batches import Draws, micro_batches, mix
from detrdistill.training.checkpointing import lack_of_space, resume, save_checkpoint
from detrdistill.training.logging import Log
from detrdistill.training.teacher_outputs import TeacherOutputs

CHECKPOINT_SECONDS = 30.0  # from one checkpoint to the next; longer where one takes more than a twentieth of it to write
TEACHER = "teacher's "  # among the loss parts: whether its logits and boxes are finite
NO_STEP = (
    "no optimizer step was taken, the last checkpoint is intact; look at these images, at the teacher's weights if it is the teacher's "
    "prediction, or lower schedule.lr"
)


def train(
    fabric: Fabric,
    distiller: Distiller,
    teacher_outputs: TeacherOutputs | None,
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

    Returns:
        `curve` (AP and `changes` by step), `metrics` (of the last evaluation), `seconds` (in training, over all sittings), `resumed`
        (how often), `commits` (of the code of all sittings) and, with a teacher, `teacher_images` (that passed it in all sittings).

    Raises:
        InputError: the checkpoint is damaged or not of this run, or `folder` has no space for it.
        NonFiniteError: a prediction, a loss part or the gradient is NaN or infinite; raised before the optimizer step, naming step,
            images, part, and where the batch is.
        StoppedError: at SIGTERM, after the step and the evaluation it came in; a checkpoint has been saved.
    """
    schedule, total = recipe.schedule, recipe.schedule.total_steps(len(dataset))
    distiller.to(memory_format=torch.channels_last)
    module, optimizer = fabric.setup(distiller, make_optimizer(distiller, schedule))
    state = resume(folder / "checkpoint.pt", distiller, optimizer, total) or {"step": 0, "curve": [], "seconds": 0.0, "resumed": 0}
    first = fabric.broadcast(state["step"])
    if fabric.all_reduce(torch.tensor(float(state["step"] != first), device=fabric.device), reduce_op="sum") > 0:
        raise InputError(
            f"{folder}: process {fabric.global_rank} continues after step {state['step']} and the first one after step {first}, or another "
            "one differs; use a folder that all of them share"
        )
    # All processes refuse together: one that waits for another in a collective operation hears no signal.
    if refused := fabric.broadcast(lack_of_space(folder / "checkpoint.pt", distiller) if fabric.is_global_zero else ""):
        raise InputError(refused)
    if teacher_outputs is not None:
        teacher_outputs.images = state.get("teacher_images", 0)
    commits = state.get("commits", [])
    state["commits"] = commits + [commit] * (commit is not None and commit not in commits)

    draws = Draws(
        len(dataset), schedule.batch, recipe.seed, state["step"], total, schedule.accumulate, fabric.global_rank, fabric.world_size
    )
    marks = {round(total * (i + 1) / schedule.evaluations) for i in range(schedule.evaluations)}
    every = max(1, total // 2000)
    clock = last_save = time.monotonic()
    took = 0.0  # seconds to write a checkpoint
    quiet = not progress or fabric.global_rank > 0
    bar = tqdm(total=total, initial=state["step"], desc=recipe.title, unit="step", disable=quiet, mininterval=1)
    asked: list[str] = []
    with (
        Log(folder / "log.jsonl" if fabric.is_global_zero else None, state["step"]) as log,
        bar,
        on_sigterm(lambda: asked.append("stop")),
        closing(micro_batches(dataset, draws, workers, pin=fabric.device.type == "cuda")) as stream,
    ):
        for step, batches in enumerate(stream, start=state["step"] + 1):
            # Randomness that is left (dropout, what methods draw) is seeded by step: resuming is exact without saving generators.
            torch.manual_seed(mix(recipe.seed, step, fabric.global_rank))
            rate = schedule.lr * lr_factor(schedule, step, total)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]
            module.train()
            images = str([image for batch in batches for image in batch.image_ids])
            images += " or another process's" if fabric.world_size > 1 else ""
            with kept_for_inspection(folder / f"stopped-step{step}-process{fabric.global_rank}.pt", step, batches):
                try:
                    parts = accumulate_gradients(fabric, module, teacher_outputs, batches, schedule)
                except NonFiniteError as error:
                    raise NonFiniteError(f"step {step}, {error}") from None
                norm = nn.utils.clip_grad_norm_(distiller.parameters(), schedule.clip_norm or math.inf)
                # With the losses, processes tell each other that they must stop: they all do so after the same step.
                values = to_host(fabric, parts | {"stop": norm.new_full((), len(asked))}, norm)
                stopping = values.pop("stop") > 0
                refuse_non_finite(values, step, images)
                values = {name: value for name, value in values.items() if not name.startswith(TEACHER)}  # zero
            optimizer.step()
            optimizer.zero_grad()
            state["step"] = step
            if teacher_outputs is not None:
                state["teacher_images"] = teacher_outputs.images

            loss = sum(value for name, value in values.items() if name != "gradient norm")
            bar.set_postfix(loss=f"{loss:.3f}", lr=f"{rate:.1e}", refresh=False)
            bar.update()
            if step % every == 0 or step in marks:
                log.write(step=step, lr=rate, loss=loss, **values)
            if step in marks:
                state["seconds"], clock = state["seconds"] + time.monotonic() - clock, time.monotonic()
                state["metrics"], held = evaluate(distiller.student)
                point = {"step": step, "AP": state["metrics"]["AP"]} | changes(held, state.get("held"))
                state["curve"], state["held"] = [*state["curve"], point], held[-1].clone()  # not the storage of all stages
                clock = time.monotonic()
            if step in marks or stopping or time.monotonic() - last_save > CHECKPOINT_SECONDS * max(1.0, took / 1.5):
                state["seconds"], clock = state["seconds"] + time.monotonic() - clock, time.monotonic()
                if fabric.is_global_zero:
                    save_checkpoint(
                        folder / "checkpoint.pt",
                        {"model": distiller.state_dict(), "optimizer": optimizer.state_dict(), "state": state},
                    )
                last_save = time.monotonic()
                took = last_save - clock
            # SIGTERM that came since is told of with the next step's losses, after the last step by a word of its own.
            if stopping or (step == total and fabric.all_reduce(norm.new_full((), len(asked)), reduce_op="sum") > 0):
                fabric.barrier()  # torchrun ends all processes as soon as one has ended
                raise StoppedError(f"{recipe.title}: SIGTERM after step {step} of {total}; saved in {folder}, run it again to continue")
    return state


def accumulate_gradients(
    fabric: Fabric,
    module: nn.Module,
    teacher_outputs: TeacherOutputs | None,
    batches: list[Batch],
    schedule: Schedule,
) -> dict[str, Tensor]:
    """Gradient of one optimizer step, as if all its micro-batches and processes were one batch.

    Returns:
        the parts of the loss; and for the teacher's logits and boxes 0, or NaN if they are not finite.

    Raises:
        NonFiniteError: a prediction is NaN or infinite, found when it is matched; names the images of its micro-batch.
    """
    boxes = float(sum(sum(batch.targets.counts) for batch in batches))
    if fabric.world_size > 1:
        boxes = fabric.all_reduce(torch.tensor(boxes, device=fabric.device), reduce_op="sum").item()
    boxes = max(boxes, 1.0)
    parts: dict[str, Tensor] = {}
    for i, batch in enumerate(batches):
        pixels = fabric.to_device(batch.pixels).contiguous(memory_format=torch.channels_last)
        padding = fabric.to_device(batch.padding)
        targets = replace(batch.targets.to(fabric.device), step_boxes=boxes, step_images=float(schedule.batch))
        answers = []
        if teacher_outputs is not None:
            with fabric.autocast():
                answers = teacher_outputs(batch, pixels, padding)
        with fabric.no_backward_sync(module, enabled=i < len(batches) - 1):
            try:
                losses = module(pixels, padding, targets, answers)
            except NonFiniteError as error:
                raise NonFiniteError(f"images {batch.image_ids}: {error}") from None
            # Processes average their gradients; the normalisers already count all of them.
            fabric.backward(torch.stack([value.sum() for value in losses.values()]).sum() * fabric.world_size)
        for name, value in losses.items():
            parts[name] = parts.get(name, 0) + value.detach().sum()
        for name in ("logits", "boxes") if answers else ():
            # Zero, and NaN where the teacher's answer is NaN or infinite: with an infinite logit every loss can still be finite.
            zero = torch.stack([(getattr(answer, name).detach() * 0).sum() for answer in answers]).sum()
            parts[TEACHER + name] = parts.get(TEACHER + name, 0) + zero
    return parts


def to_host(fabric: Fabric, parts: dict[str, Tensor], norm: Tensor) -> dict[str, float]:
    """All loss parts, summed over processes, and the gradient norm, in one transfer."""
    packed = fabric.all_reduce(torch.stack(list(parts.values())), reduce_op="sum")
    return dict(zip([*parts, "gradient norm"], torch.cat((packed, norm[None].to(packed))).tolist(), strict=True))


def changes(held: Int[Tensor, "S B Q"], before: Int[Tensor, "B Q"] | None) -> dict[str, float]:
    """How many queries an image change their object: DN-DETR's instability score (Li et al., CVPR 2022), over stages and over training.

    Args:
        held: the object that each query is matched with at each stage, -1 for none.
        before: the last stage of the evaluation before, if there was one.

    Returns:
        `changes_between_stages`, summed over the steps from stage to stage, and `changes_since_last`, of the last stage since the
        evaluation before: the paper's Figure 7 and DN-DETR's Figure 2.
    """
    found = {"changes_between_stages": (held[1:] != held[:-1]).sum().item() / held.shape[1]}
    return found if before is None else found | {"changes_since_last": (held[-1] != before).sum().item() / held.shape[1]}


def refuse_non_finite(values: dict[str, float], step: int, images: str) -> None:
    """Raise NonFiniteError if any value is NaN or infinite; names these and lists the others."""
    bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    rest = [f"{name} {value:.4g}" for name, value in values.items() if math.isfinite(value) and not name.startswith(TEACHER)]
    if bad:
        raise NonFiniteError(f"step {step}, images {images}: {', '.join(bad)} (finite: {', '.join(rest) or 'nothing'})")


@contextmanager
def kept_for_inspection(path: Path, step: int, batches: Sequence[Batch]) -> Iterator[None]:
    """Save the images and targets of a step that meets a NaN or an infinity, and add to the message where they are.

    Raises:
        NonFiniteError: the one that was met.
    """
    try:
        yield
    except NonFiniteError as error:
        saved = [vars(batch) | {"targets": vars(batch.targets)} for batch in batches]  # plain values: torch.load(weights_only=True)
        try:
            save_checkpoint(path, {"step": step, "fault": str(error), "batches": saved})
            where = f"the batch is in {path}"
        except InputError as refused:
            where = f"the batch could not be saved: {refused}"
        raise NonFiniteError(f"{error}; {where}; {NO_STEP}") from None


def make_optimizer(distiller: Distiller, schedule: Schedule) -> torch.optim.AdamW:
    """AdamW with the DETRs' groups: backbone, sampling offsets and reference points, the rest (adapters too)."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in distiller.named_parameters():
        if parameter.requires_grad:
            factor = 1.0
            if ".backbone." in f".{name}":
                factor = schedule.backbone_lr
            elif "sampling_offsets" in name or "reference_points" in name:
                factor = schedule.sampling_lr
            groups.setdefault(factor, []).append(parameter)
    settings = [{"params": parameters, "factor": factor, "lr": schedule.lr * factor} for factor, parameters in groups.items()]
    return torch.optim.AdamW(settings, weight_decay=schedule.weight_decay, fused=True)


def lr_factor(schedule: Schedule, step: int, total: int) -> float:
    """Part of the learning rate at `step` (from 1): linear warm-up, then steps to a tenth, or a cosine to zero."""
    warm = min(1.0, step / (schedule.warmup + 1)) if schedule.warmup else 1.0
    progress = (step - 1) / total
    if schedule.decay == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * progress))
    return warm * 0.1 ** sum(progress >= drop for drop in schedule.drops)
