"""DETRDistill's released code, and TPRD's port of it, replayed: matching, losses, masks, gradients."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from detrdistill.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from detrdistill.criterion import SetCriterion, box_cost, set_losses
from detrdistill.distill.assignment import AssignmentDistillation
from detrdistill.distill.features import FeatureDistillation, best_overlap, released_weights
from detrdistill.distill.logits import LogitsDistillation, class_cost
from detrdistill.matching import Problem, match
from detrdistill.models.outputs import DetectorOutput, Queries, Targets
from tests.parity.checks_deformable import build
from tests.parity.oracle import SCALAR, Oracle
from tests.parity.shared import Channels, stages

# L1 and GIoU in the names of mmdetection's losses.
MMDET = {"class": "cls", "l1": "bbox", "giou": "iou"}


def mmdet_targets(oracle: Oracle) -> Targets:
    """Targets that mmdetection states in pixels, as corners."""
    targets = oracle.targets()
    size = torch.tensor([[w, h, w, h] for h, w in oracle.config["img_shape"]], dtype=oracle.dtype)
    return replace(targets, boxes=xyxy_to_cxcywh(targets.boxes / size[:, None]))


def logits(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    targets = mmdet_targets(oracle)
    logits, boxes = (oracle.input(f"student_{name}", grad=True) for name in ("logits", "boxes"))
    student, teacher = stages(logits, boxes), stages(oracle.input("teacher_logits"), oracle.input("teacher_boxes"))
    criterion, loss = SetCriterion(), LogitsDistillation("joint", "pairs")
    problems = criterion.problems(student, targets) | loss.problems(student, teacher, targets)
    pairs = match(problems)

    for stage, image in torch.cartesian_prod(*(torch.arange(n) for n in logits.shape[:2])).tolist():
        oracle.expect(f"cost.{stage}.{image}", problems["joint"].cost[stage, image])
    found = torch.full(logits.shape[:3], -1)
    joint = pairs["joint"]
    found[joint.stage, joint.image, joint.query] = joint.target
    oracle.expect_equal("match", found)
    size = torch.tensor([[w, h, w, h] for h, w in oracle.config["img_shape"]])
    pixels = cxcywh_to_xyxy(loss._target_boxes(teacher)) * size[:, None]
    oracle.expect("teacher_pixel_boxes", pixels)

    distilled = loss(student, teacher, targets, pairs)
    expect_stages(oracle, {f"loss_{MMDET[name.split('/')[1]]}_distill": value for name, value in distilled.items()})
    detection = {f"loss_{MMDET[name]}": value for name, value in criterion(student, targets, pairs).items()}
    expect_stages(oracle, detection, one_element=("loss_cls",))
    total = torch.stack(list(distilled.values())).sum()
    oracle.expect("kd_total", total, SCALAR)
    total.backward()
    oracle.expect_gradient("student_logits", logits.grad)
    oracle.expect_gradient("student_boxes", boxes.grad)
    oracle.expect_all_compared()


def expect_stages(oracle: Oracle, losses: dict[str, Tensor], prefix: str = "loss.", one_element: tuple[str, ...] = ()) -> None:
    """Each loss's last stage under its plain name, stage i before it under d{i}."""
    for name, values in losses.items():
        for stage, value in enumerate(values):
            place = "" if stage == len(values) - 1 else f"d{stage}."
            oracle.expect(f"{prefix}{place}{name}", value.reshape(1) if name in one_element else value, SCALAR)


def feature(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    config, targets = oracle.config, mmdet_targets(oracle)
    own, other = oracle.inputs("sfeat", grad=True), oracle.inputs("tfeat")
    nowhere = [torch.zeros_like(level[:, 0], dtype=torch.bool) for level in other]  # the released code does not exclude padding
    teacher = DetectorOutput(
        oracle.input("teacher_logits"), oracle.input("teacher_box_logits").sigmoid(), oracle.input("teacher_hs"), [], nowhere, neck=other
    )
    student = replace(teacher, neck=own)
    total = torch.zeros((), dtype=oracle.dtype)
    top = config["max_per_img"]
    for stage in range(config["dec_layers"]):
        seen = teacher.at([stage])
        best = seen.logits[0].flatten(1).topk(top)
        query = best.indices // config["num_classes"]
        overlap, some = best_overlap(seen.boxes, targets)
        quality = best.values.sigmoid() * torch.where(some, overlap, 1.0)[0].gather(1, query)
        oracle.expect_equal(f"topk.{stage}", query)
        oracle.expect(f"q.{stage}", quality)
        weights = released_weights(other, nowhere, seen.queries, seen.logits, seen.boxes, targets, top)
        for level, weight in enumerate(weights):
            oracle.expect(f"mask.{stage}.{level}", weight.sqrt())

        loss = FeatureDistillation(own[0].shape[1], other[0].shape[1], 0.5, "released", maps="neck", adapter=False)
        loss.weights = lambda *_, weights=weights: weights  # with the oracle's own number of best pairs
        value = loss(student, seen, targets, {})["features"]
        oracle.expect(f"loss.{stage}", value, SCALAR)
        total = total + value
    oracle.expect("total", total, SCALAR)
    total.backward()
    for i, level in enumerate(own):
        oracle.expect_gradient(f"sfeat{i}", level.grad)
    oracle.expect_all_compared()


def teacher_group(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    """The teacher's queries through the student's decoder, beside the student's own, in one pass over one memory."""
    config, targets = oracle.config, mmdet_targets(oracle)
    names = ("nheads", "dim_feedforward", "num_feature_levels", "enc_n_points", "dec_n_points")
    source = oracle.beside(config["param_source"])
    model = build(Channels(source.config["backbone_channels"]), source, config["hidden_dim"], *(config[name] for name in names))
    model.used, model.input_proj = [config["hidden_dim"]] * model.levels, nn.ModuleList(nn.Identity() for _ in range(model.levels))
    features = oracle.inputs("feat", grad=True)
    padding = torch.ones(len(targets.counts), *config["batch_input_shape"], dtype=torch.bool)
    for image, (height, width) in enumerate(config["img_shape"]):
        padding[image, :height, :width] = False
    position, content = oracle.input("teacher_query_embed")[None].split(config["hidden_dim"], dim=-1)
    teacher = stages(oracle.input("teacher_logits"), oracle.input("teacher_boxes"))
    teacher = replace(teacher, initial=Queries(content, position, None))

    memory = model.encode_features(features, padding)
    for kind, prefix in (("student", "rematch"), ("teacher", "assigned")):
        loss = AssignmentDistillation(model.dim, model.dim, pairing=kind, references="student")
        own, group = model.decode(memory, model.queries(memory), loss.student_queries(teacher))
        for name, output in (("student", own), ("group", group)):
            oracle.expect(f"{name}.pred_logits", output.logits)
            oracle.expect(f"{name}.pred_boxes", output.boxes)
        pairs = match(loss.problems(group, teacher, targets))
        losses = loss(group, teacher, targets, pairs)
        named = {f"teacher_query_loss_{MMDET[name]}": value for name, value in losses.items()}
        expect_stages(oracle, named, f"{prefix}.", one_element=("teacher_query_loss_cls",))
        gradients = torch.autograd.grad(torch.stack(list(losses.values())).sum(), features, retain_graph=True)
        for i, gradient in enumerate(gradients):
            oracle.expect_gradient(f"feat{i}", gradient, "grad." if kind == "student" else "gradassigned.")
    chosen = torch.zeros(teacher.logits.shape[:3], dtype=torch.long)
    chosen[pairs["objects"].stage, pairs["objects"].image, pairs["objects"].query] = pairs["objects"].target + 1
    oracle.expect_equal("teacher_assigned_gt", chosen)
    oracle.expect_all_compared()


def tprd(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    """TPRD's port: joint matching, Eq. 10 with the teacher's own assignment, the released mask on given queries."""
    config, targets, weights = oracle.config, oracle.targets(), oracle.meta["weights"]
    predicted = {name: oracle.input(name, grad=True) for name in ("student_logits", "student_boxes", "group_logits", "group_boxes")}
    student, group = (stages(predicted[f"{name}_logits"], predicted[f"{name}_boxes"]) for name in ("student", "group"))
    teacher = stages(oracle.input("teacher_logits"), oracle.input("teacher_boxes"))

    # It cuts the student's boxes at the border for the cost alone, and the teacher's nowhere.
    loss = LogitsDistillation("joint", "pairs")
    loss._target_boxes = lambda teacher: teacher.boxes
    cost = class_cost(student.logits, teacher.logits) + box_cost(student.boxes.clamp(0, 1), teacher.boxes)
    pairs = match({"joint": Problem(cost)})
    found = torch.full(student.logits.shape[:3], -1)
    found[pairs["joint"].stage, pairs["joint"].image, pairs["joint"].query] = pairs["joint"].target
    oracle.expect_equal("match", found)
    parts = {"distill": {name.split("/")[1]: value for name, value in loss(student, teacher, targets, pairs).items()}}

    eq10 = AssignmentDistillation(1, 1)
    assigned = match(eq10.problems(group, teacher, targets))
    for stage in range(config["layers"]):
        here = assigned["objects"].stage == stage
        image, query, target = (getattr(assigned["objects"], name)[here] for name in ("image", "query", "target"))
        oracle.expect_equal(f"gt_indices.{stage}.src", query)
        oracle.expect_equal(f"gt_indices.{stage}.tgt", target)
        oracle.expect_equal(f"gt_indices.{stage}.counts", image.bincount(minlength=len(targets.counts)))
    parts["teacher"] = set_losses(group, targets, assigned["objects"])

    total = torch.zeros((), dtype=oracle.dtype)
    inside = {"distill": {"class": 1, "l1": 5, "giou": 2}, "teacher": {"class": 2, "l1": 5, "giou": 2}}  # what our values contain
    theirs = {"class": "class", "l1": "bbox", "giou": "giou"}
    for prefix, losses in parts.items():
        for part, values in losses.items():
            name = f"{prefix}_loss_{theirs[part]}"
            for stage, value in enumerate(values / inside[prefix][part]):
                oracle.expect(f"loss.{name}{'' if stage == len(values) - 1 else f'_{stage}'}", value, SCALAR)
                total = total + weights[name] * value

    own, other = oracle.inputs("sfeat", grad=True), oracle.inputs("tfeat")
    nowhere = [torch.zeros_like(level[:, 0], dtype=torch.bool) for level in other]
    aware = FeatureDistillation(config["dim"], config["dim"], 0.5, "released", maps="neck", adapter=False)
    for stage in range(config["layers"]):
        seen, ones = given_queries(oracle, stage, targets)
        aware.weights = lambda *_, seen=seen, ones=ones: released_weights(
            other, nowhere, seen.queries, seen.logits, seen.boxes, ones, config["M"]
        )
        seen = replace(seen, neck=other, padding=nowhere)
        value = aware(replace(seen, neck=own), seen, targets, {})["features"]
        oracle.expect(f"loss.target_aware_loss_{stage}", value, SCALAR)
        total = total + weights["target_aware_loss"] * value
    oracle.expect("total", total, SCALAR)
    total.backward()
    for name, value in predicted.items():
        oracle.expect_gradient(name, value.grad)
    for i, level in enumerate(own):
        oracle.expect_gradient(f"sfeat{i}", level.grad)
    oracle.expect_all_compared()


def given_queries(oracle: Oracle, stage: int, targets: Targets) -> tuple[DetectorOutput, Targets]:
    """The oracle's M queries as predictions of one class whose quality is the one it states: images without objects take the score."""
    quality, queries = oracle.input(f"q_{stage}"), oracle.input(f"query_{stage}")
    score = (quality.clamp(1e-12) / (1 - quality)).log()[None, ..., None]
    empty = replace(targets, labels=targets.labels[:, :0], boxes=targets.boxes[:, :0], counts=[0] * len(targets.counts))
    return DetectorOutput(score, quality.new_full((1, *quality.shape, 4), math.nan), queries[None], [], []), empty


CHECKS = {"Logits": logits, "Feature": feature, "TeacherGroup": teacher_group, "TPRDDistill": tprd}
