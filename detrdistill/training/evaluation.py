"""COCO evaluation: detections in pixels, and the twelve COCO numbers in percent."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from faster_coco_eval import COCO, COCOeval_faster
from jaxtyping import Float, Int
from torch import Tensor, nn

from detrdistill.boxes import cxcywh_to_xyxy
from detrdistill.criterion import matched_objects
from detrdistill.data.coco import CocoDataset
from detrdistill.errors import InputError, NonFiniteError
from detrdistill.process import no_garbage_collection
from detrdistill.recipes.words import METRICS
from detrdistill.training.batches import in_order, loading


def best_pairs(
    logits: Float[Tensor, "B Q C"], boxes: Float[Tensor, "B Q 4"], original_sizes: Tensor | Sequence[tuple[int, int]], top: int = 100
) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"], Float[Tensor, "B K 4"]]:
    """The detectors' post-processing: the `top` best pairs of query and class of each image. No clipping, no suppression.

    Args:
        original_sizes: height and width of each image in its file.
        top: 100 in the DETRs, the number of queries in AdaMixer: a detector's `top`.

    Returns:
        scores, labels and boxes (xyxy in pixels), best first.
    """
    scores = logits.sigmoid().flatten(1)
    # Not `min`: the pairs of a two-stage detector are not known while it is traced for export.
    scores, index = scores.topk(torch.sym_min(top, scores.shape[1]), dim=1)
    height, width = torch.as_tensor(original_sizes, device=boxes.device).to(boxes.dtype).unbind(1)
    corners = cxcywh_to_xyxy(boxes) * torch.stack((width, height, width, height), dim=1)[:, None]
    classes = logits.shape[-1]
    return scores, index % classes, corners.gather(1, (index // classes)[..., None].expand(-1, -1, 4))


def detections(
    logits: Float[Tensor, "B Q C"], boxes: Float[Tensor, "B Q 4"], original_sizes: Tensor | Sequence[tuple[int, int]], top: int = 100
) -> list[dict[str, Tensor]]:
    """`scores`, `labels` and `boxes` of each image. Arguments are those of `best_pairs`."""
    images = zip(*best_pairs(logits, boxes, original_sizes, top), strict=True)
    return [{"scores": score, "labels": label, "boxes": box} for score, label, box in images]


def evaluate(
    detector: nn.Module, dataset: CocoDataset, batch: int, device: torch.device | str = "cpu", workers: int = 0, top: int = 100
) -> tuple[dict[str, float | None], Int[Tensor, "S B Q"]]:
    """The twelve COCO numbers of a detector's last stage, in percent, None where COCO defines none; and what its queries are matched
    with: the number of an object of each image, -1 for none. Arguments and errors are those of `detect`.
    """
    found, held = detect(detector, dataset, batch, device, workers, top)
    return coco_metrics(dataset.coco.dataset, found), held


@torch.no_grad()
def detect(
    detector: nn.Module, dataset: CocoDataset, batch: int, device: torch.device | str = "cpu", workers: int = 0, top: int = 100
) -> tuple[list[dict[str, Any]], Int[Tensor, "S B Q"]]:
    """What a detector's last stage finds, in COCO's result format (ids of the data, boxes in pixels of the image's file), and its matches.

    The detector is put into evaluation mode and afterwards back into the mode it was in.

    Raises:
        InputError: the detector has another number of classes than the data.
        NonFiniteError: a prediction is NaN or infinite; names the images.
    """
    results: list[dict[str, Any]] = []
    held: list[Tensor] = []
    with loading(dataset, in_order(dataset, batch), workers) as batches, ExitStack() as at_end:
        at_end.callback(detector.train, detector.training)
        detector.eval()
        for samples in batches:
            pixels = samples.pixels.to(device, memory_format=torch.channels_last)
            memory = detector.encode(pixels, samples.padding.to(device))
            (output,) = detector.decode(memory, detector.queries(memory))
            _check(output.logits, output.boxes, samples.image_ids, len(dataset.categories))
            logits, boxes = output.logits[-1].float(), output.boxes[-1].float()
            for image, found in zip(samples.image_ids, detections(logits, boxes, samples.original_sizes, top), strict=True):
                results += _coco_results(image, found, [category.id for category in dataset.categories])
            held.append(matched_objects(output, samples.targets.to(device)).cpu().to(torch.int32))
    # A two-stage detector has fewer queries where an image has fewer tokens than it wants.
    widest = max(one.shape[2] for one in held)
    held = [F.pad(one, (0, widest - one.shape[2]), value=-1) for one in held]
    return results, torch.cat(held, dim=1)


class WholeFile(COCO):
    """Annotations that are evaluated all together: the evaluator gets them as they are, and none is looked up by its id.

    faster-coco-eval asks its files for nothing else than these methods give; tests compare what it finds with pycocotools.
    """

    def createIndex(self) -> None:
        self.imgs, self.cats = ({one["id"]: one for one in self.dataset[kind]} for kind in ("images", "categories"))

    def getAnnIds(self, **chosen: Any) -> list[int]:
        return []

    def loadAnns(self, ids: list[int]) -> list[dict[str, Any]]:
        return self.dataset["annotations"]


def coco_metrics(annotations: dict[str, Any], found: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The first of what `coco_evaluation` gives."""
    return coco_evaluation(annotations, found)[0]


def coco_evaluation(
    annotations: dict[str, Any], found: Sequence[dict[str, Any]]
) -> tuple[dict[str, float | None], dict[int, float | None]]:
    """The twelve COCO numbers, and AP by category id, in percent; None where COCO gives -1: there is no object of that size or class.

    Args:
        annotations: an annotation file's content: images, categories, annotations.
        found: detections in COCO's result format: image_id, category_id, bbox (x, y, width, height), score.
    """
    # The evaluator writes into what it is given, so it gets copies, and of what it needs: boxes, not masks.
    needed = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    images_and_categories = {key: annotations[key] for key in ("images", "categories")}
    with no_garbage_collection():  # which would look through half a million of dicts again and again
        objects = [{key: one[key] for key in needed if key in one} for one in annotations["annotations"]]
        guesses = [one | {"id": i, "area": one["bbox"][2] * one["bbox"][3], "iscrowd": 0} for i, one in enumerate(found, start=1)]
        truth, guessed = (WholeFile(images_and_categories | {"annotations": some}) for some in (objects, guesses))
        evaluator = COCOeval_faster(truth, guessed, iouType="bbox")
        evaluator.run()
    metrics = {name: None if value < 0 else 100 * float(value) for name, value in zip(METRICS, evaluator.stats, strict=True)}
    precision = evaluator.eval["precision"][:, :, :, 0, -1]  # [IoUs, recalls, classes] for objects of all sizes, 100 detections
    classes = dict(zip(evaluator.params.catIds, precision.transpose(2, 0, 1), strict=True))
    return metrics, {id: 100 * float(one[one > -1].mean()) if (one > -1).any() else None for id, one in classes.items()}


def _check(logits: Float[Tensor, "S B Q C"], boxes: Float[Tensor, "S B Q 4"], image_ids: Sequence[int], classes: int) -> None:
    if logits.shape[-1] != classes:
        raise InputError(f"the detector knows {logits.shape[-1]} classes, the data has {classes}; give the data it was trained for")
    finite = logits.isfinite().all(-1).all(-1).all(0) & boxes.isfinite().all(-1).all(-1).all(0)
    broken = [image for image, good in zip(image_ids, finite.tolist(), strict=True) if not good]
    if broken:
        raise NonFiniteError(
            f"evaluation: predictions for image ids {', '.join(map(str, broken))} are NaN or infinite; "
            "look at these images, or train with a lower schedule.lr"
        )


def _coco_results(image: int, found: dict[str, Tensor], category_ids: Sequence[int]) -> list[dict[str, Any]]:
    x1, y1, x2, y2 = found["boxes"].unbind(1)
    boxes = torch.stack((x1, y1, x2 - x1, y2 - y1), dim=1).tolist()
    pairs = zip(found["labels"].tolist(), boxes, found["scores"].tolist(), strict=True)
    return [{"image_id": image, "category_id": category_ids[label], "bbox": box, "score": score} for label, box, score in pairs]


def changes(held: Int[Tensor, "S B Q"], before: Int[Tensor, "B Q"] | None) -> dict[str, float]:
    """How many queries an image change their object: DN-DETR's instability score (Li et al., CVPR 2022), over stages and over training.

    Args:
        held: the object that each query is matched with at each stage, -1 for none.
        before: the last stage of the evaluation before, if there was one.

    Returns:
        `changes_between_stages`, summed over the steps from stage to stage, and `changes_since_last`, of the last stage since the
        evaluation before: the paper's Figure 7 and DN-DETR's Figure 2.
    """
    found = {"changes_between_stages": (held[1:] != held[:-1]).sum().item() / held.shape[1]}
    return found if before is None else found | {"changes_since_last": (held[-1] != before).sum().item() / held.shape[1]}
