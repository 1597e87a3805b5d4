"""Where runs lie and what is known of them. A run has happened if, and only if, its record is there. No torch here."""

import json
import os
import platform
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import Field

from detrdistill.errors import InputError
from detrdistill.experiments.recipes import CropRecipe, Recipe, run_id
from detrdistill.experiments.strict import Strict
from detrdistill.files import file_hash, make_folder, write_text, writing

Numbers = dict[str, float | None]


class Record(Strict):
    """What a complete run left behind; written last, in one piece, and hashed against later edits."""

    id: str
    recipe: Recipe | CropRecipe
    metrics: Numbers = Field(description="the twelve COCO numbers in percent (null: no such object), or crop accuracy in percent")
    curve: list[Numbers] = Field(description="AP by optimizer step")
    cost: dict[str, float | int | None] = Field(
        description="seconds of training, steps, images a second, peak MiB, times resumed, images that passed the teacher"
    )
    parents: dict[str, dict[str, str | float | None]] = Field(description="runs whose weights this run started or learned from")
    provenance: dict[str, Any] = Field(description="data and weight hashes, commit, library versions, device")


class Store:
    """The runs of one results folder, `results/<preset>`."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def folder(self, recipe: Recipe | CropRecipe) -> Path:
        return self.root / "runs" / run_id(recipe)

    def weights(self, recipe: Recipe | CropRecipe) -> Path:
        return self.folder(recipe) / "weights.safetensors"

    def record(self, recipe: Recipe | CropRecipe) -> Record | None:
        """The run's record, None if it has not been completed.

        Raises:
            InputError: the record was edited or damaged, or is that of another recipe.
        """
        path = self.folder(recipe) / "record.json"
        if not path.exists():
            return None
        record = read_record(path)
        if _placeless(record.recipe) != _placeless(recipe):
            raise InputError(f"record {path}: made by another recipe, from before a default was changed; delete its folder to run again")
        return record

    def check_weights(self, record: Record) -> Path:
        """Path of a record's weights, after comparing their hash.

        Raises:
            InputError: they are missing or differ.
        """
        path = self.weights(record.recipe)
        if not path.exists():
            raise InputError(f"run {record.id}: weights {path} are missing; restore them, or delete the folder to train again")
        if file_hash(path) != record.provenance["weights_sha256"]:
            raise InputError(f"run {record.id}: weights {path} differ from its record; restore them, or delete the folder to train again")
        return path

    def write(self, record: Record) -> None:
        body = record.model_dump(mode="json")
        write_text(self.folder(record.recipe) / "record.json", json.dumps(body | {"sha256": _hash(body)}, indent=1) + "\n")

    @contextmanager
    def hold(self, recipe: Recipe | CropRecipe) -> Iterator[None]:
        """Keep other processes from training the same run; a dead holder's lock is free, and its half-written files are removed.

        Raises:
            InputError: another process holds it; names that process.
        """
        import fcntl

        path = make_folder(self.folder(recipe)) / ".lock"
        with writing(path):
            file = path.open("ab+", buffering=0)  # no buffer to be written at the end, when the disk may be full
        with file:
            try:
                # Not flock, whose lock a dead process's children (loaders of images) would keep. It holds against other processes only.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                file.seek(0)
                holder = file.read().decode().strip() or "another process"
                raise InputError(f"run {run_id(recipe)} is being trained by {holder}; wait for it, or stop it") from None
            except OSError as error:
                raise InputError(f"{path}: cannot be locked ({error.strerror}); choose a results folder on a disk that has locks") from None
            with writing(path):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            for unfinished in (*path.parent.glob(".*.part"), *path.parent.glob(".tmp*")):  # the latter are those of safetensors
                unfinished.unlink()
            yield


def read_record(path: Path) -> Record:
    """Read and check one record file.

    Raises:
        InputError: not JSON, unknown fields, or content that does not fit its hash.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise InputError(f"record {path}: not a JSON object; delete its folder to run again")
    stated, found = body.pop("sha256", "none"), _hash(body)
    if stated != found:
        raise InputError(
            f"record {path}: its content (hash {found[:8]}) does not fit the hash in it ({str(stated)[:8]}), so it was edited or damaged; "
            "restore the file, or delete its folder to run again"
        )
    return Record.read(body, where=f"record {path}")


def open_store(preset: str) -> Store:
    """The store of a preset: `$DETRDISTILL_RESULTS/<preset>`, else `results/<preset>` in this folder or the nearest above that has one."""
    if stated := os.environ.get("DETRDISTILL_RESULTS"):
        return Store(Path(stated) / preset)
    here = Path.cwd()
    roots = [folder / "results" for folder in (here, *here.parents)]
    return Store(next((root for root in roots if root.is_dir()), roots[0]) / preset)


def provenance() -> dict[str, Any]:
    """Code, libraries and machine of this process."""
    libraries = ("torch", "torchvision", "numpy", "scipy", "lightning-fabric", "faster-coco-eval", "pillow", "scikit-image", "scikit-learn")
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in libraries},
        "machine": f"{platform.system()} {platform.machine()}",
    }


def commit() -> str | None:
    """The commit of this code, with "+changes" if files differ from it or are new; None outside a git checkout."""
    git = lambda *words: subprocess.run(  # noqa: E731
        ("git", *words), cwd=Path(__file__).parent, capture_output=True, text=True, check=False, timeout=60
    )
    try:
        head = git("rev-parse", "HEAD")
        if head.returncode:
            return None
        changed = git("status", "--porcelain", "--untracked-files=normal", "--", "..").stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+changes" if changed else "")


def short_commit(commit: str | None) -> str:
    """The commit of a record as people read it."""
    if not isinstance(commit, str):
        return "unknown"
    parts = [one.partition("+") for one in commit.split(", ")]  # several: the run was continued by other code
    return ", ".join(name[:8] + plus + changes for name, plus, changes in parts)


def _placeless(recipe: Recipe | CropRecipe) -> str:
    """The recipe without the paths of data folders, which may move."""
    return re.sub(r'"path": *"[^"]*"', "", json.dumps(recipe.model_dump(mode="json")))


def _hash(body: dict[str, Any]) -> str:
    return sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
