"""Parents come from the committed reference, rows never; finished runs are brought into it with thinned logs."""

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from detrdistill.errors import InputError
from detrdistill.files import file_hash
from detrdistill.recipes.presets import smoke
from detrdistill.recipes.tables import make_table
from detrdistill.records import Record, read_record, record_text
from detrdistill.report.tables import collect
from detrdistill.runs import reference
from detrdistill.runs.run import run
from detrdistill.runs.store import Store

STUDENT, TEACHER, DISTILLED = (smoke().recipe(setting) for setting in ("student", "teacher", "detrdistill"))
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def committed(tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A reference that holds the smoke preset's distilled student, its teacher and their backbone, weights and all."""
    monkeypatch.setattr(reference, "FOLDER", tmp_path / "reference")
    shutil.copytree(finished, tmp_path / "reference" / "smoke")
    return Store(tmp_path / "reference" / "smoke")


def go(recipe, store: Store, **how) -> Record:
    return run(recipe, store, device="cpu", progress=False, **how)


def test_parents_are_taken_and_marked_and_rows_are_trained(committed: Store, tmp_path: Path) -> None:
    store = Store(tmp_path / "own")
    record = go(DISTILLED, store)
    teacher = store.record(TEACHER)
    assert teacher == committed.record(TEACHER) and store.is_stored(teacher) and store.check_weights(teacher)
    assert not store.is_stored(record) and (store.folder(DISTILLED) / "log.jsonl").exists()
    assert not (store.folder(TEACHER) / "log.jsonl").exists(), "it was not trained"
    frame = collect(make_table("main_results", [smoke()], [0]), store).set_index("setting")
    assert frame.loc[["teacher", "detrdistill", "student"], "status"].tolist() == ["stored", "measured", "not run"]


def test_a_run_that_is_asked_for_itself_is_taken_only_where_that_is_said(committed: Store, tmp_path: Path) -> None:
    for name, taken in (("anew", False), ("taken", True)):
        store = Store(tmp_path / name)
        assert store.is_stored(go(TEACHER, store, reference=taken)) == taken


def test_it_waits_for_nobody_and_overwrites_nothing(committed: Store, tmp_path: Path) -> None:
    """A run that another process trains is that process's; what an unfinished training left is not the stored run's."""
    store = Store(tmp_path / "own")
    script = f"""
import sys
from detrdistill.recipes.presets import smoke
from detrdistill.runs.store import Store
with Store({str(store.root)!r}).hold(smoke().recipe("teacher")):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="is being trained by process"):
            reference.take(TEACHER, store)
        holder.communicate("")
    assert store.record(TEACHER) is None
    for name in ("log.jsonl", "checkpoint.pt"):
        (store.folder(TEACHER) / name).write_text("{}\n")
    taken = reference.take(TEACHER, store)
    assert reference.run_log(store, taken) == [] and not (store.folder(TEACHER) / "checkpoint.pt").exists()


def test_a_copy_that_was_not_finished_leaves_no_mark(committed: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "own")
    monkeypatch.setattr(Store, "write", lambda self, record: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reference.take(TEACHER, store)
    monkeypatch.undo()
    monkeypatch.setattr(reference, "FOLDER", tmp_path / "nowhere")
    assert not store.is_stored(go(TEACHER, store)), "trained here after all"


def test_a_damaged_reference_is_refused_and_nothing_is_left(committed: Store, tmp_path: Path) -> None:
    with committed.weights(TEACHER).open("ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match="differ from its record"):
        go(DISTILLED, Store(tmp_path / "own"))
    assert not Store(tmp_path / "own").folder(TEACHER).exists()


def test_what_is_shown_is_one_s_own_as_soon_as_there_is_a_run(committed: Store, tmp_path: Path) -> None:
    own = Store(tmp_path / "own")
    assert reference.to_show("smoke", own).root == committed.root
    go(TEACHER, own, reference=True)
    assert reference.to_show("smoke", own).root == committed.root, "a teacher that was taken is no run of one's own"
    go(STUDENT, own)
    assert reference.to_show("smoke", own) is own
    assert reference.to_show("quick", Store(tmp_path / "none")).root == tmp_path / "none", "nothing is committed for it"


def clean(root: Path) -> None:
    """As if the runs had been made by a commit."""
    for path in root.glob("runs/*/record.json"):
        record = read_record(path)
        path.write_text(record_text(record.replace(provenance=record.provenance | {"commit": COMMIT})))


def test_finished_runs_are_brought_with_thinned_logs_and_without_weights(tmp_path: Path, finished: Path, monkeypatch) -> None:
    monkeypatch.setattr(reference, "FOLDER", tmp_path / "reference")
    own = Store(shutil.copytree(finished, tmp_path / "own"))
    clean(own.root)
    teacher = own.record(TEACHER)
    (own.folder(TEACHER) / "log.jsonl").write_text("".join(json.dumps({"step": i, "loss": 1 / 3}) + "\n" for i in range(1, 26)))
    assert len(reference.bring("smoke", own.root, [teacher.id])) == 3
    target = Store(tmp_path / "reference" / "smoke")
    assert target.record(TEACHER) == teacher and target.check_weights(teacher) and not target.weights(DISTILLED).exists()
    assert reference.run_log(target, teacher) == [{"step": i, "loss": 0.33333} for i in (1, 11, 21, 25)]
    assert [entry["step"] for entry in reference.run_log(own, own.record(DISTILLED))] == list(range(1, 7)), "one's own log is whole"
    packed = (target.root / reference.LOGS).read_bytes()
    assert reference.bring("smoke", own.root) == [] and (target.root / reference.LOGS).read_bytes() == packed


@pytest.mark.parametrize(
    ("preset", "weights", "message"), [("smok", (), "preset 'smok' is unknown"), ("smoke", ("plain-0",), "run 'plain-0' is not complete")]
)
def test_refuses_what_it_does_not_know(tmp_path: Path, preset: str, weights: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        reference.bring(preset, tmp_path, weights)


def test_weights_are_brought_once_and_never_changed(tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "FOLDER", tmp_path / "reference")
    own = Store(shutil.copytree(finished, tmp_path / "own"))
    clean(own.root)
    teacher = own.record(TEACHER)
    own.weights(TEACHER).rename(tmp_path / "aside")
    with pytest.raises(InputError, match=r"weights .* are missing"):
        reference.bring("smoke", own.root, [teacher.id])
    (tmp_path / "aside").rename(own.weights(TEACHER))
    reference.bring("smoke", own.root, [teacher.id])
    with own.weights(TEACHER).open("ab") as file:
        file.write(b"x")
    own.write(teacher.replace(provenance=teacher.provenance | {"weights_sha256": file_hash(own.weights(TEACHER))}))
    with pytest.raises(InputError, match="is committed with other weights"):
        reference.bring("smoke", own.root, [teacher.id])
    target = Store(tmp_path / "reference" / "smoke")
    assert target.check_weights(target.record(TEACHER))


def test_what_was_taken_is_not_brought_as_measured(committed: Store, tmp_path: Path) -> None:
    clean(committed.root)
    store = Store(tmp_path / "own")
    taken = reference.take(TEACHER, store)
    assert taken.id not in reference.bring("mini", store.root)


def test_refuses_runs_of_code_that_is_in_no_commit(tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "FOLDER", tmp_path / "reference")
    own = Store(shutil.copytree(finished, tmp_path / "own"))
    record = own.record(TEACHER)
    own.write(record.replace(provenance=record.provenance | {"commit": COMMIT + "+changes"}))
    with pytest.raises(InputError, match="made by code that is in no commit"):
        reference.bring("smoke", own.root)
    assert not (tmp_path / "reference").exists()


DAMAGED = {
    "no gzip": b"no gzip",
    "no json": gzip.compress(b"no json\n"),
    "no run": gzip.compress(b'{"step": 1}\n'),
    "cut short": gzip.compress(b"{}")[:-9],
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)  # the bytes hold the time: processes would name the tests differently
def test_damaged_logs_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / reference.LOGS).write_bytes(content)
    with pytest.raises(InputError, match=r"logs .*logs\.jsonl\.gz: damaged .*restore the file with git"):
        reference.read_packed(tmp_path / reference.LOGS)
