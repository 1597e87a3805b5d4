"""Any detector that can be read, measured on a data folder: the twelve COCO numbers, AP a class, and its detections in COCO's format."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detrdistill.checkpoints.formats import About
from detrdistill.checkpoints.presets import NEEDED, PREPARED
from detrdistill.checkpoints.pretrained import load_pretrained
from detrdistill.data.coco import CocoDataset, open_dataset
from detrdistill.data.layout import data_cache
from detrdistill.data.transforms import build_transform
from detrdistill.errors import InputError
from detrdistill.files import write_text
from detrdistill.models.weights import few
from detrdistill.recipes.parts import DetectorWeights, Folder, Resize
from detrdistill.training.evaluation import coco_evaluation, detect
from detrdistill.training.fabric import loaders, make_fabric

SETTINGS = (*NEEDED, "backbone.dilation", *PREPARED, "part")


@dataclass(frozen=True)
class Evaluation:
    """What a detector is worth on a split of a data set.

    Attributes:
        about: the detector.
        resize: how images were prepared.
        data: the split.
        metrics: the twelve COCO numbers in percent, None where COCO defines none.
        classes: AP by category id.
        results: detections in COCO's result format: ids of the data, boxes (x, y, width, height) in pixels of the image's file.
    """

    about: About
    resize: Resize
    data: CocoDataset
    metrics: dict[str, float | None]
    classes: dict[int, float | None]
    results: list[dict[str, Any]]

    def text(self) -> str:
        """The numbers as a table to print."""

        def shown(value):
            return "   -" if value is None else f"{value:.1f}"

        data, resize, objects = self.data, self.resize, Counter(one["category_id"] for one in self.data.coco.anns.values())
        size = f"shorter side {resize.short} px, longer at most {resize.long} px"
        size = f"stretched to {resize.short} px high and {resize.long} px wide" if resize.stretch else size
        width = max(len("class"), *(len(category.name) for category in data.categories))
        rows = [f"{c.name:<{width}}  {objects[c.id]:>7}  {shown(self.classes[c.id]):>5}" for c in data.categories]
        return "\n".join(
            (
                self.about.title,
                f"{data.report.file}: {len(data)} images, {size}",
                "",
                *(f"{name:<5}  {shown(value):>5}" for name, value in self.metrics.items()),
                "",
                f"{'class':<{width}}  objects     AP",
                *rows,
            )
        )

    def write(self, folder: Path) -> Path:
        """Write `results.json`, which pycocotools' loadRes reads and COCO's server takes."""
        path = folder / "results.json"
        write_text(path, json.dumps(self.results))
        return path


def evaluate_model(
    model: Path,
    folder: Path,
    split: str = "val",
    *,
    device: str = "auto",
    batch: int = 1,
    workers: int | None = None,
    outputs: Sequence[str] = (),
    settings: Mapping[str, str] | None = None,
) -> Evaluation:
    """Measure a detector in any format that `load_pretrained` reads, its images prepared as it wants them.

    Outputs for classes that the data does not have are left out. The class of an output is found by its name.

    Args:
        model: a run's folder, a checkpoint file or a Hugging Face folder.
        folder: of COCO json and images.
        batch: images at once. GroupNorm counts padding, so that more than one may change AP a little.
        outputs: names of the classes of the file's outputs, where it does not say them.
        settings: of `SETTINGS`: what neither the file nor its tensors say, such as heads, or resize.short, and which part of it is meant.

    Raises:
        InputError: model, data or settings are not usable, or the model does not know a class of the data.
        NonFiniteError: a prediction is NaN or infinite.
    """
    settings = dict(settings or {})
    if strange := sorted(settings.keys() - {*SETTINGS}):
        raise InputError(f"setting '{strange[0]}' is none that an evaluation takes; known are {', '.join(SETTINGS)}")
    part = DetectorWeights(path=model).replace(part=settings.pop("part", "")).part or None
    if batch < 1:
        raise InputError(f"batch {batch}: a number of images; give 1 or more")
    spec = Folder(path=folder)
    names = [category.name for category in open_dataset(spec, split, data_cache(), None).categories]
    fabric = make_fabric(device, "fp32")
    detector, about = load_pretrained(model, categories=names, outputs=outputs or None, replace_head=True, part=part, **settings)
    if not any(about.names):
        raise InputError(f"{about.title} does not say its classes; name its {len(about.names)} outputs as 'outputs'")
    if unknown := [name for name, row in zip(names, about.rows, strict=True) if row is None]:
        raise InputError(
            f"{about.title} does not know {len(unknown)} of the {len(names)} classes of {folder} ({few(unknown)}; it knows "
            f"{few([name for name in about.names if name])}); give data of its classes, or train it on yours"
        )
    resize = about.settings.get("resize", Resize())
    data = open_dataset(spec, split, data_cache(), build_transform(resize, train=False))
    found, _ = detect(detector.to(fabric.device), data, batch, fabric.device, loaders(fabric) if workers is None else workers, detector.top)
    return Evaluation(about, resize, data, *coco_evaluation(data.coco.dataset, found), found)
