"""Detectors side by side on one data set: what each finds, what it costs, and where they differ."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from detrdistill.analysis.confusion import Matched, Repairs, confusion_matrix, crowds_of, match, repairs
from detrdistill.analysis.detections import ground_truth
from detrdistill.checkpoints.locate import record_of
from detrdistill.checkpoints.names import outputs_by_name
from detrdistill.compare.costs import COUNTER, cost_of, first_images, gflops, hardware, milliseconds, peak_mib, seen_by
from detrdistill.data.coco import Category, CocoDataset, open_dataset
from detrdistill.data.layout import data_cache, data_hash
from detrdistill.errors import InputError
from detrdistill.figures.detections import Objects
from detrdistill.models.weights import few
from detrdistill.predict.models import Model, TorchModel, open_model
from detrdistill.recipes.parts import Digits, Folder
from detrdistill.records import Cost
from detrdistill.runs.reference import FOLDER as REFERENCE
from detrdistill.runs.store import Store
from detrdistill.training.batches import in_order, loading
from detrdistill.training.evaluation import coco_evaluation

SCORED = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@dataclass(frozen=True)
class Side:
    """One detector of a comparison.

    Attributes:
        metrics: the twelve COCO numbers in percent.
        classes: AP by category id.
        found: everything it reports, image by image.
        matched: what of it is above the threshold, beside the objects.
        gflops: None where its runtime cannot be counted in.
        times: median and quartiles of milliseconds an image.
    """

    name: str
    model: Model
    metrics: dict[str, float | None]
    classes: dict[int, float | None]
    found: list[Objects]
    matched: list[Matched]
    gflops: float | None
    times: tuple[float, float, float]
    peak_mib: float | None


@dataclass(frozen=True)
class Comparison:
    """Detectors on the same images; the first is what the others are compared with.

    Attributes:
        threshold: the least score of what counts as found, in all but AP.
    """

    data: CocoDataset
    sides: list[Side]
    threshold: float

    @property
    def names(self) -> list[str]:
        return [side.name for side in self.sides]

    @cached_property
    def table(self) -> pd.DataFrame:
        """A line a detector: AP, what it gains over the first, parameters, GFLOPs, milliseconds an image, MiB."""
        lines, first = {}, self.sides[0].metrics["AP"]
        for side in self.sides:
            line: dict[str, Any] = {name: side.metrics[name] for name in SCORED}
            line |= {"AP gain": None if side is self.sides[0] or None in (first, side.metrics["AP"]) else side.metrics["AP"] - first}
            line |= {"parameters (M)": side.model.parameters and side.model.parameters / 1e6, "GFLOPs": side.gflops}
            line |= dict(zip(("ms", "ms from", "ms to"), side.times, strict=True))
            lines[side.name] = line | {"peak MiB": side.peak_mib, "runtime": side.model.runtime, "hardware": hardware(side.model)}
        return pd.DataFrame.from_dict(lines, orient="index").rename_axis("model")

    @cached_property
    def classes(self) -> pd.DataFrame:
        """A line a class: how many objects, and every detector's AP."""
        objects = Counter(one["category_id"] for one in self.data.coco.anns.values() if not one["iscrowd"])
        lines = {c.name: {"objects": objects[c.id]} | {side.name: side.classes[c.id] for side in self.sides} for c in self.data.categories}
        return pd.DataFrame.from_dict(lines, orient="index").rename_axis("class")

    @cached_property
    def images(self) -> pd.DataFrame:
        """A line an image, those first where the detectors' F1 differ most; `index` is the image's number in the data."""
        files = [self.data.coco.imgs[id]["file_name"] for id in self.data.ids]
        frame = pd.DataFrame({"file": files} | {side.name: [one.f1 for one in side.matched] for side in self.sides})
        frame["difference"] = frame[self.names].max(axis=1) - frame[self.names].min(axis=1)
        frame["objects"] = [len(one.truth.names) for one in self.sides[0].matched]
        return frame.rename_axis("index").sort_values(["difference", "objects"], ascending=False, kind="stable")

    def repairs(self, before: str, after: str) -> Repairs:
        """What the detector `after` finds that `before` misses, and the other way round."""
        return repairs(*(self.sides[self.names.index(name)].matched for name in (before, after)))

    @cached_property
    def repaired(self) -> pd.DataFrame:
        """A line a detector but the first: objects found by both, by it alone, by the first alone, by neither."""
        lines = {}
        for name in self.names[1:]:
            one = self.repairs(self.names[0], name)
            lines[name] = {"found by both": one.both, "repaired": one.repaired, "broken": one.broken, "found by neither": one.neither}
        return pd.DataFrame.from_dict(lines, orient="index").rename_axis(f"beside {self.names[0]}")

    @cached_property
    def confusion(self) -> dict[str, np.ndarray]:
        """By detector, `analysis.confusion.confusion_matrix`."""
        classes = [category.name for category in self.data.categories]
        return {side.name: confusion_matrix(side.matched, classes) for side in self.sides}

    @property
    def notes(self) -> str:
        """How the numbers were got."""
        return (
            f"{self.data.report.file.name}: {len(self.data)} images. AP in percent. Found means: with a score of at least "
            f"{self.threshold:g}, and an IoU of at least 0.5 with an object of the class. GFLOPs by {COUNTER}. Milliseconds an image, one "
            "at once, from pixels to boxes, on one thread: the median and the quartiles; the detectors took turns. Peak MiB: weights, and "
            "what the largest of those images needs beside them."
        )


def compare_models(
    models: Mapping[str, Model], data: Digits | Folder, split: str = "val", *, threshold: float = 0.5, batch: int = 1, progress: bool = True
) -> Comparison:
    """Measure detectors on one split, and their costs on its first images. Costs of a run are kept beside its record, once.

    Runs of the committed reference are left as they are.

    Args:
        models: by the name to show, the first is what others are compared with.
        threshold: the least score of what counts as found.
        batch: images at once when AP is measured.

    Raises:
        InputError: a model does not know a class of the data, or costs beside a run are damaged.
        NonFiniteError: a prediction is NaN or infinite.
    """
    dataset = open_dataset(data, split, data_cache(), None)
    outputs = {name: outputs_for(name, models, dataset.categories, dataset.report.file) for name in models}
    # Read before anything is measured, which a damaged file would throw away.
    lacking = {name: store for name, model in models.items() if split == "val" and (store := _store_without_cost(model, data))}
    firsts = [first_images(dataset, model) for model in models.values()]
    everything = range(len(dataset))
    truths, crowds = ground_truth(dataset, everything), crowds_of(dataset, everything)
    # Memory first: what a runtime keeps from one image to the next would hide what it took.
    peaks = [peak_mib(model, batches) for model, batches in zip(models.values(), firsts, strict=True)]
    measured: dict[str, list[dict[str, Any]]] = {}
    with tqdm(total=len(models) * len(dataset), desc="images", unit="image", disable=None if progress else True, mininterval=0.5) as bar:
        for name, model in models.items():
            bar.set_postfix_str(name, refresh=False)
            measured[name] = _detect(model, seen_by(dataset, model), outputs[name], batch, bar)
    times = milliseconds(list(models.values()), firsts)
    sides = []
    for (name, model), batches, taken, peak in zip(models.items(), firsts, times, peaks, strict=True):
        metrics, classes = coco_evaluation(dataset.coco.dataset, measured[name])
        found = _objects(dataset, measured[name])
        matched = [match(*one, threshold) for one in zip(found, truths, crowds, strict=True)]
        counted = gflops(model, batches) if isinstance(model, TorchModel) else None
        sides.append(Side(name, model, metrics, classes, found, matched, counted, taken, peak))
        if name in lacking:
            _keep_cost(lacking[name], model, cost_of(model, batches, counted, taken, peak))
    return Comparison(dataset, sides, threshold)


def _store_without_cost(model: Model, data: Digits | Folder) -> Store | None:
    """Where the costs of a run that is compared on its own data are to be written, once; never into the committed reference.

    Raises:
        InputError: costs lie there that are damaged, or of other weights.
    """
    if not isinstance(model, TorchModel) or (record := record_of(model.path)) is None:
        return None
    folder = (model.path if model.path.is_dir() else model.path.parent).resolve()
    store = Store(folder.parents[1])
    ours = store.folder(record.recipe) == folder and REFERENCE not in folder.parents and os.access(folder, os.W_OK)
    of_data = ours and data_hash(data, data_cache()) == record.provenance["data_sha256"]
    return store if of_data and store.cost(record) is None else None


def _keep_cost(store: Store, model: TorchModel, cost: dict[str, Any]) -> None:
    record = record_of(model.path)
    stated = {name: record.provenance[name] for name in ("weights_sha256", "data_sha256")}
    store.write_cost(record.recipe, Cost(run=record.id, **stated, **cost))


def outputs_for(name: str, models: Mapping[str, Model], categories: Sequence[Category], where: Path) -> tuple[int, ...]:
    """The output of a model for each class of the data, by name.

    Raises:
        InputError: it does not know one; says which other model does.
    """
    found = outputs_by_name(models[name].names, [category.name for category in categories])
    if unknown := [category.name for category, row in zip(categories, found, strict=True) if row is None]:
        others = [other for other, model in models.items() if outputs_by_name(model.names, unknown[:1]) != (None,)]
        more = f", and {others[0]} does" if others else ""
        raise InputError(
            f"{name} does not know {len(unknown)} of the {len(categories)} classes of {where} ({few(unknown)}){more}; compare detectors "
            "of the same classes, on data of these"
        )
    return found


def named_models(models: Sequence[str], names: Sequence[str], device: str) -> dict[str, Model]:
    """The detectors that are named, by what to call them.

    Raises:
        InputError: fewer than two, not a name each, or a detector that cannot be used.
    """
    if len(models) < 2:
        raise InputError(f"models {', '.join(models) or 'none'}: a comparison needs two or more")
    if names and not len(names) == len(set(names)) == len(models):
        raise InputError(f"names {', '.join(names)}: {len(set(names))} different for {len(models)} models; give one each")
    opened = [open_model(one, device, threads=1) for one in models]
    return dict(zip(names or short_names([one.path for one in opened]), opened, strict=True))


def short_names(paths: Sequence[Path]) -> list[str]:
    """Of files and folders: the last part of the path, of a run without its hash; numbered where several are alike."""
    runs = [record_of(path) for path in paths]
    stems = [run.recipe.title if run else path.stem for run, path in zip(runs, paths, strict=True)]
    alike = Counter(stems)
    return [stem if alike[stem] == 1 else f"{stem} ({number})" for number, stem in enumerate(stems, start=1)]


def data_of(models: Mapping[str, Model]) -> Digits | Folder:
    """The data of the first run among the models.

    Raises:
        InputError: none of them is a run.
    """
    for model in models.values():
        if (record := record_of(model.path)) is not None:
            return record.recipe.data
    raise InputError("none of the models is a run, whose data is known; say on which data they are compared: --data FOLDER")


def _detect(model: Model, dataset: CocoDataset, outputs: Sequence[int], batch: int, bar: tqdm) -> list[dict[str, Any]]:
    """In COCO's result format, with ids of the data."""
    category = {row: one.id for row, one in zip(outputs, dataset.categories, strict=True)}
    results: list[dict[str, Any]] = []
    with loading(dataset, in_order(dataset, batch), 0) as batches:
        for samples in batches:
            for id, seen in zip(samples.image_ids, model.detect(samples, outputs), strict=True):
                for score, label, (x0, y0, x1, y1) in zip(*(seen[key].tolist() for key in ("scores", "labels", "boxes")), strict=True):
                    box = [x0, y0, x1 - x0, y1 - y0]
                    results.append({"image_id": id, "category_id": category[label], "bbox": box, "score": score})
            bar.update(len(samples))
    return results


def _objects(dataset: CocoDataset, results: Sequence[Mapping[str, Any]]) -> list[Objects]:
    """Results of COCO's format, image by image."""
    of_image: dict[int, list[Mapping[str, Any]]] = {id: [] for id in dataset.ids}
    for one in results:
        of_image[one["image_id"]].append(one)
    found = []
    for some in of_image.values():
        boxes = np.array([one["bbox"] for one in some], dtype=float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        names = [dataset.categories[dataset.index_of[one["category_id"]]].name for one in some]
        found.append(Objects(boxes, names, np.array([one["score"] for one in some])))
    return found
