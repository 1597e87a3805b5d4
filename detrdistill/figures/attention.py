"""Where methods and detectors put their weight on an image, side by side, as the paper's Figure 2."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from detrdistill.figures import style
from detrdistill.figures.detections import Objects, show_image
from detrdistill.figures.masks import overlay
from detrdistill.figures.quality import outline


def active_regions(
    images: Sequence[np.ndarray],
    truths: Sequence[Objects],
    maps: Mapping[str, Sequence[np.ndarray]],
    inside: Mapping[str, Sequence[float]],
    note: str = "",
) -> Figure:
    """A row an image, a column a map; below each map the part of its weight that lies inside the boxes.

    Args:
        images: [H W 3], uint8.
        truths: annotated objects, drawn on every panel.
        maps: by column title, for every image a map [h w] without negative numbers.
        inside: by the same titles, for every image that part, between 0 and 1; NaN where a map has no weight.
    """
    with style.paper():
        columns = 3 if style.narrow() else len(maps) + 1
        side = (style.width() - 0.6) / columns
        titles = [style.even(title, side / style.scale() - 0.05, 8, "bold") for title in ("ground truth", *maps)]
        lines = math.ceil(len(titles) / columns)  # of panels, an image; where there are several, each panel has its title
        titled = len(images) * lines if lines > 1 else 1
        high = len(images) * lines * (side * max(image.shape[0] / image.shape[1] for image in images) + 0.2 * style.scale())
        high += (0.31 + titled * 0.12 * (1 + max(map(len, titles)))) * style.scale()
        figure = style.Picture(figsize=(style.width(), high))
        grid = figure.subplots(len(images) * lines, columns, squeeze=False)
        figure.get_layout_engine().set(wspace=0.02, hspace=0.01, w_pad=0.01, h_pad=0.02)
        heat = None
        for row, (image, truth) in enumerate(zip(images, truths, strict=True)):
            first, *panels = panels_of_image = grid[row * lines : (row + 1) * lines].ravel()
            show_image(first, image)
            outline(first, truth.boxes, width=0.8)
            for axes, (title, shown) in zip(panels, maps.items(), strict=False):
                heat = overlay(axes, image, shown[row])
                outline(axes, truth.boxes, width=0.8)
                share = inside[title][row]
                axes.set_xlabel("no weight" if np.isnan(share) else f"{100 * share:.0f} % inside", labelpad=2, fontsize=style.points(7.5))
            if row == 0 or lines > 1:
                for axes, title in zip(panels_of_image, titles, strict=False):
                    axes.set_title("\n".join(title), fontsize=style.points(8), fontweight="bold", pad=4)
            for axes in panels_of_image[len(titles) :]:
                axes.remove()
        if heat is not None:
            bar = figure.colorbar(heat, ax=grid.ravel().tolist(), fraction=0.015, pad=0.01, aspect=40, ticks=[0, 0.5, 1])
            bar.set_label("weight / its maximum")
            bar.outline.set_visible(False)
        style.note(figure, note)
    return figure
