"""Images with their annotated objects, some in a row: what a data set looks like."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from detrdistill.figures import style
from detrdistill.figures.detections import Objects, draw


def gallery(images: Sequence[np.ndarray], truths: Sequence[Objects], note: str = "", *, columns: int = 3) -> Figure:
    """Images with boxes and class names.

    Args:
        images: [H W 3], uint8, of any sizes.
        truths: the objects of each.
    """
    with style.paper():
        # Laid out by hand, as in `detections.compare`: labels are placed by the size of a pixel on paper.
        notes = style.wrapped(note, style.width())
        gap, bottom = 0.06, (0.09 + 0.11 * style.leading() * len(notes)) * style.scale() if note else 0.02
        rows = -(-len(images) // columns)
        side = (style.width() - gap * (columns - 1)) / columns
        high = side * max((image.shape[0] / image.shape[1] for image in images), default=1)
        height = bottom + rows * high + (rows - 1) * gap
        figure = style.Picture(figsize=(style.width(), height), layout="none")
        room = {"left": 0, "right": 1, "top": 1, "bottom": bottom / height, "wspace": gap / side, "hspace": gap / high}
        grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw=room).ravel()
        for axes, image, truth in zip(grid, images, truths, strict=False):
            draw(axes, image, truth, "ground truth")
        for axes in grid[len(images) :]:
            axes.set_visible(False)
        figure.text(0, 0.04 / height, "\n".join(notes), va="bottom", fontsize=style.points(6.5), color=style.FAINT)
    return figure
