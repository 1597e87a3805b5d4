"""Files of weights, read without executing anything, and how tensors are fitted into a module: all or none."""

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from detrdistill.errors import InputError
from detrdistill.files import atomic


def save_weights(path: Path, module: nn.Module, about: dict[str, str]) -> None:
    """Write a module's parameters and buffers as safetensors, with `about` in its header."""
    tensors: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        value, written = value.detach().cpu().contiguous(), {one.data_ptr() for one in tensors.values()}
        tensors[name] = value.clone() if value.data_ptr() in written else value  # safetensors takes no memory twice, as tied heads have it
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


class Unread:
    """Stands for an array or a log beside the weights: whatever the file says of it is dropped."""

    def __new__(cls, *_: Any) -> "Unread":
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


class NumberType(Unread):
    """Stands for numpy's type of a number: its code if it is one of a real number, else None."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code = code if code in ("b1", "f2", "f4", "f8", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8))) else None

    def __setstate__(self, state: Any) -> None:
        self.code = None if ">" in state else self.code  # of other machines


def number(kind: Any, data: Any) -> bool | int | float | None:
    """The number that a file holds as one of numpy's."""
    code = kind.code if isinstance(kind, NumberType) and isinstance(data, bytes) else None
    return np.frombuffer(data, code, count=1)[0].item() if code else None


# What people save beside weights, and what stands for it here. Of the modules that are named, nothing is imported or called.
STAND_INS: list[Any] = [
    argparse.Namespace,
    *((PurePosixPath, f"{module}.{kind}Path") for module in ("pathlib", "pathlib._local") for kind in ("Posix", "PurePosix")),
    *((PureWindowsPath, f"{module}.{kind}Path") for module in ("pathlib", "pathlib._local") for kind in ("Windows", "PureWindows")),
    (NumberType, "numpy.dtype"),
    (Unread, "numpy.ndarray"),
    *((number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((Unread, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    (Unread, "mmengine.logging.history_buffer.HistoryBuffer"),  # in every checkpoint that mmengine's runner saves
]


def read_pickle(path: Path) -> dict[str, Any]:
    """A file of torch.save that holds a dict of tensors and plain values, and of other objects at most those of `STAND_INS`.

    Raises:
        InputError: the file is missing, damaged, or holds anything else, of which nothing is executed.
    """
    try:
        with torch.serialization.safe_globals(STAND_INS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on pickles of newer protocols, then refuses them
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"weights {path}: no such file; correct the path") from None
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = f"'{refused[1]}'" if refused else "something"
        raise InputError(
            f"weights {path}: not read, since it holds {what} beside tensors and plain values, and to load that could run code (none was "
            "run); if you trust it, save its weights alone where it was made: torch.save(model.state_dict(), 'weights.pth')"
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
        held = f" (it has {few([str(name)[:30] for name in content])})" if content else ""
        raise InputError(f"weights {path}: no named tensors, nor an entry 'model' or 'state_dict' of them{held}; save model.state_dict()")
    if any(value.numel() == 0 for value in content.values()):
        raise InputError(f"weights {path}: tensors without numbers, as in one process' part of a model; join the parts and save them whole")
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
