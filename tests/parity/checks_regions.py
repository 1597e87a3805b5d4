"""Replays of the methods that weigh cells by objects or attention: FGD, FKD and FGFI."""

import pytest
import torch
from torch import Tensor, nn

from detrdistill.boxes import xyxy_to_cxcywh
from detrdistill.distill.baselines import fgfi
from detrdistill.distill.baselines.fgd import FGDLoss, object_masks
from detrdistill.distill.baselines.fgfi import FGFILoss
from detrdistill.distill.baselines.fkd import FKDLoss, spatial_attention
from detrdistill.models.outputs import DetectorOutput, Targets
from tests.parity.oracle import SCALAR, Oracle

# Official beginnings of parameter names, and ours.
FGD_NAMES = {f"conv_mask_{letter}.": f"{model}_context.score." for letter, model in (("s", "student"), ("t", "teacher"))} | {
    f"channel_add_conv_{letter}.": f"{model}_context.transform." for letter, model in (("s", "student"), ("t", "teacher"))
}
FKD_NAMES = {
    "s.adaptation_layers.": "adapt.",
    "s.channel_wise_adaptation.": "adapt_channels.",
    "s.spatial_wise_adaptation.": "adapt_cells.",
    "s.non_local_adaptation.": "adapt_relation.",
}
for _model in ("student", "teacher"):
    for _theirs, _ours in {"conv_out.bn": "norm", "conv_out.conv": "out", "theta.conv": "theta", "phi.conv": "phi", "phi.0.0.conv": "phi",
                           "g.conv": "g", "g.0.0.conv": "g"}.items():  # fmt: skip
        FKD_NAMES[f"{_model[0]}.{_model}_non_local.{_theirs}."] = f"{_model}_relation.{_ours}."


def fgd(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    config = oracle.config
    student, teacher = oracle.input("student", grad=True), oracle.input("teacher")
    weights = {"foreground": "alpha", "background": "beta", "attention": "gamma", "relation": "lambda"}
    settings = {ours: config[theirs] for ours, theirs in weights.items()}
    loss = FGDLoss(student.shape[1], teacher.shape[1], **settings, temperature=config["temp"])
    names = load(loss, oracle, FGD_NAMES)

    counts = oracle.input("target.counts").tolist()
    boxes = [
        xyxy_to_cxcywh(found / found.new_tensor([width, height, width, height]))
        for found, (height, width) in zip(oracle.input("target.boxes").split(counts), config["img_shape"], strict=True)
    ]
    targets = Targets.pack(oracle.input("target.labels").split(counts), boxes)
    padding = torch.zeros(len(counts), *student.shape[2:], dtype=torch.bool)
    for name, mask in zip(("fg", "bg"), object_masks(targets, padding), strict=True):
        oracle.expect(f"mask_{name}", mask)
    for name, maps in (("s", loss.align(student)), ("t", teacher)):
        cells, channels = loss.attend(maps, padding)
        oracle.expect(f"S_{name}", cells)
        oracle.expect(f"C_{name}", channels)

    parts = loss(student, teacher, padding, targets)
    for ours, official in {"foreground": "fg", "background": "bg", "attention": "mask", "relation": "rela"}.items():
        oracle.expect(f"part.{official}", parts[ours] / config[weights[ours]], SCALAR)
    total = sum(parts.values())
    oracle.expect("loss", total, SCALAR)
    total.backward()
    oracle.expect_gradient("student", student.grad)
    expect_gradients(loss, oracle, names)
    oracle.expect_all_compared()


def fkd(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    config = oracle.config
    student, teacher = oracle.input("student", grad=True), oracle.input("teacher")
    weights = {"feature": 7e-5, "channel": 4e-3, "spatial": 4e-3, "relation": 7e-5}
    pool = config["maxpool_stride"] if config["sub_sample"] else None
    loss = FKDLoss(student.shape[1], teacher.shape[1], **weights, temperature=0.5, reduction=config["reduction"], pool=pool)
    names = load(loss, oracle, FKD_NAMES)
    loss.train(config["bn_train"])

    padding = torch.zeros(len(student), *student.shape[2:], dtype=torch.bool)
    mask = (spatial_attention(student, padding, 0.5) + spatial_attention(teacher, padding, 0.5)) / 2
    oracle.expect("spatial_mask", mask[:, None])
    oracle.expect("s_relation_adapt", loss.adapt_relation(loss.student_relation(student, padding)))
    oracle.expect("t_relation", loss.teacher_relation(teacher, padding))
    nothing = torch.zeros(0, dtype=torch.long)
    parts = loss(student, teacher, padding, Targets.pack([nothing] * len(student), [teacher.new_zeros(0, 4)] * len(student)))
    for ours, official in {"feature": "feat", "channel": "channel", "spatial": "spatial", "relation": "nonlocal"}.items():
        oracle.expect(f"part.{official}", parts[ours] / weights[ours], SCALAR)
    total = sum(parts.values())
    oracle.expect("loss", total, SCALAR)
    total.backward()
    oracle.expect_gradient("student", student.grad)
    expect_gradients(loss, oracle, names)
    oracle.expect_all_compared()


def imitation(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    config = oracle.config
    student, teacher = oracle.input("student", grad=True), oracle.input("teacher")
    height, width = config["hw"]
    pixels = teacher.new_tensor([width, height, width, height]) * config["feat_stride"]
    counts = config["num_targets"]
    boxes = [xyxy_to_cxcywh(found[:n, :4] / pixels) for found, n in zip(oracle.input("gt_boxes"), counts, strict=True)]
    targets = Targets.pack([torch.zeros(n, dtype=torch.long) for n in counts], boxes)
    padding = torch.zeros(len(counts), height, width, dtype=torch.bool)

    scales, ratios = ([*map(float, config[name])] for name in ("scales", "ratios"))
    loss = FGFILoss(student.shape[1], teacher.shape[1], 1, "features", 0.5, scales, ratios)
    loss.adapters[0] = nn.Identity()  # the oracle's student is adapted already
    oracle.expect("anchors", torch.tensor(loss.anchors))
    oracle.expect_equal("count", fgfi.near_anchors(targets, [padding], loss.anchors, loss.threshold)[0])
    outputs = (maps_alone(found, padding) for found in (student, teacher))
    total = config["weight"] * loss(*outputs, targets, {})["fgfi"]
    oracle.expect("loss", total, SCALAR)
    total.backward()
    oracle.expect_gradient("student", student.grad)
    oracle.expect_all_compared()


def load(loss: nn.Module, oracle: Oracle, names: dict[str, str]) -> dict[str, str]:
    """Load the official parameters strictly; returns the official name of each of ours."""
    official = {our_name(name, names): name for name in oracle.parameters()}
    shapes = {name: value.shape for name, value in loss.state_dict().items()}
    stored = oracle.parameters()
    # Officially some linear layers of vectors are 1x1 convolutions of 1x1 maps.
    loss.load_state_dict({ours: stored[theirs].reshape(shapes.get(ours, stored[theirs].shape)) for ours, theirs in official.items()})
    loss.to(oracle.dtype)
    return official


def our_name(name: str, names: dict[str, str]) -> str:
    for theirs, ours in names.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def expect_gradients(loss: nn.Module, oracle: Oracle, names: dict[str, str]) -> None:
    """Gradients of the losses' small weights are smaller than `LEAST_NORM`: both sides are raised, so that they are compared."""
    oracle.meta["grad_norm"] = {name: 1e4 * norm for name, norm in oracle.meta["grad_norm"].items()}
    oracle.expect_gradient_norms({names[name]: 1e4 * parameter.grad for name, parameter in loss.named_parameters()})


def maps_alone(maps: Tensor, padding: Tensor) -> DetectorOutput:
    """An output without predictions."""
    nothing = maps.new_zeros(1, len(maps), 0, 4)
    return DetectorOutput(nothing, nothing, nothing, [maps], [padding])


CHECKS = {"FGDLoss": fgd, "FBKDL": fkd, "FGFI": imitation}
