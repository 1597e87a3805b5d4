"""COCO evaluation: detections in pixels, and the twelve COCO numbers in percent."""

from collections.abc import Sequence
from typing import Any

import torch
from faster_coco_eval import COCO, COCOeval_faster
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader

from detrdistill.boxes import cxcywh_to_xyxy
from detrdistill.errors import InputError, NonFiniteError

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def detections(
    output_logits: Float[Tensor, "B Q C"],
    boxes: Float[Tensor, "B Q 4"],
    original_sizes: Tensor | Sequence[tuple[int, int]],
    top: int = 100,
) -> list[dict[str, Tensor]]:
    """The DETRs' post-processing: the `top` best pairs of query and class of each image. No clipping, no suppression.

    Args:
        original_sizes: height and width of each image as it lies on disk.

    Returns:
        `scores`, `labels` and `boxes` (xyxy in pixels) of each image, best first.
    """
    probabilities = output_logits.sigmoid()
    classes = probabilities.shape[-1]
    scores, index = probabilities.flatten(1).topk(min(top, probabilities[0].numel()), dim=1)
    height, width = torch.as_tensor(original_sizes, device=boxes.device).to(boxes.dtype).unbind(1)
    corners = cxcywh_to_xyxy(boxes) * torch.stack((width, height, width, height), dim=1)[:, None]
    corners = corners.gather(1, (index // classes)[..., None].expand(-1, -1, 4))
    parts = zip(scores, index % classes, corners, strict=True)
    return [{"scores": score, "labels": label, "boxes": box} for score, label, box in parts]


@torch.no_grad()
def evaluate(
    detector: nn.Module, dataset: Any, batch: int, device: torch.device | str = "cpu", workers: int = 0
) -> dict[str, float | None]:
    """The twelve COCO numbers of a detector's last stage on a `data.coco.CocoDataset`, in percent; None where COCO defines none.

    The detector is put into evaluation mode, and back into its own afterwards.

    Raises:
        NonFiniteError: a prediction is NaN or infinite; names the images.
        InputError: the detector has another number of classes than the dataset.
    """
    results: list[dict[str, Any]] = []
    training = detector.training
    detector.eval()
    try:
        for samples in DataLoader(dataset, batch_size=batch, collate_fn=dataset.collate, num_workers=workers):
            memory = detector.encode(samples.pixels.to(device), samples.padding.to(device))
            (output,) = detector.decode(memory, detector.queries(memory))
            logits, boxes = output.logits[-1].float(), output.boxes[-1].float()
            if logits.shape[-1] != len(dataset.categories):
                raise InputError(f"detector has {logits.shape[-1]} classes, data {len(dataset.categories)} categories; use the data it was trained on")
            finite = logits.isfinite().flatten(1).all(1) & boxes.isfinite().flatten(1).all(1)
            image_ids = [int(image) for image in samples.image_ids]
            broken = [image for image, good in zip(image_ids, finite.tolist(), strict=True) if not good]
            if broken:
                raise NonFiniteError(f"evaluation: predictions for image ids {', '.join(map(str, broken))} are NaN or infinite")
            for image, found in zip(image_ids, detections(logits, boxes, samples.original_sizes), strict=True):
                results += _coco_results(image, found, dataset.categories)
    finally:
        detector.train(training)
    return coco_metrics(dataset.coco.dataset, results)


def coco_metrics(annotations: dict[str, Any], detections: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The twelve COCO numbers in percent, None where COCO gives -1: no object of that size.

    Args:
        annotations: an annotation file's content: images, categories, annotations.
        detections: in COCO's result format: image_id, category_id, bbox (x, y, width, height), score.
    """
    images, categories = annotations["images"], annotations["categories"]
    # The evaluator writes into what it is given, and needs no masks.
    needed = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    objects = [{"iscrowd": 0} | {key: one[key] for key in needed if key in one} for one in annotations["annotations"]]
    found = [
        dict(one, id=i, area=one["bbox"][2] * one["bbox"][3], iscrowd=0)
        for i, one in enumerate(detections, start=1)
    ]  # fmt: skip
    truth = COCO({"images": images, "categories": categories, "annotations": objects})
    guess = COCO({"images": images, "categories": categories, "annotations": found})
    evaluator = COCOeval_faster(truth, guess, iouType="bbox")
    evaluator.run()
    return {name: None if value < 0 else 100 * float(value) for name, value in zip(METRICS, evaluator.stats, strict=True)}


def _coco_results(image: int, found: dict[str, Tensor], categories: Sequence[int]) -> list[dict[str, Any]]:
    left, top, right, bottom = found["boxes"].double().unbind(1)
    boxes = torch.stack((left, top, right - left, bottom - top), dim=1).tolist()
    parts = zip(found["labels"].tolist(), boxes, found["scores"].tolist(), strict=True)
    return [{"image_id": image, "category_id": categories[label], "bbox": box, "score": score} for label, box, score in parts]
