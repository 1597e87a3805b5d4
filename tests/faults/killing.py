"""A short run that children train and are killed in: how they die, what must be left of it, and how it must end.

Children are forked from a process that has imported the kit, since that takes longer than the run; what they do is `detrdistill train`.
"""

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from detrdistill.models.weights import read_weights
from detrdistill.recipes.identity import parents
from detrdistill.recipes.presets import smoke
from detrdistill.recipes.recipe import Recipe
from detrdistill.runs.store import Store
from detrdistill.training.checkpointing import load_checkpoint
from detrdistill.training.logging import read_log
from tests.warm import CHILDREN

CHANGES = {"dropout": 0.1, "schedule.steps": 5, "schedule.evaluations": 2}  # dropout: random numbers must come back, too
RECIPE = smoke().student.replace(**CHANGES)
LEFT = [".lock", "log.jsonl", "record.json", "weights.safetensors"]
OPERATIONS = ("open", "os.chmod", "os.remove", "os.rename")


def command(store: Store, **changes: object) -> list[str]:
    """The words after `detrdistill`."""
    settings = [word for name, value in (CHANGES | changes).items() for word in ("--set", f"{name}={value}")]
    return ["train", "smoke", "student", "--results", str(store.root), "--device", "cpu", *settings]


@dataclass(frozen=True)
class Death:
    """Before an operation on a file of the run whose name contains `name`; with `byte`, in the first write after it that goes beyond it.

    The log stays open between two lines, when others write their files, libraries to share memory for one. So with `byte` it is the
    log's own writes that are limited, whatever `number` says.
    """

    name: str
    number: int
    byte: int | None = None

    def prepare(self, folder: Path) -> None:
        """To be called in the process that is to die."""
        if self.name == "log.jsonl" and self.byte is not None:
            self._prepare_log()
            return
        numbers, prefix = count(1), str(folder)

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            if event in OPERATIONS and (path := str(arguments[0])).startswith(prefix):
                if self.name in Path(path).name and next(numbers) == self.number:
                    if self.byte is None:
                        os.kill(os.getpid(), signal.SIGKILL)
                    self._limit()

        sys.addaudithook(watch)

    def _limit(self) -> None:
        """The system writes up to the limit and kills at the next byte; Python would otherwise make it an error."""
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.byte, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def _prepare_log(self) -> None:
        from detrdistill.training.logging import Log

        write, before = Log.write, resource.getrlimit(resource.RLIMIT_FSIZE)

        def limited(*arguments: Any, **entry: Any) -> None:
            self._limit()
            write(*arguments, **entry)
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

        Log.write = limited


def start(store: Store, death: Death | None = None, *, every_step: bool = True, workers: int = 0) -> BaseProcess:
    """A child that trains the run, with a checkpoint at every step or only at evaluations."""
    child = CHILDREN.Process(target=_train, args=(store, death, every_step, workers))
    child.start()
    return child


def _train(store: Store, death: Death | None, every_step: bool, workers: int) -> None:
    from detrdistill.cli import main
    from detrdistill.training import checkpointing

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    multiprocessing.set_start_method(None, force=True)  # loaders of a server outlive a killed trainer for ever
    if every_step:
        checkpointing.CHECKPOINT_SECONDS = -1.0
    if death:
        death.prepare(store.folder(RECIPE))
    sys.argv = ["detrdistill", *command(store), "--workers", str(workers)]
    main()


def ended(child: BaseProcess) -> int:
    """The exit code of a child, minus the signal that killed it."""
    child.join(120)
    assert child.exitcode is not None, "the child hangs"
    return child.exitcode


def until(condition: Callable[[], object], process: subprocess.Popen | BaseProcess) -> None:
    """Wait for a condition while the process lives."""
    alive = process.is_alive if isinstance(process, BaseProcess) else lambda: process.poll() is None
    deadline = time.monotonic() + 120
    while not condition():
        assert alive(), "it ended too early"
        assert time.monotonic() < deadline, "it hangs"
        time.sleep(0.01)


def steps(store: Store, recipe: Recipe = RECIPE) -> int:
    """How many steps the run has logged."""
    return len(read_log(store.folder(recipe) / "log.jsonl"))


def holder(store: Store, recipe: Recipe = RECIPE) -> int:
    """The process that trains the run, as its lock says."""
    return int((store.folder(recipe) / ".lock").read_text().split()[1])


class Whole:
    """The run as nothing disturbed it, and the judge of those that were killed."""

    def __init__(self, root: Path) -> None:
        self.store = Store(root)
        assert ended(start(self.store)) == 0  # data and backbone too, which are no part of the run
        shutil.rmtree(self.store.folder(RECIPE))
        began = time.monotonic()
        assert ended(start(self.store)) == 0
        self.seconds = time.monotonic() - began
        self.record = self.store.record(RECIPE)
        self.lines = read_log(self.folder / "log.jsonl")
        assert len(self.lines) == 5

    @property
    def folder(self) -> Path:
        return self.store.folder(RECIPE)

    def beside(self, root: Path) -> Store:
        """A store with the backbone that the run starts from, but not the run."""
        store = Store(root)
        for parent in parents(RECIPE).values():
            shutil.copytree(self.store.folder(parent), store.folder(parent))
        return store

    def check_left(self, store: Store) -> int:
        """What a killed run left is whole and true; the step of its checkpoint."""
        folder = store.folder(RECIPE)
        found = read_log(folder / "log.jsonl")
        assert found == self.lines[: len(found)]
        if store.record(RECIPE) is not None:
            self.check_end(store)
            return len(self.lines)
        if (path := store.weights(RECIPE)).exists():
            self._same_weights(path)
        saved = load_checkpoint(folder / "checkpoint.pt")
        return saved["state"]["step"] if saved else 0

    def check_end(self, store: Store) -> None:
        """The run is complete and, byte for byte, that which nothing disturbed."""
        record, folder = store.record(RECIPE), store.folder(RECIPE)
        assert (record.metrics, record.curve) == (self.record.metrics, self.record.curve)
        assert (folder / "log.jsonl").read_bytes() == (self.folder / "log.jsonl").read_bytes()
        self._same_weights(store.check_weights(record))

    def check_continued(self, store: Store) -> None:
        """Called once more, the run comes to its end, and leaves nothing half behind."""
        over = store.record(RECIPE) is not None  # then its checkpoint stays if it was not yet removed
        assert ended(start(store)) == 0
        self.check_end(store)
        names = sorted(path.name for path in store.folder(RECIPE).iterdir())
        assert names == LEFT or (over and set(LEFT) <= set(names) and "checkpoint.pt" in names)

    def _same_weights(self, path: Path) -> None:
        (found, about), (wanted, same) = (read_weights(one) for one in (path, self.store.weights(RECIPE)))
        assert about == same and found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
