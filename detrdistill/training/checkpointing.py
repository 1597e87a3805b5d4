"""The checkpoint that a run continues from. Loading it executes nothing. (Weights to use a detector: `models/weights.py`.)"""

from pathlib import Path
from typing import Any

import torch

from detrdistill.errors import InputError
from detrdistill.files import atomic


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write everything a run needs to continue; a kill while writing leaves the previous checkpoint."""
    with atomic(path) as temporary:
        torch.save(state, temporary)


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
        raise InputError(f"checkpoint {path}: not readable ({type(error).__name__}); delete it to start this run afresh") from None
