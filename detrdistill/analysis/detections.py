"""What a detector sees on chosen images, as numpy arrays: what the notebooks show of any data set.

Beside it, a figure a module: `query_masks` (Figure 4), `where_to_look` (Figure 2) and `stability` (Figure 7).
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from detrdistill.data.coco import Batch, CocoDataset, collate
from detrdistill.figures.detections import Objects
from detrdistill.models.outputs import DetectorOutput
from detrdistill.training.evaluation import detections


def pictures(dataset: CocoDataset, indices: Sequence[int]) -> list[np.ndarray]:
    """The images as they lie on disk, [H W 3] uint8."""
    return [np.asarray(dataset.load_image(dataset.ids[index])) for index in indices]


def ground_truth(dataset: CocoDataset, indices: Sequence[int]) -> list[Objects]:
    """The annotated objects of each image; crowds are left out."""
    found = []
    for index in indices:
        objects = [a for a in dataset.coco.imgToAnns[dataset.ids[index]] if not a["iscrowd"]]
        boxes = np.array([a["bbox"] for a in objects], dtype=float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        found.append(Objects(boxes, [dataset.categories[dataset.index_of[a["category_id"]]].name for a in objects]))
    return found


def detect(detector: nn.Module, dataset: CocoDataset, indices: Sequence[int]) -> list[Objects]:
    """What the detector sees on each image, best first."""
    batch = collate([dataset[index] for index in indices])
    output, names = forward(detector, batch), [category.name for category in dataset.categories]
    return [
        Objects(found["boxes"].numpy(), [names[label] for label in found["labels"].tolist()], found["scores"].numpy())
        for found in detections(output.logits[-1], output.boxes[-1], batch.original_sizes, detector.top)
    ]


def detect_with_transformers(folder: Path, images: Sequence[np.ndarray]) -> list[Objects] | None:
    """What a folder written by `export_hugging_face` sees on images [H W 3], by transformers' own code; every detection, best first.

    None where there is no such folder, or transformers is not installed.
    """
    if not (folder / "config.json").is_file() or find_spec("transformers") is None:
        return None
    from transformers import AutoImageProcessor, AutoModelForObjectDetection
    from transformers.utils import logging

    logging.disable_progress_bar()
    processor, model = AutoImageProcessor.from_pretrained(folder), AutoModelForObjectDetection.from_pretrained(folder)
    found = []
    for image in images:
        with torch.no_grad():
            output = model.eval()(**processor(Image.fromarray(image), return_tensors="pt"))
        (seen,) = processor.post_process_object_detection(output, threshold=0.0, target_sizes=[image.shape[:2]])
        labels = [model.config.id2label[label] for label in seen["labels"].tolist()]
        found.append(Objects(seen["boxes"].numpy(), labels, seen["scores"].numpy()))
    return found


@torch.no_grad()
def forward(detector: nn.Module, batch: Batch) -> DetectorOutput:
    """The detector's own queries, decoded; the result on the host."""
    device = next(detector.parameters()).device
    memory = detector.eval().encode(batch.pixels.to(device), batch.padding.to(device))
    (output,) = detector.decode(memory, detector.queries(memory))
    maps = {name: [level.cpu() for level in getattr(output, name)] for name in ("features", "padding")}
    return DetectorOutput(output.logits.cpu(), output.boxes.cpu(), output.queries.cpu(), **maps, l1=output.l1)


def portions(indices: Sequence[int], size: int = 16) -> list[Sequence[int]]:
    """The indices in order, at most `size` at once: what fits into a batch."""
    return [indices[i : i + size] for i in range(0, len(indices), size)]
