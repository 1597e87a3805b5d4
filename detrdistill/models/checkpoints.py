"""Weights of detectors: the kit's own safetensors, official checkpoints, mmdetection's, and Hugging Face folders.

Nothing in a file is ever executed, and nothing is loaded in part: what does not fit is refused with a report. `load_pretrained` builds
the detector that a file holds, `load_detector_weights` fills one that is there; `hugging_face.py` writes folders.
"""

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from detrdistill.errors import InputError
from detrdistill.experiments.recipes import OWNERS, Recipe, Schedule
from detrdistill.experiments.store import read_record
from detrdistill.files import atomic
from detrdistill.models import AdaMixer, ConditionalDETR, DeformableDETR, build_detector, names

FAMILIES = {"conditional_detr": ConditionalDETR, "deformable_detr": DeformableDETR, "adamixer": AdaMixer}
SHARED_FIELDS = ("detector", "backbone", "dim", "heads", "ffn", "decoder_layers", "queries", "dropout")


@dataclass(frozen=True)
class About:
    """What a file of weights says of itself, in its own words and by the shapes of its tensors.

    Attributes:
        path: the file or folder.
        origin: whose format it is in: "kit", "official", "mmdetection" or "Hugging Face".
        settings: a recipe's fields of this detector, as far as they are known.
        names: the class of each output of the head; None where an output stands for none, or nobody says.
        rows: for each class of the detector that was loaded, the output of the file that it got; None where it started afresh.
        left_out: beginnings of names of tensors that are not the detector's, in a file that holds more.
    """

    path: Path
    origin: str
    settings: dict[str, Any]
    names: tuple[str | None, ...]
    rows: tuple[int | None, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.path} ({self.origin} weights of a {FAMILIES[self.settings['detector']].__name__})"


@dataclass(frozen=True)
class Found:
    """A file's tensors under their own names, and what lies beside them."""

    tensors: dict[str, Tensor]
    told: dict[str, Any] = field(default_factory=dict)  # as `settings`, and "names"


@dataclass(frozen=True)
class Layout:
    """A format, recognised by the name of a parameter that only this detector has."""

    detector: str
    origin: str
    sign: str
    table: names.Table


LAYOUTS = (
    Layout("conditional_detr", "official", "transformer.decoder.ref_point_head.layers.0.weight", names.CONDITIONAL),
    Layout("deformable_detr", "official", "transformer.level_embed", names.DEFORMABLE),
    Layout("adamixer", "official", "rpn_head.init_content_features.weight", names.ADAMIXER),
    Layout("deformable_detr", "mmdetection", "bbox_head.transformer.level_embeds", names.MMDET_DEFORMABLE),
    Layout("conditional_detr", "Hugging Face", "model.decoder.ref_point_head.layers.0.weight", names.HUGGING_FACE_CONDITIONAL),
    Layout("deformable_detr", "Hugging Face", "model.level_embed", names.HUGGING_FACE_DEFORMABLE),
    Layout("conditional_detr", "kit", "ref_point_head.layers.0.weight", ()),
    Layout("deformable_detr", "kit", "level_embed", ()),
    Layout("adamixer", "kit", "init_content.weight", ()),
)


# Loading


def load_pretrained(
    path: Path | str,
    *,
    categories: Sequence[str] | None = None,
    outputs: Sequence[str | None] | None = None,
    replace_head: bool = False,
    part: str | None = None,
    **settings: Any,
) -> tuple[nn.Module, About]:
    """The detector that a file or folder holds, in evaluation mode.

    Its sizes are read off the tensors. What tensors do not show (heads, points; queries of a two-stage detector; dilation and stride of
    the backbone) comes from what lies beside them (`args`, config.json, a run's record), or must be given.

    Args:
        path: a run's folder or its weights.safetensors; an official or mmdetection file; a Hugging Face folder.
        categories: names of the classes in the order wanted, such as those of a data set. The head's outputs are put in this order
            by name; without, they stay as the file has them.
        outputs: the class of each output of the file's head, None for none, where the file does not say. A file that says nothing and
            has 91 or 80 outputs has COCO's classes: by COCO's ids, or one after the other.
        replace_head: start classes of `categories` that the file does not know with fresh weights, and drop those not in `categories`.
        part: "student" or "teacher", for a file that holds both.
        settings: fields of a recipe, which override what the file says.

    Raises:
        InputError: the file is missing, damaged, holds code, or another model; a setting is missing; or the classes differ.
    """
    state, about = read_detector_weights(path, part)
    known = _settings(state, about.path, about.settings | settings)
    needed = {"heads": True, "points": known["detector"] == "deformable_detr", "queries": True}
    if missing := [f"{name}=" for name, here in needed.items() if here and name not in known]:
        raise InputError(
            f"{about.title}: nothing in it tells {', '.join(missing)[:-1]}; give {', '.join(missing)} as the model was trained"
        )
    recipe = Recipe.read(known | {"schedule": Schedule(steps=1)}, where=str(about.path))
    about = replace(about, settings=known)
    detector = build_detector(recipe, len(categories) if categories is not None else len(about.names))
    return detector.eval(), _load(detector, state, about, categories, outputs, replace_head)


def load_detector_weights(
    detector: nn.Module,
    path: Path | str,
    *,
    categories: Sequence[str] | None = None,
    outputs: Sequence[str | None] | None = None,
    replace_head: bool = False,
    part: str | None = None,
) -> About:
    """Load a file or folder in any of the formats into a detector, strictly. Arguments are those of `load_pretrained`.

    Raises:
        InputError: as there, or the weights do not fit; nothing has been loaded then.
    """
    state, about = read_detector_weights(path, part)
    return _load(detector, state, about, categories, outputs, replace_head)


def _load(
    detector: nn.Module,
    state: dict[str, Tensor],
    about: About,
    categories: Sequence[str] | None,
    outputs: Sequence[str | None] | None,
    replace_head: bool,
) -> About:
    family = FAMILIES[about.settings["detector"]]
    if not isinstance(detector, family):
        raise InputError(
            f"{about.title} cannot be loaded into a {type(detector).__name__}; give weights of that detector, or build this one with "
            "load_pretrained"
        )
    if outputs is not None:
        if len(outputs) != len(about.names):
            raise InputError(f"{about.title}: 'outputs' names {len(outputs)} classes, the head has {len(about.names)}; name each output")
        about = replace(about, names=tuple(outputs))
    own = detector.state_dict()
    heads = [name for name in own if re.match(r"class_embed\.|stages\.\d+\.fc_cls\.", name)]
    count = len(own[heads[0]])
    if categories is None:
        rows = tuple(range(len(about.names)))
        if count != len(rows):
            raise InputError(
                f"{about.title} has {len(rows)} class outputs, the detector {count}; give the names of the classes as 'categories', and "
                "replace_head=True for those that the file does not know"
            )
    else:
        if count != len(categories):
            raise InputError(f"{about.title}: {len(categories)} categories for a detector of {count} classes; give one name a class")
        rows = _rows(about, categories, replace_head)
        kept = [i for i, row in enumerate(rows) if row is not None]
        for name in heads:
            if name in state:
                fresh = own[name].clone()
                fresh[kept] = state[name][[rows[i] for i in kept]].to(fresh)
                # The first output of a two-stage detector's last head is how good a proposal is, whatever the classes.
                if getattr(detector, "two_stage", False) and name.startswith(f"class_embed.{len(detector.class_embed) - 1}."):
                    fresh[0] = state[name][0]
                state[name] = fresh
    # Only trained BatchNorm counts batches, and the count changes nothing.
    state = {name: value for name, value in state.items() if name in own or not name.endswith("num_batches_tracked")}
    state |= {name: value for name, value in own.items() if name not in state and name.endswith("num_batches_tracked")}
    fit(detector, state, about.title, "it may be of a variant that the kit does not have, or need other settings")
    return replace(about, rows=rows)


def _rows(about: About, categories: Sequence[str], replace_head: bool) -> tuple[int | None, ...]:
    """The file's output for each category, found by name."""
    plain = lambda name: " ".join(name.lower().split())  # noqa: E731
    known = {plain(name): row for row, name in enumerate(about.names) if name is not None}
    if not known and not replace_head:
        raise InputError(
            f"{about.title} does not say its classes; name its {len(about.names)} outputs as 'outputs', or say replace_head=True"
        )
    rows = tuple(known.get(plain(name)) for name in categories)
    fresh = [name for name, row in zip(categories, rows, strict=True) if row is None]
    dropped = [about.names[row] for row in known.values() if row not in rows]
    if (fresh or dropped) and not replace_head:
        found = [f"{len(some)} {what} ({_few(some)})" for some, what in ((fresh, "unknown to it"), (dropped, "not among them")) if some]
        raise InputError(
            f"{about.title} has other classes than the {len(categories)} categories: {', '.join(found)}; with replace_head=True it keeps "
            f"{len(categories) - len(fresh)} by name, starts {len(fresh)} afresh and drops {len(dropped)}"
        )
    return rows


def fit(module: nn.Module, state: Mapping[str, Tensor], source: str, remedy: str) -> None:
    """Load tensors into a module, strictly.

    Raises:
        InputError: missing, unexpected or misshaped tensors, which it names; nothing has been loaded then.
    """
    own = module.state_dict()
    faults = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "misshaped": [
            f"{name} {list(state[name].shape)} instead of {list(value.shape)}"
            for name, value in own.items()
            if name in state and state[name].shape != value.shape
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(some)} {kind} ({_few(some)})" for kind, some in faults.items() if some)
        raise InputError(f"{source} do not fit this {type(module).__name__}: {listed}; {remedy}")
    module.load_state_dict(state)


def _few(some: Sequence[str]) -> str:
    return ", ".join(some[:3]) + (", ..." if len(some) > 3 else "")


# Reading


def read_detector_weights(path: Path | str, part: str | None = None) -> tuple[dict[str, Tensor], About]:
    """A detector's tensors under the kit's names, from a file or folder in any of the formats, and what is known of it.

    Raises:
        InputError: the file is missing, damaged, holds code, or another model.
    """
    path = Path(path)
    found = _read(path)
    tensors, left_out = _unwrapped(found.tensors, part, path)
    layout = _layout(tensors)
    if layout is None and all(name.startswith("model.") for name in tensors):  # as Lightning saves
        tensors = {name.removeprefix("model."): value for name, value in tensors.items()}
        layout = _layout(tensors)
    if layout is None:
        hint = "it is an image classifier: give it as backbone.weights" if {"fc.weight", "conv1.weight"} <= tensors.keys() else ""
        raise InputError(
            f"weights {path}: no Conditional DETR, Deformable DETR or AdaMixer in any format known here ({len(tensors)} tensors: "
            f"{_few(sorted(tensors))}); {hint or 'give a checkpoint of one of these'}"
        )
    told = dict(found.told)
    stated = told.pop("names", None)
    try:
        state = _our_state(tensors, layout, told)
    except InputError as error:
        raise InputError(f"weights {path}: {error}") from None
    settings = _settings(state, path, {"detector": layout.detector} | told)
    head = state.get("class_embed.weight", state.get("class_embed.0.weight", state.get("stages.0.fc_cls.weight")))
    if head is None:
        raise InputError(f"weights {path}: a {layout.detector} without its class head; give the complete checkpoint")
    return state, About(path, layout.origin, settings, _classes(stated, len(head)), left_out=left_out)


def _layout(tensors: Mapping[str, Tensor]) -> Layout | None:
    return next((layout for layout in LAYOUTS if layout.sign in tensors), None)


def _unwrapped(tensors: dict[str, Tensor], part: str | None, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The detector's tensors without the prefixes of what it was wrapped in, and beginnings of the names of what else there was."""
    without = lambda some, prefix: {name.removeprefix(prefix): value for name, value in some.items() if name.startswith(prefix)}  # noqa: E731
    parallel = lambda some: without(some, "module.") if all(name.startswith("module.") for name in some) else some  # noqa: E731
    tensors = parallel(tensors)
    parts = [one for one in ("student", "teacher") if any(name.startswith(f"{one}.") for name in tensors)]
    if part is None and len(parts) == 2:
        raise InputError(f"weights {path} hold a student and a teacher; say part='student' or part='teacher'")
    if part is not None and part not in parts:
        raise InputError(f"weights {path} hold no tensors of a '{part}' ({' and '.join(parts) or 'no prefix'} instead); leave out 'part'")
    if not parts:
        return tensors, ()
    chosen = part or parts[0]
    others = sorted({name.split(".")[0] for name in tensors} - {chosen})
    return parallel(without(tensors, f"{chosen}.")), tuple(others)


def _our_state(tensors: dict[str, Tensor], layout: Layout, told: dict[str, Any]) -> dict[str, Tensor]:
    if layout.origin == "kit":
        return tensors
    if layout.origin == "mmdetection":
        # Its extra levels are numbered on their own.
        levels = len({name.split(".")[2] for name in tensors if name.startswith("neck.convs.")})
        extra = lambda name: re.sub(r"^neck\.extra_convs\.(\d+)", lambda m: f"neck.convs.{levels + int(m[1])}", name)  # noqa: E731
        tensors = {extra(name): value for name, value in tensors.items()}
    state = names.our_state(tensors, layout.table, one_head=layout.detector == "deformable_detr" and _plain(tensors, layout, told))
    if layout.origin == "mmdetection":
        # Its neck's convolutions have no bias.
        for name in [name for name in state if re.fullmatch(r"input_proj\.\d+\.0\.weight", name)]:
            state.setdefault(name.replace("weight", "bias"), torch.zeros(len(state[name])))
    # Ours pack the three projections of plain attention into one matrix.
    for name in [name for name in state if re.search(r"\.self_attn\.q_proj\.", name)]:
        parts = [name.replace(".q_proj.", f".{one}_proj.") for one in "qkv"]
        if all(one in state for one in parts):
            state[name.replace(".q_proj.", ".in_proj_")] = torch.cat([state.pop(one) for one in parts])
    return state


def _plain(tensors: dict[str, Tensor], layout: Layout, told: Mapping[str, Any]) -> bool:
    """Whether a Deformable DETR's stages share one head: as the file says, or else if all heads are equal."""
    if "form" in told:
        return told["form"] == "plain"
    if any(re.search(r"decoder\.bbox_embed\.|\benc_output\.", name) for name in tensors):
        return False
    ours = {names.our_name(name, layout.table): value for name, value in tensors.items()}
    heads = [(name, value) for name, value in ours.items() if re.match(r"(class|bbox)_embed\.", name)]
    first = {name: ours.get(re.sub(r"^(\w+)\.\d+", r"\1.0", name)) for name, _ in heads}
    return all(first[name] is not None and torch.equal(first[name], value) for name, value in heads)


def _classes(stated: Sequence[str | None] | None, count: int) -> tuple[str | None, ...]:
    """The class of each output of the head."""
    if stated is not None and len(stated) == count and any(stated):
        return tuple(stated)
    if count == len(names.COCO_91):
        return names.COCO_91
    coco = tuple(name for name in names.COCO_91 if name)
    return coco if count == len(coco) else (None,) * count


def _settings(state: Mapping[str, Tensor], path: Path, told: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a recipe read off the tensors (with the kit's names); those `told` count instead where they are given."""
    size = lambda name, axis=0: state[name].shape[axis]  # noqa: E731
    count = lambda prefix: len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})  # noqa: E731
    detector = told["detector"]
    try:
        if detector == "adamixer":
            channels, dim = size("neck.gn_out.weight"), size("init_content.weight", 1)
            all_points, out_points = (
                size("stages.0.sampling_offset_generator.bias") // 3,
                size("stages.0.mixing.out_proj.weight", 1) // channels,
            )
            # The generator makes groups * (channels / groups)^2 + all_points * out_points numbers.
            groups = channels**2 // max(1, size("stages.0.mixing.parameter_generator.bias") - all_points * out_points)
            found = {
                "dim": dim,
                "feature_dim": None if channels == dim else channels,
                "heads": size("stages.0.iof_tau"),
                "ffn": size("stages.0.linear1.bias"),
                "decoder_layers": count("stages."),
                "queries": size("init_content.weight"),
                "groups": groups,
                "in_points": all_points // max(1, groups),
                "out_points": out_points,
                "dropout": 0.0,
            }
        else:
            found = {
                "dim": size("decoder.0.norm1.weight"),
                "ffn": size("decoder.0.linear1.bias"),
                "encoder_layers": count("encoder."),
                "decoder_layers": count("decoder."),
            }
            if "query_embed.weight" in state:
                found["queries"] = size("query_embed.weight")
        if detector == "deformable_detr":
            found["levels"] = size("level_embed")
            two_stage, refines = "enc_output.weight" in state, count("class_embed.") > 1
            found["form"] = "two_stage" if two_stage else "box_refine" if refines else "plain"
            heads_and_points = size("decoder.0.cross_attn.attention_weights.bias") // found["levels"]
            for one, other in (("heads", "points"), ("points", "heads")):
                if one in told:
                    found[other] = max(1, heads_and_points // int(told[one]))
    except (KeyError, IndexError) as error:
        raise InputError(f"weights {path}: a {detector} without {error}; give the complete checkpoint") from None
    found["backbone"] = _backbone(state, path)
    # A file may tell more than its detector has.
    theirs = {name: value for name, value in told.items() if detector in OWNERS.get(name, (detector,))}
    if isinstance(backbone := theirs.get("backbone"), dict):
        theirs["backbone"] = found["backbone"] | backbone
        if theirs["backbone"].get("stride_in_1x1"):
            theirs["backbone"] |= {"weights": path}  # torchvision's ImageNet weights have no such variant
    return found | theirs


def _backbone(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Fields of a backbone's recipe. Its `weights` say how it goes on training: frozen as an ImageNet backbone, or whole."""
    body = "backbone.body."
    trained = any(name.startswith(body) and name.endswith("num_batches_tracked") for name in state)
    if f"{body}0.0.weight" in state:
        return {"name": "mobilenet_v2", "weights": "none" if trained else "imagenet"}
    layers = [{name.split(".")[3] for name in state if name.startswith(f"{body}layer{i}.")} for i in (1, 2, 3, 4)]
    blocks, stem = tuple(len(layer) for layer in layers), state.get(f"{body}conv1.weight")
    bottleneck = f"{body}layer1.0.conv3.weight" in state
    known = {((2, 2, 2, 2), False): "resnet18", ((3, 4, 6, 3), True): "resnet50", ((3, 4, 23, 3), True): "resnet101"}
    name = known.get((blocks, bottleneck))
    if stem is not None and stem.shape[-1] == 3 and not bottleneck and all(blocks):
        return {"name": "thin_resnet", "width": len(stem), "blocks": blocks, "weights": "none" if trained else path}
    if stem is None or name is None:
        raise InputError(f"weights {path}: its backbone has {blocks} blocks a stage; known here are ResNet-18, -50, -101 and MobileNetV2")
    return {"name": name, "weights": "none" if trained else "imagenet"}


# Files


def save_weights(path: Path, module: nn.Module, about: dict[str, str]) -> None:
    """Write a module's parameters and buffers as safetensors, with `about` in its header."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata=about)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file.

    Raises:
        InputError: no such file, or a damaged one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except FileNotFoundError:
        raise InputError(f"weights {path}: no such file; correct the path, or train the run that makes it") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"weights {path}: damaged or not a safetensors file ({error}); restore or retrain it") from None


def load_weights(module: nn.Module, path: Path) -> dict[str, str]:
    """Load a safetensors file of the kit into a module, strictly; returns the file's header.

    Raises:
        InputError: missing file, damaged file, or missing, unexpected or misshaped tensors, which it names.
    """
    tensors, about = read_weights(path)
    fit(module, tensors, f"weights {path}", "use the recipe they were trained with")
    return about


def _read(path: Path) -> Found:
    """A file or folder as it is."""
    if path.is_dir():
        if (path / "weights.safetensors").is_file():
            return _read(path / "weights.safetensors")
        return Found(_read_shards(path), _told_by_config(path / "config.json"))
    if path.suffix == ".safetensors":
        tensors, header = read_weights(path)
        told: dict[str, Any] = {"names": header["categories"].split(", ")} if "categories" in header else {}
        if (path.parent / "record.json").is_file():
            recipe = read_record(path.parent / "record.json").recipe
            if isinstance(recipe, Recipe):
                told |= {name: getattr(recipe, name) for name in (*SHARED_FIELDS, *OWNERS)}
        elif (path.parent / "config.json").is_file():
            told |= _told_by_config(path.parent / "config.json")
        return Found(tensors, told)
    content = read_pickle(path)
    state = next((content[name] for name in ("model", "state_dict") if isinstance(content.get(name), dict)), content)
    if not state or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        raise InputError(f"weights {path}: no named tensors, nor an entry 'model' or 'state_dict' of them; save model.state_dict()")
    if isinstance(content.get("args"), argparse.Namespace):
        return Found(state, _told_by_args(vars(content["args"]), path))
    meta = content.get("meta") if isinstance(content.get("meta"), dict) else {}
    classes = meta.get("CLASSES") or (meta.get("dataset_meta") or {}).get("classes")
    return Found(state, {"names": list(classes)} if classes else {})


def read_pickle(path: Path) -> dict[str, Any]:
    """A file of torch.save that holds a dict of tensors, plain values and at most an `argparse.Namespace`, as official checkpoints do.

    Raises:
        InputError: the file is missing, damaged, or holds anything else, of which nothing is executed.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on pickles of newer protocols, then refuses them
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"weights {path}: no such file; correct the path") from None
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = f"code ('{refused[1]}')" if refused else "code or something that is not tensors"
        raise InputError(
            f"weights {path}: refused unread, since it holds {what}; if you trust it, load it where it was made and save its state_dict alone"
        ) from None
    except Exception as error:  # torch reports damage in many types: RuntimeError, EOFError, KeyError, IndexError
        raise InputError(f"weights {path}: truncated or damaged ({type(error).__name__}); copy or download it again") from None
    if not isinstance(content, dict):
        raise InputError(f"weights {path}: a {type(content).__name__} instead of named tensors; save model.state_dict()")
    return content


def _read_shards(folder: Path) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder, in one file or in several."""
    for name, read in (("model.safetensors", lambda path: read_weights(path)[0]), ("pytorch_model.bin", read_pickle)):
        if (folder / name).is_file():
            return read(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = read_json(index).get("weight_map", {})
            # Files of this folder only, whatever the index says.
            return {
                key: value
                for shard in sorted({Path(shard).name for shard in shards.values()})
                for key, value in read(folder / shard).items()
            }
    raise InputError(
        f"weights {folder}: no weights.safetensors of a run, and no model.safetensors or pytorch_model.bin of a Hugging Face model; "
        "give a folder that has them, or a file"
    )


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a Hugging Face folder needs it") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({str(error)[:100]}); restore it") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object; restore it")
    return content


# What lies beside the tensors


def _told_by_args(args: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Settings among an official checkpoint's arguments."""
    told = {ours: args[theirs] for theirs, ours in {"nheads": "heads", "dropout": "dropout"}.items() if theirs in args}
    if "dilation" in args:
        told["backbone"] = {"dilation": args["dilation"]}
    if "with_box_refine" in args:
        told |= _form(args, "num_queries")
    if "dec_n_points" in args:
        told["points"] = _equal(args, "enc_n_points", "dec_n_points", path)
    return told


def _told_by_config(path: Path) -> dict[str, Any]:
    """Settings in a Hugging Face folder's config.json."""
    config = read_json(path)
    kind = config.get("model_type")
    if kind not in ("conditional_detr", "deformable_detr"):
        raise InputError(f"{path}: the model is a '{kind}'; only 'conditional_detr' and 'deformable_detr' can be read")
    expected = {"activation_function": "relu", "position_embedding_type": "sine"}
    if kind == "conditional_detr":
        # With it, the port feeds normalised states from layer to layer, unlike the official code.
        expected["auxiliary_loss"] = False
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise InputError(
                f"{path}: '{name}' is {config[name]!r}, which makes it another function than the official; it must be {value!r}"
            )
    backbone = config.get("backbone_config") or {}
    told = {
        "heads": _equal(
            {"encoder_attention_heads": 8, "decoder_attention_heads": 8} | config,
            "encoder_attention_heads",
            "decoder_attention_heads",
            path,
        ),
        "dropout": config.get("dropout", 0.1),
        "backbone": {
            "dilation": bool(config.get("dilation")) or backbone.get("output_stride") == 16,
            "stride_in_1x1": bool(backbone.get("downsample_in_bottleneck")),
        },
    }
    if kind == "deformable_detr":
        told["points"] = _equal({"encoder_n_points": 4, "decoder_n_points": 4} | config, "encoder_n_points", "decoder_n_points", path)
        told |= _form(config, "two_stage_num_proposals")
    labels = {int(row): name for row, name in (config.get("id2label") or {}).items()}
    if labels:
        # Transformers calls classes LABEL_3 that nobody named.
        named = lambda name: None if name is None or re.fullmatch(r"LABEL_\d+|N/A", name) else name  # noqa: E731
        told["names"] = [named(labels.get(row)) for row in range(max(labels) + 1)]
    return told


def _form(values: Mapping[str, Any], queries: str) -> dict[str, Any]:
    """Deformable DETR's form; that of two stages has its number of queries nowhere in its tensors."""
    if values.get("two_stage"):
        return {"form": "two_stage", "queries": values.get(queries, 300)}
    return {"form": "box_refine" if values.get("with_box_refine") else "plain"}


def _equal(values: Mapping[str, Any], one: str, other: str, path: Path) -> Any:
    if values.get(one, values[other]) != values[other]:
        raise InputError(f"{path}: '{one}' is {values[one]} and '{other}' {values[other]}; the kit has detectors with equal ones only")
    return values[other]
