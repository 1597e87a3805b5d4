"""What the weight of each row's loss does to AP, a panel a row."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter

from detrdistill.figures import style

PANEL = 1.6  # inches: a panel


def weight_trials(frame: pd.DataFrame, note: str = "") -> Figure:
    """AP over the multiplier of a row's weights, one panel a row and detector that has trials, all on one scale.

    A dot is a run with the first seed, a diamond one with the second, and the line goes through the first; what was chosen is ringed. The
    dashed line is the plain student with the first seed.

    Args:
        frame: of `tuning.tuning_frame`.
    """
    with style.paper():
        waiting = int(frame["multiplier"].isna().sum())
        frame = frame.dropna(subset="multiplier")
        rows = list(frame.groupby(["detector", "row"], sort=False))
        columns = max(1, int(style.room() / PANEL))
        lines = max(1, -(-len(rows) // columns))
        figure = style.Picture(figsize=(style.width(), (1.0 + 1.6 * lines) * style.scale()))
        panels = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
        for axes, ((detector, _), trials) in zip(panels, rows, strict=False):
            axes.set_title(
                "\n".join([detector, *style.even(trials["title"].iloc[0], PANEL - 0.25, 7.5)]), loc="left", fontsize=style.points(7.5)
            )
            axes.set_xscale("log")
            factors = sorted(trials["multiplier"])
            fit = 3 if len(f"{factors[0]:g}") > 4 else 4 if style.narrow() else 5  # so many numbers
            axes.set_xticks(factors[:: -(-len(factors) // fit)], minor=False)
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.tick_params(axis="x", labelsize=style.points(6.5))
            if trials["AP_plain"].notna().any():
                axes.axhline(trials["AP_plain"].iloc[0], color=style.FAINT, linestyle="--", linewidth=1, zorder=1)
            axes.plot(trials["multiplier"], trials["AP_100"], color=style.BLUE, marker="o", markersize=3.5, linewidth=1)
            axes.plot(trials["multiplier"], trials["AP_101"], color=style.AMBER, marker="D", markersize=3.5, linestyle="none")
            chosen = trials[trials["chosen"]]
            means = chosen[["AP_100", "AP_101"]].mean(axis=1)
            axes.plot(chosen["multiplier"], means, marker="o", markersize=11, fillstyle="none", color=style.RED, linestyle="none")
            axes.set_xlim(trials["multiplier"].min() / 2, trials["multiplier"].max() * 2)
            axes.margins(y=0.15)
        for axes in panels[len(rows) :]:
            axes.set_visible(False)
        figure.supylabel("AP", fontsize=style.points(8.5))
        left = f"; {waiting} rows have no trials yet" if waiting else ""
        title = f"AP by the multiplier of the weights (blue: first seed, amber: second, ring: chosen, dashed: plain student){left}"
        title = "\n".join(style.even(title, style.room() - 0.1, 8.5))
        figure.suptitle(title, fontsize=style.points(8.5), x=0.01, ha="left")
        style.note(figure, note)
    return figure
