"""Figure 7: which object each query is matched with at each decoder stage, and how often that changes from stage to stage."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from torch import nn

from detrdistill.analysis.detections import forward, ground_truth, portions
from detrdistill.criterion import matched_objects
from detrdistill.data.coco import CocoDataset, collate
from detrdistill.recipes.words import TITLES


def assignments(detector: nn.Module, dataset: CocoDataset, indices: Sequence[int]) -> np.ndarray:
    """The object that each query is matched with at each stage, -1 for none. [S B Q]."""
    batches = (collate([dataset[index] for index in some]) for some in portions(indices))
    return np.concatenate([matched_objects(forward(detector, batch), batch.targets).numpy() for batch in batches], axis=1)


def instability(assigned: np.ndarray) -> dict[str, np.ndarray]:
    """How many queries and how many objects of an image change hands from each decoder stage to the next, [B S-1] each.

    A query changes if its object does, or if it gains or loses one: the score of DN-DETR (Li et al., CVPR 2022), there from epoch to
    epoch. An object changes if its query does.

    Args:
        assigned: of `assignments`, [S B Q].
    """
    numbers = np.arange(assigned.max(initial=-1) + 1)[:, None, None, None]
    holds = assigned == numbers  # [N S B Q]
    holder = np.where(holds.any(-1), holds.argmax(-1), -1)
    return {"queries": (assigned[1:] != assigned[:-1]).sum(-1).T, "objects": (holder[:, 1:] != holder[:, :-1]).sum(0).T}


def instability_table(
    scores: Mapping[str, Sequence[Mapping[str, np.ndarray]]], dataset: CocoDataset, indices: Sequence[int]
) -> pd.DataFrame:
    """A line a setting, means over seeds: changed queries and objects an image over all steps, and the part of objects a step.

    Args:
        scores: for every setting a list over seeds of `instability` on the images `indices`; its means are empty if the list is.
    """
    objects, lines = sum(len(truth.boxes) for truth in ground_truth(dataset, indices)), []
    for setting, runs in scores.items():
        means = {f"{name} an image": _mean(run[name].sum(1).mean() for run in runs) for name in ("queries", "objects")}
        part = _mean(run["objects"].sum() / max(objects * run["objects"].shape[1], 1) for run in runs)
        lines.append({"changed": TITLES.get(setting, setting), "seeds": len(runs), **means, "percent of objects a step": 100 * part})
    return pd.DataFrame(lines).set_index("changed").round(2)


def _mean(values: Iterable[float]) -> float:
    return pd.Series([*values], dtype=float).mean()  # NaN without values, where numpy warns
