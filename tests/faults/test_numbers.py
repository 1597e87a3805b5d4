"""NaN and infinity stop before they reach a weight, an unfit teacher before it teaches; and the same work gives the same numbers."""

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from detrdistill.criterion import SetCriterion
from detrdistill.errors import InputError, NonFiniteError
from detrdistill.files import file_hash
from detrdistill.models import build_detector
from detrdistill.models.weights import read_weights, save_weights
from detrdistill.recipes.identity import parents
from detrdistill.recipes.parts import Folder
from detrdistill.recipes.presets import get_preset, smoke
from detrdistill.recipes.recipe import Recipe
from detrdistill.recipes.words import DETECTORS
from detrdistill.records import Record
from detrdistill.runs import run as runs
from detrdistill.runs.load import open_split
from detrdistill.runs.run import run
from detrdistill.runs.store import Store
from detrdistill.training import evaluation, guards, trainer
from detrdistill.training.evaluation import METRICS, evaluate
from detrdistill.training.logging import read_log
from tests.folders import write_folder
from tests.training.test_trainer import distilled, same_weights, sit

STEADY = {"dropout": 0.0, "schedule.warmup": 0, "schedule.evaluations": 1}
TEACHER, DISTILLED = smoke().recipe("teacher"), smoke().recipe("detrdistill")

# Where a NaN appears, and what the message says of it.
PLACES = {
    "images": "matching 'student': the cost at stage (or pair of stages) 1, image 1 of the batch",
    "logits": "",
    "boxes": "",
    "teacher's logits": "",
    "teacher's boxes": "",  # of one query: found by the matcher, in the loss of an image without objects, or after the forward pass
    "loss": "detection/l1 is ",
    "gradient": "gradient norm is ",
}


def spoilt(answer: Callable, field: str, value: float) -> Callable:
    """The same outputs with one number replaced: last stage, first image, first query."""

    def spoil(output):
        numbers = getattr(output, field).detach().clone()
        numbers[-1, 0, 0, 0] = value
        return replace(output, **{field: getattr(output, field) * 0 + numbers})

    return lambda *inputs, **named: [spoil(output) for output in answer(*inputs, **named)]


class Poison:
    """Puts `value` into one place at one step, and remembers weights and images of that step."""

    def __init__(self, patch: pytest.MonkeyPatch, place: str, value: float, step: int) -> None:
        self.patch, self.place, self.value, self.step, self.calls = patch, place, value, step, 0
        self.kept = trainer.accumulate_gradients
        patch.setattr(trainer, "accumulate_gradients", self)

    def __call__(self, fabric, module, teacher, batches, schedule) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls < self.step:
            return self.kept(fabric, module, teacher, batches, schedule)
        self.module, self.before = module, copy.deepcopy(module.state_dict())
        self.images = [image for batch in batches for image in batch.image_ids]
        if self.place == "images":
            batches[0].pixels[0, 0, 5, 5] = self.value
        elif self.place in ("logits", "boxes"):
            self.patch.setattr(module.student, "decode", spoilt(module.student.decode, self.place, self.value))
        elif self.place.startswith("teacher"):
            teacher = spoilt(teacher, self.place.rpartition(" ")[2], self.value)
        elif self.place == "loss":
            forward = SetCriterion.forward
            spoil = lambda *inputs: (found := forward(*inputs)) | {"l1": found["l1"] + self.value}  # noqa: E731
            self.patch.setattr(SetCriterion, "forward", spoil)
        parts = self.kept(fabric, module, teacher, batches, schedule)
        if self.place == "gradient":
            next(one for one in module.parameters() if one.grad is not None).grad.view(-1)[0] = self.value
        return parts

    def nothing_was_touched(self) -> bool:
        now = self.module.state_dict()
        return self.calls == self.step and all(torch.equal(now[name], value) for name, value in self.before.items())


@pytest.mark.parametrize("place", PLACES)
def test_a_non_finite_number_stops_before_the_optimizer_step(tmp_path, place, times, tries):
    """With step, images and loss parts in the message, the batch beside the log, and everything on disk of finite steps only."""
    recipe = distilled(**{name: value for name, value in STEADY.items() if name == "dropout"}).replace(**STEADY)
    values = {"images": (math.nan, math.inf), "teacher's boxes": (math.nan, math.inf)}.get(place, (math.nan, math.inf, -math.inf))
    for number in range(times(1, 3 * len(values))):
        value, step, folder = values[number % len(values)], 1 + (2 + number // len(values)) % 5, tmp_path / str(number)
        with tries(f"NaN or infinity in {place}"), pytest.MonkeyPatch.context() as patch:
            poison = Poison(patch, place, value, step)
            with pytest.raises(NonFiniteError) as error:
                sit(folder, recipe)
            message, file = str(error.value), folder / f"stopped-step{step}-process0.pt"
            assert message.startswith(f"step {step}, images {poison.images}: ") and "\n" not in message
            assert PLACES[place] in message and message.endswith(
                f"; the batch is in {file}; no optimizer step was taken, the last checkpoint is intact; "
                "look at these images, at the teacher's weights if it is the teacher's prediction, or lower schedule.lr"
            )
            if "loss" in place or "gradient" in place:
                assert "detection/giou " in message and " is " in message and "(finite: " in message, "all loss parts are told"
            assert poison.nothing_was_touched()
            assert [entry["step"] for entry in read_log(folder / "log.jsonl")] == list(range(1, step))
            saved = torch.load(file, weights_only=True)
            assert (saved["step"], saved["fault"]) == (step, message.partition("; the batch is in ")[0])
            assert [image for batch in saved["batches"] for image in batch["image_ids"]] == poison.images
            batch = saved["batches"][0]
            assert batch["pixels"].isfinite().all().item() == (place != "images") and batch["targets"]["boxes"].isfinite().all()
            assert sorted(path.name for path in folder.iterdir()) == ["log.jsonl", file.name], "no half-written file, no checkpoint"


def test_what_stopped_at_a_nan_goes_on_without_it(tmp_path, monkeypatch, tries):
    """And ends where an undisturbed run ends, from the checkpoint before."""
    recipe = distilled()
    _, wanted = sit(tmp_path / "whole", recipe)
    with tries("going on after a NaN"):
        with monkeypatch.context() as patch:
            Poison(patch, "loss", math.nan, 5)
            with pytest.raises(NonFiniteError):
                sit(tmp_path / "run", recipe)
        state, found = sit(tmp_path / "run", recipe)
        assert state["resumed"] == 1 and same_weights(found, wanted)
        assert (tmp_path / "run" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()


def test_a_batch_that_cannot_be_saved_hides_no_nan(tmp_path, monkeypatch, tries):
    def full(path, state):
        raise InputError(f"{path}: cannot be written (No space left on device)")

    monkeypatch.setattr(guards, "save_checkpoint", full)
    with tries("NaN on a full disk"):
        Poison(monkeypatch, "loss", math.nan, 2)
        with pytest.raises(NonFiniteError, match=r"detection/l1 is nan .*; the batch could not be saved: .*No space left") as error:
            sit(tmp_path / "run", distilled())
        assert "no optimizer step was taken" in str(error.value)


ONE_OF_TWO = """
import math, os, sys
from detrdistill.cli import main
from detrdistill.training import trainer

micro_batches, accumulate_gradients = trainer.micro_batches, trainer.accumulate_gradients
poisoned, steps = sys.argv.pop(1), iter(range(1, 99))

def with_images(*words, **named):
    for step, batches in enumerate(micro_batches(*words, **named), start=1):
        if step == 2:
            batches[0].pixels[:] = math.nan
        yield batches

def with_losses(*words):
    parts = accumulate_gradients(*words)
    return {name: value * math.nan for name, value in parts.items()} if next(steps) == 2 else parts

if os.environ["RANK"] == "1" and poisoned == "images":
    trainer.micro_batches = with_images
if os.environ["RANK"] == "1" and poisoned == "losses":
    trainer.accumulate_gradients = with_losses
main()
"""


def given_parents(store: Store, finished: Path) -> Store:
    for parent in parents(DISTILLED).values():
        shutil.copytree(Store(finished).folder(parent), store.folder(parent))
    return store


# Images are met when their predictions are matched, in one process; losses are summed over processes, and met by all of them.
@pytest.mark.parametrize(
    ("poisoned", "said"), [("images", r"images \[.*\]: matching 'student'"), ("losses", r"images \[.*\] or another process's: ")]
)
def test_a_nan_in_one_of_two_processes_stops_both(tmp_path, finished, times, tries, poisoned, said):
    if not times(0, 1):
        pytest.skip("with --long")
    store = given_parents(Store(tmp_path), finished)
    script = tmp_path / "poisoned.py"
    script.write_text(ONE_OF_TWO)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, poisoned]
    command = [*launcher, "train", "smoke", "detrdistill", "--results", store.root, "--device", "cpu"]
    with tries("NaN in one of two processes"):
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode and re.search(f"error: step 2, {said}", done.stderr), done.stderr
        assert store.record(DISTILLED) is None and len(read_log(store.folder(DISTILLED) / "log.jsonl")) == 1
        assert torch.load(store.folder(DISTILLED) / "stopped-step2-process1.pt", weights_only=True)["step"] == 2


@pytest.fixture
def store(tmp_path, finished) -> Store:
    return given_parents(Store(tmp_path / "results"), finished)


def go(recipe: Recipe, store: Store) -> Record:
    return run(recipe, store, device="cpu", progress=False)


def put_weights(store: Store, detector: str) -> None:
    """Random weights of some detector in the place of the teacher's, under a record that praises them and whose hashes fit."""
    torch.manual_seed(5)
    path = store.weights(TEACHER)
    save_weights(path, build_detector(get_preset("smoke", detector).teacher, 10), read_weights(path)[1])
    record = store.record(TEACHER)
    about = record.provenance | {"weights_sha256": file_hash(path)}
    store.write(record.model_copy(update={"metrics": record.metrics | {"AP": 99.0}, "provenance": about}))


def of_other_classes(tmp_path: Path) -> Recipe:
    return DISTILLED.replace(data=Folder(path=write_folder(tmp_path / "mine")))


UNFIT = {
    "untrained teacher": r"the teacher deformable_detr-.* has AP \d\.\d on this data, and must exceed teacher_floor 20\.0 to teach",
    "teacher of another family": r"weights\.safetensors.*(miss|unexpected|lack)",
    "teacher of other classes": r"weights .* were trained for the classes 0, 1, .*, the data has cross, disc, bar; use a detector of this",
    "teacher exactly at its floor": r"AP 0\.0 on this data, and must exceed teacher_floor 0\.0 .*, check its weights, or lower the floor",
    "teacher without an AP": r"no AP that is defined on this data, and must exceed teacher_floor -1\.0 to teach",
}


@pytest.mark.parametrize("fault", UNFIT)
def test_an_unfit_teacher_does_not_teach(tmp_path, store, monkeypatch, tries, fault):
    """Measured before the first step, whatever its record says."""
    recipe = DISTILLED.replace(teacher_floor=20.0)
    if fault == "untrained teacher":
        put_weights(store, "deformable_detr")
    elif fault == "teacher of another family":
        put_weights(store, "conditional_detr")
    elif fault == "teacher of other classes":
        recipe = of_other_classes(tmp_path)
    else:  # of no object, AP is undefined, and that is not 0
        measured = 0.0 if fault == "teacher exactly at its floor" else None
        recipe = DISTILLED.replace(teacher_floor=-1.0 if measured is None else 0.0)
        monkeypatch.setattr(runs, "evaluate", lambda *_, **__: (dict.fromkeys(METRICS, measured), torch.zeros(2, 8, 20)))
    with tries(fault):
        with pytest.raises(InputError, match=UNFIT[fault]) as error:
            go(recipe, store)
        assert "\n" not in str(error.value)
        assert store.record(recipe) is None and not (store.folder(recipe) / "log.jsonl").exists()


def test_a_recipe_with_a_teacher_of_another_family_is_refused(tries):
    other = get_preset("smoke", "conditional_detr").teacher
    with (
        tries("teacher of another family"),
        pytest.raises(InputError, match=r"conditional_detr mean something else to deformable_detr; take"),
    ):
        DISTILLED.replace(teacher=other)


@pytest.mark.parametrize("detector", DETECTORS)
def test_evaluating_one_by_one_finds_what_sixteen_at_once_do(monkeypatch, detector, tries):
    """On images of one size: convolutions, and GroupNorm as the official networks use it, see padding (tests/models/test_contract.py)."""
    recipe = get_preset("smoke", detector).student.replace(**{"data.val": 16})
    data = open_split(recipe, "val")
    torch.manual_seed(0)
    found, kept = [], evaluation.detections
    monkeypatch.setattr(evaluation, "detections", lambda logits, boxes, *rest: found.append((logits, boxes)) or kept(logits, boxes, *rest))
    model = build_detector(recipe, len(data.categories)).eval()
    with tries("another batch of evaluation"):
        metrics = [evaluate(model, data, batch)[0] for batch in (1, 16)]
        assert len(found) == 17
        for one, other in zip(zip(*found[:16], strict=True), found[16], strict=True):
            torch.testing.assert_close(torch.cat(one), other, atol=2e-4, rtol=1e-3)
        assert metrics[0] == {name: value if value is None else pytest.approx(value, abs=0.1) for name, value in metrics[1].items()}


def without_cost(store: Store, recipe: Recipe) -> dict:
    body = json.loads((store.folder(recipe) / "record.json").read_text())
    return {name: value for name, value in body.items() if name not in ("cost", "sha256")}


def test_a_fixed_seed_gives_the_same_log_in_another_process(tmp_path, finished, times, tries):
    """The same bytes of log and weights, and the same record but for its cost."""
    reference = Store(finished)
    for number in range(times(1, 4)):
        store = given_parents(Store(tmp_path / str(number)), finished)
        command = [sys.executable, "-m", "detrdistill", "train", "smoke", "detrdistill", "--results", store.root, "--device", "cpu"]
        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONHASHSEED": str(number + 1)}
        with tries("a second process with the same seed"):
            subprocess.run(command, check=True, capture_output=True, timeout=200, env=environment)
            for name in ("log.jsonl", "weights.safetensors"):
                one, other = (each.folder(DISTILLED) / name for each in (reference, store))
                assert one.read_bytes() == other.read_bytes(), name
            assert without_cost(store, DISTILLED) == without_cost(reference, DISTILLED)


def test_a_record_says_what_is_not_deterministic(finished, monkeypatch):
    assert Store(finished).record(DISTILLED).provenance["deterministic"] is True
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    gpu = SimpleNamespace(device=torch.device("cuda"), world_size=1)
    about = runs._provenance(gpu, DISTILLED, Store(finished))
    assert about["deterministic"] is False and "grid_sample" in about["not_deterministic"]
