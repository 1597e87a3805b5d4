"""Boxes of annotations: read, cut at the border of their image, made from an outline where there is none; and which form a file's have.

COCO's form is [x, y, width, height] in pixels, x and y those of the upper left corner.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from pycocotools import mask

from detrdistill.data.values import is_quoted_number, number, show, whole
from detrdistill.errors import InputError

SMALLEST = 0.01  # pixels; COCO writes two decimals, so less than this is a side of zero
ROUNDING = 1.0  # pixels by which a box may leave its image and still be meant to lie in it
FEW = 4  # boxes; of fewer no form is told
FORMS = {"corners": "[x1, y1, x2, y2]", "centres": "[centre x, centre y, width, height]"}
PIXELS = "give [x, y, width, height] in pixels"


def read_box(value: Any, image: dict, note: Callable[..., None]) -> list[float] | None:
    """The box [x, y, w, h] within its image, or None if it is dropped."""
    numbers = finite_box(value)
    if numbers is None:
        quoted = isinstance(value, list) and any(map(is_quoted_number, value))
        return note("box", f"bbox is {show(value)}, not four finite numbers{' (write them without quotes)' * quoted}")
    x, y, w, h = numbers
    if w < SMALLEST or h < SMALLEST:
        return note("empty box", f"bbox {show(value)} has no width or no height")
    left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + w, float(image["width"])), min(y + h, float(image["height"]))
    if right - left < SMALLEST or bottom - top < SMALLEST:
        return note("box outside", f"bbox {show(value)} lies outside the image of {image['width']} x {image['height']}")
    beyond = max(left - x, top - y, x + w - right, y + h - bottom)
    if beyond <= 0:
        return numbers
    if beyond > SMALLEST:  # less is rounding, clipped without a word
        note("box partly outside", f"bbox {show(value)} reaches out of the image of {image['width']} x {image['height']}", "clip")
    return [left, top, right - left, bottom - top]


def finite_box(value: Any) -> list[float] | None:
    numbers = [number(one) for one in value] if isinstance(value, list) else []
    return None if len(numbers) != 4 or None in numbers else numbers


def box_of_outline(outline: Any, image: dict) -> list[float] | None:
    """The box around polygons [x1, y1, x2, y2, ...] or a run-length encoded mask of the image's size; None if there is no such thing."""
    if isinstance(outline, dict):
        return _box_of_mask(outline, image)
    rings = outline if isinstance(outline, list) else []
    points = [number(value) for ring in rings if isinstance(ring, list) and len(ring) >= 6 and len(ring) % 2 == 0 for value in ring]
    if not points or None in points:
        return None
    xs, ys = points[0::2], points[1::2]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _box_of_mask(outline: dict, image: dict) -> list[float] | None:
    height, width = image["height"], image["width"]
    counts, size = outline.get("counts"), outline.get("size")
    if size != [height, width]:
        return None
    if isinstance(counts, list):
        runs = [whole(one) for one in counts]
        if None in runs or min(runs, default=-1) < 0 or sum(runs) != height * width:
            return None
        outline = mask.frPyObjects({"counts": runs, "size": size}, height, width)
    # pycocotools reads on past the end of a text whose last letter is none that ends a number: of 6 bits the highest is "more follows".
    elif not (isinstance(counts, str) and re.fullmatch("[0-o]*[0-O]", counts)):
        return None
    return [float(one) for one in mask.toBbox(outline)]


def require_coco_form(boxes: Sequence[tuple[Sequence[float], float | None, dict]]) -> str | None:
    """Whether the boxes of a whole file are of COCO's form. What cannot be decided is a warning, which is returned.

    Args:
        boxes: [a, b, c, d] as listed, the area as listed (None if not), and the image.

    Raises:
        InputError: they make sense in another form alone.
    """
    if len(boxes) > 1 and all(max(box) <= 1 for box, _, _ in boxes):
        raise InputError(f"all boxes lie within one pixel, as if relative to the image; {PIXELS}")
    if len(boxes) < FEW:
        return None
    out = {form: sum(not _fits(form, box, image) for box, _, image in boxes) for form in ("coco", *FORMS)}
    areas = [(area, box) for box, area, _ in boxes if area and area > 0]
    as_corners = sum(_near(area, (c - a) * (d - b)) for area, (a, b, c, d) in areas)
    as_coco = sum(_near(area, c * d) for area, (_, _, c, d) in areas)
    for form, words in FORMS.items():
        # An eighth and more of a file's boxes out of their images, and in another form none is: nobody draws so.
        decided = out["coco"] * 8 >= len(boxes) and not out[form]
        if decided or (form == "corners" and not out[form] and as_corners >= 0.9 * len(boxes) > 2 * as_coco):
            by_area = f", and {as_corners} have the area of such boxes, {as_coco} of COCO's" if form == "corners" and areas else ""
            seen = f"{out['coco']} of {len(boxes)} do not fit into their images; read so, all do{by_area}"
            raise InputError(f"boxes are as if {words}: {seen}; {PIXELS}")
    form = min(FORMS, key=out.__getitem__)
    if out["coco"] * 20 >= len(boxes) and out[form] * 4 <= out["coco"]:
        return f"{out['coco']} of {len(boxes)} boxes do not fit into their images, {out[form]} if read as {FORMS[form]}; look at some drawn"
    return None


def _fits(form: str, box: Sequence[float], image: dict) -> bool:
    a, b, c, d = box
    if form == "corners":
        left, top, right, bottom = a, b, c, d
    elif form == "centres":
        left, top, right, bottom = a - c / 2, b - d / 2, a + c / 2, b + d / 2
    else:
        left, top, right, bottom = a, b, a + c, b + d
    inside = left >= -ROUNDING and top >= -ROUNDING and right <= image["width"] + ROUNDING and bottom <= image["height"] + ROUNDING
    return inside and left < right and top < bottom


def _near(one: float, other: float) -> bool:
    return abs(one - other) <= 0.02 * abs(one) + 1
