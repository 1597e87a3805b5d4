"""How each kind of oracle is replayed: our functions on its inputs, compared with all of its outputs.

Every size comes from the oracle itself.
"""

import math
import re

import pytest
import torch
from torch import Tensor, nn

from detrdistill import boxes, criterion
from detrdistill.experiments import recipes
from detrdistill.matching import Problem, match
from detrdistill.models import attention
from detrdistill.models.attention import DeformableAttention, sine_code, sine_position, valid_ratio
from detrdistill.models.backbones import Backbone
from detrdistill.models.deformable_detr import DeformableDETR, Memory, token_anchors
from detrdistill.models.outputs import DetectorOutput, Queries
from detrdistill.training.evaluation import detections
from tests.parity.names import our_name, our_state
from tests.parity.oracle import PIXEL, SCALAR, Oracle, formula_weight


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


def deformable_attention(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    config = oracle.config
    module = DeformableAttention(config["d_model"], config["n_heads"], config["n_levels"], config["n_points"]).to(oracle.dtype)
    module.load_state_dict(oracle.parameters())
    kernel, sampled = attention.sample_and_sum, []

    def record(value: Tensor, shapes: list, locations: Tensor, weights: Tensor, heads: int) -> Tensor:
        sampled.append((value.unflatten(-1, (heads, -1)), locations, weights))
        return kernel(value, shapes, locations, weights, heads)

    monkeypatch.setattr(attention, "sample_and_sum", record)
    query, tokens, points = oracle.input("query", grad=True), oracle.input("flatten", grad=True), oracle.input("reference2", grad=True)
    shapes, padding = [tuple(shape) for shape in oracle.input("spatial_shapes").tolist()], oracle.input("padding_mask")
    out = module(query, points, tokens, shapes, padding)
    oracle.expect("out2", out)
    oracle.expect("out4", module(query, oracle.input("reference4"), tokens, shapes, padding))
    oracle.expect("out2_nomask", module(query, points, tokens, shapes, torch.zeros_like(padding)))
    (value, locations2, weights), (_, locations4, _), _ = sampled
    oracle.expect("value", value)
    oracle.expect("locations2", locations2)
    oracle.expect("locations4", locations4)
    oracle.expect("attention", weights)
    stored = [oracle.tensors[f"output.{name}"].double() for name in ("value", "locations2", "attention")]
    oracle.expect("core", kernel(stored[0].flatten(2), shapes, *stored[1:], config["n_heads"]))
    (out * oracle.input("cot")).sum().backward()
    for name, source in (("query", query), ("flatten", tokens), ("reference2", points)):
        oracle.expect_gradient(name, source.grad)
    oracle.expect_all_compared()


def deformable_model(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    config = oracle.config
    model = build(
        Channels(config["backbone_channels"]), oracle, config["hidden_dim"], config["nheads"], config["dim_feedforward"],
        config["num_feature_levels"], config["enc_n_points"], config["dec_n_points"],
    )  # fmt: skip
    features = oracle.inputs("feat", grad=True)
    encoder_input: list[tuple[Tensor, ...]] = []
    model.encoder[0].register_forward_pre_hook(lambda _, inputs: encoder_input.append(inputs))
    memory = model.encode_features(features, oracle.input("image_mask"))
    queries = model.queries(memory)
    (output,) = model.decode(memory, queries)

    x, position, *_ = encoder_input[0]
    seen = ~memory.padding
    if "output.src_flatten" in oracle.tensors:
        oracle.expect("src_flatten", x, where=seen)
        oracle.expect("pos_with_level_embed", position, where=seen)
    expect_model_outputs(oracle, memory, queries, output)
    oracle.expect("memory", memory.tokens, where=seen)
    oracle.expect("hs", output.queries)
    oracle.expect("pred_logits", output.logits)
    oracle.expect("pred_boxes", output.boxes)
    oracle.expect("inter_references", output.boxes if model.refine else queries.reference.sigmoid().expand(*output.boxes.shape[:3], -1))

    ((output.logits * oracle.input("cot_logits")).sum() + (output.boxes * oracle.input("cot_boxes")).sum()).backward()
    parameters = dict(model.named_parameters())
    for i, feature in enumerate(features):
        oracle.expect_gradient(f"feat{i}", feature.grad)
    if "grad.query_embed.weight" in oracle.tensors:
        oracle.expect_gradient("query_embed.weight", parameters["query_embed.weight"].grad)
    oracle.expect_gradient_norms({name: parameters[our_name(name, not model.refine)].grad for name in oracle.meta["grad_norm"]})
    oracle.expect_all_compared()


def expect_model_outputs(oracle: Oracle, memory: Memory, queries: Queries, output: DetectorOutput) -> None:
    """What small and complete models have in common."""
    oracle.expect_equal("mask_flatten", memory.padding)
    oracle.expect_equal("spatial_shapes", torch.tensor(memory.shapes))
    oracle.expect("valid_ratios", memory.ratios)
    oracle.expect("init_reference", queries.reference.sigmoid().expand(len(memory.tokens), -1, -1))
    if not oracle.config["two_stage"]:
        return
    proposals = queries.proposals
    # Ours are known by their sigmoid, under which the official infinities of unusable tokens are 1.
    if "output.enc_coord_unact" in oracle.tensors:
        oracle.tensors["output.enc_coord_unact"] = oracle.tensors["output.enc_coord_unact"].sigmoid()
        oracle.expect("enc_coord_unact", proposals.boxes[0])
        oracle.expect("enc_logits", proposals.logits[0])
        oracle.expect("decoder_tgt", queries.content)
        oracle.expect("decoder_query_pos", queries.position)
    else:
        oracle.expect("enc_logits0", proposals.logits[0, :, :, 0])
    chosen = (queries.reference.sigmoid()[:, :, None] == proposals.boxes[0][:, None]).all(-1)
    assert bool((chosen.sum(-1) == 1).all()), "queries are not each one proposal"
    oracle.expect_equal("topk_index", chosen.int().argmax(-1))


def full_deformable(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    config, weights = oracle.config, {name: rule[0] for name, rule in oracle.meta["weights"].items()}
    levels, dim = weights["transformer.level_embed"]
    heads = config.get("nheads", 8)
    points = weights["transformer.encoder.layers.0.self_attn.attention_weights.bias"][0] // (heads * levels)
    ffn = weights["transformer.encoder.layers.0.linear1.bias"][0]
    # An ImageNet recipe freezes BatchNorm; its weights come from the oracle.
    backbone = Backbone(recipes.Backbone(name=config.get("backbone", "resnet50"), weights="imagenet"))
    model = build(backbone, oracle, dim, heads, ffn, levels, points, points)
    sizes = config["image_sizes"]
    height, width = (max(side) for side in zip(*sizes, strict=True))
    pixels, padding = torch.zeros(len(sizes), 3, height, width, dtype=oracle.dtype), torch.ones(len(sizes), height, width, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        pixels[i, :, :h, :w], padding[i, :h, :w] = formula_weight(oracle.meta["seed"], f"image{i}", [3, h, w], 1.7), False
    with torch.no_grad():
        features = model.backbone(pixels)
        memory = model.encode_features(features, padding)
        queries = model.queries(memory)
        (output,) = model.decode(memory, queries)

    expect_model_outputs(oracle, memory, queries, output)
    for name in (name.removeprefix("output.") for name in list(oracle.tensors) if re.fullmatch(r"output\.c\d", name)):
        level = features[int(name[1]) - 3]
        oracle.expect(name, level[:, :: level.shape[1] // oracle.tensors[f"output.{name}"].shape[1]])
    oracle.expect("memory", memory.tokens[..., :: dim // oracle.tensors["output.memory"].shape[-1]], where=~memory.padding)
    some = slice(None, None, config["query_stride"])
    oracle.expect("hs_last", output.queries[-1, :, some])
    oracle.expect("pred_logits", output.logits[:, :, some])
    oracle.expect("pred_boxes", output.boxes[:, :, some])
    whole = {"c5": features[-1], "hs": output.queries, "pred_logits": output.logits, "pred_boxes": output.boxes}
    for name, value in whole.items():
        found = torch.stack((value.double().mean(), value.double().std()))
        torch.testing.assert_close(found, torch.tensor(oracle.meta["stats"][name]).double(), atol=1e-4, rtol=1e-4)
    oracle.expect_all_compared()


def proposal_helpers(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    shapes, padding = [tuple(shape) for shape in oracle.input("spatial_shapes").tolist()], oracle.input("mask_flatten")
    masks = [mask.unflatten(1, shape) for mask, shape in zip(padding.split([h * w for h, w in shapes], dim=1), shapes, strict=True)]
    coordinates = oracle.input("coords")
    features = oracle.tensors["output.proposal_pos"].shape[-1] // coordinates.shape[-1]
    oracle.expect("proposal_pos", sine_code(coordinates.sigmoid() * 2 * math.pi, features).flatten(-2))
    position = sine_position(masks[0], oracle.tensors["output.pos2d"].shape[1] // 2, shift=-0.5)
    oracle.expect("pos2d", position, where=~masks[0][:, None].expand_as(position))
    ratios = torch.stack([valid_ratio(mask) for mask in masks], dim=1)
    anchors, unusable = token_anchors(Memory(padding[..., None].to(oracle.dtype), padding, shapes, ratios.to(oracle.dtype)))
    oracle.expect("proposals", anchors)
    oracle.expect_equal("proposals_valid_memory", ~unusable)
    oracle.expect_all_compared()


def postprocess(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    found = detections(oracle.input("pred_logits"), oracle.input("pred_boxes"), oracle.input("target_sizes"))
    oracle.expect("scores", torch.stack([image["scores"] for image in found]))
    oracle.expect_equal("labels", torch.stack([image["labels"] for image in found]))
    oracle.expect("boxes", torch.stack([image["boxes"] for image in found]), PIXEL)
    oracle.expect_all_compared()


def initial_values(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    for name in (name for name in oracle.tensors if name.startswith("sampling_offsets_bias.")):
        heads, levels, points = map(int, re.findall(r"\d+", name))
        bias = DeformableAttention(4 * heads, heads, levels, points).sampling_offsets.bias.detach()
        stored = oracle.tensors[name]
        oracle.compared.add(name)
        torch.testing.assert_close(bias, stored, atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    oracle.expect_all_compared(except_for=["adamixer."])


class Channels(nn.Module):
    """Stands for a backbone where an oracle starts from feature maps."""

    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        self.channels = channels


def build(
    backbone: nn.Module, oracle: Oracle, dim: int, heads: int, ffn: int, levels: int, encoder_points: int, points: int
) -> DeformableDETR:
    """The detector of an oracle, in evaluation mode, loaded strictly from the official parameters."""
    config = oracle.config
    form = "two_stage" if config["two_stage"] else "box_refine" if config["with_box_refine"] else "plain"
    model = DeformableDETR(
        backbone, classes=config["num_classes"], form=form, dim=dim, heads=heads, ffn=ffn, encoder_layers=config["enc_layers"],
        decoder_layers=config["dec_layers"], queries=config["num_queries"], levels=levels, points=points, dropout=0.0,
    )  # fmt: skip
    if encoder_points != points:
        # No published detector has this, so recipes do not either; small oracles do.
        for layer in model.encoder:
            layer.self_attn = DeformableAttention(dim, heads, levels, encoder_points)
    model.load_state_dict(our_state(oracle.parameters(), shared_heads=form == "plain"))
    return model.to(oracle.dtype).eval()


def stages(logits: Tensor, boxes: Tensor, proposals: DetectorOutput | None = None) -> DetectorOutput:
    """Predictions [S B Q *] as a detector's output, without what the set criterion does not look at."""
    nothing = logits.new_zeros(*logits.shape[:3], 0)
    return DetectorOutput(logits, boxes, nothing, [], [], Queries(nothing[0], nothing[0], nothing[0], proposals))


CHECKS = {
    "BoxOps": box_ops,
    "Matcher": matcher,
    "Criterion": set_criterion,
    "MSDA": deformable_attention,
    "DeformableModel": deformable_model,
    "Proposal256": proposal_helpers,
    "full Deformable-DETR": full_deformable,
    "PostProcess": postprocess,
    "init": initial_values,
}

# Kinds of oracles that are unknown here, by what they wait for. They are named in the summary of every run.
LATER = {
    "ConditionalModel": "Conditional DETR",
    "Sine256": "Conditional DETR",
    "full ConditionalDETR": "Conditional DETR",
    "AdaMixerModel": "AdaMixer",
    "Geometry": "AdaMixer",
    "Mixing": "AdaMixer",
    "Neck": "AdaMixer",
    "Sampling3D": "AdaMixer",
    "Losses": "AdaMixer",
    "Post": "AdaMixer",
    "full AdaMixer": "AdaMixer",
    "Feature": "DETRDistill's feature loss",
    "Logits": "DETRDistill's logits loss",
    "TeacherGroup": "DETRDistill's query-prior assignment",
    "TPRDDistill": "DETRDistill in TPRD's port",
    "TPRDFitNet": "FitNet",
    "TPRDKDDETR": "KD-DETR in TPRD's port",
    "KDDETR": "KD-DETR",
    "FGDLoss": "FGD",
    "MGDLoss": "MGD",
    "FBKDL": "FKD",
    "FGFI": "FGFI",
    "PKDL": "PKD",
    "CWDL": "CWD",
}
