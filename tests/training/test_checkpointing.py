"""Checkpoints and weights: whole or not there, refused with a reason, and never executed."""

import os
import pickle

import pytest
import torch
from torch import nn

from detrdistill.errors import InputError
from detrdistill.models.weights import load_weights, read_weights, save_weights
from detrdistill.training.checkpointing import load_checkpoint, save_checkpoint
from detrdistill.training.logging import Log, read_log


class Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_checkpoint_comes_back(tmp_path):
    path = tmp_path / "new folder" / "checkpoint.pt"
    assert load_checkpoint(path) is None
    optimizer = torch.optim.AdamW(nn.Linear(2, 3).parameters())
    save_checkpoint(path, {"model": nn.Linear(2, 3).state_dict(), "optimizer": optimizer.state_dict(), "state": {"step": 7, "curve": []}})
    assert load_checkpoint(path)["state"] == {"step": 7, "curve": []}


def test_unreadable_checkpoints_are_refused_and_not_executed(tmp_path):
    path, target = tmp_path / "checkpoint.pt", tmp_path / "made by the attack"
    save_checkpoint(path, {"model": torch.randn(1000)})
    whole = path.read_bytes()
    attack = tmp_path / "attack.pt"
    torch.save({"model": Attack(target)}, attack)
    for content in (whole[:-200], whole[:100], b"", b"text", pickle.dumps(Attack(target)), attack.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"checkpoint .*checkpoint\.pt: not readable .*delete it to start") as error:
            load_checkpoint(path)
        assert "\n" not in str(error.value)
    assert not target.exists()


def test_weights_come_back_with_their_header(tmp_path):
    one, other = nn.Linear(2, 3), nn.Linear(2, 3)
    save_weights(tmp_path / "w.safetensors", one, {"categories": "a, b"})
    assert load_weights(other, tmp_path / "w.safetensors") == {"categories": "a, b"}
    assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)


@pytest.mark.parametrize("content", ["cut", "text", "empty", "pickle", "folder", "absent"])
def test_damaged_weights_are_refused(tmp_path, content):
    path, target = tmp_path / "w.safetensors", tmp_path / "made by the attack"
    save_weights(path, nn.Linear(20, 30), {})
    if content == "absent" or content == "folder":
        path.unlink()
        if content == "folder":
            path.mkdir()
    else:
        whole = path.read_bytes()
        path.write_bytes({"cut": whole[:-50], "text": b"not weights", "empty": b"", "pickle": pickle.dumps(Attack(target))}[content])
    with pytest.raises(InputError, match=r"weights .*w\.safetensors: (damaged|no such file)") as error:
        read_weights(path)
    assert "\n" not in str(error.value) and not target.exists()


def test_weights_of_another_model_are_refused_by_name_and_nothing_is_loaded(tmp_path):
    path = tmp_path / "w.safetensors"
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    save_weights(path, nn.ModuleDict({"0": nn.Linear(2, 3), "1": nn.Linear(3, 4), "student": nn.Linear(1, 1)}), {})
    with pytest.raises(InputError) as error:
        load_weights(module, path)
    for part in ("2 unexpected (student.bias, student.weight)", "1.weight [4, 3] instead of [3, 3]", "do not fit this Sequential"):
        assert part in str(error.value)
    save_weights(path, nn.ModuleDict({"0": nn.Linear(2, 3)}), {})
    with pytest.raises(InputError, match=r"2 missing \(1\.bias, 1\.weight\)"):
        load_weights(module, path)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_log_keeps_whole_lines_up_to_the_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    with Log(path) as log:
        for step in (1, 2, 3):
            log.write(step=step, loss=step / 3)
    path.write_bytes(path.read_bytes() + b'{"step": 4, "lo')
    assert [entry["step"] for entry in read_log(path)] == [1, 2, 3]
    with Log(path, resume_at=2) as log:
        log.write(step=3, loss=9.0)
    assert read_log(path) == [{"step": 1, "loss": 1 / 3}, {"step": 2, "loss": 2 / 3}, {"step": 3, "loss": 9.0}]
    with Log(None) as log:
        log.write(step=1)
    assert read_log(tmp_path / "absent") == []
