"""How a Hugging Face model wants its images: what preprocessor_config.json says, as a recipe's `resize`."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detrdistill.errors import InputError
from detrdistill.models.weights import read_json
from detrdistill.recipes.parts import MEAN, STD, Resize


def resize_of(folder: Path) -> Resize:
    """Sizes, mean and deviation of a folder's image processor; those of the DETR papers where the folder has none.

    Raises:
        InputError: the file is damaged, or asks for what the kit does not do to images.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return Resize()
    config = read_json(path)
    sides, (mean, std) = _sides(config, path), _statistics(config, path)
    return Resize.read(sides | {"mean": mean, "std": std}, where=str(path))


def _sides(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Shorter side and limit of the longer one, or height and width of all images."""
    size = config.get("size", {"shortest_edge": 800, "longest_edge": 1333})
    limit = config.get("max_size")  # beside it, as older versions of transformers write it
    if type(size) is int:
        size = {"shortest_edge": size, "longest_edge": limit or 1333}
    elif isinstance(size, dict) and size.keys() == {"shortest_edge"} and limit:
        size = {"shortest_edge": size["shortest_edge"], "longest_edge": limit}
    if config.get("do_resize") is False:
        raise InputError(f"{path}: 'do_resize' is false, and the kit resizes every image; set it to true and 'size' to the images' size")
    if config.get("resample", 2) not in (2, None):
        raise InputError(
            f"{path}: 'resample' is {config['resample']!r}, and the kit resizes bilinearly; set it to 2 if the detector bears it"
        )
    if isinstance(size, dict) and {"shortest_edge", "longest_edge"} <= size.keys():
        return {"short": size["shortest_edge"], "long": size["longest_edge"]}
    if isinstance(size, dict) and size.keys() == {"height", "width"}:
        return {"short": size["height"], "long": size["width"], "stretch": True}
    if isinstance(size, dict) and size.keys() == {"max_height", "max_width"} and size["max_height"] == size["max_width"]:
        return {"short": size["max_height"], "long": size["max_width"]}  # the longer side becomes this long, whatever the shorter is
    raise InputError(
        f"{path}: 'size' is {str(size)[:80]}, and the kit resizes to a shorter side within a longer, or to one height and width; set it to "
        "'shortest_edge' and 'longest_edge' if the detector bears it"
    )


def _statistics(config: Mapping[str, Any], path: Path) -> tuple[list[float], list[float]]:
    """Mean and deviation of pixels from 0 to 1, of the three colours."""
    factor = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    found = []
    for name, default, neutral in (("image_mean", MEAN, 0.0), ("image_std", STD, 1.0)):
        values = config.get(name, default) if config.get("do_normalize", True) else (neutral,) * 3
        if isinstance(values, int | float):
            values = (values,) * 3
        numbers = [factor, *values] if isinstance(values, list | tuple) and len(values) == 3 else []
        if not numbers or not all(type(x) in (int, float) and math.isfinite(x) for x in numbers) or factor <= 0:
            raise InputError(
                f"{path}: '{name}' is {str(values)[:60]}, 'rescale_factor' {str(factor)[:20]}; restore them: three numbers, and one"
            )
        # A pixel p of 0 to 255 becomes (factor p - mean) / deviation there, (p / 255 - mean) / deviation here.
        found.append(list(values) if math.isclose(255 * factor, 1) else [value / (255 * factor) for value in values])
    return found[0], found[1]
