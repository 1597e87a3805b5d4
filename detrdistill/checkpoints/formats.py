"""Whose format a file of weights is in, and its tensors under the kit's names."""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detrdistill.any_detr.build import family_of, read_family
from detrdistill.checkpoints import names
from detrdistill.checkpoints.hugging_face import equal, fields_of_config, form_of, positive, read_folder
from detrdistill.checkpoints.locate import WHOLE
from detrdistill.checkpoints.mmdetection import fields_of_text
from detrdistill.checkpoints.preparation import resize_of
from detrdistill.checkpoints.sizes import recipe_fields
from detrdistill.errors import InputError
from detrdistill.models import AdaMixer, ConditionalDETR, DeformableDETR
from detrdistill.models.weights import classes_of, few, named_tensors, read_json, read_pickle, read_weights
from detrdistill.recipes.families import FAMILIES as OF_TRANSFORMERS
from detrdistill.recipes.recipe import OWNERS, Recipe
from detrdistill.recipes.words import NAMES
from detrdistill.records import read_record

FAMILIES = {"conditional_detr": ConditionalDETR, "deformable_detr": DeformableDETR, "adamixer": AdaMixer}
SIZED, NORMALISED = ("resize.short", "resize.long", "resize.stretch"), ("resize.mean", "resize.std")
SHARED_FIELDS = ("detector", "backbone", "dim", "heads", "ffn", "decoder_layers", "queries", "dropout")


@dataclass(frozen=True)
class About:
    """What a file of weights says of itself, in its own words and by the shapes of its tensors.

    Attributes:
        path: the file or folder.
        origin: whose format it is in: "kit", "official", "mmdetection" or "Hugging Face".
        settings: a recipe's fields of this detector, as far as they are known; "resize" says how it wants its images prepared.
        names: the class of each output of the head; None where an output stands for none, or nobody says.
        rows: for each class of the detector that was loaded, the output of the file that it got; None where it started afresh.
        left_out: beginnings of names of tensors that are not the detector's, in a file that holds more.
        entry: which entry of the file the tensors are, where it holds a moving average (EMA) of them.
        unclear: settings of its images that it says in several ways, or in one that is not understood.
    """

    path: Path
    origin: str
    settings: dict[str, Any]
    names: tuple[str | None, ...]
    rows: tuple[int | None, ...] = ()
    left_out: tuple[str, ...] = ()
    entry: str | None = None
    unclear: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        entry = f", entry '{self.entry}'" if self.entry else ""
        return f"{self.path}{entry} ({self.origin} weights of a {NAMES[self.settings['detector']]})"


@dataclass(frozen=True)
class Layout:
    """A format, recognised by the name of a parameter that only this detector has."""

    detector: str
    origin: str
    sign: str
    table: names.Table


LAYOUTS = (
    Layout("conditional_detr", "official", "transformer.decoder.ref_point_head.layers.0.weight", names.OFFICIAL_CONDITIONAL),
    Layout("deformable_detr", "official", "transformer.level_embed", names.OFFICIAL_DEFORMABLE),
    Layout("adamixer", "official", "rpn_head.init_content_features.weight", names.OFFICIAL_ADAMIXER),
    Layout("deformable_detr", "mmdetection", "bbox_head.transformer.level_embeds", names.MMDET_DEFORMABLE),
    Layout("deformable_detr", "mmdetection", "bbox_head.reg_branches.0.0.weight", names.MMDET3_DEFORMABLE),
    Layout("conditional_detr", "mmdetection", "decoder.ref_point_head.layers.0.weight", names.MMDET3_CONDITIONAL),
    Layout("conditional_detr", "Hugging Face", "model.decoder.ref_point_head.layers.0.weight", names.HUGGING_FACE_CONDITIONAL),
    Layout("deformable_detr", "Hugging Face", "model.level_embed", names.HUGGING_FACE_DEFORMABLE),
    Layout("conditional_detr", "kit", "ref_point_head.layers.0.weight", ()),
    Layout("deformable_detr", "kit", "level_embed", ()),
    Layout("adamixer", "kit", "init_content.weight", ()),
)
# Entries of a file that hold a model, and its moving average; some codes put the average within another entry.
MODEL, AVERAGE, WITHIN = (
    ("model", "state_dict", "model_state_dict", "module"),
    ("ema", "model_ema", "ema_model", "ema_state_dict"),
    "module",
)
# Parts of names that wrappers of torch add wherever they wrap.
WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def read_detector_weights(path: Path | str, part: str | None = None) -> tuple[dict[str, Tensor], About]:
    """A detector's tensors under the kit's names, from a file or folder in any of the formats, and what is known of it.

    Args:
        part: "student" or "teacher" of a file that holds both; "model" or "ema" of one that holds a moving average of the weights, which
            is what its code evaluates: without a word, it is taken.

    Raises:
        InputError: the file is missing, damaged, holds code, or another model.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if part is None and family_of(folder) and not (folder / "record.json").is_file():
        if path != folder and path.name not in WHOLE:
            raise InputError(
                f"weights {path}: beside a config.json of transformers, which names its weights itself; give the folder {folder}"
            )
        return _read_family(folder)
    tensors, stated = _read(path, part if part in ("model", "ema") else None)
    if stated.get("detector") in OF_TRANSFORMERS:  # a run of the kit
        return tensors, About(path, "kit", stated, tuple(stated.pop("names")))
    if part == "ema" and "entry" not in stated:
        raise InputError(f"weights {path} hold no moving average; leave out 'part'")
    tensors, left_out = _unwrapped(tensors, part if part not in ("model", "ema") else None, path)
    layout = _layout(tensors)
    if layout is None:
        hint = "it is an image classifier: give it as backbone.weights" if {"fc.weight", "conv1.weight"} <= tensors.keys() else ""
        raise InputError(
            f"weights {path}: no Conditional DETR, Deformable DETR or AdaMixer in any format known here ({len(tensors)} tensors: "
            f"{few(sorted(tensors))}); {hint or 'give a checkpoint of one of these'}"
        )
    classes, entry, unclear = stated.pop("names", None), stated.pop("entry", None), stated.pop("unclear", ())
    try:
        state = _our_state(tensors, layout, stated)
    except InputError as error:
        raise InputError(f"weights {path}: {error}") from None
    settings = recipe_fields(state, path, {"detector": layout.detector} | stated)
    head = state.get("class_embed.weight", state.get("class_embed.0.weight", state.get("stages.0.fc_cls.weight")))
    if head is None:
        raise InputError(f"weights {path}: a {layout.detector} without its class head; give the complete checkpoint")
    return state, About(path, layout.origin, settings, _classes(classes, len(head)), left_out=left_out, entry=entry, unclear=unclear)


def _read_family(folder: Path) -> tuple[dict[str, Tensor], About]:
    """A folder of transformers' in one of the families that the kit has through transformers itself."""
    state, fields, labels = read_family(folder)
    path = folder / "preprocessor_config.json"
    said = read_json(path) if path.is_file() else {}
    unclear = () if "size" in said else SIZED  # these families have other defaults than the kit
    unclear += () if said.get("do_normalize") is False or "image_mean" in said else NORMALISED
    return state, About(folder, "Hugging Face", fields | {"resize": resize_of(folder)}, tuple(labels), unclear=unclear)


def _layout(tensors: Mapping[str, Tensor]) -> Layout | None:
    return next((layout for layout in LAYOUTS if layout.sign in tensors), None)


def _unwrapped(tensors: dict[str, Tensor], part: str | None, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The detector's tensors without the prefixes of what it was wrapped in, and beginnings of the names of what else there was."""

    def without(some, prefix):
        return {name.removeprefix(prefix): value for name, value in some.items() if name.startswith(prefix)}

    def bare(some):
        """Without the prefixes of DataParallel and Lightning, as long as nothing else gives the format away."""
        while some and _layout(some) is None:
            prefix = next((one for one in ("module.", "model.") if all(name.startswith(one) for name in some)), None)
            if prefix is None:
                break
            some = without(some, prefix)
        return some

    tensors = {WRAPPERS.sub("", name): value for name, value in tensors.items()}
    if all(name.startswith("module.") or name in ("n_averaged", "steps") for name in tensors):  # counters of averaged models
        tensors = without(tensors, "module.")
    tensors = bare(tensors)
    parts = [one for one in ("student", "teacher") if any(name.startswith(f"{one}.") for name in tensors)]
    if part is None and len(parts) == 2:
        raise InputError(
            f"weights {path} hold a student and a teacher; say part='student' or part='teacher' (--set part=student of evaluate, --set "
            "teacher.start.part=student of train, or start.part with --start)"
        )
    if part is not None and part not in parts:
        raise InputError(f"weights {path} hold no tensors of a '{part}' ({' and '.join(parts) or 'no prefix'} instead); leave out 'part'")
    if not parts:
        return tensors, ()
    chosen = part or parts[0]
    others = sorted({name.split(".")[0] for name in tensors} - {chosen})
    return bare(without(tensors, f"{chosen}.")), tuple(others)


def _our_state(tensors: dict[str, Tensor], layout: Layout, stated: dict[str, Any]) -> dict[str, Tensor]:
    if layout.origin == "kit":
        return tensors
    if layout.origin == "mmdetection":
        # Its extra levels are numbered on their own.
        levels = len({name.split(".")[2] for name in tensors if name.startswith("neck.convs.")})

        def extra(name):
            return re.sub(r"^neck\.extra_convs\.(\d+)", lambda m: f"neck.convs.{levels + int(m[1])}", name)

        tensors = {extra(name): value for name, value in tensors.items()}
    state = names.our_state(tensors, layout.table, one_head=layout.detector == "deformable_detr" and _plain(tensors, layout, stated))
    if layout.origin == "mmdetection" and layout.detector == "deformable_detr":
        # Its neck's convolutions have no bias.
        for name in [name for name in state if re.fullmatch(r"input_proj\.\d+\.0\.weight", name)]:
            state.setdefault(name.replace("weight", "bias"), torch.zeros(len(state[name])))
    if layout.origin == "Hugging Face" and stated.get("form") == "box_refine":
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


def _plain(tensors: dict[str, Tensor], layout: Layout, stated: Mapping[str, Any]) -> bool:
    """Whether a Deformable DETR's stages share one head: as the file says, or else if all heads are equal."""
    if "form" in stated:
        return stated["form"] == "plain"
    if any(re.search(r"decoder\.bbox_embed\.|\benc_output\.|\bmemory_trans_fc\.", name) for name in tensors):
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


def _read(path: Path, part: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A file's tensors under their own names, and what lies beside them: a recipe's fields, "names" (the class of each output), "entry"."""
    if path.is_dir():
        if (path / "weights.safetensors").is_file():
            return _read(path / "weights.safetensors", part)
        return read_folder(path), fields_of_config(path / "config.json") | {"resize": resize_of(path)}
    if path.suffix == ".safetensors":
        tensors, header = read_weights(path)
        stated: dict[str, Any] = {"names": names} if (names := classes_of(header)) is not None else {}
        if (path.parent / "record.json").is_file():
            recipe = read_record(path.parent / "record.json").recipe
            if isinstance(recipe, Recipe):
                stated |= {name: getattr(recipe, name) for name in (*SHARED_FIELDS, *OWNERS, "resize")}
        elif (path.parent / "config.json").is_file():
            stated |= fields_of_config(path.parent / "config.json") | {"resize": resize_of(path.parent)}
        return named_tensors(tensors, path), stated
    content = read_pickle(path)
    found, stated = _entry(content, part, path)
    state = named_tensors(found, path)
    args = vars(args) if isinstance(args := content.get("args"), argparse.Namespace) else args
    if isinstance(args, dict):
        return state, stated | _fields_of_args(args, path)
    meta = content.get("meta") if isinstance(content.get("meta"), dict) else {}
    later = meta.get("dataset_meta") if isinstance(meta.get("dataset_meta"), dict) else {}
    classes = meta.get("CLASSES") or later.get("classes")
    if isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes):
        stated["names"] = list(classes)
    text = meta.get("cfg") or meta.get("config")  # of mmdetection 3 and 2
    return state, stated | (fields_of_text(text, path) if isinstance(text, str) else {})


def _entry(content: dict[str, Any], part: str | None, path: Path) -> tuple[Any, dict[str, Any]]:
    """The entry of a file that holds the wanted tensors, and its name, where there is a choice."""
    there = {
        kind: next(((name, content[name]) for name in entries if isinstance(content.get(name), dict) and content[name]), None)
        for kind, entries in (("model", MODEL), ("ema", AVERAGE))
    }
    if "mmengine_version" in (content["meta"] if isinstance(content.get("meta"), dict) else {}) and there["ema"]:
        there = {"model": there["ema"], "ema": there["model"]}  # mmengine has the average in the model's place when it saves
    if part is not None and there[part] is None:
        raise InputError(f"weights {path}: no entry of a '{part}' ({few([str(name)[:30] for name in content])}); leave out 'part'")
    name, state = there[part] if part else there["ema"] or there["model"] or (None, content)
    if isinstance(inner := state.get(WITHIN), dict):
        name, state = f"{name}.{WITHIN}", inner
    return state, {"entry": name} if there["ema"] else {}


def _fields_of_args(args: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Settings among an official checkpoint's arguments."""
    stated = {"heads": positive(args, "nheads", path, 8)} if "nheads" in args else {}
    if "dropout" in args:
        stated["dropout"] = args["dropout"]
    if "dilation" in args:
        stated["backbone"] = {"dilation": args["dilation"]}
    if "with_box_refine" in args:
        stated |= form_of(args, "num_queries")
    if "dec_n_points" in args:
        stated["points"] = equal(args, "enc_n_points", "dec_n_points", path, 4)
    return stated
