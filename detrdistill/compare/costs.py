"""What a detector costs: parameters, GFLOPs, milliseconds an image, peak memory."""

import gc
import os
import platform
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from detrdistill.data.coco import Batch, CocoDataset, collate
from detrdistill.predict.models import Model, TorchModel
from detrdistill.process import growth
from detrdistill.runs.provenance import provenance

IMAGES, ROUNDS = 20, 5  # the first of a split; each is timed so often
COUNTER = (
    "torch.utils.flop_counter.FlopCounterMode, a multiply-add as two; counted: convolutions, matrix products, attention; "
    "not counted: grid_sample, normalisation, softmax, activations, whatever is done element by element"
)


def first_images(dataset: CocoDataset, model: Model, count: int = IMAGES) -> list[Batch]:
    """The first images of a split, one a batch, prepared as the model wants them."""
    own = seen_by(dataset, model)
    return [collate([own[index]]) for index in range(min(count, len(own)))]


def seen_by(dataset: CocoDataset, model: Model) -> CocoDataset:
    """The same images and annotations, prepared as the model wants them."""
    own = copy(dataset)
    own.transforms, own.kept = model.transform, {}
    return own


def sizes_of(batches: Sequence[Batch]) -> dict[str, int]:
    """How many images there are of each size after resizing, "height x width"."""
    return dict(sorted(Counter("{} x {}".format(*batch.pixels.shape[-2:]) for batch in batches).items()))


def gflops(model: TorchModel, batches: Sequence[Batch]) -> float:
    """10^9 operations an image, the mean over the images; each size is counted once."""
    counted: dict[torch.Size, int] = {}
    for batch in batches:
        if (size := batch.pixels.shape) not in counted:
            with FlopCounterMode(display=False) as counter:
                model.outputs(batch)
            counted[size] = counter.get_total_flops()
    return float(np.mean([counted[batch.pixels.shape] for batch in batches])) / 1e9


def milliseconds(models: Sequence[Model], batches: Sequence[Sequence[Batch]], rounds: int = ROUNDS) -> list[tuple[float, float, float]]:
    """Median and quartiles of the milliseconds that a model takes for an image, one at once, from pixels to boxes, on one thread.

    Reading, resizing and sorting of detections do not count. Models take turns image by image, so that a machine that others use as well
    slows down all alike. Each image is seen once before it is timed.

    Args:
        batches: of each model, the same images.
    """
    taken: list[list[float]] = [[] for _ in models]
    with one_thread():
        for turn in zip(*batches, strict=True):
            for number in range(rounds + 1):
                for times, model, batch in zip(taken, models, turn, strict=True):
                    start = time.perf_counter()
                    model.outputs(batch)  # its result is on the host: a GPU has been waited for
                    if number:
                        times.append(1000 * (time.perf_counter() - start))
    return [tuple(float(x) for x in np.percentile(times, (50, 25, 75))) for times in taken]


def peak_mib(model: Model, batches: Sequence[Batch]) -> float | None:
    """MiB of the weights and of what the largest image needs beside them; None where the system does not tell.

    On the CPU it is what the process grows by, which counts what libraries need for their work; on a GPU what torch's tensors take.
    """
    largest = max(batches, key=lambda batch: batch.pixels.shape[-2:].numel())
    if isinstance(model, TorchModel) and model.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(model.device)
        model.outputs(largest)
        return torch.cuda.max_memory_allocated(model.device) / 2**20
    if isinstance(model, TorchModel):
        model.outputs(largest)  # what torch sets up once is no model's; onnxruntime sets up for each, and keeps it
    gc.collect()
    grown = growth(lambda: model.outputs(largest))
    return None if grown is None else grown + model.weight_bytes / 2**20


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes on one thread within."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def hardware(model: Model) -> str:
    """The GPU's or the processor's name."""
    if isinstance(model, TorchModel) and model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(named, platform.processor() or platform.machine())}, {os.cpu_count()} cores"


def cost_of(
    model: TorchModel, batches: Sequence[Batch], counted: float, times: tuple[float, float, float], peak: float | None
) -> dict[str, Any]:
    """What is kept beside a run's record: fields of `records.Cost`, but for whose costs they are."""
    return {
        "parameters": model.parameters,
        "gflops": round(counted, 6),
        "counter": COUNTER,
        "images": sizes_of(batches),
        "milliseconds": dict(zip(("median", "low", "high"), (round(x, 3) for x in times), strict=True)),
        "peak_mib": None if peak is None else round(peak, 1),
        "runtime": model.runtime,
        "threads": 1,
        "hardware": hardware(model),
        "provenance": provenance(),
    }
