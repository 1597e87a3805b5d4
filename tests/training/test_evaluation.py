"""COCO numbers against pycocotools, and the detectors' post-processing."""

import contextlib
import copy
import io
import math
import multiprocessing
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from detrdistill.data.coco import Batch, Category, collate
from detrdistill.errors import InputError, NonFiniteError
from detrdistill.models.outputs import DetectorOutput
from detrdistill.training.evaluation import METRICS, changes, coco_metrics, detections, evaluate

CATEGORIES = [1, 3, 7, 18, 44, 90]


def random_annotations(seed: int, images: int = 25) -> dict[str, Any]:
    """Objects of all sizes, crowds among them; every fifth image is empty and the last category never occurs."""
    random = np.random.default_rng(seed)
    annotations = []
    for image in range(images):
        for _ in range(0 if image % 5 == 0 else int(random.integers(1, 12))):
            width, height = np.exp(random.uniform(np.log(8), np.log(300), 2))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 10 * image + 3,
                    "category_id": int(random.choice(CATEGORIES[:-1])),
                    "bbox": [*random.uniform(0, 340, 2), width, height],
                    "area": width * height * random.uniform(0.5, 1),
                    "iscrowd": int(random.random() < 0.15),
                }
            )
    return {
        "images": [{"id": 10 * image + 3, "width": 640, "height": 640} for image in range(images)],
        "categories": [{"id": category, "name": str(category)} for category in CATEGORIES],
        "annotations": annotations,
    }


def random_detections(seed: int, annotations: dict[str, Any]) -> list[dict[str, Any]]:
    """Shaken copies of most objects, some of another class, and boxes of nothing; coarse scores, so that many tie."""
    random = np.random.default_rng(seed)
    found = []
    for one in annotations["annotations"]:
        for _ in range(int(random.integers(0, 3))):
            x, y, width, height = one["bbox"]
            dx, dy, dw, dh = random.normal(0, 0.12, 4)
            category = one["category_id"] if random.random() < 0.85 else int(random.choice(CATEGORIES))
            box = [x + dx * width, y + dy * height, width * math.exp(dw), height * math.exp(dh)]
            found.append({"image_id": one["image_id"], "category_id": category, "bbox": box, "score": round(random.uniform(0.2, 1), 2)})
    for image in annotations["images"][::3]:  # more than the 100 that count
        for _ in range(130):
            box = [*random.uniform(0, 500, 2), *random.uniform(5, 200, 2)]
            found.append({"image_id": image["id"], "category_id": 7, "bbox": box, "score": round(random.uniform(0, 0.6), 2)})
    return found


def reference(annotations: dict[str, Any], found: list[dict[str, Any]]) -> dict[str, float | None]:
    """pycocotools' twelve numbers, in our words."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(annotations)
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(copy.deepcopy(found)), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return {name: None if value < 0 else 100 * float(value) for name, value in zip(METRICS, evaluator.stats, strict=True)}


@pytest.mark.parametrize("seed", range(4))
def test_all_twelve_numbers_are_those_of_pycocotools(seed: int, capfd: pytest.CaptureFixture[str]) -> None:
    annotations = random_annotations(seed)
    found = random_detections(seed + 100, annotations)
    before = copy.deepcopy((annotations, found))
    metrics = coco_metrics(annotations, found)
    assert capfd.readouterr() == ("", "")
    assert (annotations, found) == before
    assert tuple(metrics) == METRICS
    assert metrics == pytest.approx(reference(annotations, found), abs=1e-9)
    assert 1 < metrics["AP"] < 90


def test_objects_of_images_that_are_not_listed_do_not_count() -> None:
    annotations = random_annotations(0)
    found = random_detections(100, annotations)
    unlisted = annotations["annotations"][0]["image_id"]
    annotations["images"] = [image for image in annotations["images"] if image["id"] != unlisted]
    found = [one for one in found if one["image_id"] != unlisted]
    assert coco_metrics(annotations, found) == pytest.approx(reference(annotations, found), abs=1e-9)


def test_a_perfect_detector_has_full_marks_and_a_size_without_objects_none() -> None:
    annotations = random_annotations(0)
    annotations["annotations"] = [one | {"iscrowd": 0} for one in annotations["annotations"] if one["area"] < 96**2]
    found = [{key: one[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9} for one in annotations["annotations"]]
    metrics = coco_metrics(annotations, found)
    assert metrics["AP"] == pytest.approx(100)
    assert metrics["APl"] is None and metrics["ARl"] is None
    assert metrics == pytest.approx(reference(annotations, found), abs=1e-9)


def test_no_detection_at_all_is_zero_and_no_object_at_all_is_none() -> None:
    annotations = random_annotations(0)
    assert set(coco_metrics(annotations, []).values()) == {0.0}
    assert set(coco_metrics(annotations | {"annotations": []}, []).values()) == {None}


def test_detections_are_the_best_pairs_of_query_and_class_in_pixels() -> None:
    logits = torch.tensor([[[-9.0, 2.0, 1.0], [3.0, -9.0, -9.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 1.2, 0.5], [0.25, 0.5, 0.5, 1.0]]])
    (found,) = detections(logits, boxes, [(100, 200)], top=3)
    assert found["labels"].tolist() == [0, 1, 2]
    assert found["scores"].tolist() == pytest.approx(torch.tensor([3.0, 2.0, 1.0]).sigmoid().tolist())
    # Boxes are not cut at the border: the second reaches beyond the image.
    expected = torch.tensor([[0.0, 0, 100, 100], [-20, 25, 220, 75], [-20, 25, 220, 75]])
    torch.testing.assert_close(found["boxes"], expected)
    assert len(detections(logits, boxes, torch.tensor([[100, 200]]))[0]["scores"]) == 6


class Data(list):
    """What evaluation asks of a dataset: two images of different size with an object or two each, ids with gaps."""

    def __init__(self) -> None:
        sizes, boxes = [(40, 60), (50, 30)], [[[0.5, 0.5, 0.4, 0.6]], [[0.3, 0.4, 0.5, 0.5], [0.7, 0.7, 0.3, 0.2]]]
        labels, annotations = [[1], [0, 1]], []
        self.categories = [Category(0, 4, "cat"), Category(1, 9, "dog")]
        for i, (height, width) in enumerate(sizes):
            where = {"image_id": 20 + i, "original_size": (2 * height, 2 * width)}
            target = {"labels": torch.tensor(labels[i]), "boxes": torch.tensor(boxes[i])} | where
            self.append((torch.full((3, height, width), float(i)), target))
            for label, (cx, cy, w, h) in zip(labels[i], boxes[i], strict=True):
                box = [2 * width * (cx - w / 2), 2 * height * (cy - h / 2), 2 * width * w, 2 * height * h]
                one = {"id": len(annotations) + 1, "image_id": 20 + i, "category_id": self.categories[label].id}
                annotations.append(one | {"bbox": box, "area": box[2] * box[3], "iscrowd": 0})
        images = [{"id": 20 + i, "height": 2 * height, "width": 2 * width} for i, (height, width) in enumerate(sizes)]
        categories = [{"id": category.id, "name": category.name} for category in self.categories]
        self.coco = SimpleNamespace(dataset={"images": images, "annotations": annotations, "categories": categories})

    def batch(self, keys: Sequence[int]) -> Batch:
        return collate([self[key] for key in keys])


class KnowsAll(nn.Module):
    """A detector that knows each image by its colour, and its objects by heart."""

    def __init__(self, data: Data, classes: int = 2, broken: int | None = None) -> None:
        super().__init__()
        self.data, self.classes, self.broken = data, classes, broken
        self.bias = nn.Parameter(torch.zeros(()))

    def encode(self, pixels: torch.Tensor, padding: torch.Tensor) -> list[int]:
        assert not self.training and not torch.is_grad_enabled() and padding.shape == pixels[:, 0].shape
        return pixels[:, 0, 0, 0].int().tolist()

    def queries(self, memory: list[int]) -> int:
        return 2

    def decode(self, memory: list[int], queries: int) -> list[DetectorOutput]:
        logits, boxes = torch.full((1, len(memory), queries, self.classes), -9.0), torch.full((1, len(memory), queries, 4), 0.1)
        for i, image in enumerate(memory):
            target = self.data[image][1]
            for query, (label, box) in enumerate(zip(target["labels"], target["boxes"], strict=True)):
                logits[0, i, query, label], boxes[0, i, query] = 5.0, box
            if image == self.broken:
                boxes[0, i, 0, 0] = math.nan
        # An earlier stage that is wrong must not count.
        both = torch.cat([boxes, boxes])
        return [DetectorOutput(torch.cat([-logits, logits]), both + self.bias, both, [], [])]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_evaluate_measures_the_last_stage_and_leaves_the_mode_alone(batch: int, training: bool) -> None:
    detector = KnowsAll(Data()).train(training)
    metrics, held = evaluate(detector, detector.data, batch=batch)
    assert metrics["AP"] == pytest.approx(100) and metrics["ARm"] == pytest.approx(100)
    assert held.shape[:2] == (2, len(detector.data)) and held.max() >= 0
    assert detector.training is training


def test_batches_may_have_different_numbers_of_queries() -> None:
    """As in two-stage detectors: an image of few tokens has few proposals."""
    detector = KnowsAll(Data())
    detector.queries = lambda memory: 2 + memory[0]
    held = evaluate(detector, detector.data, batch=1)[1]
    assert held.shape == (2, 2, 3) and held[:, 0, 2].tolist() == [-1, -1] and held[-1, 0].max() == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_non_finite_prediction_stops_and_names_its_image(workers) -> None:
    detector, before = KnowsAll(Data(), broken=1), multiprocessing.active_children()
    with pytest.raises(NonFiniteError, match=r"image ids 21 are NaN or infinite") as kept:
        evaluate(detector, detector.data, batch=2, workers=workers)
    assert detector.training and kept.value.__traceback__ is not None and multiprocessing.active_children() == before


def test_another_number_of_classes_is_refused() -> None:
    detector = KnowsAll(Data(), classes=3)
    with pytest.raises(InputError, match="knows 3 classes, the data has 2"):
        evaluate(detector, detector.data, batch=2)


def test_changes_are_counted_between_stages_and_since_the_last_evaluation() -> None:
    held = torch.tensor([[[0, 1, -1], [-1, -1, 0]], [[1, 0, -1], [-1, -1, 0]], [[1, -1, 0], [0, -1, -1]]])
    assert changes(held, None) == {"changes_between_stages": (2 + 2 + 2) / 2}
    assert changes(held, held[0]) == {"changes_between_stages": 3.0, "changes_since_last": (3 + 2) / 2}
