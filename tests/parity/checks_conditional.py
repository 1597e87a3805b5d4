"""Conditional DETR: its position codes, small and complete networks."""

import math

import pytest
import torch
from torch import Tensor, nn

from detrdistill.checkpoints.names import OFFICIAL_CONDITIONAL, our_name, our_state
from detrdistill.models import conditional_detr
from detrdistill.models.attention import sine_code, sine_position
from detrdistill.models.backbones import Backbone
from detrdistill.models.conditional_detr import ConditionalDETR
from detrdistill.recipes.parts import BackboneRecipe
from tests.parity.oracle import Oracle
from tests.parity.shared import Channels, every, expect_statistics, formula_images


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


CHECKS = {
    "Sine256": conditional_sine,
    "ConditionalModel": conditional_model,
    "full ConditionalDETR": full_conditional,
}
