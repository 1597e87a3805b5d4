"""A NaN or an infinity stops training before the optimizer step, and the batch that it appeared in is kept."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from detrdistill.data.coco import Batch
from detrdistill.errors import InputError, NonFiniteError
from detrdistill.models.outputs import DetectorOutput
from detrdistill.training.checkpointing import save_checkpoint

TEACHER = "teacher's "  # begins the names of `teacher_zeros` among the loss parts
NO_STEP = (
    "no optimizer step was taken, the last checkpoint is intact; look at these images, at the teacher's weights if it is the teacher's "
    "prediction, or lower schedule.lr"
)


def teacher_zeros(outputs: Sequence[DetectorOutput]) -> dict[str, Tensor]:
    """0 for the teacher's logits and for its boxes, or NaN where one is NaN or infinite. Without outputs nothing.

    Every loss can still be finite with an infinite logit of the teacher's. A product with 0 keeps the device from waiting.
    """
    if not outputs:
        return {}
    return {
        TEACHER + name: torch.stack([(getattr(output, name).detach() * 0).sum() for output in outputs]).sum()
        for name in ("logits", "boxes")
    }


def images_of(batches: Sequence[Batch], processes: int) -> str:
    """The images of this process's step, as messages name them."""
    images = str([image for batch in batches for image in batch.image_ids])
    return images + " or another process's" if processes > 1 else images


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
