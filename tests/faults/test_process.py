"""The trainer is killed at any moment, or asked to stop: nothing is lost, nothing half is read, and it ends as if nothing had been."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import psutil
import pytest

from detrdistill.errors import InputError, StoppedError
from detrdistill.recipes.identity import run_id
from detrdistill.runs import run as runs
from detrdistill.runs.store import Store
from detrdistill.training.checkpointing import load_checkpoint
from tests.faults.killing import RECIPE, Death, Whole, command, ended, holder, start, steps, until

Times = Callable[[int, int], int]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def stores(whole: Whole, tmp_path: Path) -> Callable[[], Store]:
    numbers = count()
    return lambda: whole.beside(tmp_path / str(next(numbers)))


@pytest.mark.timeout(1200)
def test_kill_9_at_any_moment(whole: Whole, stores: Callable[[], Store], times: Times, tries, chance) -> None:
    """Again and again in one folder: no kill costs more than the step it came in."""
    for _ in range(times(1, 14)):
        store, before = stores(), 0
        for _ in range(3):
            with tries("kill -9 of the trainer at a random moment"):
                child = start(store)
                child.join(chance.uniform(0, whole.seconds))
                child.kill()
                assert ended(child) in (-signal.SIGKILL, 0)
                after = whole.check_left(store)
                assert after >= before, "a step that was saved is lost"
                before = after
        whole.check_continued(store)


@pytest.mark.timeout(1200)
def test_kill_9_before_every_file_operation(whole: Whole, stores: Callable[[], Store], times: Times, tries, chance) -> None:
    """Opening, renaming, removing, giving rights: all moments at which the folder looks different."""
    few = chance.sample(range(1, 40), 3)
    for number in count(1) if times(0, 1) else few:
        store = stores()
        with tries("kill -9 of the trainer before a file operation"):
            code = ended(start(store, Death("", number)))
            if code != 0:
                assert code == -signal.SIGKILL
                whole.check_left(store)
                whole.check_continued(store)
        if code == 0:  # there are fewer operations
            assert number > 40
            break


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["log.jsonl", "checkpoint.pt", "weights.safetensors", "record.json"])
def test_killed_in_the_middle_of_writing(whole: Whole, stores: Callable[[], Store], times: Times, tries, chance, name: str) -> None:
    # Half of a checkpoint is more than the other files are long; of the log, what is written before the first checkpoint.
    size = {"log.jsonl": 300, "checkpoint.pt": 1_500_000}.get(name) or (whole.folder / name).stat().st_size
    for _ in range(times(1, 8)):
        store = stores()
        death = Death(name, 1, chance.randrange(1, size))
        with tries(f"killed while writing {name}"):
            assert ended(start(store, death, every_step=False)) == -signal.SIGXFSZ
            whole.check_left(store)
            if name == "log.jsonl":
                assert (store.folder(RECIPE) / name).stat().st_size == death.byte
            whole.check_continued(store)


def test_sigterm_saves_and_exits(whole: Whole, stores: Callable[[], Store], times: Times, tries, chance) -> None:
    """To the process alone, or to all it started, as schedulers do; there are checkpoints at evaluations else, after steps 2 and 5."""
    for number in range(times(1, 8)):
        store = stores()
        log = store.folder(RECIPE) / "log.jsonl"
        with tries("SIGTERM to the trainer"):
            lines = chance.randrange(1, 5)
            words = [sys.executable, "-m", "detrdistill", *command(store), "--workers", "2" if number % 2 == 0 else "0"]
            process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
            until(lambda: steps(store) >= lines, process)  # noqa: B023
            os.killpg(process.pid, signal.SIGTERM) if number % 2 == 0 else process.terminate()
            told = process.communicate(timeout=60)[1].splitlines()[-1]
            step = load_checkpoint(log.with_name("checkpoint.pt"))["state"]["step"]
            assert process.returncode == 143
            assert told == f"stopped: {RECIPE.title}: SIGTERM after step {step} of 5; saved in {log.parent}, run it again to continue"
            assert step >= lines and steps(store) == step and whole.check_left(store) == step
            whole.check_continued(store)
            assert store.record(RECIPE).cost["resumed"] == 1


@pytest.mark.parametrize(("number", "step"), [(1, 3), (2, 5)])
def test_sigterm_in_an_evaluation(stores: Callable[[], Store], monkeypatch: pytest.MonkeyPatch, tries, number: int, step: int) -> None:
    """It ends first. Also in the last: nothing else is started then, such as the student of a teacher that has just been trained."""
    store, kept, seen = stores(), runs.evaluate, []

    def signalled(*words: object, **named: object) -> object:
        seen.append(1)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return kept(*words, **named)

    monkeypatch.setattr(runs, "evaluate", signalled)
    with tries("SIGTERM in an evaluation"):
        with pytest.raises(StoppedError, match=f"SIGTERM after step {step} of 5"):
            runs.run(RECIPE, store, device="cpu", progress=False)
        assert runs.run(RECIPE, store, device="cpu", progress=False).cost["resumed"] == 1


def test_sigterm_before_training_ends_at_once(stores: Callable[[], Store], tries) -> None:
    store = stores()
    with tries("SIGTERM to the trainer"):
        child = start(store)
        child.terminate()
        assert ended(child) == -signal.SIGTERM and store.record(RECIPE) is None


def test_two_runs_on_one_folder(whole: Whole, stores: Callable[[], Store], tries) -> None:
    """The second is refused and told who holds it; the lock of a dead holder is free, even while its loaders of images still live."""
    store = stores()
    child = start(store, workers=2)
    try:
        until(lambda: steps(store), child)
        with tries("a second run on one folder"):
            with pytest.raises(InputError) as error:
                runs.run(RECIPE, store, device="cpu", progress=False)
            here = f"process {child.pid} on {socket.gethostname()}"
            assert str(error.value) == f"run {run_id(RECIPE)} is being trained by {here}; wait for it, or stop it"
        trainer = psutil.Process(child.pid)
        loaders = trainer.children()
    finally:
        child.kill()
    with tries("a dead holder's lock"):
        trainer.wait(20)
        assert any(loader.is_running() for loader in loaders)
        whole.check_continued(store)
    assert ended(child) == -signal.SIGKILL


PAIR = {"schedule.steps": 12, "schedule.evaluations": 4}
OF_PAIR = RECIPE.replace(**PAIR)


def torchrun(store: Store) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "detrdistill"]
    return subprocess.Popen([*launcher, *command(store, **PAIR)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


ALONE = """
import atexit, sys
from torch import distributed
from detrdistill import cli
from detrdistill.errors import InputError

def train(error: str) -> None:
    distributed.init_process_group("gloo")
    atexit.register(distributed.barrier)  # as Fabric does with NCCL, whose connections all processes close together
    if distributed.get_rank() == 1:
        if error == "disk full":
            sys.stderr = open("/dev/full", "w")
        raise RuntimeError("CUDA out of memory") if error == "RuntimeError" else InputError("CUDA out of memory")
    distributed.broadcast_object_list([None])

sys.argv = ["detrdistill", "train", "--error", sys.argv[1]]
cli.COMMANDS = (train, *cli.COMMANDS[1:])
cli.main()
"""


@pytest.mark.parametrize(
    ("error", "told"), [("InputError", "error: CUDA out of"), ("RuntimeError", "RuntimeError: CUDA out of"), ("disk full", "")]
)
def test_an_error_of_one_process_ends_the_others_that_wait_for_it(tmp_path: Path, times: Times, tries, error: str, told: str) -> None:
    if not times(error == "InputError", True):
        pytest.skip("with --long")
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, error]
    with tries("an error in one of two processes"):
        done = subprocess.run(launcher, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode and told in done.stderr, done.stderr


@pytest.mark.timeout(1200)
def test_two_processes_of_torchrun(stores: Callable[[], Store], times: Times, tries, chance) -> None:
    """One of two is killed, or the launcher is asked to stop: both end, and go on together as if nothing had been."""
    if not times(0, 1):
        pytest.skip("minutes: with --long")
    undisturbed = stores()
    assert torchrun(undisturbed).wait(200) == 0
    wanted = (undisturbed.folder(OF_PAIR) / "log.jsonl").read_bytes()
    for number in range(6):
        store, victim = stores(), ("rank 0", "rank 1", "torchrun")[number % 3]
        with tries(f"{'SIGTERM' if victim == 'torchrun' else 'kill -9'} of {victim}"):
            launcher, lines = torchrun(store), chance.randrange(4, 11)
            until(lambda: steps(store, OF_PAIR) >= lines, launcher)  # noqa: B023
            first = psutil.Process(holder(store, OF_PAIR))
            if victim == "torchrun":
                launcher.terminate()
            else:
                (second,) = {child.pid for child in psutil.Process(launcher.pid).children()} - {first.pid}
                os.kill(first.pid if victim == "rank 0" else second, signal.SIGKILL)
            assert launcher.wait(100) != 0 and store.record(OF_PAIR) is None
            saved = load_checkpoint(store.folder(OF_PAIR) / "checkpoint.pt")["state"]["step"]
            assert saved == steps(store, OF_PAIR) if victim == "torchrun" else saved >= 3
            assert torchrun(store).wait(200) == 0
            assert (store.folder(OF_PAIR) / "log.jsonl").read_bytes() == wanted
            record, same = store.record(OF_PAIR), undisturbed.record(OF_PAIR)
            assert (record.metrics, record.curve, record.cost["resumed"]) == (same.metrics, same.curve, 1)
