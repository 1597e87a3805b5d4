"""Where runs lie. A run has happened if, and only if, its record is there. No torch here."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from detrdistill.errors import InputError
from detrdistill.files import file_hash, make_folder, write_text, writing
from detrdistill.recipes.identity import run_id, same_run
from detrdistill.recipes.parts import Folder
from detrdistill.recipes.recipe import CropRecipe, Recipe
from detrdistill.records import Cost, InsideObjects, Record, read_cost, read_inside, read_record, record_text

SHARES = "inside_objects.json"  # beside the record of a detector whose maps were measured
COST = "cost.json"  # beside the record of a detector whose costs were measured
MARK = "stored.txt"  # beside the record of a run that was not trained here


Measured = TypeVar("Measured", InsideObjects, Cost)


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

        Of a recipe that does not state its data folder's content (a preset's, on a folder that need not be here) the record says it.

        Raises:
            InputError: the record was edited or damaged, is that of another recipe or lies in another run's folder; or the recipe does not
                state its data's content, and there are runs on several.
        """
        found = []
        for path in self._paths(recipe):
            record = read_record(path)
            if not path.parent.name == record.id == run_id(record.recipe):
                raise InputError(f"record {path} is that of run {record.id}; a record belongs in the folder of its own run")
            if same_run(record.recipe, recipe):
                found.append(record)
            elif path.parent.name == run_id(recipe):
                raise InputError(
                    f"record {path}: made by another recipe, from before a default was changed; delete its folder to run again"
                )
        if len(found) > 1:
            ids = ", ".join(record.id for record in found)
            raise InputError(f"runs {ids} differ only in the content of their data; keep one of them in {self.root}")
        return found[0] if found else None

    def _paths(self, recipe: Recipe | CropRecipe) -> list[Path]:
        """Of the records that may be the recipe's."""
        if isinstance(recipe.data, Folder) and not recipe.data.sha256:
            return sorted((self.root / "runs").glob(f"{recipe.title}-{'[0-9a-f]' * 8}/record.json"))
        path = self.folder(recipe) / "record.json"
        return [path] if path.exists() else []

    @property
    def has_runs(self) -> bool:
        """Whether a run is complete that was not taken from the committed reference."""
        return any(not path.with_name(MARK).exists() for path in (self.root / "runs").glob("*/record.json"))

    def is_stored(self, record: Record) -> bool:
        """Whether the run was taken from the committed reference instead of trained here."""
        return (self.folder(record.recipe) / MARK).exists()

    def mark_stored(self, recipe: Recipe | CropRecipe, why: str) -> None:
        write_text(self.folder(recipe) / MARK, f"{why}\n")

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

    def inside_objects(self, record: Record) -> InsideObjects | None:
        """How much of the maps of a run's detector lies inside objects, None if that was not measured.

        Raises:
            InputError: the file was edited or damaged, or it was measured on other data or with other weights than the record's.
        """
        path = self.folder(record.recipe) / SHARES
        return self._of_record(record, read_inside(path), f"shares {path}") if path.exists() else None

    def cost(self, record: Record) -> Cost | None:
        """What a run's detector costs when it is used, None if that was not measured.

        Raises:
            InputError: as `inside_objects`.
        """
        path = self.folder(record.recipe) / COST
        return self._of_record(record, read_cost(path), f"costs {path}") if path.exists() else None

    @staticmethod
    def _of_record(record: Record, found: Measured, title: str) -> Measured:
        about, stated = record.provenance, (found.run, found.weights_sha256, found.data_sha256)
        if stated != (record.id, about["weights_sha256"], about["data_sha256"]):
            raise InputError(
                f"{title}: of run {stated[0]}, weights {stated[1][:8]}, data {stated[2][:8]}; the record beside it is of "
                f"run {record.id}, weights {about['weights_sha256'][:8]}, data {about['data_sha256'][:8]}; delete it to measure again"
            )
        return found

    def write_inside(self, recipe: Recipe, found: InsideObjects) -> None:
        write_text(self.folder(recipe) / SHARES, record_text(found))

    def write_cost(self, recipe: Recipe, found: Cost) -> None:
        write_text(self.folder(recipe) / COST, record_text(found))

    def write(self, record: Record) -> None:
        write_text(self.folder(record.recipe) / "record.json", record_text(record))

    @contextmanager
    def hold(self, recipe: Recipe | CropRecipe) -> Iterator[None]:
        """Keep other processes from training the same run; a dead holder's lock is free, and its half-written files are removed.

        Raises:
            InputError: another process holds it; names that process.
        """
        try:
            import fcntl
        except ModuleNotFoundError:
            raise InputError("runs cannot be locked on this system (Windows), so nothing is trained; use Linux, macOS or WSL") from None

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
            if not (path.parent / "record.json").exists():
                (path.parent / MARK).unlink(missing_ok=True)  # of a copy that was not finished
            yield


def open_store(preset: str) -> Store:
    """The store of a preset: `$DETRDISTILL_RESULTS/<preset>`, else `results/<preset>` in this folder or the nearest above that has one."""
    if stated := os.environ.get("DETRDISTILL_RESULTS"):
        return Store(Path(stated) / preset)
    here = Path.cwd()
    roots = [folder / "results" for folder in (here, *here.parents)]
    return Store(next((root for root in roots if root.is_dir()), roots[0]) / preset)
