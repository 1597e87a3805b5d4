"""`--logger tensorboard`: what is logged is shown, and no number depends on it."""

import sys
from pathlib import Path

import pytest
import torch

from detrdistill import cli
from detrdistill.distill.build import build_distiller
from detrdistill.errors import InputError
from detrdistill.models import build_detector
from detrdistill.runs.load import open_split
from detrdistill.training import logging
from detrdistill.training.fabric import make_fabric
from detrdistill.training.logging import make_loggers, read_log
from detrdistill.training.trainer import train
from tests.training.test_trainer import plain, same_weights, sit, sum_of_weights


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_what_is_logged_is_shown_and_changes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    recipe, folder = plain(), tmp_path / "watched"
    torch.manual_seed(0)
    distiller = build_distiller(build_detector(recipe, 10), recipe)
    fabric = make_fabric("cpu", recipe.precision, make_loggers("tensorboard", folder))
    train(fabric, distiller, None, open_split(recipe, "train"), recipe, folder, sum_of_weights, progress=False)
    _, alone = sit(tmp_path / "alone", recipe)
    assert same_weights(distiller, alone)
    assert (folder / "log.jsonl").read_bytes() == (tmp_path / "alone" / "log.jsonl").read_bytes()
    shown, log = scalars(folder / "tensorboard"), read_log(folder / "log.jsonl")
    assert len(log) == 6 and shown.keys() == log[0].keys() - {"step"} | {"AP"} and len(shown) > 6
    for tag in shown.keys() - {"AP"}:
        assert shown[tag] == [(entry["step"], pytest.approx(entry[tag])) for entry in log]
    assert [step for step, _ in shown["AP"]] == [3, 6]


def test_a_logger_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["detrdistill", "train", "smoke", "student", "--results", "results", "--logger", "wandb"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert capsys.readouterr().err == "error: logger 'wandb' is unknown; known: tensorboard\n"
    monkeypatch.setattr(logging, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"'tensorboard' is not installed; install the extra: pip install 'detrdistill\[tensorboard\]'"):
        make_loggers("tensorboard", tmp_path / "run")
    assert not list(tmp_path.iterdir())
