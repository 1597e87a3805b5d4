"""Confusion matrices side by side: which classes detectors take for which, and what they miss or invent."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from detrdistill.figures import style
from detrdistill.recipes.words import TITLES

BACKGROUND = "background"
COUNTED = 12  # classes; with more, numbers in the cells would not be legible


def confusion(matrices: Mapping[str, np.ndarray], names: Sequence[str], note: str = "") -> Figure:
    """A matrix a detector: annotated classes are rows, what they were taken for columns, the background last.

    A cell's shade is its part of the row: of a class, of its objects; of the background, of all detections where nothing is.

    Args:
        matrices: counts [C+1 C+1] by detector, of `analysis.confusion.confusion_matrix`.
    """
    with style.paper():
        columns = 1 if style.narrow() else min(3, len(matrices))
        rows = -(-len(matrices) // columns)
        side = style.width() / columns
        figure = style.Picture(figsize=(style.width(), rows * (side + 0.3 * style.scale()) + 0.5 * style.scale()))
        grid = figure.subplots(rows, columns, squeeze=False)
        labels = [*names, BACKGROUND]
        for number, (axes, (name, counts)) in enumerate(zip(grid.ravel(), matrices.items(), strict=False)):
            _matrix(axes, counts, labels, side, first=number % columns == 0)
            axes.set_title(style.cut(TITLES.get(name, name), side / style.scale() - 0.4, 9), color=style.colours(list(matrices))[name])
        for axes in grid.ravel()[len(matrices) :]:
            axes.set_visible(False)
        how = "Rows: annotated; columns: detected. The last row holds detections where nothing is, the last column what was missed."
        style.note(figure, f"{how}\n{note}")
    return figure


def _matrix(axes: Axes, counts: np.ndarray, labels: Sequence[str], side: float, first: bool) -> None:
    part = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(part, cmap="Blues", vmin=0, vmax=1)
    axes.grid(False)
    shown = [style.cut(label, 0.9, 6.5) for label in labels]
    every = math.ceil(len(labels) / (8 * side / style.scale()))
    places = range(0, len(labels), every)
    small = style.points(6.5)
    axes.set_xticks(places, [shown[i] for i in places], rotation=90, fontsize=small)
    axes.set_yticks(places, [shown[i] for i in places] if first else [], fontsize=small)
    axes.tick_params(length=0)
    axes.axhline(len(labels) - 1.5, color=style.FAINT, linewidth=0.6)
    axes.axvline(len(labels) - 1.5, color=style.FAINT, linewidth=0.6)
    if len(labels) - 1 <= COUNTED:
        size = min(style.points(6.5), 0.55 * 72 * side * 0.75 / len(labels))
        for i, j in zip(*np.nonzero(counts), strict=True):
            axes.text(j, i, str(counts[i, j]), ha="center", va="center", fontsize=size, color="white" if part[i, j] > 0.55 else style.TEXT)
