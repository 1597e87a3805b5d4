"""More steps for a complete run: as if all of them had been one, or from the start, and then it says why."""

import re
import shutil
from pathlib import Path

import pytest

from detrdistill.recipes.identity import parents, run_id
from detrdistill.recipes.presets import smoke
from detrdistill.recipes.recipe import Recipe
from detrdistill.records import Record
from detrdistill.runs import continuing
from detrdistill.runs.continuing import continue_shorter, shorter_runs
from detrdistill.runs.run import run
from detrdistill.runs.store import Store
from detrdistill.training import trainer
from detrdistill.training.checkpointing import load_checkpoint
from detrdistill.training.logging import is_logged, read_log

OPEN = {"schedule.decay": "step", "schedule.drops": (), "schedule.warmup": 3, "schedule.batch": 4, "dropout": 0.1}
FINE_TUNED = {"schedule.keep": "best", "schedule.ema": 0.9}
STUDENT = smoke().student.replace(**OPEN)


def length(recipe: Recipe, steps: int, evaluations: int) -> Recipe:
    return recipe.replace(**{"schedule.steps": steps, "schedule.evaluations": evaluations})


def go(recipe: Recipe, store: Store) -> Record:
    return run(recipe, store, device="cpu", progress=False)


def beside(finished: Path, root: Path, recipe: Recipe) -> Store:
    """A store with all that the recipe needs, and no run of it."""
    store = Store(root)
    for parent in parents(recipe).values():
        shutil.copytree(Store(finished).folder(parent), store.folder(parent))
    return store


def check_same(one: Store, other: Store, recipe: Recipe) -> None:
    """Weights, log and numbers of a run in two stores."""
    for name in ("weights.safetensors", "log.jsonl"):
        assert (one.folder(recipe) / name).read_bytes() == (other.folder(recipe) / name).read_bytes(), name
    for name in ("metrics", "curve", "kept"):
        assert getattr(one.record(recipe), name) == getattr(other.record(recipe), name)


def test_more_steps_continue_a_complete_run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluated after the same steps, and killed on the way."""
    recipe = STUDENT.replace(**FINE_TUNED)
    short, long = length(recipe, 4, 2), length(recipe, 8, 4)
    store, whole = (beside(finished, tmp_path / name, recipe) for name in ("continued", "whole"))
    assert go(short, store).continued is None and (store.folder(short) / "checkpoint.pt").exists()
    kept, steps = trainer.refuse_non_finite, []

    def interrupt(values: dict[str, float], step: int, images: str) -> None:
        steps.append(step)
        if step == 6:
            raise KeyboardInterrupt
        kept(values, step, images)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "refuse_non_finite", interrupt)
        go(long, store)
    assert steps == [5, 6], "the first four steps are not trained again"
    record, undisturbed = go(long, store), go(long, whole)
    assert record.continued == {"run": run_id(short), "step": 4} and undisturbed.continued is None
    assert record.kept["of"] == 4 and record.kept["split"] == "val"
    check_same(store, whole, long)
    assert shorter_runs(length(recipe, 12, 6), 12, store) == [record, store.record(short)], "the next one continues the longest"


def test_more_steps_under_a_teacher(finished: Path, tmp_path: Path) -> None:
    """One evaluation at the end of each: the longer one leaves out the shorter one's."""
    recipe = smoke().recipe("detrdistill").replace(**OPEN)
    short, long = length(recipe, 3, 1), length(recipe, 5, 1)
    store, whole = (beside(finished, tmp_path / name, recipe) for name in ("continued", "whole"))
    go(short, store)
    record, undisturbed = go(long, store), go(long, whole)
    assert record.continued == {"run": run_id(short), "step": 3} and len(record.curve) == 1
    check_same(store, whole, long)
    assert record.cost["teacher_images"] == undisturbed.cost["teacher_images"] == 20


@pytest.fixture(scope="module")
def short(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a complete run of four steps and two evaluations. Not to be written to."""
    store = beside(finished, tmp_path_factory.mktemp("short") / "results", STUDENT)
    go(length(STUDENT, 4, 2), store)
    return store.root


def begin(store: Store, recipe: Recipe, parents: dict | None = None) -> dict | None:
    """What a longer run begins with."""
    continue_shorter(recipe, 32, store, store.record(length(STUDENT, 4, 2)).parents if parents is None else parents)
    return load_checkpoint(store.folder(recipe) / "checkpoint.pt")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"missing": True}, r".*checkpoint\.pt is not there"),
        ({"content": b"half of it"}, r"checkpoint .*checkpoint\.pt: not readable \(\w+\)"),
        ({"steps": 9, "evaluations": 3}, r"it was evaluated after other steps than every 3"),
        ({"evaluations": 2}, r"it was evaluated after other steps than every 4; schedule\.evaluations=4 would be"),
        ({"parents": {"backbone": {"run": "other", "weights_sha256": "0" * 64}}}, "its backbone had other weights"),
    ],
)
def test_where_it_cannot_be_continued_it_says_why(
    short: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict, why: str
) -> None:
    shutil.copytree(short, tmp_path / "results")
    store, of = Store(tmp_path / "results"), length(STUDENT, 4, 2)
    checkpoint = store.folder(of) / "checkpoint.pt"
    if "missing" in changes:
        checkpoint.unlink()
    elif "content" in changes:
        checkpoint.write_bytes(changes["content"])
    recipe = length(STUDENT, changes.get("steps", 8), changes.get("evaluations", 4))
    assert begin(store, recipe, changes.get("parents")) is None
    (line,) = caplog.messages
    assert line.startswith(f"{recipe.title}: trains from its first step; run {run_id(of)} of 4 steps cannot be continued: ")
    assert re.search(f": {why}; a run that starts from its weights needs --start$", line), line


def test_a_start_that_was_renamed_is_the_same_weights() -> None:
    here = {"file": "a.pth", "source": "org/a@1", "origin": "kit", "sha256": "1", "classes": "3 of 3 outputs"}
    there = here | {"file": "b.pth", "source": "", "AP": 1.0}
    first, renamed, other = ({"start": one} for one in (here, there, here | {"sha256": "2"}))
    assert continuing._origin(first, "start") == continuing._origin(renamed, "start") != continuing._origin(other, "start")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"schedule.decay": "cosine"}, "its learning rate fell as a cosine"),
        ({"schedule.drops": (0.5, 0.8)}, "its learning rate fell after parts 0.5, 0.8 of all steps"),
    ],
)
def test_a_schedule_with_an_end_cannot_be_continued(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict, why: str
) -> None:
    recipe = STUDENT.replace(**changes)
    store = beside(finished, tmp_path / "results", recipe)
    first = go(length(recipe, 1, 1), store)
    assert not (store.folder(first.recipe) / "checkpoint.pt").exists()
    assert go(length(recipe, 2, 1), store).continued is None
    (line,) = caplog.messages
    assert f"run {first.id} of 1 steps cannot be continued: {why} (schedule.decay=step with schedule.drops= can be continued)" in line


def test_only_runs_that_differ_in_length_alone_are_continued(short: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(short)
    for changes in ({"schedule.lr": 1e-4}, {"schedule.ema": 0.9}, {"queries": 10}, {"schedule.steps": 4}, {"schedule.steps": 3}):
        recipe = length(STUDENT, 8, 4).replace(**changes)
        assert not shorter_runs(recipe, recipe.schedule.steps, store) and begin(store, recipe) is None
    assert not caplog.messages
    epochs = STUDENT.replace(**{"schedule.steps": None, "schedule.epochs": 1, "schedule.evaluations": 4})
    assert [record.cost["steps"] for record in shorter_runs(epochs, 8, store)] == [4]


def test_of_the_shorter_run_s_log_it_takes_what_it_would_have_logged(short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of an evaluation that is none of its own is left out, as after thousands of steps, where only some have lines."""
    shutil.copytree(short, tmp_path / "results")
    store = Store(tmp_path / "results")
    monkeypatch.setattr(continuing, "is_logged", lambda step, total, open_ended: step == 3)
    for steps, evaluations, wanted in ((9, 1, [3]), (8, 4, [2, 3, 4])):
        recipe = length(STUDENT, steps, evaluations)
        assert begin(store, recipe)["state"]["curve"] == store.record(length(STUDENT, 4, 2)).curve * (evaluations > 1)
        assert [entry["step"] for entry in read_log(store.folder(recipe) / "log.jsonl")] == wanted


def test_a_run_that_has_begun_is_left_alone(short: Path, tmp_path: Path) -> None:
    shutil.copytree(short, tmp_path / "results")
    store, recipe = Store(tmp_path / "results"), length(STUDENT, 8, 4)
    assert begin(store, recipe)["state"]["step"] == 4
    path = store.folder(recipe) / "checkpoint.pt"
    before = path.stat().st_mtime_ns
    assert begin(store, recipe) and path.stat().st_mtime_ns == before


def test_what_an_open_ended_schedule_logs_does_not_depend_on_its_end() -> None:
    closed, open_ = ([step for step in range(1, 9001) if is_logged(step, 9000, ended)] for ended in (False, True))
    assert closed == list(range(4, 9001, 4))
    assert open_ == [*range(1, 2001), *range(2002, 4001, 2), *range(4004, 8001, 4), *range(8008, 9001, 8)]
    assert open_ == [step for step in range(1, 9001) if is_logged(step, 100_000, True)]
