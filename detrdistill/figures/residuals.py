"""What the fit of a detector's runs leaves over, row by row: are all rows equally noisy?"""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from detrdistill.figures import style

ROW = 0.15  # inches


def residuals(of_detectors: Mapping[str, pd.DataFrame], note: str = "") -> Figure:
    """A panel a detector, a line a row of its tables, a dot a run; rows are in the order of their spread.

    Args:
        of_detectors: by detector, a line a run: treatment, title, table, residual (AP), stands_out (its row's spread is larger than that of
            the others by a test).
    """
    panels = {name: _titled(runs) for name, runs in of_detectors.items() if len(runs)}
    counts = [runs["row"].nunique() for runs in panels.values()]
    with style.paper():
        label = style.even("AP of a run minus what its row and its seed explain", 0.5 * style.room(), 8.5)
        title = "Noise by row; orange: the row's spread stands out, and its intervals are wider for it"
        title = style.even(title, style.room() - 0.1, 9)
        height = ROW * sum(counts) + 0.75 * len(panels) + 0.6 + 0.17 * (len(title) + len(label) - 2)
        figure = style.Picture(figsize=(style.width(), height * style.scale()))
        figure.get_layout_engine().set(hspace=0.03)
        panes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=counts)[:, 0]
        reach = 1.05 * max(runs["residual"].abs().max() for runs in panels.values())
        for axes, (name, runs) in zip(panes, panels.items(), strict=True):
            spreads = runs.groupby("row")["residual"].apply(lambda values: round((values**2).mean(), 9))
            places = {row: i for i, row in enumerate(spreads.sort_values(kind="stable").index)}
            colours = runs["stands_out"].map({True: style.RED, False: style.BLUE})
            axes.axvline(0, color="#888888", linewidth=0.9, zorder=1)
            axes.scatter(runs["residual"], runs["row"].map(places), s=12, c=colours, alpha=0.75, linewidths=0, zorder=3)
            axes.set_yticks(
                range(len(places)), [style.cut(row, min(3.2, 0.45 * style.room()), 7) for row in places], fontsize=style.points(7)
            )
            axes.set(xlim=(-reach, reach), ylim=(-0.8, len(places) - 0.2))
            axes.set_title(name, loc="left", weight="bold")
            axes.tick_params(axis="y", length=0)
        panes[-1].set_xlabel("\n".join(label))
        figure.suptitle("\n".join(title), x=0.012, ha="left", fontsize=style.points(9))
        style.note(figure, note)
    return figure


def _titled(runs: pd.DataFrame) -> pd.DataFrame:
    """With a name for each row, its table's added where two rows of the detector have one title."""
    named = runs.drop_duplicates("treatment").set_index("treatment")
    twice = named["title"].duplicated(keep=False)
    names = named["title"].where(~twice, named["title"] + " (" + named["table"].str.lower() + ")")
    return runs.assign(row=runs["treatment"].map(names))
