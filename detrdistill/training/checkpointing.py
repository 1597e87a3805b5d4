"""Two kinds of files: a checkpoint to continue a run from, and weights to use a detector. Neither executes anything on load."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

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


def save_weights(path: Path, module: nn.Module, about: dict[str, str]) -> None:
    """Write a module's parameters and buffers as safetensors, with `about` in its header."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata=about)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file.

    Raises:
        InputError: no such file, or a damaged one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except FileNotFoundError:
        raise InputError(f"weights {path}: no such file; correct the path, or train the run that makes it") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"weights {path}: damaged or not a safetensors file ({error}); restore or retrain it") from None


def load_weights(module: nn.Module, path: Path) -> dict[str, str]:
    """Load a safetensors file into a module, strictly; returns the file's header.

    Raises:
        InputError: missing file, damaged file, or missing, unexpected or misshaped tensors, which it names.
    """
    tensors, about = read_weights(path)
    own = module.state_dict()
    faults = {
        "missing": sorted(own.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - own.keys()),
        "misshaped": [
            f"{name} {list(tensors[name].shape)} instead of {list(value.shape)}"
            for name, value in own.items()
            if name in tensors and tensors[name].shape != value.shape
        ],
    }
    if any(faults.values()):
        listed = [
            f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" for kind, names in faults.items() if names
        ]
        name = type(module).__name__
        raise InputError(f"weights {path} do not fit this {name}: {'; '.join(listed)}; use the recipe they were trained with")
    module.load_state_dict(tensors)
    return about
