"""What a run costs."""

import time

import torch
from lightning_fabric import Fabric

from detrdistill.process import peak_memory


class Watch:
    """Wall time and peak memory of a run; on the CPU the peak is the process's, which an earlier run in it may have set."""

    def __init__(self, fabric: Fabric) -> None:
        self._clock, self._device = time.monotonic, fabric.device
        self._start = self._clock()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def seconds(self) -> float:
        return self._clock() - self._start

    def cost(self, steps: int, seconds: float, resumed: int, batch: int | None = None) -> dict[str, float | int | None]:
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device) / 2**20
        else:
            peak = peak_memory()
        return {
            "seconds": round(seconds, 1),
            "steps": steps,
            "images_per_second": round(batch * steps / seconds, 1) if batch else None,
            "peak_memory_mib": None if peak is None else round(peak),
            "resumed": resumed,
        }
