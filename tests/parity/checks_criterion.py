"""Boxes, matching, the detection loss and detections of the official DETR codes."""

import pytest
import torch

from detrdistill import boxes, criterion
from detrdistill.matching import Problem, match
from detrdistill.training.evaluation import detections
from tests.parity.oracle import PIXEL, SCALAR, Oracle
from tests.parity.shared import stages


def box_ops(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    cxcywh, xyxy = oracle.input("cxcywh"), oracle.input("xyxy")
    converted = boxes.cxcywh_to_xyxy(cxcywh)
    iou, giou = boxes.iou(converted[:, None], xyxy[None])
    oracle.expect("xyxy", converted)
    oracle.expect("cxcywh", boxes.xyxy_to_cxcywh(xyxy))
    oracle.expect("iou", iou)
    oracle.expect("giou", giou)
    oracle.expect("inverse_sigmoid", boxes.inverse_sigmoid(oracle.input("p")))
    oracle.expect_all_compared()


def matcher(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    targets = oracle.targets()
    cost = criterion.target_cost(stages(oracle.input("pred_logits")[None], oracle.input("pred_boxes")[None]), targets)
    for image, count in enumerate(targets.counts):
        oracle.expect(f"cost.{image}", cost[0, image, :, :count])
    pairs = match({"student": Problem(cost, targets.counts)})["student"]
    oracle.expect_equal("indices.src", pairs.query)
    oracle.expect_equal("indices.tgt", pairs.target)
    oracle.expect_equal("indices.counts", pairs.image.bincount(minlength=len(targets.counts)))
    oracle.expect_all_compared()


def set_criterion(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    targets = oracle.targets()
    predicted = {name: oracle.input(name, grad=True) for name in ("pred_logits", "pred_boxes")}
    proposals = None
    if "input.enc_logits" in oracle.tensors:
        predicted |= {name: oracle.input(name, grad=True) for name in ("enc_logits", "enc_boxes")}
        proposals = stages(predicted["enc_logits"][None], predicted["enc_boxes"][None])
    student = stages(predicted["pred_logits"], predicted["pred_boxes"], proposals)
    set_loss = criterion.SetCriterion()
    problems = set_loss.problems(student, targets)
    losses = set_loss(student, targets, match(problems))

    official = {"class": ("ce", criterion.CLASS), "l1": ("bbox", criterion.L1), "giou": ("giou", criterion.GIOU)}
    last = len(student.logits) - 1
    for name, values in losses.items():
        loss, weight = official[name.removeprefix("proposals/")]
        for stage, value in enumerate(values):
            suffix = "_enc" if name.startswith("proposals/") else "" if stage == last else f"_{stage}"
            oracle.expect(f"loss.loss_{loss}{suffix}", value / weight, SCALAR)
    for name, problem in problems.items():
        for stage, image in ((s, b) for s in range(len(problem.cost)) for b in range(len(targets.counts))):
            layer = stage if name == "student" else "enc"
            oracle.expect(f"cost.{layer}.{image}", problem.cost[stage, image, :, : targets.counts[image]])

    total = sum(value.sum() for value in losses.values())
    oracle.expect("total", total, SCALAR)
    total.backward()
    for name, value in predicted.items():
        oracle.expect_gradient(name, value.grad)
    # The official code logs these two; nothing is trained with them.
    oracle.expect_all_compared(except_for=["output.loss.class_error", "output.loss.cardinality_error"])


def postprocess(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    found = detections(oracle.input("pred_logits"), oracle.input("pred_boxes"), oracle.input("target_sizes"))
    oracle.expect("scores", torch.stack([image["scores"] for image in found]))
    oracle.expect_equal("labels", torch.stack([image["labels"] for image in found]))
    oracle.expect("boxes", torch.stack([image["boxes"] for image in found]), PIXEL)
    oracle.expect_all_compared()


CHECKS = {
    "BoxOps": box_ops,
    "Matcher": matcher,
    "Criterion": set_criterion,
    "PostProcess": postprocess,
}
