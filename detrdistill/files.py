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

# What can stand in the way of writing, and what helps.
REMEDIES = {errno.EFBIG: "raise the limit on the size of files (ulimit -f)"}
REMEDIES |= dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free disk space")
REMEDIES |= dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make it writable")


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
            temporary.chmod(0o666 & ~umask())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Say plainly why `path` cannot be written: a full disk, a read-only one, no permission, a limit on the size of files."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        number = _number(error)
        if number not in REMEDIES:
            raise
        raise InputError(f"{path}: cannot be written ({os.strerror(number)}); {REMEDIES[number]}, or choose another folder") from None


def write_text(path: Path | str, text: str) -> None:
    """Write `text` (UTF-8) atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def make_folder(path: Path | str) -> Path:
    """Create `path` and its parents.

    Raises:
        InputError: a file stands in the way, or the system refuses; says why.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        blocking = next(p for p in (path, *path.parents) if p.exists() and not p.is_dir())
        raise InputError(f"output folder {path}: {blocking} is a file; move it away or choose another folder") from None
    except PermissionError:
        raise InputError(f"output folder {path}: no permission to create it; choose a writable folder") from None
    except OSError as error:
        remedy = REMEDIES.get(error.errno, "correct the path")
        raise InputError(f"output folder {path}: cannot be made ({error.strerror}); {remedy}, or choose another folder") from None
    return path


def nearby(path: Path) -> Path:
    """A relative path looked for here, then in the folders above: a notebook finds what lies beside its folder. Itself if there is none."""
    if path.is_absolute() or path.exists():
        return path
    return next((folder / path for folder in Path.cwd().parents if (folder / path).exists()), path)


def file_hash(path: Path | str) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _number(error: BaseException | None) -> int | None:
    """The system's number for what went wrong: safetensors has it in its message, torch raises an error of its own on top."""
    if error is None or isinstance(error, OSError):
        return error and error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else _number(error.__context__)


def umask() -> int:
    """Permissions that new files and folders of this process do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
