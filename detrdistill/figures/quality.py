"""Queries as the paper's Figure 4 shows them: masks (Eq. 7) with the boxes they belong to; and how good queries are (Eq. 8)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import matplotlib
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from detrdistill.figures import style
from detrdistill.figures.detections import show_image
from detrdistill.figures.masks import overlay

MOST_PANELS = 24


@dataclass(frozen=True)
class Mask:
    """A soft mask of the whole image and what is drawn on it.

    Attributes:
        values: [h w], shown as they are.
        title: above it.
        objects: [N 4], x0 y0 x1 y1 in pixels: annotated objects, solid white.
        guess: [K 4]: a query's own box, dashed blue.
    """

    values: np.ndarray
    title: str
    objects: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    guess: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))


def masks(image: np.ndarray, panels: Sequence[Mask], note: str = "", *, columns: int = 4, whole: np.ndarray | None = None) -> Figure:
    """The image, then every mask as heat over it, cut at 0 and scaled to its own largest value as in the paper (Figure 4).

    Args:
        image: [H W 3], uint8.
        panels: at most `MOST_PANELS` are drawn.
        whole: [N 4], boxes drawn on the image itself.
    """
    with style.paper():
        panels = panels[:MOST_PANELS]
        columns = min(columns, 2 if style.narrow() else columns, len(panels) + 1)
        rows = -(-(len(panels) + 1) // columns)
        side = (style.width() - 0.6) / columns
        lines = max((1 + panel.title.count("\n") for panel in panels), default=1)
        text = (0.12 + 0.15 * style.leading() * lines) * style.scale()
        height = rows * (side * image.shape[0] / image.shape[1] + text) + 0.25 * style.scale()
        figure = style.Picture(figsize=(style.width(), height))
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        show_image(grid[0], image)
        grid[0].set_title("image")
        outline(grid[0], np.zeros((0, 4)) if whole is None else whole)
        heat = None
        for axes, panel in zip(grid[1:], panels, strict=False):
            heat = overlay(axes, image, panel.values)
            outline(axes, panel.objects)
            outline(axes, panel.guess, dashed=True)
            axes.set_title(panel.title)
        for axes in grid[len(panels) + 1 :]:
            axes.set_visible(False)
        if heat is not None:
            bar = figure.colorbar(heat, ax=grid.tolist(), fraction=0.025, pad=0.01, ticks=[0, 0.5, 1])
            bar.set_label("mask / its maximum")
            bar.outline.set_visible(False)
        drawn = [
            text
            for text, boxes in (
                ("Solid: annotated objects.", [panel.objects for panel in panels]),
                ("Dashed: the query's own box.", [panel.guess for panel in panels]),
            )
            if any(len(some) for some in boxes)
        ]
        style.note(figure, "\n".join(part for part in (" ".join(drawn), note) if part))
        figure.draw_without_rendering()  # the layout learns where images end, and with that where their titles are
    return figure


def outline(axes: Axes, boxes: np.ndarray, dashed: bool = False, width: float = 1.2) -> None:
    """White boxes, or blue dashed ones, with a dark edge: they show on light ground, on dark, and on heat."""
    edge = [patheffects.Stroke(linewidth=2 * width, foreground=style.TEXT), patheffects.Normal()]
    colour, dash = (style.SKY, (0, (2.5, 1.5))) if dashed else ("white", "-")
    for x0, y0, x1, y1 in boxes:
        box = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=width, linestyle=dash)
        box.set_path_effects(edge)
        axes.add_patch(box)


def quality(many: np.ndarray, one: Mapping[float, np.ndarray], gamma: float, note: str = "", *, images: int = 1) -> Figure:
    """Quality scores (Eq. 8): how they are spread, and what gamma does to the order of queries.

    Args:
        many: scores of all queries of several images at `gamma`.
        one: for each gamma the scores of one image's queries, [Q]; ranks are those at `gamma`, which must be among them.
        images: how many images `many` is from.
    """
    with style.paper():
        figure = style.Picture(figsize=(style.width(), (4.8 if style.narrow() else 2.9) * style.scale()))
        left, right = figure.subplots(2, 1) if style.narrow() else figure.subplots(1, 2, width_ratios=[1, 1.25])
        counts, _, _ = left.hist(many, bins=np.linspace(0, 1, 21), color=style.GREEN, edgecolor="white", linewidth=0.5)
        left.set_title(f"{len(many):,} queries of {images} image{'s' * (images != 1)}", loc="left")
        left.set(xlabel=f"quality score q, gamma {gamma:g}", ylabel="queries", xlim=(0, 1), ylim=(0, 1.08 * max(float(counts.max()), 1)))
        left.grid(False, axis="x")
        order, ranks = np.argsort(-one[gamma], kind="stable"), np.arange(1, len(one[gamma]) + 1)
        shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(one)))
        for (value, scores), shade in zip(sorted(one.items()), shades, strict=True):
            word = {0.0: ": the box alone", 1.0: ": the class alone"}.get(float(value), "")
            kept = value == gamma
            right.plot(
                ranks,
                scores[order],
                color=style.TEXT if kept else shade,
                linewidth=2.2 if kept else 1,
                marker="o" if len(ranks) <= 60 else "",
                markersize=3.6 if kept else 2.6,
                zorder=3 if kept else 2,
                label=f"{value:g}{word}",
            )
        right.set_title("this image's queries", loc="left")
        right.set(xlabel=f"rank at gamma {gamma:g}", ylabel="quality score q", ylim=(0, 1.03))
        right.xaxis.get_major_locator().set_params(integer=True)
        # Beside the lines, which may be anywhere.
        beside = {"loc": "upper left", "bbox_to_anchor": (1, 1.03), "alignment": "left"}
        right.legend(title="gamma", fontsize=style.points(7.5), title_fontsize=style.points(7.5), **beside)
        style.note(figure, note)
    return figure
