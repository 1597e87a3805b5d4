"""What a JSON file of someone else's may hold, read with care: numbers, ids, texts."""

import math
import unicodedata
from typing import Any

LARGEST_ID = 2**53  # pycocotools keeps ids in float64 arrays
UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # line breaks and what else steers a terminal; halves of surrogate pairs, which no file can hold


def whole(value: Any) -> int | None:
    """The value as an id: a whole number, also where it is written as 1.0, as pandas does; else None."""
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST_ID else None


def is_id(value: Any) -> bool:
    return isinstance(value, int) and whole(value) is not None


def is_length(value: float | None) -> bool:
    return value is not None and 1 <= value < 2**20 and value == int(value)


def number(value: Any) -> float | None:
    """The value if it is a finite number, not a bool; else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value) if isinstance(value, float) or abs(value) >= LARGEST_ID else value
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def steers(text: str) -> bool:
    """Whether a text could move a terminal's cursor or cannot be a file's name."""
    return any(unicodedata.category(letter) in UNPRINTABLE for letter in text)


def show(value: Any) -> str:
    """A value on one line, cut short."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # integers of more than 4300 digits, nests
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def is_quoted_number(value: Any) -> bool:
    return isinstance(value, str) and len(value) < 20 and value.isascii() and value.replace(".", "", 1).removeprefix("-").isdigit()


def show_number(value: Any) -> str:
    """A value where a number is meant; of a number in quotes, how to write it."""
    return f"{show(value)} (write {value}, without quotes)" if is_quoted_number(value) else show(value)


def counted(number: int, what: str) -> str:
    """ "1 image", "2 images", "3 classes"."""
    return f"{number} {what}" + ("" if number == 1 else "es" if what.endswith("s") else "s")
