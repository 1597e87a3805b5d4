"""Weights of detectors: the kit's own safetensors, official checkpoints, mmdetection's, and Hugging Face folders.

Nothing in a file is ever executed, and nothing is loaded in part: what does not fit is refused with a report. `load_pretrained` builds
the detector that a file holds, `load_detector_weights` fills one that is there; `hugging_face.py` writes folders.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detrdistill.errors import InputError
from detrdistill.experiments.recipes import OWNERS, Recipe, Schedule
from detrdistill.experiments.store import read_record
from detrdistill.models import AdaMixer, ConditionalDETR, DeformableDETR, build_detector, names
from detrdistill.models.hugging_face import equal, form_of, positive, read_folder, told_by_config
from detrdistill.models.sizes import settings_of
from detrdistill.models.weights import classes_of, few, fit, named_tensors, read_pickle, read_weights

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
    known = settings_of(state, about.path, about.settings | settings)
    needed = {"heads": True, "points": known["detector"] == "deformable_detr", "queries": True}
    if missing := [f"{name}=" for name, here in needed.items() if here and name not in known]:
        raise InputError(f"{about.title}: nothing tells these settings of it; give {', '.join(missing)} as the model was trained")
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
    exact = {name: row for row, name in enumerate(about.names)}  # where classes differ by capitals alone
    rows = tuple(exact.get(name, known.get(plain(name))) for name in categories)
    fresh = [name for name, row in zip(categories, rows, strict=True) if row is None]
    dropped = [about.names[row] for row in known.values() if row not in rows]
    if (fresh or dropped) and not replace_head:
        found = [f"{len(some)} {what} ({few(some)})" for some, what in ((fresh, "unknown to it"), (dropped, "not among them")) if some]
        raise InputError(
            f"{about.title} has other classes than the {len(categories)} categories: {', '.join(found)}; with replace_head=True it keeps "
            f"{len(categories) - len(fresh)} by name, starts {len(fresh)} afresh and drops {len(dropped)}"
        )
    return rows


def read_detector_weights(path: Path | str, part: str | None = None) -> tuple[dict[str, Tensor], About]:
    """A detector's tensors under the kit's names, from a file or folder in any of the formats, and what is known of it.

    Raises:
        InputError: the file is missing, damaged, holds code, or another model.
    """
    path = Path(path)
    tensors, told = _read(path)
    tensors, left_out = _unwrapped(tensors, part, path)
    layout = _layout(tensors)
    if layout is None and all(name.startswith("model.") for name in tensors):  # as Lightning saves
        tensors = {name.removeprefix("model."): value for name, value in tensors.items()}
        layout = _layout(tensors)
    if layout is None:
        hint = "it is an image classifier: give it as backbone.weights" if {"fc.weight", "conv1.weight"} <= tensors.keys() else ""
        raise InputError(
            f"weights {path}: no Conditional DETR, Deformable DETR or AdaMixer in any format known here ({len(tensors)} tensors: "
            f"{few(sorted(tensors))}); {hint or 'give a checkpoint of one of these'}"
        )
    stated = told.pop("names", None)
    try:
        state = _our_state(tensors, layout, told)
    except InputError as error:
        raise InputError(f"weights {path}: {error}") from None
    settings = settings_of(state, path, {"detector": layout.detector} | told)
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
    if layout.origin == "Hugging Face" and told.get("form") == "box_refine":
        # Transformers 5 ties the class heads of all stages, and then saves the first.
        for stage in range(1, len({name.split(".")[1] for name in state if name.startswith("decoder.")})):
            for kind in ("weight", "bias"):
                if f"class_embed.0.{kind}" in state:
                    state.setdefault(f"class_embed.{stage}.{kind}", state[f"class_embed.0.{kind}"])
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
    if stated is not None and any(stated):  # never another's names in their stead
        return tuple(stated) if len(stated) == count else (None,) * count
    if count == len(names.COCO_91):
        return names.COCO_91
    coco = tuple(name for name in names.COCO_91 if name)
    return coco if count == len(coco) else (None,) * count


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A file's tensors under their own names, and what lies beside them: a recipe's fields, and "names", the class of each output."""
    if path.is_dir():
        if (path / "weights.safetensors").is_file():
            return _read(path / "weights.safetensors")
        return read_folder(path), told_by_config(path / "config.json")
    if path.suffix == ".safetensors":
        tensors, header = read_weights(path)
        told: dict[str, Any] = {"names": names} if (names := classes_of(header)) is not None else {}
        if (path.parent / "record.json").is_file():
            recipe = read_record(path.parent / "record.json").recipe
            if isinstance(recipe, Recipe):
                told |= {name: getattr(recipe, name) for name in (*SHARED_FIELDS, *OWNERS)}
        elif (path.parent / "config.json").is_file():
            told |= told_by_config(path.parent / "config.json")
        return named_tensors(tensors, path), told
    content = read_pickle(path)
    state = next((content[name] for name in ("model", "state_dict") if isinstance(content.get(name), dict)), content)
    state = named_tensors(state, path)
    if isinstance(content.get("args"), argparse.Namespace):
        return state, _told_by_args(vars(content["args"]), path)
    meta = content.get("meta") if isinstance(content.get("meta"), dict) else {}
    later = meta.get("dataset_meta") if isinstance(meta.get("dataset_meta"), dict) else {}
    classes = meta.get("CLASSES") or later.get("classes")
    named = isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes)
    return state, {"names": list(classes)} if named else {}


def _told_by_args(args: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Settings among an official checkpoint's arguments."""
    told = {"heads": positive(args, "nheads", path, 8)} if "nheads" in args else {}
    if "dropout" in args:
        told["dropout"] = args["dropout"]
    if "dilation" in args:
        told["backbone"] = {"dilation": args["dilation"]}
    if "with_box_refine" in args:
        told |= form_of(args, "num_queries")
    if "dec_n_points" in args:
        told["points"] = equal(args, "enc_n_points", "dec_n_points", path, 4)
    return told
