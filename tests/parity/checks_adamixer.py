"""AdaMixer: neck, geometry, sampling and mixing, small and complete networks, its loss and detections."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from detrdistill import boxes, criterion
from detrdistill.checkpoints.names import OFFICIAL_ADAMIXER, our_name, our_state
from detrdistill.matching import match
from detrdistill.models import adamixer
from detrdistill.models.adamixer import AdaMixer, AdaptiveMixing, Neck
from detrdistill.models.backbones import Backbone
from detrdistill.models.outputs import Targets
from detrdistill.recipes.parts import BackboneRecipe
from detrdistill.training.evaluation import detections
from tests.parity.oracle import PIXEL, SCALAR, Oracle
from tests.parity.shared import Channels, every, expect_statistics, formula_images, stages


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


CHECKS = {
    "Neck": adamixer_neck,
    "Geometry": adamixer_geometry,
    "Sampling3D": adamixer_sampling,
    "Mixing": adamixer_mixing,
    "AdaMixerModel": adamixer_model,
    "full AdaMixer": full_adamixer,
    "Losses": adamixer_criterion,
    "Post": adamixer_postprocess,
}
