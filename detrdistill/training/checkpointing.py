"""The checkpoint that a run continues from. Loading it executes nothing. (Weights to use a detector: `models/weights.py`.)"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from detrdistill.errors import InputError
from detrdistill.files import atomic

AFRESH = "delete it to start this run afresh"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write everything a run needs to continue; a kill while writing leaves the previous checkpoint."""
    with atomic(path) as temporary:
        torch.save(state, temporary)


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
