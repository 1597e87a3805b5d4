"""How the oracles of methods that compare maps cell by cell, or channel by channel, are replayed: FitNet, MGD, PKD, CWD."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from detrdistill.distill.baselines.cwd import CWDLoss
from detrdistill.distill.baselines.fitnet import FitNetLoss
from detrdistill.distill.baselines.mgd import MGDLoss, hide
from detrdistill.distill.baselines.pkd import PKDLoss
from detrdistill.models.outputs import Targets
from tests.parity.oracle import SCALAR, Oracle


def fitnet(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    loss = FitNetLoss(oracle.config["student_channels"], oracle.config["teacher_channels"]).to(oracle.dtype)
    loss.load_state_dict({name.replace("align.0", "adapter"): value for name, value in oracle.parameters().items()})
    # The port divides the mean by the images once more.
    replay(oracle, loss, 1 / oracle.config["batch"])
    oracle.expect_gradient_norms({name.replace("adapter", "align.0"): value.grad for name, value in loss.named_parameters()})
    oracle.expect_all_compared()


def mgd(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    config, noise = oracle.config, oracle.input("noise")
    loss = MGDLoss(config["student_channels"], config["teacher_channels"], config["lambda"]).to(oracle.dtype)
    loss.load_state_dict(oracle.parameters())
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: noise.view(shape))
    replay(oracle, loss, config["alpha"])
    oracle.expect_equal("mask", (~hide(noise, config["lambda"])).long())
    # Without alpha, which would put all norms below the least one that is compared.
    oracle.meta["grad_norm"] = {name: norm / config["alpha"] for name, norm in oracle.meta["grad_norm"].items()}
    oracle.expect_gradient_norms({name: value.grad / config["alpha"] for name, value in loss.named_parameters()})
    oracle.expect_all_compared()


def pkd(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    replay(oracle, PKDLoss(oracle.config["student_channels"], oracle.config["teacher_channels"]), oracle.config["loss_weight"])
    oracle.expect_all_compared()


def cwd(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    config = oracle.config
    replay(oracle, CWDLoss(config["student_channels"], config["teacher_channels"], config["tau"]), config["loss_weight"])
    oracle.expect_all_compared()


def replay(oracle: Oracle, loss: nn.Module, weight: float) -> None:
    """Value and gradient of a loss that returns nothing else, on maps without padding."""
    student, teacher = oracle.input("student", grad=True), oracle.input("teacher")
    (value,) = loss(student, teacher, no_padding(student), no_objects(len(student))).values()
    oracle.expect("loss", weight * value, SCALAR)
    (weight * value).backward()
    oracle.expect_gradient("student", student.grad)


def no_padding(features: Tensor) -> Tensor:
    return torch.zeros_like(features[:, 0], dtype=torch.bool)


def no_objects(images: int) -> Targets:
    return Targets.pack([torch.zeros(0, dtype=torch.long)] * images, [torch.zeros(0, 4)] * images)


CHECKS: dict[str, Callable[[Oracle, pytest.MonkeyPatch], None]] = {"TPRDFitNet": fitnet, "MGDLoss": mgd, "PKDL": pkd, "CWDL": cwd}
