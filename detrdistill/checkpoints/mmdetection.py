"""What the text of an mmdetection config says that a file of its weights carries: read as text, never executed."""

import re
from pathlib import Path
from typing import Any

from detrdistill.checkpoints.hugging_face import form_of
from detrdistill.errors import InputError
from detrdistill.recipes.parts import Resize

_NUMBERS = r"\[\s*(\d{1,9}\.?\d{0,9}),\s*(\d{1,9}\.?\d{0,9}),\s*(\d{1,9}\.?\d{0,9}),?\s*\]"


def fields_of_text(text: str, path: Path) -> dict[str, Any]:
    """A recipe's fields, of what the text says once, or each time the same.

    Without a word in the config, its images are prepared as in the DETR papers: so are they in mmdetection's own configs of Deformable
    and Conditional DETR, and in AdaMixer's.

    Raises:
        InputError: it wants its images otherwise than the kit can prepare them.
    """

    def stated(pattern):
        found = set(re.findall(pattern, text))
        return found.pop() if len(found) == 1 else None

    if re.search(r"\b(bgr_to_rgb|to_rgb)=False", text) or "keep_ratio=False" in text:
        raise InputError(f"weights {path}: its config wants BGR images or stretches them, which the kit does not; take another checkpoint")
    found: dict[str, Any] = {}
    heads, points = stated(r"\bnum_heads=(\d{1,6})\b"), stated(r"\bnum_points=(\d{1,6})\b")
    # Deformable attention has eight heads where the config says nothing, whatever it says of the other attention.
    if heads and (heads == "8" or points or "ConditionalDETR" in text):
        found["heads"] = int(heads)
    if points and (heads or "num_heads=" not in text):  # attentions with different heads are not the kit's
        found["points"] = int(points)
    refine, queries = stated(r"\bwith_box_refine=(True|False)"), stated(r"\bnum_quer(?:y|ies)=(\d{1,6})\b")
    if refine:
        two_stage = stated(r"\bas_two_stage=(True|False)") == "True"
        found |= form_of({"with_box_refine": refine == "True", "two_stage": two_stage, "queries": int(queries or 300)}, "queries")
    resize: dict[str, Any] = {
        name: [round(float(x) / 255, 6) for x in values] for name in ("mean", "std") if (values := stated(rf"\b{name}={_NUMBERS}"))
    }
    if sides := stated(r"\b(?:img_)?scale=\(\s*(\d{1,6}),\s*(\d{1,6}),?\s*\)"):
        resize |= dict(zip(("short", "long"), sorted(map(int, sides)), strict=True))
    return found | {"resize": Resize.read(resize, where=f"weights {path}")}
