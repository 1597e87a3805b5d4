"""Files appear whole or not at all: everything the kit writes goes through `atomic`."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from detrdistill.errors import InputError


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, it is flushed to disk and renamed to `path`.

    A reader therefore never sees half a file, and a killed writer leaves the previous version intact.

    Raises:
        InputError: the parent cannot be a folder because a file stands there.
    """
    path = Path(path)
    make_folder(path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes files private; results are meant to be shared like any other file.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write `text` (UTF-8) atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def make_folder(path: Path | str) -> Path:
    """Create `path` and its parents, and say plainly when a file stands in the way."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        blocking = next(p for p in (path, *path.parents) if p.exists() and not p.is_dir())
        raise InputError(f"output folder {path}: {blocking} is a file; move it away or choose another folder") from None
    except PermissionError:
        raise InputError(f"output folder {path}: no permission to create it; choose a writable folder") from None
    return path


def file_hash(path: Path | str) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
