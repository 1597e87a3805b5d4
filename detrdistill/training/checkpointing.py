"""The checkpoint that a run continues from. Loading it executes nothing. (Weights to use a detector: `models/weights.py`.)"""

import resource
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detrdistill.errors import InputError
from detrdistill.files import atomic

AFRESH = "delete it to start this run afresh"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write everything a run needs to continue; a kill while writing leaves the previous checkpoint.

    Raises:
        InputError: the disk is full, or the folder cannot be written to.
    """
    # Into a file of Python's: torch's own does not tell why it cannot be written.
    with atomic(path) as temporary, temporary.open("wb") as file:
        torch.save(state, file)


def lack_of_space(path: Path, model: nn.Module) -> str:
    """Why the disk, or this process's limit on the size of files, has no room for `model`'s checkpoint; empty if it has."""
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    size = sum(value.nbytes for value in model.state_dict().values()) + 2 * trained  # AdamW keeps two moments
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and limit < size:
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


def resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> dict[str, Any] | None:
    """Continue from the run's last checkpoint: load `model` and `optimizer`, and give back the state; None if there is none yet.

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
