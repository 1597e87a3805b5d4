"""What the weight of each row's loss does to AP, a panel a row."""

import pandas as pd
from matplotlib.figure import Figure

from detrdistill.figures import style

COLUMNS = 4


def weight_trials(frame: pd.DataFrame, note: str = "") -> Figure:
    """AP over the multiplier of a row's weights, one panel a row and detector, all on one scale.

    A dot is a run with the first seed, a diamond one with the second, and the line goes through the first; what was chosen is ringed.

    Args:
        frame: of `tuning.tuning_frame`.
    """
    with style.paper():
        rows = list(frame.groupby(["detector", "row"], sort=False))
        lines = -(-len(rows) // COLUMNS)
        figure = style.Picture(figsize=(style.WIDTH, 0.6 + 1.35 * lines))
        panels = figure.subplots(lines, COLUMNS, squeeze=False, sharey=True).ravel()
        several = frame["detector"].nunique() > 1
        for axes, ((detector, _), trials) in zip(panels, rows, strict=False):
            title = trials["title"].iloc[0]
            axes.set_title(f"{detector}\n{title}" if several else title, loc="left", fontsize=7.5, wrap=True)
            if trials["multiplier"].isna().all():
                axes.tick_params(bottom=False, labelbottom=False)
                axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center", va="center", color=style.FAINT)
                continue
            axes.set_xscale("log")
            axes.plot(trials["multiplier"], trials["AP_100"], color=style.BLUE, marker="o", markersize=3.5, linewidth=1)
            axes.plot(trials["multiplier"], trials["AP_101"], color=style.AMBER, marker="D", markersize=3.5, linestyle="none")
            chosen = trials[trials["chosen"]]
            means = chosen[["AP_100", "AP_101"]].mean(axis=1)
            axes.plot(chosen["multiplier"], means, marker="o", markersize=11, fillstyle="none", color=style.RED, linestyle="none")
            axes.set_xlim(trials["multiplier"].min() / 2, trials["multiplier"].max() * 2)
        for axes in panels[len(rows) :]:
            axes.set_visible(False)
        figure.supylabel("AP", fontsize=8.5)
        figure.suptitle("multiplier of the weights; blue: first seed, amber: second seed, ring: chosen", fontsize=8.5, x=0.01, ha="left")
        style.note(figure, note)
    return figure
