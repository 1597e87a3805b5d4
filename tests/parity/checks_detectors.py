"""How each kind of oracle is replayed: our functions on its inputs, compared with all of its outputs.

Every size comes from the oracle itself.
"""

import math
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from detrdistill import boxes, criterion
from detrdistill.checkpoints.names import OFFICIAL_ADAMIXER, OFFICIAL_CONDITIONAL, OFFICIAL_DEFORMABLE, our_name, our_state
from detrdistill.matching import Problem, match
from detrdistill.models import adamixer, attention, conditional_detr
from detrdistill.models.adamixer import AdaMixer, AdaptiveMixing, Neck, Stage
from detrdistill.models.attention import DeformableAttention, sine_code, sine_position, valid_ratio
from detrdistill.models.backbones import Backbone
from detrdistill.models.conditional_detr import ConditionalDETR
from detrdistill.models.deformable_detr import DeformableDETR, Memory, token_anchors
from detrdistill.models.outputs import DetectorOutput, Queries, Targets
from detrdistill.recipes.parts import BackboneRecipe
from detrdistill.training.evaluation import detections
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


def formula_images(oracle: Oracle, sizes: list[list[int]], padded: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """The images of a complete network's oracle, and their padding mask."""
    height, width = padded or [max(side) for side in zip(*sizes, strict=True)]
    pixels, padding = torch.zeros(len(sizes), 3, height, width, dtype=oracle.dtype), torch.ones(len(sizes), height, width, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        pixels[i, :, :h, :w], padding[i, :h, :w] = formula_weight(oracle.meta["seed"], f"image{i}", [3, h, w], 1.7), False
    return pixels, padding


def expect_statistics(oracle: Oracle, whole: dict[str, Tensor]) -> None:
    """Mean and standard deviation of tensors of which an oracle stores slices only."""
    for name, value in whole.items():
        found = torch.stack((value.double().mean(), value.double().std()))
        torch.testing.assert_close(found, torch.tensor(oracle.meta["stats"][name]).double(), atol=1e-4, rtol=1e-4)


def every(value: Tensor, stored: Tensor) -> Tensor:
    """The slices of a map that an oracle stores: every so-many-th channel, row and column."""
    return value[tuple(slice(None, None, -(-ours // theirs)) for ours, theirs in zip(value.shape, stored.shape, strict=True))]


def conditional_sine(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    half = oracle.tensors["output.query_sine"].shape[-1] // 2
    oracle.expect("query_sine", sine_code(oracle.input("reference").flip(-1) * 2 * math.pi, half).flatten(-2))
    oracle.expect("pos2d", sine_position(oracle.input("mask"), oracle.tensors["output.pos2d"].shape[1] // 2, shift=0.0))
    oracle.expect_all_compared()


def conditional_model(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    config = oracle.config
    sizes = {"dim": config["hidden_dim"], "heads": config["nheads"], "ffn": config["dim_feedforward"]}
    layers = {"encoder_layers": config["enc_layers"], "decoder_layers": config["dec_layers"]}
    model = build_conditional(Channels([config["backbone_channels"]]), oracle, **sizes, **layers)
    attend, attended = conditional_detr.attend, []

    def record(query: Tensor, key: Tensor, value: Tensor, heads: int, visible: Tensor | None = None, dropout: float = 0.0) -> Tensor:
        attended.append((query, key, visible))
        return attend(query, key, value, heads, visible, dropout)

    monkeypatch.setattr(conditional_detr, "attend", record)
    source = oracle.input("src", grad=True)
    memory = model.encode_features([source], oracle.input("mask"))
    queries = model.queries(memory)
    (output,) = model.decode(memory, queries)

    oracle.expect("pos", memory.position.transpose(1, 2).unflatten(2, memory.shape))
    oracle.expect("memory", memory.tokens)
    oracle.expect("reference", queries.reference.sigmoid().expand(len(source), -1, -1))
    oracle.expect("hs", output.queries)
    oracle.expect("pred_logits", output.logits)
    oracle.expect("pred_boxes", output.boxes)
    query, key, visible = attended[-1]
    query, key = (x.unflatten(-1, (config["nheads"], -1)).transpose(1, 2) for x in (query, key))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    oracle.expect("last_cross_attn", scores.masked_fill(~visible, -math.inf).softmax(-1).mean(1))

    ((output.logits * oracle.input("cot_logits")).sum() + (output.boxes * oracle.input("cot_boxes")).sum()).backward()
    parameters = dict(model.named_parameters())
    oracle.expect_gradient("src", source.grad)
    oracle.expect_gradient("query_embed.weight", parameters["query_embed.weight"].grad)
    oracle.expect_gradient_norms({name: parameters[our_name(name, OFFICIAL_CONDITIONAL)].grad for name in oracle.meta["grad_norm"]})
    oracle.expect_all_compared()


def full_conditional(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    config, weights = oracle.config, {name: rule[0] for name, rule in oracle.meta["weights"].items()}
    sizes = {"dim": weights["query_embed.weight"][1], "heads": config.get("nheads", 8)}
    sizes["ffn"] = weights["transformer.encoder.layers.0.linear1.bias"][0]
    for part in ("encoder", "decoder"):
        sizes[f"{part}_layers"] = len({name.split(".")[3] for name in weights if name.startswith(f"transformer.{part}.layers.")})
    recipe = BackboneRecipe(name=config["backbone"], weights="imagenet", dilation=config["dilation"])
    model = build_conditional(Backbone(recipe), oracle, **sizes)
    pixels, padding = formula_images(oracle, config["image_sizes"])
    with torch.no_grad():
        features = model.backbone(pixels)
        memory = model.encode_features(features, padding)
        queries = model.queries(memory)
        (output,) = model.decode(memory, queries)

    oracle.expect("c5", every(features[-1], oracle.tensors["output.c5"]))
    oracle.expect_equal("c5_mask", output.padding[0])
    oracle.expect("memory", every(memory.tokens, oracle.tensors["output.memory"]))
    oracle.expect("reference", queries.reference.sigmoid().expand(len(pixels), -1, -1))
    some = slice(None, None, config["query_stride"])
    oracle.expect("hs_last", output.queries[-1, :, some])
    oracle.expect("pred_logits", output.logits[:, :, some])
    oracle.expect("pred_boxes", output.boxes[:, :, some])
    whole = {"c5": features[-1], "memory": memory.tokens, "hs": output.queries, "pred_logits": output.logits, "pred_boxes": output.boxes}
    expect_statistics(oracle, whole)
    oracle.expect_all_compared()


def build_conditional(backbone: nn.Module, oracle: Oracle, **sizes: int) -> ConditionalDETR:
    """The detector of an oracle, in evaluation mode, loaded strictly from the official parameters."""
    config = oracle.config
    model = ConditionalDETR(backbone, classes=config["num_classes"], queries=config["num_queries"], dropout=0.0, **sizes)
    model.load_state_dict(our_state(oracle.parameters(), OFFICIAL_CONDITIONAL))
    return model.to(oracle.dtype).eval()


def our_part(oracle: Oracle, theirs: str, ours: str) -> dict[str, Tensor]:
    """Parameters of an AdaMixer's part alone, which lies under these names in the whole."""
    whole = our_state({theirs + name: value for name, value in oracle.parameters().items()}, OFFICIAL_ADAMIXER)
    return {name.removeprefix(ours): value for name, value in whole.items()}


def adamixer_neck(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    neck = Neck(oracle.config["in_channels"], oracle.config["out_channels"]).to(oracle.dtype)
    neck.load_state_dict(our_part(oracle, "neck.", "neck."))
    for i, level in enumerate(neck(oracle.inputs("c"))):
        oracle.expect(f"p{i}", level)
    oracle.expect_all_compared()


def adamixer_geometry(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    xyzr = oracle.input("xyzr")
    moved = adamixer.refine(xyzr, oracle.input("delta"))
    oracle.expect("boxes", boxes.cxcywh_to_xyxy(adamixer.to_boxes(xyzr)), PIXEL)
    oracle.expect("refined_xyzr", moved, PIXEL)
    oracle.expect("refined_boxes", boxes.cxcywh_to_xyxy(adamixer.to_boxes(moved)), PIXEL)
    oracle.expect("pe", adamixer.position_code(xyzr, oracle.tensors["output.pe"].shape[-1]))
    oracle.expect("log_iof", adamixer.log_iof(adamixer.to_boxes(xyzr)))
    oracle.expect("sample_points", adamixer.sample_points(xyzr, oracle.input("offset"))[:, :, None], PIXEL)
    torch.testing.assert_close(adamixer.to_xyzr(adamixer.to_boxes(xyzr)), xyzr, atol=1e-4, rtol=1e-5)
    oracle.expect_all_compared()


def adamixer_sampling(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    config = oracle.config
    maps, points = oracle.inputs("feat", grad=True), oracle.input("sample_points", grad=True)
    out = adamixer.sample_3d(maps, config["strides"], points[:, :, 0], config["n_groups"])
    oracle.expect("out", out)
    oracle.expect("level_weight", adamixer.level_weights(points[..., 2], config["strides"]).movedim(0, -1))
    (out * oracle.input("cot")).sum().backward()
    oracle.expect_gradient("sample_points", points.grad)
    for i, level in enumerate(maps):
        oracle.expect_gradient(f"feat{i}", level.grad)
    oracle.expect_all_compared()


def adamixer_mixing(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    config = oracle.config
    mixing = AdaptiveMixing(config["query_dim"], config["in_dim"], config["in_points"], config["out_points"], config["n_groups"])
    mixing.to(oracle.dtype).load_state_dict(our_part(oracle, "roi_head.bbox_head.0.sampling_n_mixing.adaptive_mixing.", "stages.0.mixing."))
    x, query = oracle.input("x", grad=True), oracle.input("query", grad=True)
    out = mixing(x, query)
    oracle.expect("out", out)
    (out * oracle.input("cot")).sum().backward()
    oracle.expect_gradient("x", x.grad)
    oracle.expect_gradient("query", query.grad)
    oracle.expect_all_compared()


def adamixer_model(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    config = oracle.config
    official = our_state(oracle.parameters(), OFFICIAL_ADAMIXER)
    # The oracle starts behind the neck, which cannot normalise all its widths in 32 groups.
    monkeypatch.setattr(adamixer, "Neck", Behind)
    model = AdaMixer(
        Channels([], config["strides"]), classes=config["num_classes"], dim=config["content_dim"], channels=config["feat_channels"],
        heads=config["num_heads"], ffn=config["feedforward_channels"], decoder_layers=config["num_stages"],
        queries=config["num_queries"], in_points=config["in_points"], out_points=config["out_points"], groups=config["n_groups"],
    )  # fmt: skip
    model.load_state_dict(official)
    model.to(oracle.dtype).eval()
    padding = torch.ones(len(config["img_shape"]), *config["padded_hw"], dtype=torch.bool)
    for mask, (h, w) in zip(padding, config["img_shape"], strict=True):
        mask[:h, :w] = False
    maps = oracle.inputs("feat", grad=True)
    memory = model.encode_features(maps, padding)
    queries = model.queries(memory)
    (output,) = model.decode(memory, queries)

    oracle.expect("imgs_whwh", memory.sizes)
    oracle.expect("init_xyzr", adamixer.to_xyzr(queries.reference * memory.sizes), PIXEL)
    oracle.expect("init_content", queries.content.expand(len(padding), -1, -1))
    oracle.expect("cls_score", output.logits)
    oracle.expect("content", output.queries)
    pixels = output.boxes * memory.sizes
    oracle.expect("boxes", boxes.cxcywh_to_xyxy(pixels), PIXEL)
    oracle.expect("xyzr", adamixer.to_xyzr(pixels), PIXEL)
    ((output.logits * oracle.input("cot_cls")).sum() + (boxes.cxcywh_to_xyxy(pixels) * oracle.input("cot_boxes")).sum()).backward()
    parameters = dict(model.named_parameters())
    for i, level in enumerate(maps):
        oracle.expect_gradient(f"feat{i}", level.grad)
    oracle.expect_gradient("init_content", parameters["init_content.weight"].grad)
    for stage in range(1, config["num_stages"]):
        oracle.expect_gradient(f"iof_tau.{stage}", parameters[f"stages.{stage}.iof_tau"].grad)
    # In the first stage all boxes are equal: nothing but rounding is left of the bias.
    assert parameters["stages.0.iof_tau"].grad.abs().max() < 1e-6
    grads = {name: getattr(parameters.get(our_name(name, OFFICIAL_ADAMIXER)), "grad", None) for name in oracle.meta["grad_norm"]}
    oracle.expect_gradient_norms(grads)
    single_stage(oracle, model, [x.detach() for x in maps], monkeypatch)
    oracle.expect_all_compared(except_for=["grad.iof_tau.0"])


class Behind(nn.Identity):
    """In the place of a neck, for maps that have passed it."""

    lateral_convs = ()


def single_stage(oracle: Oracle, model: AdaMixer, maps: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stage alone, from boxes that differ, with what happens inside."""
    stage, seen = model.stages[0], {}
    stage.attention.register_forward_pre_hook(lambda _, args, kwargs: seen.update(bias=kwargs["attn_mask"]), with_kwargs=True)
    for name in ("attention_norm", "mixing_norm"):
        getattr(stage, name).register_forward_hook(lambda _, inputs, result, name=name: seen.update({name: result}))
    sample = adamixer.sample_3d

    def record(maps: list[Tensor], strides: list[int], points: Tensor, groups: int) -> Tensor:
        seen.update(points=points, sampled=sample(maps, strides, points, groups))
        return seen["sampled"]

    monkeypatch.setattr(adamixer, "sample_3d", record)
    xyzr, content = oracle.input("xyzr"), oracle.input("content")
    content_after, logits, delta = stage(content, xyzr, [content.shape[1]], maps, model.backbone.strides)
    moved = adamixer.refine(xyzr, delta)
    oracle.expect("single.cls_score", logits)
    oracle.expect("single.delta", delta)
    oracle.expect("single.content", content_after)
    oracle.expect("single.xyzr", moved, PIXEL)
    oracle.expect("single.boxes", boxes.cxcywh_to_xyxy(adamixer.to_boxes(moved)), PIXEL)
    oracle.expect("single.pe", adamixer.position_code(xyzr, content.shape[-1]))
    oracle.expect("single.attn_bias", seen["bias"])
    oracle.expect("single.after_attention", seen["attention_norm"])
    oracle.expect("single.sample_points", seen["points"][:, :, None], PIXEL)
    oracle.expect("single.sampled", seen["sampled"])
    oracle.expect("single.after_mixing", seen["mixing_norm"])


def full_adamixer(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    config, weights = oracle.config, {name: rule[0] for name, rule in oracle.meta["weights"].items()}
    stage = {name.removeprefix("roi_head.bbox_head.0."): shape for name, shape in weights.items() if ".bbox_head.0." in name}
    channels, dim = weights["neck.gn_out.weight"][0], weights["rpn_head.init_content_features.weight"][1]
    out_points = stage["sampling_n_mixing.adaptive_mixing.out_proj.weight"][1] // channels
    all_points = stage["sampling_n_mixing.sampling_offset_generator.0.bias"][0] // 3
    generated = stage["sampling_n_mixing.adaptive_mixing.parameter_generator.0.bias"][0]
    groups = channels**2 // (generated - all_points * out_points)
    recipe = BackboneRecipe(name=f"resnet{config['depth']}", weights="imagenet")
    model = AdaMixer(
        Backbone(recipe, first_level=2), classes=config["num_classes"], dim=dim, channels=channels, heads=stage["iof_tau"][0],
        ffn=stage["ffn.layers.0.0.bias"][0], decoder_layers=config["num_stages"], queries=config["num_queries"],
        in_points=all_points // groups, out_points=out_points, groups=groups,
    )  # fmt: skip
    model.load_state_dict(our_state(oracle.parameters(), OFFICIAL_ADAMIXER))
    model.to(oracle.dtype).eval()
    pixels, padding = formula_images(oracle, config["img_shape"], config["padded_hw"])
    with torch.no_grad():
        features = model.backbone(pixels)
        memory = model.encode_features(features, padding)
        (output,) = model.decode(memory)

    xyxy, xyzr = boxes.cxcywh_to_xyxy(output.boxes * memory.sizes), adamixer.to_xyzr(output.boxes * memory.sizes)
    maps = {"c2": features[0], "c5": features[-1], "p2": memory.maps[0], "p5": memory.maps[-1]}
    for name, level in maps.items():
        oracle.expect(name, every(level, oracle.tensors[f"output.{name}"]))
    some = slice(None, None, config["query_stride"])
    oracle.expect("cls_score", output.logits[:, :, some])
    oracle.expect("content", output.queries[:, :, some])
    oracle.expect("boxes", xyxy[:, :, some], PIXEL)
    oracle.expect("xyzr", xyzr[:, :, some], PIXEL)
    whole = {name: maps[name] for name in ("c5", "p2", "p5")}
    expect_statistics(oracle, whole | {"cls_score": output.logits, "boxes": xyxy, "xyzr": xyzr, "content": output.queries})
    oracle.expect_all_compared()


def adamixer_criterion(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    whwh = torch.tensor([[w, h, w, h] for h, w in oracle.config["img_shape"]], dtype=oracle.dtype)[:, None]
    counts = oracle.input("target.counts").tolist()
    wanted = oracle.input("target.boxes").split(counts)
    relative = [boxes.xyxy_to_cxcywh(each / size) for each, size in zip(wanted, whwh, strict=True)]
    targets = Targets.pack(oracle.input("target.labels").split(counts), relative)
    targets = replace(targets, step_boxes=float(targets.objects(most=oracle.config["num_queries"])))
    logits, pixels = oracle.input("cls_score", grad=True), oracle.input("boxes", grad=True)
    student = replace(stages(logits, boxes.xyxy_to_cxcywh(pixels / whwh)), l1="xyxy")
    set_loss = criterion.SetCriterion()
    problems = set_loss.problems(student, targets)
    pairs = match(problems)
    losses = set_loss(student, targets, pairs)

    for stage, image in ((s, b) for s in range(len(logits)) for b in range(len(counts)) if counts[b]):
        oracle.expect(f"cost.{stage}.{image}", problems["student"].cost[stage, image, :, : counts[image]])
    for ours, official in {"class": "cls", "l1": "bbox", "giou": "iou"}.items():
        for stage, value in enumerate(losses[ours]):
            oracle.expect(f"loss.stage{stage}_loss_{official}", value, SCALAR)
    assigned = torch.zeros(logits.shape[:3], dtype=torch.long)
    found = pairs["student"]
    assigned[found.stage, found.image, found.query] = found.target + 1
    oracle.expect_equal("assigned_gt", assigned)
    total = sum(value.sum() for value in losses.values())
    oracle.expect("total", total, SCALAR)
    total.backward()
    oracle.expect_gradient("cls_score", logits.grad)
    oracle.expect_gradient("boxes", pixels.grad)
    # The official code logs the accuracy; nothing is trained with it.
    oracle.expect_all_compared(except_for=[f"output.loss.stage{stage}_pos_acc" for stage in range(len(logits))])


def adamixer_postprocess(oracle: Oracle, _: pytest.MonkeyPatch) -> None:
    config = oracle.config
    sizes = torch.tensor(config["img_shape"], dtype=oracle.dtype)
    original = sizes / torch.tensor(config["scale_factor"], dtype=oracle.dtype)[:, [1, 0]]
    relative = boxes.xyxy_to_cxcywh(oracle.input("boxes") / sizes[:, [1, 0, 1, 0]][:, None])
    for i, found in enumerate(detections(oracle.input("cls_score"), relative, original, top=config["max_per_img"])):
        # The official results are listed class by class.
        order = oracle.tensors[f"output.{i}.det"][:, 4].argsort(descending=True)
        for name in ("det", "label"):
            oracle.tensors[f"output.{i}.{name}"] = oracle.tensors[f"output.{i}.{name}"][order]
        oracle.expect(f"{i}.det", torch.cat((found["boxes"], found["scores"][:, None]), dim=1), PIXEL)
        oracle.expect_equal(f"{i}.label", found["labels"])
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
    for name in (name for name in oracle.tensors if name.startswith("adamixer.sampling_offset_bias.")):
        points, groups = map(int, re.findall(r"\d+", name))
        stage = Stage(8, groups, heads=1, ffn=1, in_points=points, out_points=1, groups=groups, classes=1, dropout=0.0)
        stage.reset_parameters()
        oracle.compared.add(name)
        bias, stored = stage.sampling_offset_generator.bias.detach(), oracle.tensors[name]
        torch.testing.assert_close(bias, stored, atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    oracle.expect_all_compared()


class Channels(nn.Module):
    """Stands for a backbone where an oracle starts from feature maps."""

    def __init__(self, channels: list[int], strides: list[int] | None = None) -> None:
        super().__init__()
        self.channels, self.strides = channels, strides


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
    "Sine256": conditional_sine,
    "ConditionalModel": conditional_model,
    "full ConditionalDETR": full_conditional,
    "Neck": adamixer_neck,
    "Geometry": adamixer_geometry,
    "Sampling3D": adamixer_sampling,
    "Mixing": adamixer_mixing,
    "AdaMixerModel": adamixer_model,
    "full AdaMixer": full_adamixer,
    "Losses": adamixer_criterion,
    "Post": adamixer_postprocess,
}
