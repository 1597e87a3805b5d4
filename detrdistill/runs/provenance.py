"""Which code, libraries and machine a run was made by. No torch here."""

import functools
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any


def provenance(*further: str) -> dict[str, Any]:
    """Code, libraries and machine of this process.

    Args:
        further: libraries whose versions count here beside the usual ones.
    """
    libraries = ("torch", "torchvision", "numpy", "scipy", "lightning-fabric", "faster-coco-eval", "pillow", "scikit-image", "scikit-learn")
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in (*libraries, *further)},
        "machine": f"{platform.system()} {platform.machine()}",
    }


def commit() -> str | None:
    """The commit of this code, with "+changes" if files differ from it or are new; None outside a checkout of it.

    An installed copy may lie inside somebody else's checkout, which does not track it.
    """

    def git(*words: str) -> "subprocess.CompletedProcess[str]":
        folder = Path(__file__).parent
        return subprocess.run(("git", *words), cwd=folder, capture_output=True, text=True, check=False, timeout=60)

    try:
        head = git("rev-parse", "HEAD")
        if head.returncode or git("ls-files", "--error-unmatch", Path(__file__).name).returncode:
            return None
        changed = git("status", "--porcelain", "--untracked-files=normal", "--", "..").stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+changes" if changed else "")


@functools.cache
def code() -> str | None:
    """The commit of this process's code, as it was when its first run started."""
    return commit()
