"""Names, shapes and first values of all parameters at full size, against the official models."""

import json
from typing import Any

import pytest
import torch

from detrdistill.checkpoints.names import OFFICIAL_ADAMIXER, OFFICIAL_CONDITIONAL, OFFICIAL_DEFORMABLE, Table, our_name
from detrdistill.models.adamixer import AdaMixer
from detrdistill.models.conditional_detr import ConditionalDETR
from detrdistill.models.deformable_detr import DeformableDETR
from tests.parity.conftest import SELECTION
from tests.parity.shared import Channels

OFFICIAL = json.loads((SELECTION / "state_dict_keys.json").read_text(encoding="utf-8"))["models"]
# A ResNet-50 without its weights, from C2 and from C3 on.
C2_TO_C5, C3_TO_C5 = Channels([256, 512, 1024, 2048], [4, 8, 16, 32]), Channels([512, 1024, 2048])
MODELS = {
    "conditional_detr_r50": (lambda: ConditionalDETR(C3_TO_C5, classes=91), OFFICIAL_CONDITIONAL),
    "deformable_detr_r50": (lambda: DeformableDETR(C3_TO_C5, classes=91), OFFICIAL_DEFORMABLE),
    "deformable_detr_r50_box_refine": (lambda: DeformableDETR(C3_TO_C5, classes=91, form="box_refine"), OFFICIAL_DEFORMABLE),
    "deformable_detr_r50_two_stage": (lambda: DeformableDETR(C3_TO_C5, classes=91, form="two_stage"), OFFICIAL_DEFORMABLE),
    "deformable_detr_r50_single_scale": (lambda: DeformableDETR(C3_TO_C5, classes=91, levels=1), OFFICIAL_DEFORMABLE),
    # The table holds one of its equal stages.
    "adamixer_r50": (lambda: AdaMixer(C2_TO_C5, classes=80, decoder_layers=1), OFFICIAL_ADAMIXER),
}


def table(name: str, renames: Table) -> dict[str, list[Any]]:
    """Shape, kind and statistics of every official parameter under our names."""
    model = OFFICIAL[name]
    keys = model.get("keys", {})
    if "relative_to" in model:
        base = OFFICIAL[model["relative_to"]]["keys"]
        keys = {key: row for key, row in base.items() if key not in model["missing"]} | model["added"] | model["changed"]
    one_head = name.startswith("deformable") and not name.endswith(("box_refine", "two_stage"))
    return {our_name(key, renames, one_head): row for key, row in keys.items()}


@pytest.mark.parametrize("name", MODELS)
def test_parameters(name: str) -> None:
    build, renames = MODELS[name]
    torch.manual_seed(0)
    ours, official = build().state_dict(), table(name, renames)
    assert set(ours) == set(official), sorted(set(ours) ^ set(official))[:6]
    wrong = [key for key, value in ours.items() if list(value.shape) != official[key][0]]
    assert not wrong, f"other shapes: {wrong[:6]}"
    wrong = []
    for key, value in ours.items():
        mean, std, low, high = official[key][2]
        # Both are samples of n numbers of one distribution.
        slack = 8 * std / value.numel() ** 0.5 + 5e-4 * max(1, abs(mean))  # printed with four digits
        found = value.std(correction=0).item() if value.numel() > 1 else 0.0
        if abs(value.mean().item() - mean) > slack or abs(found - std) > slack:
            wrong.append(f"{key}: mean {value.mean():.4g}, std {found:.4g} instead of {mean:.4g}, {std:.4g}")
        elif value.numel() >= 1000 and not (0.7 < (value.max() - value.min()).item() / max(high - low, 1e-9) < 1.4 or high == low):
            wrong.append(f"{key}: from {value.min():.4g} to {value.max():.4g} instead of {low:.4g} to {high:.4g}")
    assert not wrong, "other first values: " + "; ".join(wrong[:6])
