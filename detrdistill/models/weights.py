"""Files of weights, read without executing anything, and how tensors are fitted into a module: all or none."""

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from detrdistill.errors import InputError
from detrdistill.files import atomic


def save_weights(path: Path, module: nn.Module, about: dict[str, str]) -> None:
    """Write a module's parameters and buffers as safetensors, with `about` in its header."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata=about)
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Sort a file's metadata, which safetensors writes in another order in every process: equal weights are equal files."""
    with path.open("rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


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


def classes_text(names: Sequence[str]) -> str:
    """Names of classes, in the order of a head's outputs, as text for a header; `classes_of` reads it."""
    text = ", ".join(names)
    return text if text.split(", ") == [*names] and not text.startswith("[") else json.dumps([*names], ensure_ascii=False)


def classes_of(header: Mapping[str, str]) -> list[str] | None:
    """The names of the classes in a header, None if it has none."""
    text = header.get("categories")
    if text is None:
        return None
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else text.split(", ")


def load_weights(module: nn.Module, path: Path) -> dict[str, str]:
    """Load a safetensors file of the kit into a module, strictly; returns the file's header.

    Raises:
        InputError: missing file, damaged file, or missing, unexpected or misshaped tensors, which it names.
    """
    tensors, about = read_weights(path)
    fit(module, tensors, f"weights {path}", "use the recipe they were trained with")
    return about


def fit(module: nn.Module, state: Mapping[str, Tensor], source: str, remedy: str) -> None:
    """Load tensors into a module, strictly.

    Raises:
        InputError: missing, unexpected or misshaped tensors, which it names; nothing has been loaded then.
    """
    own = module.state_dict()
    faults = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "misshaped": [
            f"{name} {list(state[name].shape)} instead of {list(value.shape)}"
            for name, value in own.items()
            if name in state and state[name].shape != value.shape
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(some)} {kind} ({few(some)})" for kind, some in faults.items() if some)
        raise InputError(f"{source} do not fit this {type(module).__name__}: {listed}; {remedy}")
    module.load_state_dict(state)


def read_pickle(path: Path) -> dict[str, Any]:
    """A file of torch.save that holds a dict of tensors, plain values and at most an `argparse.Namespace`, as official checkpoints do.

    Raises:
        InputError: the file is missing, damaged, or holds anything else, of which nothing is executed.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on pickles of newer protocols, then refuses them
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"weights {path}: no such file; correct the path") from None
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = f"code ('{refused[1]}')" if refused else "code or something that is not tensors"
        raise InputError(
            f"weights {path}: refused unread, since it holds {what}; if you trust it, save its state_dict alone where it was made"
        ) from None
    except Exception as error:  # torch reports damage in many types: RuntimeError, EOFError, KeyError, IndexError
        raise InputError(f"weights {path}: truncated or damaged ({type(error).__name__}); copy or download it again") from None
    if not isinstance(content, dict):
        raise InputError(f"weights {path}: a {type(content).__name__} instead of named tensors; save model.state_dict()")
    return content


def named_tensors(content: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """The content of a file if it is tensors by name, each with numbers of its own.

    Raises:
        InputError: it is anything else.
    """
    if not content or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        raise InputError(f"weights {path}: no named tensors, nor an entry 'model' or 'state_dict' of them; save model.state_dict()")
    if odd := [name for name, value in content.items() if not _is_plain(value)]:
        raise InputError(f"weights {path}: {few(odd)}: no dense real numbers, or more than the file holds; save model.state_dict()")
    return dict(content)


def _is_plain(value: Tensor) -> bool:
    """Not sparse, quantized, complex or without numbers, nor some bytes that claim to be terabytes, which a copy would need."""
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_complex():
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: no such file, or a damaged one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a Hugging Face folder needs it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({str(error)[:100]}); restore it") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object; restore it")
    return content


def few(some: Sequence[str]) -> str:
    """The first three, for a message."""
    return ", ".join(some[:3]) + (", ..." if len(some) > 3 else "")
