"""What a detector gains against what it costs."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from detrdistill.figures import style
from detrdistill.recipes.words import TITLES

COSTS = {"parameters (M)": "parameters (millions)", "GFLOPs": "GFLOPs an image", "ms": "milliseconds an image"}


def tradeoff(table: pd.DataFrame, note: str = "", titles: Mapping[str, str] = TITLES) -> Figure:
    """AP against parameters, GFLOPs and milliseconds, a point a detector; whiskers are the quartiles of the time.

    Args:
        table: of `compare.compare.Comparison`: a line a detector, by name.
    """
    with style.paper():
        known = [cost for cost in COSTS if table[cost].notna().any()]
        rows = len(known) if style.narrow() else 1
        figure = style.Picture(figsize=(style.width(), (2.3 * rows + 0.5) * style.scale()))
        panels = figure.subplots(rows, len(known) // rows, squeeze=False, sharey=True).ravel()
        colours = style.colours(list(table.index))
        for axes, cost in zip(panels, known, strict=True):
            for name, line in table.iterrows():
                if pd.notna(line[cost]) and pd.notna(line["AP"]):
                    axes.plot(line[cost], line["AP"], "o", color=colours[name], markersize=7, label=titles.get(name, name))
                    if cost == "ms":
                        axes.plot([line["ms from"], line["ms to"]], [line["AP"]] * 2, color=colours[name], linewidth=1)
            axes.set_xlabel(COSTS[cost])
            axes.set_xlim(0, 1.12 * max(axes.dataLim.x1, 1e-9))
        for axes in panels if style.narrow() else panels[:1]:
            axes.set_ylabel("AP (percent)")
        low, high = panels[0].dataLim.y0, panels[0].dataLim.y1
        if low <= high:
            panels[0].set_ylim(max(0, low - 0.25 * (high - low) - 1), high + 0.15 * (high - low) + 1)
        seen = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(seen.values(), seen.keys(), loc="outside upper left", ncols=1 if style.narrow() else min(3, max(1, len(seen))))
        style.note(figure, note)
    return figure
