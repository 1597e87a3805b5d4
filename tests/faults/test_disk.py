"""Disks that are full, read-only or not there: refused before training where that can be known, else what was saved stays."""

import errno
import os
import re
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from detrdistill.errors import InputError
from detrdistill.files import atomic, write_text
from detrdistill.recipes.identity import parents
from detrdistill.recipes.presets import smoke
from detrdistill.recipes.recipe import Recipe
from detrdistill.runs import run as runs
from detrdistill.runs.run import run
from detrdistill.runs.store import Store
from detrdistill.training import trainer
from detrdistill.training.checkpointing import load_checkpoint
from detrdistill.training.logging import read_log

RECIPE = smoke().student
CHECKPOINT = 2_100_000  # bytes, a little less than it takes


def go(store: Store, recipe: Recipe = RECIPE) -> None:
    run(recipe, store, device="cpu", progress=False)


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Store:
    return with_backbone(finished, tmp_path / "results")


def with_backbone(finished: Path, root: Path) -> Store:
    store = Store(root)
    backbone = parents(RECIPE)["backbone"]
    shutil.copytree(Store(finished).folder(backbone), store.folder(backbone))
    return store


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """As `ulimit -f` does it: a file that grows beyond is cut there, and its writer told."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A real disk of some MiB; only root may mount one."""
    mounted = tmp_path / "disk"
    mounted.mkdir()

    def mount(size: int) -> Path:
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}m", "none", str(mounted)]
        if not shutil.which("mount") or subprocess.run(words, capture_output=True, check=False).returncode:
            pytest.skip("only root may mount a disk")
        return mounted

    yield mount
    subprocess.run(["umount", "-l", str(mounted)], capture_output=True, check=False)


def at_step(patch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Do something to the disk while training, before the step is logged."""
    kept = trainer.refuse_non_finite
    patch.setattr(trainer, "refuse_non_finite", lambda values, at, images: (act() if at == step else None, kept(values, at, images)))


def fill(disk: Path) -> None:
    with pytest.raises(OSError, match="No space left"), (disk / "other data").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def message(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def untrained(store: Store) -> bool:
    return not (store.folder(RECIPE) / "log.jsonl").exists()


def test_a_disk_too_small_is_refused_before_training(finished, disk, tries) -> None:
    store = with_backbone(finished, disk(4) / "results")
    with tries("disk too small, before training"), pytest.raises(InputError) as error:
        go(store)
    path = re.escape(str(store.folder(RECIPE) / "checkpoint.pt"))
    told = r"needs at least 3\.8 MiB, as it is replaced by a new one beside it, and the disk has 3\.\d MiB; free disk space, or choose .*"
    assert re.fullmatch(f"checkpoint {path}: {told}", message(error)) and untrained(store)


def test_a_limit_too_low_is_refused_before_training(store, tries) -> None:
    with tries("file-size limit, before training"), files_up_to(CHECKPOINT // 2), pytest.raises(InputError) as error:
        go(store)
    told = r"checkpoint .*/checkpoint\.pt: takes at least 1\.9 MiB, and files may have 1\.0 MiB \(ulimit -f\); raise that limit"
    assert re.fullmatch(told, message(error)) and untrained(store)


def test_a_checkpoint_that_is_there_counts_as_space(store, monkeypatch) -> None:
    """It needs only its successor beside it: a run that could be saved once is not refused for its own checkpoint."""
    at_step(monkeypatch, 3, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        go(store)
    monkeypatch.undo()
    kept, free = shutil.disk_usage(store.root), CHECKPOINT * 1.2
    monkeypatch.setattr(shutil, "disk_usage", lambda _: kept._replace(free=free))
    go(store)
    with pytest.raises(InputError, match=r"needs at least 3\.8 MiB.*the disk has 2\.4 MiB"):
        go(store, RECIPE.replace(seed=7))


@pytest.mark.parametrize("step", [2, 3, 4, 6])
def test_a_disk_that_fills_up_while_training(finished, disk, monkeypatch, tries, step) -> None:
    """Steps 2, 4 and 6 write checkpoints; freed, the run goes on from its last."""
    place = disk(8)
    store = with_backbone(finished, place / "results")
    folder = store.folder(RECIPE)
    with tries("disk full while training"):
        with monkeypatch.context() as patch, pytest.raises(InputError) as error:
            at_step(patch, step, lambda: fill(place))
            go(store)
        path = re.escape(str(folder))
        told = r"(log\.jsonl|checkpoint\.pt): cannot be written \(No space left on device\); free disk space, or choose another folder"
        assert re.fullmatch(f"{path}/{told}", message(error))
        saved = load_checkpoint(folder / "checkpoint.pt")
        assert (saved["state"]["step"] if saved else 0) == (step - 1) // 2 * 2
        with pytest.raises(InputError, match=r"No space left on device|the disk has 0\.0 MiB"):
            go(store)  # not a traceback from the lock either
        (place / "other data").unlink()
        check_end(store)


@pytest.mark.parametrize(
    ("name", "size", "saved"),
    [("log.jsonl", 500, 2), ("checkpoint.pt", 10_000, 2), ("weights.safetensors", 10_000, 6), ("record.json", 50, 6)],
)
def test_every_file_that_is_cut_short(store, monkeypatch, tries, name, size, saved) -> None:
    """A limit that is met in the middle of this file; what was last saved stays."""
    folder = store.folder(RECIPE)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))  # noqa: E731
    with tries(f"file-size limit in {name}"), monkeypatch.context() as patch:
        if name in ("log.jsonl", "checkpoint.pt"):
            at_step(patch, 3, limit)
        else:
            writer, owner = ("write", Store) if name == "record.json" else ("save_weights", runs)
            kept = getattr(owner, writer)
            patch.setattr(owner, writer, lambda *words: (limit(), kept(*words)))
        try:
            with pytest.raises(InputError) as error:
                go(store)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        why = "cannot be written (File too large); raise the limit on the size of files (ulimit -f), or choose another folder"
        assert message(error) == f"{folder / name}: {why}"
        assert load_checkpoint(folder / "checkpoint.pt")["state"]["step"] == saved
    check_end(store)


def check_end(store: Store) -> None:
    """The run comes to its end when called again, and leaves nothing half behind."""
    go(store)
    folder = store.folder(RECIPE)
    assert [entry["step"] for entry in read_log(folder / "log.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "log.jsonl", "record.json", "weights.safetensors"]
    store.check_weights(store.record(RECIPE))


def test_a_read_only_disk_is_refused_before_training(finished, disk, tries) -> None:
    place = disk(8)
    store = with_backbone(finished, place / "results")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    with tries("read-only disk"), pytest.raises(InputError) as error:
        go(store)
    why = "cannot be made (Read-only file system); make it writable, or choose another folder"
    assert message(error) == f"output folder {store.folder(RECIPE)}: {why}"
    # What is complete there can still be read.
    assert store.record(parents(RECIPE)["backbone"]).metrics["accuracy"] >= 0


def test_a_disk_that_turns_read_only_while_training(store, monkeypatch, tries) -> None:
    """As Linux does at faults of a disk. (Told by a stand-in: a disk with open files cannot be made read-only by hand.)"""

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with tries("disk turned read-only while training"):
        with monkeypatch.context() as patch, pytest.raises(InputError) as error:
            at_step(patch, 4, lambda: patch.setattr(tempfile, "mkstemp", refuse))
            go(store)
        path = store.folder(RECIPE) / "checkpoint.pt"
        assert message(error) == f"{path}: cannot be written (Read-only file system); make it writable, or choose another folder"
        assert load_checkpoint(path)["state"]["step"] == 2
        check_end(store)


def test_a_folder_without_permission(store, tries) -> None:
    if os.geteuid() == 0:
        pytest.skip("nothing is forbidden to root")
    store.root.joinpath("runs").chmod(0o555)
    try:
        with tries("no permission"), pytest.raises(InputError, match="no permission to create it; choose a writable folder"):
            go(store)
    finally:
        store.root.joinpath("runs").chmod(0o755)


def test_a_folder_where_nothing_can_be_made(tries) -> None:
    """Below /proc not even root can make one."""
    if not Path("/proc/self").exists():
        pytest.skip("no /proc here")
    with tries("output folder that cannot be made"), pytest.raises(InputError) as error:
        go(Store("/proc/results"))
    told = r"output folder /proc/results/runs/\S+: cannot be made \(No such file or directory\); correct the path, or choose another folder"
    assert re.fullmatch(told, message(error))


@pytest.mark.parametrize("place", ["results", "results/runs", "run"])
def test_an_output_folder_that_is_a_file(store, tries, place) -> None:
    blocking = store.folder(RECIPE) if place == "run" else store.root.parent / place
    if blocking.is_dir():
        shutil.rmtree(blocking)
    blocking.write_text("mine")
    with tries("output folder is a file"), pytest.raises(InputError) as error:
        go(store)
    assert re.fullmatch(rf"output folder .*: {re.escape(str(blocking))} is a file; move it away or choose another folder", message(error))
    assert blocking.read_text() == "mine"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG])
@pytest.mark.parametrize("step", ["mkstemp", "fsync", "mkdir"])
def test_whatever_the_system_says(tmp_path, monkeypatch, number, step) -> None:
    def fail(*_, **__):
        raise OSError(number, os.strerror(number), "some file")

    monkeypatch.setattr(*{"mkstemp": (tempfile, "mkstemp"), "fsync": (os, "fsync"), "mkdir": (Path, "mkdir")}[step], fail)
    with pytest.raises(InputError, match=r"(table\.csv|output folder .*new): (cannot be (written|made) \(|no permission to)") as error:
        write_text(tmp_path / "new" / "table.csv", "AP")
    assert re.search("; (free disk space|make it writable|raise the limit|choose a writable folder)", message(error))
    assert not list(tmp_path.rglob("*table.csv*"))


def test_other_faults_are_not_explained_away(tmp_path) -> None:
    for error in (OSError(errno.EIO, os.strerror(errno.EIO)), RuntimeError("something else")):
        with pytest.raises(type(error), match=str(error).replace("[", ".")), atomic(tmp_path / "file"):
            raise error
    assert list(tmp_path.iterdir()) == []
