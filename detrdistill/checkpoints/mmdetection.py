"""What the text of an mmdetection config says that a file of its weights carries: read as text, never executed."""

import re
from math import isfinite
from pathlib import Path
from typing import Any

from detrdistill.checkpoints.hugging_face import form_of
from detrdistill.errors import InputError
from detrdistill.recipes.parts import Resize


def fields_of_text(text: str, path: Path) -> dict[str, Any]:
    """A recipe's fields, of what the text says once, or each time the same; of images' preparation, what its test pipeline says.

    Without a word in the config, its images are prepared as in the DETR papers: so are they in mmdetection's own configs of Deformable
    and Conditional DETR, and in AdaMixer's.

    Returns:
        the fields, and "unclear": names of those that it says in several ways.

    Raises:
        InputError: it wants its images otherwise than the kit can prepare them.
    """

    def stated(name, value):
        found = set(re.findall(_says(name) + value, text))
        return found.pop() if len(found) == 1 else None

    if re.search(_says("(?:bgr_to_rgb|to_rgb|keep_ratio)") + "False", text):
        raise InputError(f"weights {path}: its config wants BGR images or stretches them, which the kit does not; take another checkpoint")
    found: dict[str, Any] = {}
    heads, points = stated("num_heads", r"(\d{1,6})\b"), stated("num_points", r"(\d{1,6})\b")
    # Deformable attention has eight heads where the config says nothing, whatever it says of the other attention.
    if heads and (heads == "8" or points or "ConditionalDETR" in text):
        found["heads"] = int(heads)
    if points and (heads or not re.search(_says("num_heads"), text)):  # attentions with different heads are not the kit's
        found["points"] = int(points)
    refine, queries = stated("with_box_refine", "(True|False)"), stated("num_quer(?:y|ies)", r"(\d{1,6})\b")
    if refine:
        two_stage = stated("as_two_stage", "(True|False)") == "True"
        found |= form_of({"with_box_refine": refine == "True", "two_stage": two_stage, "queries": int(queries or 300)}, "queries")
    resize: dict[str, Any] = {}
    unclear: list[str] = []
    test_pipeline = "".join(re.findall(r"(?ms)^test_pipeline\s*=.*?(?=^\w|\Z)", text))
    for name, fields, count in (("mean", ["mean"], 3), ("std", ["std"], 3), ("(?:img_)?scale", ["short", "long"], 2)):
        values = _numbers(name, count, text)
        if len(values) > 1:  # training's may be another, and a choice of several
            values = _numbers(name, count, test_pipeline) or {None}
        if len(values) > 1 or None in values:
            unclear += [f"resize.{field}" for field in fields]
        elif values:
            (numbers,) = values
            scaled = [float(f"{x / 255:.12g}") for x in numbers]  # 0.485 of 123.675, in which nothing is lost
            resize |= {name: scaled} if count == 3 else dict(zip(fields, sorted(map(int, numbers)), strict=True))
    return found | {"resize": Resize.read(resize, where=f"weights {path}"), "unclear": tuple(unclear)}


def _says(name: str) -> str:
    """Pattern of `name=`, or of `'name':` in a dictionary."""
    return rf"\b{name}\b['\"]?\s{{0,9}}[=:]\s{{0,9}}"


def _numbers(name: str, count: int, text: str) -> set[tuple[float, ...] | None]:
    """Each different list of `count` numbers that the text says of `name`; None for a list of anything else."""
    found: set[tuple[float, ...] | None] = set()
    for content in re.findall(_says(name) + r"[\[(]([^\])]{0,200})", text):
        try:
            numbers = tuple(float(x) for x in content.split(",") if x.strip())
        except ValueError:
            numbers = ()
        fits = len(numbers) == count and all(map(isfinite, numbers)) and (count == 3 or all(x >= 1 and x == int(x) for x in numbers))
        found.add((numbers if count == 3 else tuple(sorted(numbers))) if fits else None)
    return found
