"""Which weights a run reports and saves: the best evaluation's, averaged or not, whatever moment it is killed at."""

import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from detrdistill.models import build_detector
from detrdistill.training import averaging, checkpointing, trainer
from detrdistill.training.checkpointing import lack_of_space
from detrdistill.training.keeping import Kept
from tests.training.test_trainer import distilled, plain, same_weights, sit, sum_of_weights

EVERY_STEP = {"schedule.evaluations": 6}
BEST = EVERY_STEP | {"schedule.keep": "best"}


class Planned:
    """An AP that rises and falls, step by step from `start` on, and a number that tells which weights were measured."""

    def __init__(self, start: int = 0) -> None:
        self.values = iter((3.0, 8.0, 5.0, 8.0, 1.0, 2.0)[start:])

    def __call__(self, detector: nn.Module) -> tuple[dict[str, float], Tensor]:
        numbers, held = sum_of_weights(detector)
        return {"AP": next(self.values), "AP50": numbers["AP"]}, held


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_best_evaluation_is_reported_and_saved(tmp_path: Path, ema: float) -> None:
    state, distiller = sit(tmp_path / "run", plain(**BEST, **{"schedule.ema": ema}), evaluate=Planned())
    assert state["kept"] == {"step": 2, "AP": 8.0} and state["metrics"]["AP"] == 8.0, "of equally good ones the first"
    assert [point["AP"] for point in state["curve"]] == [3.0, 8.0, 5.0, 8.0, 1.0, 2.0]
    assert sum_of_weights(distiller.student)[0]["AP"] == state["metrics"]["AP50"], "the weights are those that were measured"


def test_without_objects_the_first_evaluation_is_kept(tmp_path: Path) -> None:
    state, _ = sit(tmp_path / "run", plain(**BEST), evaluate=lambda _: ({"AP": None}, torch.zeros(2, 3, 4)))
    assert state["kept"] == {"step": 1, "AP": None}


def test_nothing_is_kept_unless_it_is_asked_for(tmp_path: Path) -> None:
    state, _ = sit(tmp_path / "run", plain(**EVERY_STEP), evaluate=Planned())
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert "kept" not in state and saved.keys() == {"model", "optimizer", "state"} and state["metrics"]["AP"] == 2.0


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16", "schedule.accumulate": 2}], ids=["fp32", "bf16 accumulated"])
def test_the_average_is_that_of_all_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict) -> None:
    """Parameters and statistics of BatchNorm; evaluated, saved, and no part of the training."""
    steps: list[dict[str, Tensor]] = []
    kept = averaging.Average.update_parameters

    def update(self: averaging.Average, student: nn.Module) -> None:
        steps.append({name: value.clone() for name, value in student.state_dict().items()})
        kept(self, student)

    monkeypatch.setattr(averaging.Average, "update_parameters", update)
    recipe = plain(**EVERY_STEP, **{"backbone.weights": "none", "schedule.ema": 0.3}).replace(**changes)
    state, distiller = sit(tmp_path / "averaged", recipe)
    found = distiller.student.state_dict()
    wanted = {name: value.double() for name, value in steps[0].items()}
    for count, values in enumerate(steps[1:], start=1):
        decay = min(0.3, (1 + count) / (10 + count))  # 2/11, 3/12, 0.3, ...
        wanted = {name: decay * value + (1 - decay) * values[name].double() for name, value in wanted.items()}
    assert len(steps) == 6 and any(name.endswith("running_var") for name in found)
    for name, value in found.items():
        if value.is_floating_point():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value.double(), wanted[name], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(value, steps[-1][name])
    assert not all(torch.equal(value, steps[-1][name]) for name, value in found.items())
    assert state["metrics"] == sum_of_weights(distiller.student)[0], "the average is what was evaluated"
    sit(tmp_path / "not averaged", recipe.replace(**{"schedule.ema": 0.0}))
    assert (tmp_path / "averaged" / "log.jsonl").read_bytes() == (tmp_path / "not averaged" / "log.jsonl").read_bytes()


@pytest.mark.parametrize(("recipe", "keep", "killed_at"), [(plain, "best", 2), (distilled, "best", 3), (plain, "last", 4)])
def test_resume_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe, keep: str, killed_at: int) -> None:
    """With a checkpoint at every step: before the best evaluation, after it, and of an average of all steps."""
    changed = recipe(**EVERY_STEP, **{"schedule.keep": keep, "schedule.ema": 0.9, "backbone.weights": "none"})
    whole, wanted = sit(tmp_path / "whole", changed, evaluate=Planned())

    def interrupt(values: dict[str, float], step: int, images: list[int]) -> None:
        if step == killed_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "refuse_non_finite", interrupt)
        patch.setattr(checkpointing, "CHECKPOINT_SECONDS", -1)
        with pytest.raises(KeyboardInterrupt):
            sit(tmp_path / "broken", changed, evaluate=Planned())
    state, found = sit(tmp_path / "broken", changed, evaluate=Planned(killed_at - 1))
    assert same_weights(found, wanted)
    assert (tmp_path / "broken" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
    names = ("step", "curve", "metrics", "kept")
    assert [state.get(name) for name in names] == [whole.get(name) for name in names] and ("kept" in whole) == (keep == "best")
    again, last = sit(tmp_path / "broken", changed, evaluate=Planned(6))  # killed before the record was written
    assert same_weights(last, wanted) and again["metrics"] == whole["metrics"]


@pytest.mark.parametrize("changes", [{}, {"schedule.keep": "best"}, {"schedule.ema": 0.9}, {"schedule.keep": "best", "schedule.ema": 0.9}])
def test_the_disk_s_room_is_counted_with_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict) -> None:
    recipe = plain(**EVERY_STEP, **changes)
    sit(tmp_path / "run", recipe)
    size = (tmp_path / "run" / "checkpoint.pt").stat().st_size / 2**20
    student = build_detector(recipe, 10)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1, 1))
    told = lack_of_space(tmp_path / "run" / "checkpoint.pt", student, Kept(student, recipe.schedule))
    assert 0.9 * size < float(re.search(r"takes at least ([\d.]+) MiB", told)[1]) < size


def test_a_checkpoint_without_what_is_kept_is_refused(tmp_path: Path) -> None:
    sit(tmp_path / "run", plain(**EVERY_STEP))
    for changes in ({"schedule.ema": 0.9}, BEST):
        shutil.copytree(tmp_path / "run", tmp_path / "other", dirs_exist_ok=True)
        path = tmp_path / "other" / "checkpoint.pt"
        saved = torch.load(path, weights_only=True)
        torch.save(saved | {"state": saved["state"] | {"kept": {"step": 1, "AP": 3.0}}}, path)
        with pytest.raises(checkpointing.InputError, match=r"checkpoint\.pt: not of this run \(KeyError"):
            sit(tmp_path / "other", plain(**EVERY_STEP | changes))
