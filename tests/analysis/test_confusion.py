"""Confusion matrices and repairs, on boxes whose answer is known."""

import numpy as np
import pytest

from detrdistill.analysis.confusion import FREE, IGNORED, Matched, confusion_matrix, match, repairs
from detrdistill.figures.confusion import confusion
from detrdistill.figures.detections import Objects

NAMES = ["a", "b"]
NO_CROWD = np.zeros((0, 4))
LEFT, RIGHT, FAR = (0, 0, 10, 10), (20, 0, 30, 10), (50, 50, 60, 60)
NEAR_LEFT = (2, 0, 12, 10)  # IoU 2/3 with LEFT


def seen(*objects: tuple[tuple[int, int, int, int], str, float]) -> Objects:
    boxes = np.array([box for box, _, _ in objects], dtype=float).reshape(-1, 4)
    return Objects(boxes, [name for _, name, _ in objects], np.array([score for *_, score in objects], dtype=float))


def there(*objects: tuple[tuple[int, int, int, int], str]) -> Objects:
    return Objects(np.array([box for box, _ in objects], dtype=float).reshape(-1, 4), [name for _, name in objects])


TRUTH = there((LEFT, "a"), (RIGHT, "b"))


def test_a_detection_of_the_class_comes_before_a_better_one_of_another() -> None:
    one = match(seen((LEFT, "b", 0.9), (NEAR_LEFT, "a", 0.6), (RIGHT, "b", 0.2)), TRUTH, NO_CROWD, 0.3)
    assert one.object_of.tolist() == [FREE, 0] and one.hits.tolist() == [True, False] and one.f1 == 2 / 4
    assert confusion_matrix([one], NAMES).tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]


def test_an_object_is_found_once_and_may_be_taken_for_another() -> None:
    one = match(seen((LEFT, "a", 0.9), (LEFT, "a", 0.8), (RIGHT, "a", 0.7), (FAR, "b", 0.6)), TRUTH, NO_CROWD, 0.5)
    assert one.object_of.tolist() == [0, FREE, 1, FREE] and one.hits.tolist() == [True, False]
    assert confusion_matrix([one, one], NAMES).tolist() == [[2, 0, 0], [2, 0, 0], [2, 2, 0]]


def test_what_lies_in_a_crowd_counts_neither_way() -> None:
    crowd = np.array([[45.0, 45, 70, 70]])
    one = match(seen((LEFT, "a", 0.9), (FAR, "a", 0.8)), there((LEFT, "a")), crowd, 0.5)
    assert one.object_of.tolist() == [0, IGNORED] and one.f1 == 1 and confusion_matrix([one], NAMES).sum() == 1


def test_images_without_anything() -> None:
    empty = match(seen(), there(), NO_CROWD, 0.5)
    assert empty.f1 == 1 and match(seen((LEFT, "a", 0.9)), there(), NO_CROWD, 0.5).f1 == 0
    missed = match(seen(), TRUTH, NO_CROWD, 0.5)
    assert missed.f1 == 0 and confusion_matrix([empty, missed], NAMES).tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 0]]


def test_every_object_and_detection_is_counted_once() -> None:
    random = np.random.default_rng(0)

    def some(count: int) -> np.ndarray:
        corners = random.uniform(0, 40, (count, 2))
        return np.concatenate((corners, corners + random.uniform(5, 20, (count, 2))), axis=1)

    matched = []
    for count in range(12):
        truth = Objects(some(count), random.choice(NAMES, count).tolist())
        found = Objects(some(15), random.choice(NAMES, 15).tolist(), random.uniform(0, 1, 15))
        matched.append(match(found, truth, NO_CROWD, 0.4))
    counts = confusion_matrix(matched, NAMES)
    assert counts[:2].sum() == sum(range(12)) and counts[:, :2].sum() == sum(len(one.found.names) for one in matched)
    assert np.trace(counts) == sum(one.hits.sum() for one in matched) > 0


def test_repairs() -> None:
    def hits(*flags: bool) -> Matched:
        found = seen(*((box, name, 0.9) for (box, name), flag in zip(((LEFT, "a"), (RIGHT, "b")), flags, strict=True) if flag))
        return match(found, TRUTH, NO_CROWD, 0.5)

    before = [hits(True, False), hits(False, False), hits(True, True)]
    after = [hits(False, True), hits(True, False), hits(True, True)]
    found = repairs(before, after)
    assert (found.both, found.repaired, found.broken, found.neither) == (2, 2, 1, 1)
    assert found.by_image.tolist() == [[1, 1], [1, 0], [0, 0]]


@pytest.mark.parametrize("classes", [2, 30])
def test_it_is_drawn(classes: int) -> None:
    counts = np.eye(classes + 1, dtype=int) * 7
    figure = confusion({"student": counts, "detrdistill": counts}, [f"class {i}" for i in range(classes)])
    numbers = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert numbers.count("7") == (2 * 3 if classes == 2 else 0) and figure.axes[1].get_title() == "DETRDistill"
