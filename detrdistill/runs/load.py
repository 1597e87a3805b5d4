"""What a run starts from: data, trained detectors, weights of backbones."""

import logging
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from torch import nn

from detrdistill.any_detr.build import build_any, load_thin
from detrdistill.checkpoints.locate import pinned_weights
from detrdistill.checkpoints.pretrained import load_detector_weights
from detrdistill.data.coco import CocoDataset, open_dataset, require_same_categories
from detrdistill.data.layout import data_cache, how_found
from detrdistill.data.summary import judgements
from detrdistill.data.transforms import build_transform
from detrdistill.data.validation import NoObjectsError
from detrdistill.errors import InputError
from detrdistill.files import file_hash, nearby
from detrdistill.models.backbones import file_weights, imagenet_version, imagenet_weights, weights_path
from detrdistill.models.weights import classes_of, classes_text, few, load_weights, read_weights
from detrdistill.recipes.identity import parents, run_id
from detrdistill.recipes.parts import Digits, Folder, WeightsFile
from detrdistill.recipes.recipe import Recipe
from detrdistill.runs.store import Store

LOG = logging.getLogger(__name__)


def open_split(recipe: Recipe, split: str) -> CocoDataset:
    """The recipe's training or validation images, prepared as the recipe says."""
    return open_dataset(recipe.data, split, data_cache(), build_transform(recipe.resize, train=split == "train"))


def open_splits(recipe: Recipe) -> tuple[CocoDataset, CocoDataset]:
    """The training and the validation images.

    Raises:
        InputError: the data is refused, or the splits list different classes.
    """
    train, val = open_split(recipe, "train"), open_split(recipe, "val")
    require_same_categories(train, val)
    return train, val


def open_test(recipe: Recipe, train: CocoDataset) -> CocoDataset | None:
    """The test images, where the data has some that are annotated.

    Raises:
        InputError: the split is refused, or lists other classes than the training images.
    """
    if not how_found(recipe.data, data_cache())[1]:
        return None
    try:
        test = open_split(recipe, "test")
    except NoObjectsError as reason:
        warn_once(f"{reason}; without them nothing is measured on the test images")
        return None
    require_same_categories(train, test)
    return test


def require_usable(recipe: Recipe) -> None:
    """Refuse at once what the run would refuse after its backbone and its teacher have been trained.

    Raises:
        InputError: the data, or the weights that the detector starts from.
    """
    if isinstance(recipe.data, Folder):
        open_test(recipe, open_splits(recipe)[0])
    if recipe.start is not None:
        names = [category.name for category in open_split(recipe, "val").categories]
        start_detector(build_any(recipe, names), recipe, names)
    elif isinstance(recipe.backbone.weights, Path | WeightsFile):
        file_weights(recipe.backbone.weights)


def tell(data: Digits | Folder, train: CocoDataset, others: dict[str, CocoDataset | None], queries: int | None = None) -> None:
    """Say how the data of a run was found, and what is wrong or doubtful about it: once a command, of which several runs see the same."""
    there = {split: dataset for split, dataset in others.items() if dataset is not None}
    for text in (how_found(data, data_cache())[0], *judgements(train, there, queries)):
        if text:
            warn_once(text)


@cache
def warn_once(text: str) -> None:
    LOG.warning("%s", text)


def load_detector(recipe: Recipe, store: Store, dataset: CocoDataset) -> nn.Module:
    """A trained detector from its run, in evaluation mode.

    Raises:
        InputError: the run is not complete, its weights are damaged, or it was trained for other classes than those of `dataset`.
    """
    record = store.record(recipe)
    if record is None:
        raise InputError(f"run {run_id(recipe)} is not complete in {store.root}; run it first")
    names = [category.name for category in dataset.categories]
    detector = build_any(recipe, names)
    path = store.check_weights(record)
    about = read_weights(path)[1]
    if classes_of(about) != names:
        trained, given = about.get("categories"), classes_text(names)
        raise InputError(f"weights {path} were trained for the classes {trained}, the data has {given}; use a detector of this data")
    load_weights(detector, path)
    return detector.eval()


def start_detector(detector: nn.Module, recipe: Recipe, categories: Sequence[str]) -> dict[str, str]:
    """Load the weights of the recipe's `start` into its detector, the head's outputs by the names of the classes.

    Classes that the file does not know start afresh, and outputs for others are dropped. A published detector, which does not train,
    must know all.

    Returns:
        what was loaded, and what was not, for the record.

    Raises:
        InputError: the weights are missing, damaged, others than stated or of another architecture, or lack a class.
    """
    start, outputs = recipe.start, [name or None for name in recipe.start.outputs] or None
    about = load_detector_weights(
        detector, nearby(start.path), categories=categories, outputs=outputs, replace_head=True, part=start.part or None
    )
    pinned_weights(start)  # what was read may have been put there after the run was named
    fresh = [name for name, row in zip(categories, about.rows, strict=True) if row is None]
    dropped = [name for row, name in enumerate(about.names) if name is not None and row not in about.rows]
    if fresh and recipe.published:
        known = few([name for name in about.names if name]) or f"none of its {len(about.names)} outputs; name them in start.outputs"
        raise InputError(
            f"{about.title} does not know the data's class '{fresh[0]}' ({len(fresh)} of {len(categories)} are unknown to it; it names "
            f"{known}), so it cannot teach them; train it for this data with --start, or give the data its names"
        )
    found = {"file": start.path.name, "sha256": start.sha256, "source": start.source, "origin": about.origin}
    found |= {"entry": about.entry, "left_out": ", ".join(about.left_out)}
    found["classes"] = f"{len(categories) - len(fresh)} of {len(about.names)} outputs"
    found |= {name: classes_text(some) for name, some in (("fresh", fresh), ("dropped", dropped)) if some}
    return {name: text for name, text in found.items() if text}


def start_backbone(detector: nn.Module, recipe: Recipe, store: Store) -> dict[str, str]:
    """Load the weights that the recipe's backbone starts from, if any; says aloud when there are none.

    Returns:
        which they are, for the record; empty where they are a run's, or none.

    Raises:
        InputError: they are missing, damaged, or of another architecture.
    """
    weights = recipe.backbone.weights
    if recipe.family and weights != "crops":
        warnings.warn(f"{recipe.title}: starts from random weights; name a trained model with --start to start from it", stacklevel=2)
    elif weights == "none":
        warnings.warn(f"{recipe.title}: the backbone starts from random weights, as backbone.weights='none' says", stacklevel=2)
    elif weights == "crops":
        path = store.check_weights(store.record(parents(recipe)["backbone"]))
        state = read_weights(path)[0]
        if recipe.family:
            load_thin(detector.model, state)
        else:
            detector.backbone.load(state, str(path))
    elif weights == "imagenet":
        detector.backbone.load(imagenet_weights(recipe.backbone.name), "of torchvision")
        return {"weights": str(imagenet_version(recipe.backbone.name))}
    else:
        detector.backbone.load(file_weights(weights), str(weights))
        return {"file": weights.name, "sha256": file_hash(weights_path(weights))}
    return {}
