"""COCO numbers against pycocotools, and the detectors' post-processing."""

import contextlib
import copy
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from detrdistill.errors import InputError, NonFiniteError
from detrdistill.training.evaluation import METRICS, coco_metrics, detections, evaluate

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
