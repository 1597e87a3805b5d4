"""Query masks on the image, as the paper's Figure 4: where a query's features are distilled (Eq. 7)."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from detrdistill.figures import style
from detrdistill.figures.detections import show_image

HEAT = "inferno"


def query_masks(image: np.ndarray, masks: Sequence[np.ndarray], titles: Sequence[str], note: str = "", *, columns: int = 4) -> Figure:
    """The image, then every mask as heat over it, each scaled to its own largest value and cut at 0 as in the paper.

    Args:
        image: [H W 3], uint8.
        masks: soft masks [h w] of the whole image, each in any resolution; cells are shown as they are.
        titles: one a mask, such as "query 12: 7, q 0.81".
    """
    with style.paper():
        columns = min(columns, 2) if style.narrow() else columns
        rows = -(-(len(masks) + 1) // columns)
        side = (style.width() - 0.6) / columns
        height = rows * (side * image.shape[0] / image.shape[1] + 0.25 * style.scale()) + 0.25 * style.scale()
        figure = style.Picture(figsize=(style.width(), height))
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        show_image(panels[0], image)
        panels[0].set_title("image")
        for axes, mask, title in zip(panels[1:], masks, titles, strict=False):
            heat = overlay(axes, image, mask)
            axes.set_title(title)
        for axes in panels[len(masks) + 1 :]:
            axes.set_visible(False)
        if len(masks):
            bar = figure.colorbar(heat, ax=panels.tolist(), fraction=0.025, pad=0.01, ticks=[0, 0.5, 1])
            bar.set_label("mask / its maximum")
            bar.outline.set_visible(False)
        style.note(figure, note)
    return figure


def overlay(axes: Axes, image: np.ndarray, mask: np.ndarray):
    """A soft mask [h w] as heat over the image in grey; returns what a colour bar needs."""
    show_image(axes, np.repeat(image.mean(2, keepdims=True), 3, 2).astype(np.uint8))
    share = np.clip(mask, 0, None) / max(float(mask.max()), 1e-12)
    height, width = image.shape[:2]
    # Repeated to many pixels a cell, or viewers of the PDF would blur the cells.
    cells = share.repeat(-(-400 // len(share)), 0).repeat(-(-400 // share.shape[1]), 1)
    return axes.imshow(cells, cmap=HEAT, vmin=0, vmax=1, alpha=0.2 + 0.65 * cells, extent=(0, width, height, 0), interpolation="nearest")
