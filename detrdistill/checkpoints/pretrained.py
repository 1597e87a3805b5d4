"""Weights of detectors: the kit's own safetensors, official checkpoints, mmdetection's, and Hugging Face folders.

Nothing in a file is ever executed, and nothing is loaded in part: what does not fit is refused with a report. `load_pretrained` builds
the detector that a file holds, `load_detector_weights` fills one that is there; `hugging_face.py` writes folders.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from detrdistill.any_detr.build import build_any
from detrdistill.checkpoints.formats import FAMILIES, About, read_detector_weights
from detrdistill.checkpoints.names import outputs_by_name
from detrdistill.checkpoints.sizes import recipe_fields
from detrdistill.errors import InputError
from detrdistill.models.weights import few, fit
from detrdistill.recipes.families import FAMILIES as OF_TRANSFORMERS
from detrdistill.recipes.parts import BackboneRecipe, Resize, Schedule
from detrdistill.recipes.recipe import Recipe


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
        part: "student" or "teacher", for a file that holds both; "model" or "ema", for one that holds a moving average of its weights:
            without a word, the average is taken.
        settings: fields of a recipe, which override what the file says.

    Raises:
        InputError: the file is missing, damaged, holds code, or another model; a setting is missing; or the classes differ.
    """
    state, about = read_with_settings(path, settings, part=part)
    recipe = Recipe.read(about.settings | {"schedule": Schedule(steps=1)}, where=str(about.path))
    names = categories if categories is not None else [name or f"class {row}" for row, name in enumerate(about.names)]
    detector = build_any(recipe, names)
    return detector.eval(), _load(detector, state, about, categories, outputs, replace_head)


def read_with_settings(
    path: Path | str, settings: Mapping[str, Any], *, part: str | None = None, ask: str = "{}=", hint: str = ""
) -> tuple[dict[str, Tensor], About]:
    """A detector's tensors, and what is known of it with every setting that a recipe of it needs; `settings` override the file's.

    Args:
        settings: fields of a recipe, and of its `resize` and `backbone` by dotted name.
        ask: how the user gives a setting, for the message that asks for those that nothing tells.
        hint: what else the message says.

    Raises:
        InputError: as `load_pretrained`.
    """
    state, about = read_detector_weights(path, part)
    whole = {name: value for name, value in settings.items() if "." not in name}
    for name, has in (("resize", about.settings.get("resize", Resize())), ("backbone", about.settings.get("backbone", BackboneRecipe()))):
        if inner := {key.partition(".")[2]: value for key, value in settings.items() if key.startswith(f"{name}.")}:
            whole[name] = has.replace(**inner) if isinstance(has, Resize) else dict(has) | inner
    of_transformers = about.settings["detector"] in OF_TRANSFORMERS  # whose configuration says all sizes
    known = about.settings | whole if of_transformers else recipe_fields(state, about.path, about.settings | whole)
    needed = {"heads": not of_transformers, "points": known["detector"] == "deformable_detr", "queries": True}
    if missing := [ask.format(name) for name, here in needed.items() if here and name not in known]:
        raise InputError(f"{about.title}: nothing tells these settings of it; give {', '.join(missing)} as the model was trained{hint}")
    if unclear := [ask.format(name) for name in about.unclear if name not in settings]:
        raise InputError(f"{about.title}: its config does not say clearly how images are prepared; give {', '.join(unclear)}{hint}")
    return state, replace(about, settings=known)


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
    kind = about.settings["detector"]
    family = getattr(detector, "family", None)  # of transformers'
    if not (family is OF_TRANSFORMERS[kind] if kind in OF_TRANSFORMERS else isinstance(detector, FAMILIES[kind])):
        raise InputError(
            f"{about.title} cannot be loaded into a {type(detector).__name__}; give weights of that detector, or build this one with "
            "load_pretrained"
        )
    if outputs is not None:
        if len(outputs) != len(about.names):
            raise InputError(f"{about.title}: 'outputs' names {len(outputs)} classes, the head has {len(about.names)}; name each output")
        about = replace(about, names=tuple(outputs))
    own = detector.state_dict()
    parts = [rf"(?:.*[._])?{part}[._]" for part in family.classes] if family else [r"class_embed\.", r"stages\.\d+\.fc_cls\."]
    heads = [name for name in own if re.match("|".join(parts), name)]
    count = min(len(own[name]) for name in heads) - (family.extra_rows if family else 0)
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
            if name in state and state[name].shape[1:] == own[name].shape[1:]:  # what does not fit is reported below
                fresh = own[name].clone()
                fresh[kept] = state[name][[rows[i] for i in kept]].to(fresh)
                fresh[len(categories) :] = state[name][len(about.names) :].to(fresh)  # beyond the classes: "no object"
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
    if not any(name is not None for name in about.names) and not replace_head:
        raise InputError(
            f"{about.title} does not say its classes; name its {len(about.names)} outputs as 'outputs', or say replace_head=True"
        )
    rows = outputs_by_name(about.names, categories)
    fresh = [name for name, row in zip(categories, rows, strict=True) if row is None]
    dropped = [name for row, name in enumerate(about.names) if name is not None and row not in rows]
    if (fresh or dropped) and not replace_head:
        found = [f"{len(some)} {what} ({few(some)})" for some, what in ((fresh, "unknown to it"), (dropped, "not among them")) if some]
        raise InputError(
            f"{about.title} has other classes than the {len(categories)} categories: {', '.join(found)}; with replace_head=True it keeps "
            f"{len(categories) - len(fresh)} by name, starts {len(fresh)} afresh and drops {len(dropped)}"
        )
    return rows
