"""Hugging Face folders: what config.json says, and writing a folder that transformers opens with the same detections.

Transformers itself is not needed.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from detrdistill.any_detr.build import is_name, write_family
from detrdistill.checkpoints import names
from detrdistill.checkpoints.sizes import backbone_of, recipe_fields
from detrdistill.errors import InputError
from detrdistill.files import atomic, write_text
from detrdistill.models import ConditionalDETR, DeformableDETR
from detrdistill.models.weights import named_tensors, read_json, read_pickle, read_weights
from detrdistill.recipes.families import FAMILIES
from detrdistill.recipes.parts import Resize

# Transformers' words for the ResNets.
_RESNETS: dict[str, dict[str, Any]] = {
    "resnet18": {"depths": [2, 2, 2, 2], "layer_type": "basic", "hidden_sizes": [64, 128, 256, 512]},
    "resnet50": {"depths": [3, 4, 6, 3], "layer_type": "bottleneck", "hidden_sizes": [256, 512, 1024, 2048]},
    "resnet101": {"depths": [3, 4, 23, 3], "layer_type": "bottleneck", "hidden_sizes": [256, 512, 1024, 2048]},
}
MOST_CLASSES = 100_000
_CLASSES = {"conditional_detr": "ConditionalDetr", "deformable_detr": "DeformableDetr"}


def export_hugging_face(detector: nn.Module, folder: Path | str, categories: Sequence[str], resize: Resize | None = None) -> Path:
    """Write config.json, model.safetensors and preprocessor_config.json, for AutoModelForObjectDetection and AutoImageProcessor.

    Images are resized there as in an evaluation here, but for a rounding: where the longer side meets its limit, transformers' may
    be one to three pixels shorter.

    Args:
        detector: a Conditional or Deformable DETR on a ResNet-18, -50 or -101, or one of transformers' own.
        categories: the name of each class.
        resize: the recipe's; by default 800 pixels on the shorter side and at most 1333 on the longer.

    Raises:
        InputError: transformers has no such detector or backbone, not one name a class, or the folder cannot be written.
    """
    folder, resize = Path(folder), resize or Resize()
    if (family := getattr(detector, "family", None)) is not None:
        _require_names(folder, categories, detector.model.config.num_labels)
        processor = json.dumps(_processor(family.processor, resize), indent=2) + "\n"
        write_family(detector, folder, categories, {"preprocessor_config.json": processor})
        return folder
    config = _config(detector, folder, list(categories))
    state = {name: value.detach().cpu() for name, value in detector.state_dict().items()}
    tensors = _their_state(state, detector)
    with atomic(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    processor = _processor(f"{_CLASSES[config['model_type']]}ImageProcessor", resize)
    for name, content in (("preprocessor_config.json", processor), ("config.json", config)):
        write_text(folder / name, json.dumps(content, indent=2) + "\n")
    return folder


def _processor(kind: str, resize: Resize) -> dict[str, Any]:
    theirs = {"short": "shortest_edge", "long": "longest_edge"}
    return {
        "image_processor_type": kind,
        "format": "coco_detection",
        "do_resize": True,
        "size": {theirs.get(name, name): side for name, side in resize.sides.items()},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(resize.mean),
        "image_std": list(resize.std),
        "do_pad": not resize.stretch,
    }


def _config(detector: nn.Module, folder: Path, categories: list[str]) -> dict[str, Any]:
    kinds = {ConditionalDETR: "conditional_detr", DeformableDETR: "deformable_detr"}
    if type(detector) not in kinds:
        raise InputError(f"export to {folder}: transformers has no {type(detector).__name__}; share weights.safetensors and the recipe")
    kind, state = kinds[type(detector)], detector.state_dict()
    backbone = backbone_of(state, "of the detector")
    if backbone["name"] not in _RESNETS:
        why = "its ResNets begin with a 7x7 convolution" if backbone["name"] == "thin_resnet" else "without timm it has ResNets only"
        raise InputError(
            f"export to {folder}: transformers cannot have a {backbone['name']} here ({why}); share weights.safetensors and the recipe"
        )
    if detector.backbone.strides[-1] != 32:
        raise InputError(f"export to {folder}: transformers' ResNets cannot be dilated; share weights.safetensors and the recipe")
    if kind == "conditional_detr" and detector.temperature != 10000:
        raise InputError(
            f"export to {folder}: transformers' Conditional DETR has the temperature 10000, not {detector.temperature:g}; "
            "share weights.safetensors and the recipe"
        )
    layer = detector.decoder[0]
    heads = layer.heads if kind == "conditional_detr" else layer.cross_attn.heads
    sizes = recipe_fields(state, folder, {"detector": kind, "heads": heads})
    classes = len(state["class_embed.weight" if kind == "conditional_detr" else "class_embed.0.weight"])
    _require_names(folder, categories, classes)
    levels = sizes.get("levels", 1)
    config = {
        "architectures": [f"{_CLASSES[kind]}ForObjectDetection"],
        "model_type": kind,
        "use_timm_backbone": False,
        "backbone_config": {
            "model_type": "resnet",
            "embedding_size": 64,
            "downsample_in_bottleneck": backbone["name"] != "resnet18" and detector.backbone.body["layer2"][0].conv1.stride == (2, 2),
            "out_features": ["stage4"] if levels == 1 else ["stage2", "stage3", "stage4"][:levels],
            **_RESNETS[backbone["name"]],
        },
        "d_model": sizes["dim"],
        **{f"{part}_layers": sizes[f"{part}_layers"] for part in ("encoder", "decoder")},
        **{f"{part}_attention_heads": heads for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": sizes["ffn"] for part in ("encoder", "decoder")},
        "dropout": layer.drop.p,
        # With it, the port of Conditional DETR feeds normalised states from layer to layer, unlike the official code.
        "auxiliary_loss": False,
        "id2label": {str(i): name for i, name in enumerate(categories)},
        "label2id": {name: i for i, name in enumerate(categories)},
    }
    if kind == "conditional_detr":
        return config | {"num_queries": sizes["queries"]}
    return config | {
        "num_queries": detector.num_queries,
        "num_feature_levels": levels,
        "encoder_n_points": sizes["points"],
        "decoder_n_points": sizes["points"],
        "with_box_refine": detector.refine,
        "two_stage": detector.two_stage,
        "two_stage_num_proposals": detector.num_queries,
        # Transformers 5 would else tie the class heads of all stages, also where they differ.
        "tie_word_embeddings": False,
    }


def _require_names(folder: Path, categories: Sequence[str], classes: int) -> None:
    if len(set(categories)) != classes or len(categories) != classes:
        raise InputError(f"export to {folder}: {len(set(categories))} different names for {classes} classes; give each class its name")


def _their_state(state: Mapping[str, Tensor], detector: nn.Module) -> dict[str, Tensor]:
    """Every tensor under transformers' name, or names."""
    conditional = isinstance(detector, ConditionalDETR)
    table = names.HUGGING_FACE_CONDITIONAL if conditional else names.HUGGING_FACE_DEFORMABLE
    pairs = [(ours, theirs) for theirs, ours in table]
    theirs: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        renamed = names.rename(name, pairs)
        if ".in_proj_" in renamed:
            for part, one in zip("qkv", value.chunk(3), strict=True):
                theirs[renamed.replace(".in_proj_", f".{part}_proj.")] = one.clone()
            continue
        theirs[renamed] = value.contiguous()
        if not conditional and (head := re.match(r"(class|bbox)_embed\.(\d+)\.", name)):
            # The heads have an entry of their own for each stage, and in the decoder where that refines with them.
            stages = [int(head[2])] if detector.refine else range(len(detector.decoder))
            rest = name[head.end() :]
            entries = [f"{head[1]}_embed.{stage}.{rest}" for stage in stages]
            if detector.two_stage or (detector.refine and head[1] == "bbox"):
                entries += [f"model.decoder.{entry}" for entry in entries]
            theirs |= {entry: value.clone() for entry in entries}
    return theirs


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder, in one file or in several.

    Raises:
        InputError: no such files, or damaged ones.
    """
    for name, read in (("model.safetensors", lambda path: read_weights(path)[0]), ("pytorch_model.bin", read_pickle)):
        if (folder / name).is_file():
            return named_tensors(read(folder / name), folder)
        index = folder / f"{name}.index.json"
        if index.is_file():
            # Files of this folder only, whatever the index says.
            listed = read_json(index).get("weight_map")
            if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
                raise InputError(f"{index}: 'weight_map' is {str(listed)[:60]!r}, not the file of each tensor; restore it")
            shards = sorted({Path(shard).name for shard in listed.values()})
            return named_tensors({key: value for shard in shards for key, value in read(folder / shard).items()}, folder)
    raise InputError(
        f"weights {folder}: no weights.safetensors of a run, and no model.safetensors or pytorch_model.bin of a Hugging Face model; "
        "give a folder that has them, or a file"
    )


def fields_of_config(path: Path) -> dict[str, Any]:
    """Settings and class names ("names") in config.json.

    Raises:
        InputError: not such a file, or a model that is another function than the official one, or asks for code of its own.
    """
    config = read_json(path)
    if "auto_map" in config:
        raise InputError(
            f"{path}: 'auto_map' asks to run the folder's own code ({str(config['auto_map'])[:60]}), which the kit never does; if the "
            "weights are transformers' Conditional or Deformable DETR, take the entry out"
        )
    try:
        return _fields(config, path)
    except InputError:  # a ValueError too
        raise
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not as transformers writes it ({str(error)[:100]}); restore it") from None


def _fields(config: dict[str, Any], path: Path) -> dict[str, Any]:
    kind = config.get("model_type")
    if kind not in ("conditional_detr", "deformable_detr"):
        raise InputError(f"{path}: the model is a {kind!r}; the kit reads {', '.join((*_CLASSES, *FAMILIES))}")
    expected = {"activation_function": "relu", "position_embedding_type": "sine"}
    if kind == "conditional_detr":
        expected["auxiliary_loss"] = False
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise InputError(
                f"{path}: '{name}' is {config[name]!r}, which makes it another function than the official; it must be {value!r}"
            )
    backbone = config.get("backbone_config") or {}
    stated = {
        "heads": equal(config, "encoder_attention_heads", "decoder_attention_heads", path, 8),
        "dropout": config.get("dropout", 0.1),
        "backbone": {
            "dilation": bool(config.get("dilation")) or backbone.get("output_stride") == 16,
            "stride_in_1x1": bool(backbone.get("downsample_in_bottleneck")),
        },
    }
    if kind == "deformable_detr":
        stated["points"] = equal(config, "encoder_n_points", "decoder_n_points", path, 4)
        stated |= form_of(config, "two_stage_num_proposals")
    if labels := {int(row): name for row, name in (config.get("id2label") or {}).items()}:
        if max(labels) > MOST_CLASSES:
            raise InputError(f"{path}: 'id2label' has a class {max(labels)}; number the classes from 0")
        stated["names"] = [label if is_name(label := labels.get(row)) else None for row in range(max(labels) + 1)]
    return stated


def form_of(values: Mapping[str, Any], queries: str) -> dict[str, Any]:
    """Deformable DETR's form; with two stages its number of queries too, which its tensors do not show."""
    if values.get("two_stage"):
        return {"form": "two_stage", "queries": values.get(queries, 300)}
    return {"form": "box_refine" if values.get("with_box_refine") else "plain"}


def equal(values: Mapping[str, Any], one: str, other: str, path: Path, default: int) -> int:
    """A setting that encoder and decoder have each, and the kit once."""
    encoder, decoder = positive(values, one, path, default), positive(values, other, path, default)
    if encoder != decoder:
        raise InputError(f"{path}: '{one}' is {encoder} and '{other}' {decoder}; the kit has detectors with equal ones only")
    return decoder


def positive(values: Mapping[str, Any], name: str, path: Path, default: int) -> int:
    value = values.get(name, default)
    if type(value) is not int or value < 1:
        raise InputError(f"{path}: '{name}' is {str(value)[:60]!r}, not a whole number above 0; restore it")
    return value
