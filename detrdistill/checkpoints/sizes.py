"""A recipe's fields, read off a detector's tensors under the kit's names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from detrdistill.errors import InputError
from detrdistill.recipes.recipe import OWNERS

_RESNETS = {((2, 2, 2, 2), False): "resnet18", ((3, 4, 6, 3), True): "resnet50", ((3, 4, 23, 3), True): "resnet101"}


def recipe_fields(state: Mapping[str, Tensor], path: Path, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the recipe of a detector. `stated` must name the `detector`; what else it says counts instead of what tensors show.

    Raises:
        InputError: tensors are missing that every such detector has, or the backbone is none of the kit's.
    """
    detector = stated["detector"]
    try:
        found = _adamixer(state) if detector == "adamixer" else _detr(state)
        if detector == "deformable_detr":
            found |= _deformable(state, stated, path)
    except (KeyError, IndexError) as error:
        raise InputError(f"weights {path}: a {detector} without {error}; give the complete checkpoint") from None
    found["backbone"] = backbone_of(state, path)
    # A file may tell more than its detector has.
    stated = {name: value for name, value in stated.items() if detector in OWNERS.get(name, (detector,))}
    if isinstance(backbone := stated.get("backbone"), dict):
        stated["backbone"] = found["backbone"] | backbone
        if backbone.get("stride_in_1x1"):
            stated["backbone"]["weights"] = path  # torchvision's ImageNet weights have no such variant
    return found | stated


def backbone_of(state: Mapping[str, Tensor], path: Path | str) -> dict[str, Any]:
    """Fields of a backbone's recipe. Its `weights` say how it goes on training: frozen as an ImageNet backbone is, or whole.

    Raises:
        InputError: a backbone that the kit does not have.
    """
    body = "backbone.body."
    trained = any(name.startswith(body) and name.endswith("num_batches_tracked") for name in state)
    if f"{body}0.0.weight" in state:
        return {"name": "mobilenet_v2", "weights": "none" if trained else "imagenet"}
    blocks = tuple(_count(state, f"{body}layer{i}.") for i in (1, 2, 3, 4))
    stem, bottleneck = state.get(f"{body}conv1.weight"), f"{body}layer1.0.conv3.weight" in state
    if stem is not None and stem.shape[-1] == 3 and not bottleneck and all(blocks):
        return {"name": "thin_resnet", "width": len(stem), "blocks": blocks, "weights": "none" if trained else path}
    name = _RESNETS.get((blocks, bottleneck))
    if stem is None or name is None:
        raise InputError(f"weights {path}: its backbone has {blocks} blocks a stage; known here are ResNet-18, -50, -101 and MobileNetV2")
    return {"name": name, "weights": "none" if trained else "imagenet"}


def _detr(state: Mapping[str, Tensor]) -> dict[str, Any]:
    found = {
        "dim": _size(state, "decoder.0.norm1.weight"),
        "ffn": _size(state, "decoder.0.linear1.bias"),
        "encoder_layers": _count(state, "encoder."),
        "decoder_layers": _count(state, "decoder."),
    }
    # A two-stage detector has no queries of its own.
    return found | ({"queries": _size(state, "query_embed.weight")} if "query_embed.weight" in state else {})


def _deformable(state: Mapping[str, Tensor], stated: Mapping[str, Any], path: Path) -> dict[str, Any]:
    levels = _size(state, "level_embed")
    refines = _count(state, "class_embed.") > 1
    found = {"levels": levels, "form": "two_stage" if "enc_output.weight" in state else "box_refine" if refines else "plain"}
    product = _size(state, "decoder.0.cross_attn.attention_weights.bias") // levels  # of heads and points
    for one, other in (("points", "heads"), ("heads", "points")):
        if one in stated and (not str(stated[one]).isdecimal() or not int(stated[one])):
            raise InputError(f"weights {path}: '{one}' = {stated[one]!r}: a whole number above 0 is meant; correct it")
        if one in stated:
            found[other] = max(1, product // int(stated[one]))
    return found


def _adamixer(state: Mapping[str, Tensor]) -> dict[str, Any]:
    channels, dim = _size(state, "neck.gn_out.weight"), _size(state, "init_content.weight", 1)
    all_points = _size(state, "stages.0.sampling_offset_generator.bias") // 3
    out_points = _size(state, "stages.0.mixing.out_proj.weight", 1) // channels
    # The generator makes groups * (channels / groups)^2 + all_points * out_points numbers.
    groups = channels**2 // max(1, _size(state, "stages.0.mixing.parameter_generator.bias") - all_points * out_points)
    return {
        "dim": dim,
        "feature_dim": None if channels == dim else channels,
        "heads": _size(state, "stages.0.iof_tau"),
        "ffn": _size(state, "stages.0.linear1.bias"),
        "decoder_layers": _count(state, "stages."),
        "queries": _size(state, "init_content.weight"),
        "groups": max(1, groups),
        "in_points": all_points // max(1, groups),
        "out_points": out_points,
        "dropout": 0.0,
    }


def _size(state: Mapping[str, Tensor], name: str, axis: int = 0) -> int:
    return state[name].shape[axis]


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many modules of a list lie under `prefix`."""
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})
