"""detrdistill: DETRDistill (ICCV 2023) and its rivals, reproducible from notebooks.

The names below are imported on first use, so that `import detrdistill` and everything that only reads results
(tables, figures) does not pay for torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "InputError": "detrdistill.errors",
    "NonFiniteError": "detrdistill.errors",
    "Recipe": "detrdistill.recipes.recipe",
    "Store": "detrdistill.runs.store",
    "run": "detrdistill.runs.run",
    "build_detector": "detrdistill.models",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'detrdistill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
