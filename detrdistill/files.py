"""Files appear whole or not at all: everything the kit writes goes through `atomic`."""

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from detrdistill.errors import InputError

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, it is flushed to disk and renamed to `path`.

    A reader therefore never sees half a file, and a killed writer leaves the previous version intact.

    Raises:
        InputError: the parent cannot be a folder because a file stands there, the disk is full, or it cannot be written to.
    """
    path = Path(path)
    make_folder(path.parent)
    with writing(path):
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


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Say plainly why `path` cannot be written: a full disk, a read-only one, no permission."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else _number(str(error))
        if number not in UNWRITABLE:
            raise
        raise InputError(f"{path}: cannot be written ({os.strerror(number)}); free disk space, or choose a writable folder") from None


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
    except OSError as error:
        with writing(f"output folder {path}"):
            raise error from None
    return path


def file_hash(path: Path | str) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _number(message: str) -> int | None:
    """The system's number for what went wrong, as safetensors reports it; torch's writer keeps it to itself, most often a full disk."""
    if "inline_container" in message or "iostream error" in message:
        return errno.ENOSPC
    found = re.search(r"\(os error (\d+)\)", message)
    return int(found[1]) if found else None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
