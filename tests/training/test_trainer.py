"""The training loop on the smoke preset: exact resume, accumulation, faults, precision, schedules."""

import math
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from detrdistill.distill.build import build_distiller
from detrdistill.distill.distiller import Distiller
from detrdistill.errors import InputError, NonFiniteError
from detrdistill.models import build_detector
from detrdistill.recipes.identity import parents
from detrdistill.recipes.methods import DETRDistill
from detrdistill.recipes.parts import BackboneRecipe, CropTraining, Schedule
from detrdistill.recipes.presets import smoke
from detrdistill.recipes.recipe import CropRecipe, Recipe
from detrdistill.runs.load import open_split
from detrdistill.runs.store import Store
from detrdistill.training import checkpointing, trainer
from detrdistill.training.batches import Draws, micro_batches
from detrdistill.training.crops import train_on_crops
from detrdistill.training.fabric import make_fabric
from detrdistill.training.logging import read_log
from detrdistill.training.optimizer import lr_factor, make_optimizer
from detrdistill.training.teacher_outputs import Teacher, kept_outputs
from detrdistill.training.trainer import accumulate_gradients, train
from tests.folders import write_folder

SCHEDULE = Schedule(steps=6, batch=4, lr=1e-3, backbone_lr=1.0, warmup=2, decay="cosine", evaluations=2)


def plain(**changes) -> Recipe:
    """With dropout, so that resuming must restore random numbers too."""
    return smoke().student.replace(**{"dropout": 0.1, "queries": 6, "schedule": SCHEDULE} | changes)


def distilled(**changes) -> Recipe:
    return plain(**changes).replace(methods=(DETRDistill(),), teacher=plain(**{"dim": 64, "seed": 1} | changes))


def sum_of_weights(detector: nn.Module) -> tuple[dict[str, float], Tensor]:
    total = sum(parameter.sum().item() for parameter in detector.parameters())
    return {"AP": total}, torch.full((2, 3, 4), int(total * 1000) % 5)


def sit(
    folder: Path, recipe: Recipe, workers: int = 0, evaluate: Callable = sum_of_weights, cache: Path | None = None
) -> tuple[dict, Distiller]:
    """One sitting of a run: `train` with fresh models, as `runs.run` calls it. Teacher outputs are kept in `cache`."""
    torch.manual_seed(0)
    distiller = build_distiller(build_detector(recipe, 10), recipe)
    detector = build_detector(recipe.teacher, 10).eval().requires_grad_(False) if recipe.teacher else None
    folder.mkdir(exist_ok=True)
    fabric = make_fabric("cpu", recipe.precision)
    data = open_split(recipe, "train")
    kept = kept_outputs(fabric, distiller, data, recipe, "teacher", "0" * 64, cache) if cache else None
    teacher = Teacher(detector, distiller, kept) if detector else None
    return train(fabric, distiller, teacher, data, recipe, folder, evaluate, workers=workers, progress=False), distiller


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize(("killed_at", "every_step"), [(2, False), (5, False), (4, True)])
@pytest.mark.parametrize("recipe", [plain, distilled])
def test_resume_is_exact(tmp_path, monkeypatch, recipe, killed_at, every_step):
    """Killed before the first checkpoint, after one, and with a checkpoint at every step."""
    whole, wanted = sit(tmp_path / "whole", recipe())

    def interrupt(values: dict[str, float], step: int, images: list[int]) -> None:
        if step == killed_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "refuse_non_finite", interrupt)
        patch.setattr(checkpointing, "CHECKPOINT_SECONDS", -1 if every_step else 1e9)
        with pytest.raises(KeyboardInterrupt):
            sit(tmp_path / "broken", recipe())
    state, found = sit(tmp_path / "broken", recipe())
    assert same_weights(found, wanted)
    assert (tmp_path / "broken" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
    assert [state[key] for key in ("step", "curve", "metrics")] == [whole[key] for key in ("step", "curve", "metrics")]
    assert (state["resumed"], whole["resumed"]) == (0 if killed_at == 2 else 1, 0)


def test_resume_after_the_last_step(tmp_path):
    """Killed between the last checkpoint and the record: nothing is trained, nothing is lost."""
    first, wanted = sit(tmp_path / "run", plain())
    log = (tmp_path / "run" / "log.jsonl").read_bytes()
    again, found = sit(tmp_path / "run", plain())
    assert same_weights(found, wanted) and (again["curve"], again["metrics"]) == (first["curve"], first["metrics"])
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == log and len(log.splitlines()) == 6


@pytest.mark.parametrize(
    "fault", ["no state", "list", "other weights", "other optimizer", "state without step", "later step", "step as text"]
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, fault):
    sit(tmp_path / "run", plain())
    path = tmp_path / "run" / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    changed = {
        "no state": {"model": saved["model"]},
        "list": [1, 2],
        "other weights": saved | {"model": {"student.weight": torch.zeros(3)}},
        "other optimizer": saved | {"optimizer": torch.optim.AdamW(nn.Linear(2, 3).parameters()).state_dict()},
        "state without step": saved | {"state": {"curve": [], "seconds": 0.0, "resumed": 0}},
        "later step": saved | {"state": saved["state"] | {"step": 7}},
        "step as text": saved | {"state": saved["state"] | {"step": "6"}},
    }
    torch.save(changed[fault], path)
    with pytest.raises(InputError, match=r"checkpoint\.pt: not of this run \(.*\); delete it to start this run afresh$") as error:
        sit(tmp_path / "run", plain())
    assert "\n" not in str(error.value)


def test_crops_with_dropout_are_reproducible():
    """Whatever was drawn before, and without drawing from what follows."""
    backbone = BackboneRecipe(name="mobilenet_v2", weights="crops", crops=CropTraining(steps=2, batch=4, precision="fp32"))
    recipe, fabric = CropRecipe(backbone=backbone, data=plain().data), make_fabric("cpu", "fp32")
    data = open_split(plain(), "train")
    models = []
    for seed in (1, 2):
        before = torch.manual_seed(seed).get_state()
        models.append(train_on_crops(fabric, data, data, recipe, progress=False)[0])
        assert torch.equal(torch.get_rng_state(), before)
    assert same_weights(*models)


def test_a_nan_names_the_images_of_its_micro_batch(tmp_path, monkeypatch):
    kept, calls = Distiller.forward, []

    def forward(self, *inputs):
        calls.append(inputs)
        if len(calls) == 2:
            raise NonFiniteError("here")
        return kept(self, *inputs)

    monkeypatch.setattr(Distiller, "forward", forward)
    with pytest.raises(NonFiniteError) as error:
        sit(tmp_path / "run", plain(**{"schedule.accumulate": 2}))
    first, second = torch.load(tmp_path / "run" / "stopped-step1-process0.pt", weights_only=True)["batches"]
    assert first["image_ids"] != second["image_ids"]
    assert str(error.value).startswith(f"step 1, images {second['image_ids']}: here; the batch is in ")


@pytest.mark.parametrize("workers", [0, 2])
def test_same_seed_same_bytes(tmp_path, workers):
    sit(tmp_path / "one", plain())
    sit(tmp_path / "other", plain(), workers=workers)
    sit(tmp_path / "seed 7", plain(seed=7))
    one, other, different = ((tmp_path / name / "log.jsonl").read_bytes() for name in ("one", "other", "seed 7"))
    assert one == other and one != different


def test_no_process_outlives_an_error(tmp_path):
    """Though its traceback is kept, as a notebook does: Python, when it ends, would wait for processes that do not mind SIGTERM."""
    root = write_folder(tmp_path / "mine")
    for path in (root / "images").iterdir():
        path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InputError, match="cannot be decoded") as kept:
        sit(tmp_path / "run", plain(data={"name": "folder", "path": root}), workers=2)
    assert kept.value.__traceback__ is not None and not multiprocessing.active_children()


def test_checkpoints_take_a_twentieth_of_the_time_at_most(tmp_path, monkeypatch):
    """Large ones on a slow disk: all GPUs wait while one is written. Here a step takes 10 s, and a checkpoint 6."""
    now, saved = [0.0], []

    def step(values: dict[str, float], step: int, images: str) -> None:
        now[0] += 10

    def save(path: Path, content: dict) -> None:
        now[0] += 6
        saved.append(content["state"]["step"])

    monkeypatch.setattr(trainer, "refuse_non_finite", step)
    monkeypatch.setattr(checkpointing, "save_checkpoint", save)
    monkeypatch.setattr(checkpointing, "time", SimpleNamespace(monotonic=lambda: now[0]))
    sit(tmp_path / "run", plain(**{"schedule.steps": 20, "schedule.evaluations": 1}))
    assert saved == [4, 17, 20], "after more than 30 s, then after more than 120, and at the end"


def test_processes_that_resume_at_different_steps_are_refused(tmp_path, monkeypatch):
    """As on nodes that do not share their disk."""
    kept = Fabric.broadcast
    monkeypatch.setattr(Fabric, "broadcast", lambda self, value: 3 if value == 0 else kept(self, value))
    with pytest.raises(
        InputError, match=r"run: process 0 continues after step 0 and the first one after step 3, .* that all of them share"
    ):
        sit(tmp_path / "run", plain())


def gradient(recipe: Recipe, **changes) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Losses and gradients of the first step, summed over micro-batches; dropout is off, since it draws per micro-batch."""
    torch.manual_seed(0)
    distiller = build_distiller(build_detector(recipe, 10), recipe).eval()
    schedule = recipe.schedule.replace(**changes)
    fabric = make_fabric("cpu", "fp32")
    data = open_split(recipe, "train")
    (batches,) = micro_batches(data, Draws(len(data), schedule.batch, 0, 0, 1, schedule.accumulate, 0, 1), 0)
    teacher = build_detector(recipe.teacher, 10).eval()
    module = fabric.setup_module(distiller)
    parts = accumulate_gradients(fabric, module, Teacher(teacher, distiller), batches, schedule)
    assert all(parameter.grad is None for parameter in teacher.parameters()), "no gradient reaches a teacher, frozen or not"
    return parts, [parameter.grad for parameter in distiller.parameters()]


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_is_exact(accumulate):
    parts, gradients = gradient(distilled())
    other_parts, other_gradients = gradient(distilled(), accumulate=accumulate)
    assert len(parts) == 14
    for name, value in parts.items():
        torch.testing.assert_close(other_parts[name], value, atol=1e-5, rtol=1e-5)
    for one, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-3)


def test_accumulating_run_ends_like_the_whole_batch(tmp_path):
    recipe = distilled(dropout=0.0)
    sit(tmp_path / "4", recipe)
    sit(tmp_path / "2 x 2", recipe.replace(**{"schedule.accumulate": 2}))
    for one, other in zip(read_log(tmp_path / "4" / "log.jsonl"), read_log(tmp_path / "2 x 2" / "log.jsonl"), strict=True):
        assert other == {name: pytest.approx(value, rel=1e-3, abs=1e-4) for name, value in one.items()}


def test_two_processes_are_one(tmp_path, finished):
    """torchrun with 2 gloo processes: the same losses as one process, and one record; a moving average as well."""
    recipe = smoke().recipe("detrdistill").replace(**{"schedule.ema": 0.5})
    store, reference = Store(tmp_path), Store(finished)
    for parent in parents(recipe).values():
        shutil.copytree(reference.folder(parent), store.folder(parent))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "detrdistill", "train", "smoke", "detrdistill", "--results", str(tmp_path), "--set", "schedule.ema=0.5"]
    done = subprocess.run(
        [*command, "--device", "cpu"], capture_output=True, text=True, timeout=200, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert store.record(recipe).provenance["processes"] == 2
    one, two = (read_log(each / "log.jsonl") for each in (reference.folder(smoke().recipe("detrdistill")), store.folder(recipe)))
    assert len(one) == 6
    for expected, found in zip(one, two, strict=True):
        assert found == {name: pytest.approx(value, rel=1e-3, abs=1e-4) for name, value in expected.items()}


def test_bfloat16(tmp_path):
    recipe = distilled(dropout=0.0)
    sit(tmp_path / "fp32", recipe)
    _, distiller = sit(tmp_path / "bf16", recipe.replace(precision="bf16"))
    assert {value.dtype for value in distiller.state_dict().values()} == {torch.float32}
    full, half = (read_log(tmp_path / name / "log.jsonl") for name in ("fp32", "bf16"))
    assert full[0] != half[0]
    for name, value in full[0].items():
        assert half[0][name] == pytest.approx(value, rel=0.1, abs=0.05), name
    assert all(math.isfinite(value) for entry in half for value in entry.values())


@pytest.mark.parametrize("form", ["plain", "box_refine", "two_stage"])
def test_every_form_trains_alone_and_distilled(tmp_path, form):
    for recipe in (plain(form=form), distilled(form=form)):
        folder = tmp_path / recipe.title
        state, distiller = sit(folder, recipe.replace(**{"schedule.steps": 2}))
        assert state["step"] == 2 and ("proposals" in str(read_log(folder / "log.jsonl")[0].keys())) == (form == "two_stage")
        fresh = build_detector(recipe, 10).state_dict()
        unchanged = [n for n, p in distiller.student.named_parameters() if torch.equal(p, fresh[n])]
        assert not unchanged, "every parameter of the student is trained"


def test_log_holds_every_part_and_their_sum(tmp_path):
    sit(tmp_path / "run", distilled())
    entries = read_log(tmp_path / "run" / "log.jsonl")
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6]
    for entry in entries:
        parts = {name: value for name, value in entry.items() if name not in ("step", "lr", "loss", "gradient norm")}
        assert len(parts) == 12 and entry["loss"] == pytest.approx(sum(parts.values()))
        assert entry["lr"] == pytest.approx(1e-3 * lr_factor(SCHEDULE, entry["step"], 6))


def test_learning_rates():
    steps = Schedule(steps=100, warmup=4, drops=(0.5, 0.9))
    found = {step: lr_factor(steps, step, 100) for step in (1, 2, 4, 5, 50, 51, 90, 91, 100)}
    wanted = {1: 0.2, 2: 0.4, 4: 0.8, 5: 1.0, 50: 1.0, 51: 0.1, 90: 0.1, 91: 0.01, 100: 0.01}
    assert found == pytest.approx(wanted)
    cosine = Schedule(steps=100, decay="cosine")
    assert [lr_factor(cosine, step, 100) for step in (1, 51, 101)] == pytest.approx([1.0, 0.5, 0.0])
    assert lr_factor(cosine.replace(warmup=1), 1, 100) == pytest.approx(0.5)


def test_parameter_groups():
    recipe = distilled().replace(**{"schedule.backbone_lr": 0.1, "schedule.sampling_lr": 0.2, "schedule.weight_decay": 0.03})
    distiller = build_distiller(build_detector(recipe, 10), recipe)
    frozen = distiller.student.backbone.body.conv1.weight.requires_grad_(False)
    optimizer = make_optimizer(distiller, recipe.schedule)
    names = {id(parameter): name for name, parameter in distiller.named_parameters()}
    groups = {group["factor"]: [names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups}
    assert groups.keys() == {0.1, 0.2, 1.0}
    assert all(name.startswith("student.backbone.") for name in groups[0.1])
    assert all("sampling_offsets" in name or "reference_points" in name for name in groups[0.2])
    assert {"losses.features.adapter.weight", "student.class_embed.0.weight"} <= set(groups[1.0])
    assert not any("backbone" in name or "sampling_offsets" in name for name in groups[1.0])
    assert sorted(chain(*groups.values())) == sorted(name for name, p in distiller.named_parameters() if p is not frozen)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3 * factor for factor in groups])
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.03}


@pytest.mark.parametrize("stages", [2, 4])
def test_frozen_stages_do_not_move_and_all_else_does(tmp_path, stages):
    """Nor do their averages."""
    recipe = plain(**{"backbone.frozen_stages": stages, "schedule.steps": 2, "schedule.ema": 0.9})
    _, distiller = sit(tmp_path / "run", recipe)
    before = build_detector(recipe, 10).state_dict()
    same = {name for name, value in distiller.student.named_parameters() if torch.equal(value, before[name])}
    frozen = ("conv1", "layer1", "layer2", "layer3", "layer4")[: stages + 1]
    body = [name for name, _ in distiller.student.backbone.body.named_parameters() if name.startswith(frozen)]
    assert same == {f"backbone.body.{name}" for name in body}


def test_clipping(tmp_path, monkeypatch):
    """The logged norm is that before clipping; 0 means no clipping."""
    norms, kept = [], nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda parameters, limit: norms.append(limit) or kept(parameters, limit))
    for limit in (0.5, 0.0):
        sit(tmp_path / str(limit), plain().replace(**{"schedule.clip_norm": limit, "schedule.steps": 1, "schedule.evaluations": 1}))
    assert norms == [0.5, math.inf]
    assert read_log(tmp_path / "0.5" / "log.jsonl")[0]["gradient norm"] > 0.5
