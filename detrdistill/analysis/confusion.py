"""Which classes a detector takes for which, and which objects one detector finds that another misses."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from detrdistill.data.coco import CocoDataset
from detrdistill.figures.detections import Objects

IOU = 0.5
FREE, IGNORED = -1, -2  # a detection without an object, and one that lies in a crowd


@dataclass(frozen=True)
class Matched:
    """Detections of one image beside its objects.

    Attributes:
        found: detections above a threshold, best first.
        truth: the objects, crowds left out.
        object_of: [N], the object that each detection is matched with, or `FREE`, or `IGNORED`.
    """

    found: Objects
    truth: Objects
    object_of: np.ndarray

    @property
    def hits(self) -> np.ndarray:
        """[M], the objects that a detection of their class is matched with."""
        hit = np.zeros(len(self.truth.names), bool)
        hit[[j for i, j in enumerate(self.object_of) if j >= 0 and self.found.names[i] == self.truth.names[j]]] = True
        return hit

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 1 where nothing is there and nothing is found."""
        counted = (self.object_of != IGNORED).sum() + len(self.truth.names)
        return float(2 * self.hits.sum() / counted) if counted else 1.0


def match(found: Objects, truth: Objects, crowds: np.ndarray, threshold: float) -> Matched:
    """Give each object at most one detection with an IoU of at least 0.5.

    Best first, a detection takes the free object of its own class with the largest IoU. What is left then takes what is left of other
    classes: so a confusion costs no object that is found as well. A detection without an object that lies in a crowd by half of its area
    counts neither way, as in COCO's evaluation.

    Args:
        crowds: [K 4], x0 y0 x1 y1 in pixels.
        threshold: the least score.
    """
    found = found.above(threshold)
    ious, object_of = _ious(found.boxes, truth.boxes), np.full(len(found.names), FREE)
    for own_class in (True, False):
        for i in np.flatnonzero(object_of == FREE):
            free = [j for j in range(len(truth.names)) if j not in object_of and (found.names[i] == truth.names[j]) is own_class]
            best = max(free, key=lambda j: ious[i, j], default=None)
            if best is not None and ious[i, best] >= IOU:
                object_of[i] = best
    in_crowds = _shared(found.boxes, crowds).max(axis=1, initial=0) >= IOU * np.maximum(_area(found.boxes), 1e-12)
    object_of[(object_of == FREE) & in_crowds] = IGNORED
    return Matched(found, truth, object_of)


def crowds_of(dataset: CocoDataset, indices: Sequence[int]) -> list[np.ndarray]:
    """The crowds' boxes of each image, [K 4], x0 y0 x1 y1 in pixels."""
    listed = [[a["bbox"] for a in dataset.coco.imgToAnns[dataset.ids[index]] if a["iscrowd"]] for index in indices]
    boxes = [np.array(some, dtype=float).reshape(-1, 4) for some in listed]
    return [np.concatenate((one[:, :2], one[:, :2] + one[:, 2:]), axis=1) for one in boxes]


def confusion_matrix(matched: Sequence[Matched], names: Sequence[str]) -> np.ndarray:
    """How many objects of each class (rows) were taken for each class (columns), [C+1 C+1]; the last of both is the background.

    The last row holds detections where no object is, the last column objects that were missed.
    """
    place = {name: index for index, name in enumerate(names)}
    counts = np.zeros((len(names) + 1, len(names) + 1), dtype=int)
    for one in matched:
        for name, j in zip(one.found.names, one.object_of, strict=True):
            if j != IGNORED:
                counts[len(names) if j == FREE else place[one.truth.names[j]], place[name]] += 1
        for j in set(range(len(one.truth.names))) - set(one.object_of.tolist()):
            counts[place[one.truth.names[j]], len(names)] += 1
    return counts


@dataclass(frozen=True)
class Repairs:
    """Objects by who finds them.

    Attributes:
        both, repaired, broken, neither: how many are found by both, by the second alone, by the first alone, by neither.
        by_image: [images 2], how many are repaired and how many broken on each.
    """

    both: int
    repaired: int
    broken: int
    neither: int
    by_image: np.ndarray


def repairs(before: Sequence[Matched], after: Sequence[Matched]) -> Repairs:
    """What the second detector finds that the first misses, and the other way round, on the same images."""
    pairs = [(one.hits, other.hits) for one, other in zip(before, after, strict=True)]
    by_image = np.array([((~one & other).sum(), (one & ~other).sum()) for one, other in pairs], dtype=int).reshape(-1, 2)
    both, neither = sum(int((one & other).sum()) for one, other in pairs), sum(int((~one & ~other).sum()) for one, other in pairs)
    return Repairs(both, *by_image.sum(axis=0).tolist(), neither, by_image)


def _ious(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    shared = _shared(boxes, others)
    return shared / np.maximum(_area(boxes)[:, None] + _area(others)[None] - shared, 1e-12)


def _shared(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return (high - low).clip(0).prod(axis=-1)


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(axis=-1)
