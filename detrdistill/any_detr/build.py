"""Models of transformers from recipes and from folders, and what a folder says as a recipe's fields.

transformers is imported when a family needs it: it is an optional extra, and takes seconds.
"""

import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from detrdistill.errors import InputError
from detrdistill.files import make_folder, write_text, writing
from detrdistill.models import build_detector
from detrdistill.models.weights import few
from detrdistill.recipes.families import FAMILIES, Family
from detrdistill.recipes.parts import BackboneRecipe
from detrdistill.recipes.recipe import Recipe

# What a recipe does not keep of a configuration: said by other fields, or about the file instead of the model.
_NOT_KEPT = (
    "model_type",
    "id2label",
    "label2id",
    "num_labels",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "_name_or_path",
)
# What would have transformers read other files than those that are hashed, or code.
_REFUSED = {"auto_map", "transformers_weights", "attn_implementation", "_attn_implementation", "quantization_config"}
_OLDER = {"backbone", "backbone_kwargs", "use_pretrained_backbone", "use_timm_backbone"}  # which it turns into `backbone_config`
_SIZES = {"queries": "num_queries", "decoder_layers": "decoder_layers", "levels": "num_feature_levels"}
_FIRST_STAGE = ("embedder.", "stages.0.", "conv1", "layer1.")  # and what comes before, by transformers' names and timm's
# What the official codes start otherwise than this file does the rest, and transformers as they do.
_MEANT = ("sampling_offsets", "attention_weights", "class_embed", "class_labels_classifier", "score_head", "gateway")
_OFFSETS = "reference_point_embed"  # RF-DETR's and LW-DETR's embeddings that correct boxes: zero in the official code, nearly so here
_CORRECTIONS = ("bbox", "reg_conf")  # networks of a few layers that correct what is there: a box by its reference, a score by its quality
_PRIOR = 0.01  # of a class, in the head's first biases


def build_any(recipe: Recipe, names: Sequence[str]) -> nn.Module:
    """The recipe's detector with fresh weights, of the kit or of transformers: a pure function of the recipe's seed.

    Args:
        names: of the classes.

    Raises:
        InputError: transformers is not installed, or refuses the recipe's `config`.
    """
    if recipe.family is None:
        return build_detector(recipe, len(names))
    from detrdistill.any_detr.adapter import AnyDETR

    with _transformers(recipe.family.title) as transformers, torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        with _in_one_line(f"{recipe.family.title}: transformers refuses the recipe's 'config' ({{}}); correct it"):
            model = transformers.AutoModelForObjectDetection.from_config(_config(recipe, names, transformers))
        initialise(model, recipe.family)
    unfreeze(model, fresh=recipe.start is None)
    return AnyDETR(model, recipe.family)


def _config(recipe: Recipe, names: Sequence[str], transformers: Any) -> Any:
    """The configuration of the recipe's model; of a pretrained backbone it never loads weights."""
    sizes = {_SIZES[name]: getattr(recipe, name) for name in _SIZES if name != "levels" or recipe.levels > 1}
    sizes[recipe.family.dim] = recipe.dim
    sizes |= thin_config(recipe.backbone, recipe.levels) if recipe.backbone.weights == "crops" else {}
    if strange := sorted(_REFUSED & recipe.config.keys()):
        raise InputError(f"config.{strange[0]}: asks for code or files beyond the recipe, which are never read; leave it out")
    config = transformers.AutoConfig.for_model(recipe.family.model_type, **recipe.config, **sizes)
    if recipe.start is None:  # a published one may have entries of other versions
        known = type(config)().to_dict().keys() | _OLDER
        if mistyped := sorted(recipe.config.keys() - known):
            raise InputError(f"config.{mistyped[0]}: {recipe.family.title} has no such entry; it has {', '.join(sorted(known))}")
    config.id2label, config.label2id = dict(enumerate(names)), {name: row for row, name in enumerate(names)}
    if hasattr(config, "use_pretrained_backbone"):
        config.use_pretrained_backbone = False
    if getattr(config, "initializer_bias_prior_prob", _PRIOR) is None:
        config.initializer_bias_prior_prob = _PRIOR  # transformers takes 1 / (classes + 1): of ten classes, nine times too many objects
    return config


def initialise(model: nn.Module, family: Family) -> None:
    """Start weights as the official codes do (RT-DETR v2 and D-FINE: `_reset_parameters` of their decoders).

    From a configuration alone transformers draws weights of deviation 0.01, BatchNorm's scales and the hidden layers of box heads too:
    signals die out within a few layers, and a model that is trained from there learns nothing.
    """
    for name, module in model.named_modules():
        if isinstance(getattr(module, "layers", None), nn.ModuleList) and any(part in name for part in _CORRECTIONS):
            for layer in module.layers:
                layer.reset_parameters()
            if family.head != "softmax":  # DETR's boxes correct nothing
                nn.init.zeros_(module.layers[-1].weight)
                nn.init.zeros_(module.layers[-1].bias)
        elif isinstance(module, nn.Embedding) and not name.endswith(_OFFSETS):
            module.reset_parameters()
        elif any(part in name for part in (*_MEANT, *_CORRECTIONS)):
            continue
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def unfreeze(model: nn.Module, fresh: bool) -> None:
    """Train what transformers freezes of DETR's backbone, all of it where its weights are `fresh`.

    Stem and first stage are meant to stay as they were learned. Of its own ResNet transformers misses the names, and freezes every stage.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and not module.weight.requires_grad:
            module.weight.requires_grad_(fresh or not any(part in name for part in _FIRST_STAGE))


def thin_config(backbone: BackboneRecipe, levels: int) -> dict[str, Any]:
    """A family's configuration of a thin_resnet, its last `levels` stages as the maps, whose norms are frozen like the kit's."""
    channels = [backbone.width * 2**stage for stage in range(4)]
    shape = {"model_type": "resnet", "layer_type": "basic", "embedding_size": backbone.width, "hidden_sizes": channels}
    shape |= {"depths": list(backbone.blocks), "out_features": [f"stage{stage + 1}" for stage in range(4)][-levels:]}
    return {"backbone_config": shape, "encoder_in_channels": channels[-levels:], "freeze_backbone_batch_norms": True}


def load_thin(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a crop-trained thin_resnet into the ResNet of `thin_config`, which computes the same: its stem's kernel of 7 x 7 pixels holds
    the 3 x 3 in its middle."""
    held = {_of_transformers(name): tensor for name, tensor in state.items() if not name.startswith("fc.")}
    stem = "embedder.embedder.convolution.weight"
    held[stem] = nn.functional.pad(held[stem], (2, 2, 2, 2))
    body = model.model.backbone.model
    body.load_state_dict({name: held[name] for name in body.state_dict()})


def _of_transformers(name: str) -> str:
    """What transformers' ResNet calls a tensor of torchvision's."""
    *place, part, kind = name.split(".")
    if part[0] in "01":  # of a shortcut
        return f"encoder.stages.{int(place[0][-1]) - 1}.layers.{place[1]}.shortcut.{('convolution', 'normalization')[int(part)]}.{kind}"
    what, number = ("convolution", part[-1]) if part.startswith("conv") else ("normalization", part[-1])
    if not place:
        return f"embedder.embedder.{what}.{kind}"
    return f"encoder.stages.{int(place[0][-1]) - 1}.layers.{place[1]}.layer.{int(number) - 1}.{what}.{kind}"


def family_of(folder: Path) -> str | None:
    """The family whose model lies in a folder, as its config.json says; None for another model or another file."""
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return next((name for name, family in FAMILIES.items() if family.model_type == model_type), None)


def read_family(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[str | None]]:
    """A folder's tensors as `AnyDETR` names them, a recipe's fields, and the class of each output; None for one that nobody named.

    Raises:
        InputError: transformers is not installed, the folder asks for code of its own, or is damaged.
    """
    from detrdistill.any_detr.adapter import AnyDETR

    name = family_of(folder)
    family = FAMILIES[name]
    stated = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if strange := [*sorted(_REFUSED & stated.keys()), *(["adapter_config.json"] if (folder / "adapter_config.json").exists() else [])]:
        raise InputError(
            f"{folder}: '{strange[0]}' asks for code or files beyond the model's own, which are never read; give a model of transformers "
            "itself, without it"
        )
    refusal = f"{folder}: transformers cannot open this {family.title} ({{}}); restore the folder"
    with _transformers(family.title) as transformers, _in_one_line(refusal):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        if hasattr(config, "use_pretrained_backbone"):
            config.use_pretrained_backbone = False
        how = {"config": config, "dtype": torch.float32, "local_files_only": True, "trust_remote_code": False}
        # Tensors that are missing or misshaped are drawn at random then, and refused here by their names.
        model, found = transformers.AutoModelForObjectDetection.from_pretrained(
            folder, **how, ignore_mismatched_sizes=True, output_loading_info=True
        )
    faults = {
        "missing": sorted(one for one in found["missing_keys"] if not one.endswith("num_batches_tracked")),
        "misshaped": sorted(f"{one} {list(there)} instead of {list(wanted)}" for one, there, wanted in found["mismatched_keys"]),
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(some)} tensors are {kind}: {few(some)}" for kind, some in faults.items() if some)
        raise InputError(refusal.format(listed))
    kept = json.loads(json.dumps(config.to_diff_dict()))
    known = {family.dim, *_SIZES.values(), *_NOT_KEPT, "use_pretrained_backbone"}
    fields = {"detector": name, "config": {key: value for key, value in kept.items() if key not in known}}
    fields |= {"dim": getattr(config, family.dim), "levels": getattr(config, "num_feature_levels", 1)}
    fields |= {field: getattr(config, _SIZES[field]) for field in ("queries", "decoder_layers")}
    labels = [config.id2label.get(row) for row in range(config.num_labels)]
    return AnyDETR(model, family).state_dict(), fields, [label if is_name(label) else None for label in labels]


def is_name(label: object) -> bool:
    """Whether a label of config.json names a class: transformers calls one that nobody named LABEL_3."""
    return isinstance(label, str) and not re.fullmatch(r"LABEL_\d+|N/A", label)


def write_family(detector: nn.Module, folder: Path, categories: Sequence[str], beside: Mapping[str, str]) -> None:
    """Write config.json and model.safetensors as transformers does, heads that it ties once. Nothing is moved there before all is whole.

    Args:
        categories: a name for each class.
        beside: text of further files by their names.

    Raises:
        InputError: the folder cannot be made or written to.
    """
    model, own = detector.model, detector.model.config
    make_folder(folder)
    with writing(folder), _transformers(detector.family.title), tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as name:
        temporary = Path(name)
        model.config = deepcopy(own)  # in which transformers notes what it writes
        model.config.id2label, model.config.label2id = dict(enumerate(categories)), {name: row for row, name in enumerate(categories)}
        try:
            model.save_pretrained(temporary)
        finally:
            model.config = own
        for file, text in beside.items():
            write_text(temporary / file, text)
        for file in sorted(temporary.iterdir(), key=_is_config):  # which says that there is a model, last
            file.replace(folder / file.name)


def _is_config(file: Path) -> bool:
    return file.name == "config.json"


@contextmanager
def _transformers(what: str) -> Iterator[Any]:
    """The library, quiet about what the kit tells itself.

    Raises:
        InputError: it, or a library that a model of its needs, is not installed.
    """
    try:
        import transformers
        from transformers.utils import logging as its_logging
    except ModuleNotFoundError:
        raise InputError(
            f"{what} is a model of transformers, which is not installed; install the extra: pip install 'detrdistill[transformers]'"
        ) from None
    before = its_logging.get_verbosity()
    its_logging.set_verbosity(logging.ERROR)
    its_logging.disable_progress_bar()
    try:
        yield transformers
    except ImportError as error:
        raise InputError(f"{what}: a library that this model needs is not installed ({_short(error)}); install it with pip") from None
    finally:
        its_logging.set_verbosity(before)


@contextmanager
def _in_one_line(message: str) -> Iterator[None]:
    """What transformers says against a file or a configuration becomes an InputError: `message`, with its words in {}."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError, StrictDataclassError) as error:
        raise InputError(message.format(_short(error))) from None


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
