"""Runs and records: nothing is trained twice, nothing that was tampered with is used, and own data works."""

import contextlib
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from detrdistill.distill.distiller import Distiller
from detrdistill.errors import InputError
from detrdistill.files import file_hash
from detrdistill.models.weights import read_weights
from detrdistill.recipes.identity import parents, run_id
from detrdistill.recipes.parts import Folder
from detrdistill.recipes.presets import smoke
from detrdistill.recipes.recipe import Recipe
from detrdistill.recipes.tables import named_runs
from detrdistill.records import read_record
from detrdistill.runs import load
from detrdistill.runs import run as runs
from detrdistill.runs.load import load_detector, open_split, start_backbone
from detrdistill.runs.pinned import pinned, pinned_preset
from detrdistill.runs.run import run
from detrdistill.runs.store import Store, open_store
from detrdistill.training.evaluation import METRICS
from tests.folders import CATEGORIES, read_split, write_folder, write_split

STUDENT, TEACHER, DISTILLED = (smoke().recipe(setting) for setting in ("student", "teacher", "detrdistill"))


@pytest.fixture
def store(tmp_path, finished) -> Store:
    """A copy of the finished store that may be written to."""
    shutil.copytree(finished, tmp_path / "results")
    return Store(tmp_path / "results")


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """Titles of the runs that are trained from here on."""
    titles = []
    for name in ("_run_detector", "_run_crops"):
        kept = getattr(runs, name)
        monkeypatch.setattr(runs, name, lambda fabric, recipe, *rest, kept=kept: titles.append(recipe.title) or kept(fabric, recipe, *rest))
    return titles


def go(recipe: Recipe, store: Store):
    return run(recipe, store, device="cpu", progress=False)


def test_a_record_says_what_was_done(finished):
    store = Store(finished)
    record = store.record(DISTILLED)
    assert tuple(record.metrics) == METRICS and record.id == run_id(DISTILLED) and record.recipe == DISTILLED
    assert [point["step"] for point in record.curve] == [2, 4, 6] and record.curve[-1]["AP"] == record.metrics["AP"]
    assert record.cost["steps"] == 6 and record.cost["peak_memory_mib"] > 0
    for name, parent in parents(DISTILLED).items():
        assert record.parents[name]["run"] == run_id(parent)
        assert record.parents[name]["weights_sha256"] == store.record(parent).provenance["weights_sha256"]
    assert record.parents["teacher"]["AP"] == pytest.approx(store.record(TEACHER).metrics["AP"])
    assert {"commit", "versions", "device", "data_sha256", "weights_sha256", "deterministic"} <= record.provenance.keys()
    assert sorted(path.name for path in store.folder(DISTILLED).iterdir()) == [".lock", "log.jsonl", "record.json", "weights.safetensors"]


def test_run_again_returns_the_record(store, trained):
    before = {path: path.stat().st_mtime_ns for path in store.root.rglob("*")}
    assert go(DISTILLED, store) == store.record(DISTILLED)
    assert trained == [] and before == {path: path.stat().st_mtime_ns for path in store.root.rglob("*")}


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        (DISTILLED.replace(seed=3), ["student"]),
        (DISTILLED.replace(teacher=TEACHER.replace(seed=9)), ["teacher", "student"]),
        (DISTILLED.replace(**{"backbone.crops.lr": 1e-3}), ["crops", "student"]),
        (STUDENT, ["student"]),
    ],
)
def test_one_changed_field_runs_what_depends_on_it(store, trained, changed, wanted):
    go(changed, store)
    names = {changed.title: "student", TEACHER.replace(seed=9).title: "teacher"}
    assert [names.get(title, "crops") for title in trained] == wanted


@pytest.mark.parametrize("edit", ["metric", "recipe", "not json", "list"])
def test_an_edited_record_is_refused(store, trained, edit):
    path = store.folder(DISTILLED) / "record.json"
    text = path.read_text()
    content = json.loads(text)
    content["metrics"]["AP"] = 46.6
    edits = {"metric": json.dumps(content), "recipe": text.replace('"queries": 20', '"queries": 30'), "not json": text[:-20], "list": "[]"}
    path.write_text(edits[edit])
    with pytest.raises(InputError, match=r"^record .*record\.json: .*(edited or damaged|not a JSON object).*delete its folder") as error:
        go(DISTILLED, store)
    assert "\n" not in str(error.value) and trained == [] and path.read_text() == edits[edit]


def test_a_record_of_another_recipe_is_refused(store):
    shutil.rmtree(store.folder(DISTILLED))
    shutil.copytree(store.folder(TEACHER), store.folder(DISTILLED))
    with pytest.raises(InputError, match=f"is that of run {run_id(TEACHER)}; a record belongs in the folder of its own run"):
        go(DISTILLED, store)


def test_a_record_from_before_a_default_was_changed_is_refused(store, monkeypatch):
    """Its name is the same, since a name holds what is not at its default; what it was made with is not."""
    monkeypatch.setattr("detrdistill.runs.store.same_run", lambda one, other: False)
    with pytest.raises(InputError, match="made by another recipe, from before a default was changed; delete its folder"):
        store.record(TEACHER)


@pytest.mark.parametrize("parent", ["teacher", "backbone"])
@pytest.mark.parametrize("fault", ["truncated", "exchanged", "missing"])
def test_weights_that_differ_from_their_record_are_refused(store, parent, fault):
    changed = DISTILLED.replace(seed=3)
    path = store.weights(parents(changed)[parent])
    whole = path.read_bytes()
    path.unlink()
    if fault != "missing":
        path.write_bytes(whole[:-100] if fault == "truncated" else whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match=r"weights .* (differ from its record|are missing).*; restore them") as error:
        go(changed, store)
    assert "\n" not in str(error.value) and store.record(changed) is None


def test_missing_store_of_a_detector(tmp_path):
    with pytest.raises(InputError, match=r"is not complete in .*; run it first"):
        load_detector(STUDENT, Store(tmp_path), open_split(STUDENT, "val"))


def test_a_stored_detector_is_the_one_that_was_measured(finished):
    data = open_split(DISTILLED, "val")
    detector = load_detector(DISTILLED, Store(finished), data)
    assert not detector.training
    again, _ = runs.evaluate(detector, data, batch=3)
    assert again == {name: pytest.approx(value, abs=1e-3) for name, value in Store(finished).record(DISTILLED).metrics.items()}


def test_a_batch_trains_the_runs_it_waits_for(tmp_path):
    """The names that the preset tells before training are those of the records."""
    folder = {"data": Folder(path=write_folder(tmp_path / "mine")), "schedule.steps": 2, "schedule.evaluations": 1, "schedule.batch": 2}
    preset = smoke()
    preset = replace(preset, teacher=preset.teacher.replace(**folder), student=preset.student.replace(**folder))
    store = Store(tmp_path / "results")
    for setting in ("teacher", "student", "detrdistill"):
        go(preset.recipe(setting), store)
    named = named_runs(["main_results"], [replace(pinned_preset(preset), rivals=())], (0,))
    assert {path.name for path in (store.root / "runs").iterdir()} == named.keys()


def test_a_run_that_another_process_finished_meanwhile(store, finished, trained, monkeypatch):
    """It is done when the lock is free at last, and not done again."""
    folder, kept = store.folder(DISTILLED), Store.hold
    shutil.rmtree(folder)

    def late(self, recipe):
        shutil.copytree(Store(finished).folder(recipe), self.folder(recipe))
        return kept(self, recipe)

    monkeypatch.setattr(Store, "hold", late)
    assert go(DISTILLED, store) == Store(finished).record(DISTILLED) and trained == []


def test_what_one_process_found_all_do(store, monkeypatch):
    """A process whose own disk does not show the record yet follows the first."""
    record = store.record(DISTILLED)

    class Second:
        world_size, is_global_zero, device = 2, False, torch.device("cpu")

        def broadcast(self, value):
            assert value is None
            return record

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(runs, "make_fabric", lambda *_: Second())
    assert go(DISTILLED, Store(store.root / "elsewhere")) == record


def test_evaluation_takes_images_as_training_does(store, monkeypatch):
    calls = []
    monkeypatch.setattr(
        runs, "evaluate", lambda *words, **_: calls.append(words[2:]) or (dict.fromkeys(METRICS, 1.0), torch.zeros(1, 1, 1))
    )
    changed = STUDENT.replace(**{"schedule.accumulate": 2, "schedule.evaluations": 1, "schedule.steps": 1})
    run(changed, store, device="cpu", workers=1, progress=False)
    assert calls == [(2, torch.device("cpu"), 1)]


def test_the_backbone_s_start_is_in_the_record(store, tmp_path):
    recipe = STUDENT.replace(**{"schedule.steps": 1, "schedule.evaluations": 1})
    backbone = store.weights(parents(recipe)["backbone"])
    torch.save(read_weights(backbone)[0], tmp_path / "mine.pt")
    record = go(recipe.replace(**{"backbone.weights": tmp_path / "mine.pt"}), store)
    assert record.parents == {"backbone": {"file": "mine.pt", "sha256": file_hash(tmp_path / "mine.pt")}}


def test_another_file_under_the_name_of_a_backbone_is_refused(store, tmp_path):
    """A run is named by the path: its record says nothing of the weights that lie there now."""
    path = tmp_path / "mine.pt"
    recipe = STUDENT.replace(**{"schedule.steps": 1, "schedule.evaluations": 1, "backbone.weights": path})
    weights = read_weights(store.weights(parents(STUDENT)["backbone"]))[0]
    torch.save(weights, path)
    record = go(recipe, store)
    torch.save(weights | {"conv1.weight": weights["conv1.weight"] + 1}, path)
    with pytest.raises(InputError, match=rf"backbone weights .*mine\.pt are others now .* than run {record.id} started from"):
        go(recipe, store)
    path.unlink()
    assert go(recipe, store) == record, "what was measured stands without the file"


def test_runs_from_other_weights_of_torchvision_are_refused(store):
    recipe = STUDENT.replace(backbone={"name": "resnet18", "weights": "imagenet"})
    old = store.record(TEACHER).model_copy(update={"id": run_id(recipe), "recipe": recipe, "parents": {"backbone": {"weights": "V0"}}})
    store.write(old)
    with pytest.raises(InputError, match=r"imagenet are others now \(ResNet18_Weights.IMAGENET1K_V1\) than run .* started from \(V0\)"):
        go(recipe, store)
    store.write(old.model_copy(update={"parents": {"backbone": {"weights": "ResNet18_Weights.IMAGENET1K_V1"}}}))
    assert go(recipe, store).recipe == recipe


def test_which_imagenet_weights_is_in_the_record_too(monkeypatch, tmp_path):
    class Detector:
        backbone = property(lambda self: self)

        def load(self, state, source):
            pass

    monkeypatch.setattr(load, "imagenet_weights", lambda name: {})
    recipe = STUDENT.replace(backbone={"name": "resnet50", "weights": "imagenet"})
    assert start_backbone(Detector(), recipe, Store(tmp_path)) == {"weights": "ResNet50_Weights.IMAGENET1K_V1"}


def test_the_commits_of_all_sittings(store, monkeypatch):
    """Taken before training, whatever happens to the code meanwhile."""
    from detrdistill.training import trainer

    recipe, kept = STUDENT.replace(seed=5), trainer.refuse_non_finite

    def interrupt(values, step, images):
        if step == 5:
            raise KeyboardInterrupt

    for commit in ("one", "two"):
        monkeypatch.setattr(runs, "code", lambda commit=commit: commit)
        monkeypatch.setattr(trainer, "refuse_non_finite", interrupt if commit == "one" else kept)
        with contextlib.suppress(KeyboardInterrupt):
            go(recipe, store)
    assert store.record(recipe).provenance["commit"] == "one, two"


def test_random_backbones_are_announced(tmp_path):
    recipe = STUDENT.replace(**{"backbone.weights": "none"})
    with pytest.warns(UserWarning, match="the backbone starts from random weights, as backbone.weights='none' says"):
        start_backbone(nn.Identity(), recipe, Store(tmp_path))


def test_a_batch_that_cannot_be_shared(store, monkeypatch):
    class Three:
        world_size, is_global_zero, device = 3, True, torch.device("cpu")

        def broadcast(self, value):
            return value

    monkeypatch.setattr(runs, "make_fabric", lambda *_: Three())
    with pytest.raises(InputError, match=re.escape("schedule.batch 4 cannot be shared among 3 processes and 1 micro-batches")):
        go(STUDENT, store)


def own(root: Path, recipe: Recipe = STUDENT) -> Recipe:
    data = Folder(path=root)
    short = {"schedule.steps": 2, "schedule.evaluations": 1, "schedule.batch": 2}
    changed = recipe.replace(data=data, **short)
    return changed.replace(teacher=TEACHER.replace(data=data, **short)) if recipe.teacher else changed


def test_own_data_with_gaps_between_ids(tmp_path):
    """Distilled from backbone to record on a user's folder; moving the folder changes nothing."""
    recipe, store = own(write_folder(tmp_path / "mine"), DISTILLED), Store(tmp_path / "results")
    record = go(recipe, store)
    assert record.metrics["AP"] is not None and len(record.provenance["data_sha256"]) == 64
    data = open_split(recipe, "val")
    assert [category.id for category in data.categories] == [3, 17, 90]
    assert load_detector(record.recipe, store, data).class_embed[0].out_features == 3
    assert len(list((store.root / "runs").iterdir())) == 3, "student, teacher, and the backbone that both start from"


def test_moved_and_changed_data(tmp_path, trained):
    store, first = Store(tmp_path / "results"), write_folder(tmp_path / "mine")
    record = go(own(first), store)
    assert len(trained) == 2
    moved = first.rename(tmp_path / "elsewhere")
    assert go(own(moved), store).id == record.id and len(trained) == 2
    content = read_split(moved, "train")
    content["annotations"][0]["bbox"][2] += 1
    write_split(moved, "train", content)
    assert go(own(moved), store).id != record.id and len(trained) == 4
    with pytest.raises(InputError, match=r"its annotations hash to [0-9a-f]{64}, the recipe says [0-9a-f]{64}; give that run's data"):
        go(pinned(own(moved)).replace(data=Folder(path=moved, sha256="0" * 64)), store)


@pytest.mark.parametrize("fault", ["missing", "file", "json", "classes", "image", "no images"])
def test_own_data_that_cannot_be_used(tmp_path, fault):
    root = write_folder(tmp_path / "mine")
    recipe = own(root)
    if fault == "missing":
        shutil.rmtree(root)
    elif fault == "file":
        shutil.rmtree(root)
        root.write_text("mine")
    elif fault == "json":
        (root / "instances_val.json").write_text('{"images": [')
    elif fault == "classes":
        write_split(root, "val", read_split(root, "val") | {"categories": [*CATEGORIES, {"id": 91, "name": "ring"}]})
    elif fault == "image":
        path = root / "images" / "100.png"
        path.write_bytes(path.read_bytes()[:-3000])
    elif fault == "no images":
        shutil.rmtree(root / "images")
    messages = {
        "missing": "data folder .*mine: does not exist; expected there",
        "file": "data folder .*mine: not a folder",
        "json": r"instances_val\.json: not valid JSON",
        "classes": r"categories differ from those of .*91 'ring'",
        "image": r"image 100: .*100\.png cannot be decoded",
        "no images": "not the image folder .*images",
    }
    with pytest.raises(InputError, match=messages[fault]) as error:
        go(recipe, Store(tmp_path / "results"))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "results").rglob("record.json")) or fault in ("classes", "image")


def test_where_results_lie(tmp_path, monkeypatch):
    monkeypatch.delenv("DETRDISTILL_RESULTS", raising=False)
    (tmp_path / "results").mkdir()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert open_store("smoke").root == tmp_path / "results" / "smoke"
    monkeypatch.setenv("DETRDISTILL_RESULTS", str(tmp_path / "other"))
    assert open_store("quick").root == tmp_path / "other" / "quick"


def test_a_record_with_unknown_fields_is_refused(store):
    path = store.folder(TEACHER) / "record.json"
    from detrdistill.records import _hash

    body = json.loads(path.read_text()) | {"note": "mine"}
    body.pop("sha256")
    path.write_text(json.dumps(body | {"sha256": _hash(body)}))
    with pytest.raises(InputError, match=r"record .*record\.json: unknown parameter 'note'"):
        read_record(path)


def test_files_of_a_run_are_for_everybody_to_read(finished):
    umask = os.umask(0)
    os.umask(umask)
    for path in Store(finished).folder(DISTILLED).glob("[!.]*"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_bfloat16_leaves_ground_truth_and_the_teacher_s_outputs_alone(monkeypatch, tmp_path):
    """What a step compares with is not rounded to 8 bits on the way to the losses."""
    outputs, seen, kept, forward = [], [], Distiller.teacher_outputs, Distiller.forward

    def compute(self, *inputs):
        outputs.append(kept(self, *inputs))
        return outputs[-1]

    def watch(self, pixels, padding, targets, teacher_outputs=()):
        seen.append((pixels, targets, teacher_outputs))
        return forward(self, pixels, padding, targets, teacher_outputs)

    monkeypatch.setattr(Distiller, "teacher_outputs", compute)
    monkeypatch.setattr(Distiller, "forward", watch)
    changes = {"precision": "bf16", "schedule.steps": 1, "schedule.evaluations": 1, "teacher.schedule.steps": 1}
    changes |= {"teacher.schedule.evaluations": 1, "methods": [{"name": "detrdistill", "mask_queries": "initial"}]}
    go(DISTILLED.replace(**changes), Store(tmp_path))
    pixels, targets, teacher_outputs = seen[-1]
    assert pixels.dtype == targets.boxes.dtype == teacher_outputs[0].boxes.dtype == torch.float32
    assert torch.equal(teacher_outputs[0].boxes, outputs[-1][0].boxes) and not torch.equal(targets.boxes, targets.boxes.bfloat16().float())
