"""The parameters of notebooks, checked."""

import re
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, field_validator

from detrdistill.recipes.presets import PRESETS
from detrdistill.recipes.schema import Strict
from detrdistill.recipes.words import DEFORMABLE

SHARED = ("resize", "data", "precision")  # what images a detector sees and how it computes: a student's are its teacher's too


class Parameters(Strict):
    """The parameters that notebooks share, and below `progress` those that only some have.

    YAML's text numbers are accepted, and a single one where a list is meant.

    Attributes:
        detector, detectors: one, or several; none: all that the preset has recipes for.
        setting: whose weights are looked at: teacher, student, or methods joined by "+".
        image: number of a validation image, or the path of an image file.
        images: numbers of validation images.
        rows: names of rows whose weights are tuned.
        interactive: sliders where they are of use.
        data: folder of COCO json and images; empty: the preset's data.
        results: folder of runs; empty: the preset's.
    """

    preset: str
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
    changes: dict[str, Any] = Field(default_factory=dict)
    device: Literal["auto", "cpu", "cuda"]
    progress: bool
    detector: str = DEFORMABLE
    detectors: tuple[str, ...] | None = None
    setting: str = "teacher"
    image: NonNegativeInt | Path = 0
    images: tuple[NonNegativeInt, ...] = ()
    rows: tuple[str, ...] = ()
    interactive: bool = False
    data: str = ""
    results: str = ""

    @field_validator("preset")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in PRESETS:
            raise ValueError(f"unknown preset; known: {', '.join(PRESETS)}")
        return value

    @field_validator("rows", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value  # their names have spaces and commas

    @field_validator("seeds", "images", "detectors", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        if isinstance(value, str):
            value = value.replace(",", " ").split()
        return value if isinstance(value, list | tuple | None) else [value]

    @field_validator("image", mode="before")
    @classmethod
    def _number_or_file(cls, value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, int | str | Path):
            raise ValueError("give the number of a validation image, or the path of an image file")
        try:
            return int(value)
        except (TypeError, ValueError):
            path = Path(value).expanduser()
        if not path.is_file():
            raise ValueError(f"no such file (looked in {Path.cwd()}); give the number of a validation image, or the path of an image file")
        return path

    @field_validator("data")
    @classmethod
    def _folder(cls, value: str) -> str:
        if value and not Path(value).expanduser().is_dir():
            raise ValueError(f"no such folder (looked in {Path.cwd()}); give one with COCO json and images, or nothing")
        return value


def _injected_in_vain(known: Collection[str]) -> list[str]:
    """Parameters that papermill injected and no cell knows: of a mistyped name it only warns, and the default would run."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    injected, own = set(), set(known)
    for cell in shell.user_ns.get("In", ()) if shell else ():
        (injected if cell.startswith("# Parameters\n") else own).update(re.findall(r"^(\w+)\s*(?::[^=\n]*)?=(?!=)", cell, re.MULTILINE))
    return sorted(injected - own)
