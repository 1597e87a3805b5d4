"""What every part of the loss does over training, a panel a loss."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from detrdistill.figures import style

GROUP_TITLES = {
    "detection": "Detection loss",
    "logits": "Logits distillation (Eq. 3 to 5)",
    "features": "Feature distillation (Eq. 9)",
    "assignment": "Assignment distillation (Eq. 10)",
}
COLOURS = {"class": style.BLUE, "l1": style.RED, "giou": style.GREEN}
NAMES = {"l1": "L1", "giou": "GIoU"}
# A detector of `transformers` logs a part a decoder layer and a denoising group, such as "loss_bbox_dn_0"; kinds as its library calls them.
OF_LIBRARY = re.compile(r"detection/loss_([a-z]+)(_aux|_dn|_enc)*(_\d+)?$")
KINDS = {"vfl": "class", "ce": "class", "bbox": "l1"}
NOT_PARTS = ("step", "lr", "loss", "gradient norm")


def loss_parts(log: Sequence[Mapping[str, Any]], title: str = "", note: str = "") -> Figure:
    """Weighted loss parts over optimizer steps: faint as logged, thick their running mean, its last value at the end.

    Args:
        log: entries of `log.jsonl` as `training.logging.read_log` gives them.
    """
    with style.paper():
        frame = summed(pd.DataFrame(list(log)))
        parts = [name for name in frame.columns if name not in NOT_PARTS]
        groups = list(dict.fromkeys(name.partition("/")[0] for name in parts)) or ["detection"]
        columns = 1 if style.narrow() else min(2, len(groups))
        rows = -(-len(groups) // columns)
        figure = style.Picture(figsize=(style.width(), (0.6 + (1.7 if style.narrow() else 2.2) * rows) * style.scale()))
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
        for axes in panels[len(groups) :]:
            axes.set_visible(False)
        labels = []
        for axes, group in zip(panels, groups, strict=False):
            axes.set_title(GROUP_TITLES.get(group, group), loc="left")
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            own = [name for name in parts if name.partition("/")[0] == group]
            smooth = frame[own].rolling(max(1, len(frame) // 25), min_periods=1, center=True).mean()
            ends = []
            for name in own:
                label, value = name.partition("/")[2], smooth[name].iloc[-1]
                colour = COLOURS.get(label.rpartition("/")[2], style.TEXT)
                dash = "--" if "/" in label and not label.startswith("positive") else "-"
                axes.plot(frame["step"], frame[name], color=colour, linewidth=0.6, alpha=0.25)
                axes.plot(frame["step"], smooth[name], color=colour, linestyle=dash, linewidth=1.5)
                words = [NAMES.get(word, word) for word in label.split("/") if word]
                ends.append((value, " ".join([*words, f"{value:.2f}"]), colour))
            if own:
                # The first steps may be many times as high as all others; they would flatten what there is to see.
                axes.set_ylim(0, 1.1 * frame[own].iloc[len(frame) // 50 :].quantile(0.995).max())
                axes.margins(x=0.01)
                labels.append((axes, ends))
            else:
                style.not_run(axes)
        for axes in panels[max(0, len(groups) - columns) : len(groups)]:
            axes.set_xlabel("optimizer steps")
            axes.tick_params(labelbottom=True)
        figure.supylabel("weighted loss", fontsize=style.points(8.5))
        style.note(figure, f"Run {title}. {note}" if title else note)
        for axes, ends in labels:
            style.label_ends(axes, ends, 7.5)
    return figure


def summed(frame: pd.DataFrame) -> pd.DataFrame:
    """Parts that a library logs layer by layer, added up by kind: "detection/class" for "loss_vfl", "loss_vfl_aux_0", "loss_vfl_dn_1"."""

    def kind(name: str) -> str:
        found = OF_LIBRARY.match(name)
        return f"detection/{KINDS.get(found[1], found[1])}" if found else name

    return frame.T.groupby(kind, sort=False).sum(min_count=1).T if len(frame) else frame
