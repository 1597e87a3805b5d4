"""How the oracles of KD-DETR are replayed, the authors' and TPRD's: the same loss for the teacher's queries and for random ones."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from detrdistill.distill.baselines.kd_detr import SpecificSampling
from detrdistill.models.outputs import DetectorOutput, Targets
from tests.parity.oracle import SCALAR, Oracle


def kd_detr(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    found, students, total = replay(oracle, SpecificSampling(1, 1)), {}, 0.0
    for group, official in (("spec", "auxrf"), ("rand", "randomrf")):
        values, students[group] = found[group]
        # The authors do not divide the class term by the images, which were 8.
        values["class"] = values["class"] * oracle.config["batch"] / 8
        for ours, name in (("class", "cls"), ("l1", "bbox"), ("giou", "giou")):
            value, name = values[ours].sum(), f"loss_kd_{official}_{name}"
            oracle.expect(f"loss.{name}", value / oracle.meta["weights"][name], SCALAR)
            total = total + value
    oracle.expect("total", total, SCALAR)
    total.backward()
    expect_gradients(oracle, students)


def tprd_kd_detr(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    found, students, total = replay(oracle, SpecificSampling(1, 1, form="tprd")), {}, 0.0
    for group, official in (("spec", "teacher"), ("rand", "auxilary")):
        values, students[group] = found[group]
        for ours, name, weight in (("class", "class", 2), ("l1", "bbox", 5), ("giou", "giou", 2)):
            plain = values[ours] / weight  # the oracle's gradient is of the losses without weights
            for stage, value in enumerate(plain):
                suffix = "" if stage == len(plain) - 1 else f"_{stage}"
                oracle.expect(f"loss.{official}_loss_{name}{suffix}", value, SCALAR)
            total = total + plain.sum()
    total.backward()
    expect_gradients(oracle, students)


def replay(oracle: Oracle, loss: SpecificSampling) -> dict[str, tuple[dict[str, Tensor], DetectorOutput]]:
    """Losses and student of both groups of queries. A teacher without stages teaches every stage."""
    images, found = oracle.config["batch"], {}
    nothing = Targets.pack([torch.zeros(0, dtype=torch.long)] * images, [torch.zeros(0, 4)] * images)
    for group, other in (("spec", "t"), ("rand", "t_rand")):
        student = output(oracle.input(f"{group}_logits", grad=True), oracle.input(f"{group}_boxes", grad=True))
        teacher = [oracle.input(f"{other}_{name}").expand_as(getattr(student, name)) for name in ("logits", "boxes")]
        found[group] = loss(student, output(*teacher), nothing, {}), student
    return found


def output(logits: Tensor, boxes: Tensor) -> DetectorOutput:
    return DetectorOutput(logits, boxes, logits[..., :0], [], [])


def expect_gradients(oracle: Oracle, students: dict[str, DetectorOutput]) -> None:
    for group, student in students.items():
        oracle.expect_gradient(f"{group}_logits", student.logits.grad)
        oracle.expect_gradient(f"{group}_boxes", student.boxes.grad)
    oracle.expect_all_compared()


CHECKS: dict[str, Callable[[Oracle, pytest.MonkeyPatch], None]] = {"KDDETR": kd_detr, "TPRDKDDETR": tprd_kd_detr}
