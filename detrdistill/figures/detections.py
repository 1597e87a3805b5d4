"""Images with boxes, class names and scores; and what several detectors see on the same images."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath

from detrdistill.figures import style
from detrdistill.recipes.words import TITLES

SIZE = 6  # points of the labels
CROWDED = 12  # boxes; with more, labels would cover what they tell of
PIXELS = 480  # small images are enlarged to about this side by repeating pixels: crisp in every viewer


@dataclass(frozen=True)
class Objects:
    """What is on an image, or what a detector says is.

    Attributes:
        boxes: [N 4], x0 y0 x1 y1 in pixels.
        names: class names.
        scores: [N], None for ground truth.
    """

    boxes: np.ndarray
    names: Sequence[str]
    scores: np.ndarray | None = None

    def above(self, score: float) -> "Objects":
        """Those with at least this score, best first; all of a ground truth."""
        if self.scores is None:
            return self
        kept = [i for i in np.argsort(-self.scores, kind="stable") if self.scores[i] >= score]
        return Objects(self.boxes[kept], [self.names[i] for i in kept], self.scores[kept])


def compare(images: Sequence[np.ndarray], columns: Mapping[str, Sequence[Objects]], note: str = "", *, least_score: float = 0.3) -> Figure:
    """A row an image, a column a detector: "ground truth" first, then settings such as student, detrdistill, teacher.

    Boxes are dashed where no object of that class lies (IoU with all of them under 0.5, or found already by a better box). Where a
    picture would be crowded with labels, those of the commonest class are left out of the whole figure.

    Args:
        images: [H W 3], uint8.
        columns: for every column the objects of each image.
        least_score: detections below are not drawn.
    """
    with style.paper():
        truths = columns.get("ground truth", [None] * len(images))
        columns = {setting: [one.above(least_score) for one in objects] for setting, objects in columns.items()}
        everything = [one for objects in columns.values() for one in objects]
        crowded = max(len(one.boxes) for one in everything) > CROWDED
        common = Counter(name for one in everything for name in one.names).most_common(1)[0][0] if crowded else None
        how = f"Dashed: no such object there. Detections with a score of at least {least_score:g}."
        if crowded:
            how += f" Without a label: {common}."
        # Laid out by hand: where labels find room depends on how large a pixel is printed, and that must be known beforehand.
        notes = style.wrapped(f"{how}\n{note}", style.width())
        gap, top, bottom = 0.04, 0.22 * style.scale(), (0.1 + 0.11 * style.leading() * len(notes)) * style.scale()
        side = (style.width() - gap * (len(columns) - 1)) / len(columns)
        high = side * max(image.shape[0] / image.shape[1] for image in images)
        height = top + bottom + len(images) * high + (len(images) - 1) * gap
        figure = style.Picture(figsize=(style.width(), height), layout="none")
        room = {"left": 0, "right": 1, "top": 1 - top / height, "bottom": bottom / height, "wspace": gap / side, "hspace": gap / high}
        panels = figure.subplots(len(images), len(columns), squeeze=False, gridspec_kw=room)
        for j, (setting, objects) in enumerate(columns.items()):
            title = TITLES.get(setting, setting.capitalize())
            panels[0, j].set_title(title, color=style.COLOURS.get(setting, style.TEXT), fontweight="bold", pad=4)
            for i, image in enumerate(images):
                draw(panels[i, j], image, objects[i], setting, truths[i], common)
        figure.text(0, 0.05 / height, "\n".join(notes), va="bottom", fontsize=style.points(6.5), color=style.FAINT)
    return figure


def draw(
    axes: Axes, image: np.ndarray, objects: Objects, setting: str = "detrdistill", truth: Objects | None = None, unnamed: str | None = None
) -> None:
    """One image with boxes in the setting's colour, dashed where `truth` has no such object.

    Each has a label outside of it, but for those of class `unnamed`.
    """
    show_image(axes, image)
    colour = style.COLOURS.get(setting, style.GREY)
    right = np.ones(len(objects.boxes), bool) if truth is None or objects.scores is None else hits(objects, truth)
    labels = list(objects.names)
    if objects.scores is not None:
        labels = [f"{name} {score:.2f}" for name, score in zip(objects.names, objects.scores, strict=True)]
    halo = [patheffects.Stroke(linewidth=2.6, foreground="white"), patheffects.Normal()]
    for (x0, y0, x1, y1), hit in zip(objects.boxes, right, strict=True):
        box = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.3, linestyle="-" if hit else (0, (2.5, 1.5)))
        box.set_path_effects(halo)
        axes.add_patch(box)
    told = [i for i, name in enumerate(objects.names) if name != unnamed]
    labels = [labels[i] for i in told]
    places = place_labels(axes, image, objects.boxes[told], labels, around=objects.boxes)
    for (x, y, wide, tall), text in zip(places, labels, strict=True):
        axes.add_patch(Rectangle((x, y), wide, tall, color=colour, linewidth=0, zorder=3))
        axes.text(x + wide / 2, y + tall / 2, text, color="white", fontsize=SIZE, ha="center", va="center_baseline", clip_on=True)


def show_image(axes: Axes, image: np.ndarray) -> None:
    """The image in its own pixel coordinates, pixels visible as squares."""
    times = max(1, PIXELS // max(image.shape[:2]))
    height, width = image.shape[:2]
    axes.imshow(image.repeat(times, 0).repeat(times, 1), extent=(0, width, height, 0), interpolation="nearest")
    axes.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    axes.grid(False)
    axes.spines[:].set_visible(False)


def place_labels(
    axes: Axes, image: np.ndarray, boxes: np.ndarray, labels: Sequence[str], around: np.ndarray
) -> list[tuple[float, float, float, float]]:
    """Left, top, width and height of the labels: above, below or beside their boxes, within the image, where they cover least.

    Args:
        around: all boxes of the image, those without a label too.
    """
    height, width = image.shape[:2]
    area, sheet = axes.get_position(), axes.figure
    point = max(width / (area.width * sheet.get_figwidth()), height / (area.height * sheet.get_figheight())) / 72  # in image pixels
    tall, gap, taken, placed = 1.3 * SIZE * point, 1.3 * point, list(around), []
    for (x0, y0, x1, y1), text in zip(boxes, labels, strict=True):
        wide = (TextPath((0, 0), text, size=SIZE).get_extents().width + 4) * point
        above, below = y0 - tall - gap, y1 + gap
        places = [(x0, above), (x1 - wide, above), (x0, below), (x1 - wide, below), (x1 + gap, y0), (x0 - wide - gap, y0)]
        places = [(min(max(x, 0), width - wide), min(max(y, 0), height - tall)) for x, y in places]
        covered = [sum(_overlap((x, y, x + wide, y + tall), box) for box in taken) for x, y in places]
        x, y = places[int(np.argmin(covered))]
        taken.append((x, y, x + wide, y + tall))
        placed.append((float(x), float(y), wide, tall))
    return placed


def hits(found: Objects, truth: Objects) -> np.ndarray:
    """Which detections, best first, find an object of their class with IoU 0.5 that none before has found."""
    free, hit = set(range(len(truth.boxes))), np.zeros(len(found.boxes), bool)
    for i, (box, name) in enumerate(zip(found.boxes, found.names, strict=True)):
        ious = {j: _iou(box, truth.boxes[j]) for j in free if truth.names[j] == name}
        best = max(ious, key=ious.get, default=None)
        if best is not None and ious[best] >= 0.5:
            hit[i] = True
            free.remove(best)
    return hit


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _iou(a: Sequence[float], b: Sequence[float]) -> float:
    shared = _overlap(a, b)
    return shared / max((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared, 1e-12)
