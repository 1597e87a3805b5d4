"""Deformable DETR: its attention, its proposals, small and complete networks, initial values."""

import math
import re

import pytest
import torch
from torch import Tensor, nn

from detrdistill.checkpoints.names import OFFICIAL_DEFORMABLE, our_name, our_state
from detrdistill.models import attention
from detrdistill.models.adamixer import Stage
from detrdistill.models.attention import DeformableAttention, sine_code, sine_position, valid_ratio
from detrdistill.models.backbones import Backbone
from detrdistill.models.deformable_detr import DeformableDETR, Memory, token_anchors
from detrdistill.models.outputs import DetectorOutput, Queries
from detrdistill.recipes.parts import BackboneRecipe
from tests.parity.oracle import Oracle
from tests.parity.shared import Channels, expect_statistics, formula_images


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
    ours = {name: our_name(name, OFFICIAL_DEFORMABLE, one_head(oracle)) for name in oracle.meta["grad_norm"]}
    oracle.expect_gradient_norms({name: parameters[own].grad for name, own in ours.items()})
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
    # By score, not by box: those of unusable tokens (padding, border) are all alike.
    oracle.expect_equal("topk_index", proposals.logits[0, :, :, 0].topk(queries.reference.shape[1], dim=1).indices)


def full_deformable(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    config, weights = oracle.config, {name: rule[0] for name, rule in oracle.meta["weights"].items()}
    levels, dim = weights["transformer.level_embed"]
    heads = config.get("nheads", 8)
    points = weights["transformer.encoder.layers.0.self_attn.attention_weights.bias"][0] // (heads * levels)
    ffn = weights["transformer.encoder.layers.0.linear1.bias"][0]
    # An ImageNet recipe freezes BatchNorm; its weights come from the oracle.
    backbone = Backbone(BackboneRecipe(name=config.get("backbone", "resnet50"), weights="imagenet"))
    model = build(backbone, oracle, dim, heads, ffn, levels, points, points)
    pixels, padding = formula_images(oracle, config["image_sizes"])
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
    expect_statistics(oracle, {"c5": features[-1], "hs": output.queries, "pred_logits": output.logits, "pred_boxes": output.boxes})
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
    anchors, unusable = token_anchors(Memory(padding[..., None].to(oracle.dtype), padding, shapes, ratios.to(oracle.dtype), []))
    oracle.expect("proposals", anchors)
    oracle.expect_equal("proposals_valid_memory", ~unusable)
    oracle.expect_all_compared()


def initial_values(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    for name in (name for name in oracle.tensors if name.startswith("sampling_offsets_bias.")):
        heads, levels, points = map(int, re.findall(r"\d+", name))
        bias = DeformableAttention(4 * heads, heads, levels, points).sampling_offsets.bias.detach()
        stored = oracle.tensors[name]
        oracle.compared.add(name)
        torch.testing.assert_close(bias, stored, atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    for name in (name for name in oracle.tensors if name.startswith("adamixer.sampling_offset_bias.")):
        points, groups = map(int, re.findall(r"\d+", name))
        stage = Stage(8, groups, heads=1, ffn=1, in_points=points, out_points=1, groups=groups, classes=1, dropout=0.0)
        stage.reset_parameters()
        oracle.compared.add(name)
        bias, stored = stage.sampling_offset_generator.bias.detach(), oracle.tensors[name]
        torch.testing.assert_close(bias, stored, atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    oracle.expect_all_compared()


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
    model.load_state_dict(our_state(oracle.parameters(), OFFICIAL_DEFORMABLE, one_head(oracle)))
    return model.to(oracle.dtype).eval()


def one_head(oracle: Oracle) -> bool:
    """Whether all stages of the oracle's Deformable DETR share one head."""
    return not (oracle.config["with_box_refine"] or oracle.config["two_stage"])


CHECKS = {
    "MSDA": deformable_attention,
    "DeformableModel": deformable_model,
    "Proposal256": proposal_helpers,
    "full Deformable-DETR": full_deformable,
    "init": initial_values,
}
