"""The checkpoint that a run continues from. Loading it executes nothing. (Weights to use a detector: `models/weights.py`.)"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from detrdistill.errors import InputError
from detrdistill.files import atomic
from detrdistill.process import largest_file
from detrdistill.training.keeping import Kept

CHECKPOINT_SECONDS = 30.0  # from one checkpoint to the next; longer where one takes more than a twentieth of it to write
AFRESH = "delete it to start this run afresh"


class Checkpoint:
    """The checkpoint that all processes of a run continue from, rewritten as often as takes a twentieth of the time at most.

    Args:
        model, optimizer, kept: what it holds beside the state of the training loop.
    """

    def __init__(self, fabric: Fabric, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, kept: Kept) -> None:
        self.fabric, self.path, self.model, self.optimizer, self.kept = fabric, path, model, optimizer, kept
        self._saved_at, self._took = time.monotonic(), 0.0  # seconds

    def resume(self, steps: int) -> dict[str, Any]:
        """Load all it holds, if there is a checkpoint; the state to continue from, before the first step where there is none.

        Raises:
            InputError: the file cannot be read, is not a checkpoint of this run of `steps` steps or differs between processes, or the
                disk has no room for the next one.
        """
        state = resume(self.path, self.model, self.optimizer, self.kept, steps) or {"step": 0, "curve": [], "seconds": 0.0, "resumed": 0}
        fabric, first = self.fabric, self.fabric.broadcast(state["step"])
        if fabric.all_reduce(torch.tensor(float(state["step"] != first), device=fabric.device), reduce_op="sum") > 0:
            raise InputError(
                f"{self.path.parent}: process {fabric.global_rank} continues after step {state['step']} and the first one after step "
                f"{first}, or another one differs; use a folder that all of them share"
            )
        # All processes refuse together: one that waits for another in a collective operation hears no signal.
        if refused := fabric.broadcast(lack_of_space(self.path, self.model, self.kept) if fabric.is_global_zero else ""):
            raise InputError(refused)
        self._saved_at = time.monotonic()
        return state

    @property
    def due(self) -> bool:
        """Whether the last one is so old that another is worth its time."""
        return time.monotonic() - self._saved_at > CHECKPOINT_SECONDS * max(1.0, self._took / 1.5)

    def save(self, state: dict[str, Any]) -> None:
        """Write model, optimizer, what is kept and `state`; of several processes, the first one does.

        Raises:
            InputError: the disk is full, or the folder cannot be written to.
        """
        start = time.monotonic()
        if self.fabric.is_global_zero:
            parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), **self.kept.state_dict()}
            save_checkpoint(self.path, parts | {"state": state})
        self._saved_at = time.monotonic()
        self._took = self._saved_at - start


class Stopwatch:
    """Seconds that a run has trained, over all sittings.

    Args:
        seconds: of the sittings before.
    """

    def __init__(self, seconds: float) -> None:
        self._zero = time.monotonic() - seconds

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._zero

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What takes place within does not count."""
        start = time.monotonic()
        yield
        self._zero += time.monotonic() - start


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write everything a run needs to continue; a kill while writing leaves the previous checkpoint.

    Raises:
        InputError: the disk is full, or the folder cannot be written to.
    """
    # Into a file of Python's: torch's own does not tell why it cannot be written.
    with atomic(path) as temporary, temporary.open("wb") as file:
        torch.save(state, file)


def lack_of_space(path: Path, model: nn.Module, kept: Kept) -> str:
    """Why the disk, or this process's limit on the size of files, has no room for `model`'s checkpoint; empty if it has."""
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    size = sum(value.nbytes for value in model.state_dict().values()) + 2 * trained + kept.nbytes  # AdamW has two moments
    limit = largest_file()
    if limit is not None and limit < size:
        return f"checkpoint {path}: takes at least {mib(size)}, and files may have {mib(limit)} (ulimit -f); raise that limit"
    # The old one stays until the new one is written.
    needed = 2 * size - (path.stat().st_size if path.exists() else 0)
    if (free := shutil.disk_usage(path.parent).free) < needed:
        return (
            f"checkpoint {path}: needs at least {mib(needed)}, as it is replaced by a new one beside it, and the disk has {mib(free)}; "
            "free disk space, or choose another folder for the results"
        )
    return ""


def mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, kept: Kept, steps: int) -> dict[str, Any] | None:
    """Continue from the run's last checkpoint: load `model`, `optimizer` and `kept`, and give back the state; None if there is none yet.

    Raises:
        InputError: the file cannot be read, or is not a checkpoint of this run of `steps` steps.
    """
    saved = load_checkpoint(path)
    if saved is None:
        return None
    try:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state = dict(saved["state"])
        kept.load_state_dict(saved)
        fits = 0 <= state["step"] <= steps and isinstance(state["curve"], list) and (state["step"] < steps or "metrics" in state)
        state |= {"resumed": state["resumed"] + 1, "seconds": float(state["seconds"])}
    except (KeyError, RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"checkpoint {path}: not of this run ({type(error).__name__}: {reason}); {AFRESH}") from None
    if not fits:
        raise InputError(f"checkpoint {path}: not of this run (step {state['step']} of {steps}); {AFRESH}")
    return state


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The run's last checkpoint, None if there is none yet.

    Raises:
        InputError: the file cannot be read, or holds more than tensors and plain values.
    """
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch reports damage in many types: RuntimeError, UnpicklingError, EOFError, KeyError
        raise InputError(f"checkpoint {path}: not readable ({type(error).__name__}); {AFRESH}") from None
