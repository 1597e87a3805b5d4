"""What people state, in a notebook or on a command line, checked and made into recipes. No torch here."""

import json
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, field_validator

from detrdistill.checkpoints.presets import choose_presets
from detrdistill.errors import InputError
from detrdistill.recipes.identity import all_runs
from detrdistill.recipes.methods import METHODS
from detrdistill.recipes.parts import Digits
from detrdistill.recipes.presets import PRESETS, Preset, get_preset
from detrdistill.recipes.recipe import CropRecipe, Recipe
from detrdistill.recipes.schema import Strict
from detrdistill.recipes.tables import make_table, only_parents, possible_tables
from detrdistill.recipes.words import DEFORMABLE, DETECTORS
from detrdistill.runs.pinned import pinned_preset
from detrdistill.runs.tuning import runs_before_tuning

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
        threshold: the least score of what counts as found.
        data: folder of COCO json and images; empty: the preset's data.
        teacher, start: a published detector that teaches, or that students start from, as `checkpoints.locate` takes it; empty: none.
        results: folder of runs; empty: the preset's.
    """

    preset: str
    seeds: tuple[NonNegativeInt, ...]
    changes: dict[str, Any] = Field(default_factory=dict)
    device: str
    progress: bool
    detector: str = DEFORMABLE
    detectors: tuple[str, ...] | None = None
    setting: str = "teacher"
    image: NonNegativeInt | Path = 0
    images: tuple[NonNegativeInt, ...] = ()
    rows: tuple[str, ...] = ()
    interactive: bool = False
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    data: str = ""
    teacher: str = ""
    start: str = ""
    results: str = ""

    @field_validator("preset")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in PRESETS:
            raise ValueError(f"unknown preset; known: {', '.join(PRESETS)}")
        return value

    @field_validator("device")
    @classmethod
    def _device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
            raise ValueError("use auto, cpu, cuda, or cuda:1 for the second GPU")
        return value

    @field_validator("seeds")
    @classmethod
    def _some(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value:
            raise ValueError("give at least one")
        return value

    @field_validator("rows", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value  # their names have spaces and commas

    @field_validator("seeds", "images", "detectors", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        if isinstance(value, str):
            value = value.strip("[]() ").replace(",", " ").split()
        return value if isinstance(value, list | tuple | None) else [value]

    @field_validator("changes", mode="before")
    @classmethod
    def _mapping(cls, value: object) -> object:
        try:
            return json.loads(value) if isinstance(value, str) else value
        except ValueError:
            raise ValueError('give a mapping, such as {"schedule.steps": 3}') from None

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


def read_parameters(given: Mapping[str, object]) -> Parameters:
    """A notebook's parameters, checked.

    Raises:
        InputError: a name that the notebook does not have, a wrong type, a value out of range, a file or folder that is not there.
    """
    if unknown := unknown_injected(given):
        raise InputError(f"parameters: unknown {', '.join(unknown)}, injected by papermill; known here: {', '.join(given)}")
    return Parameters.read(given, where="parameters")


def only_seed(seeds: Sequence[int]) -> int:
    """The seed of a notebook that shows one run.

    Raises:
        InputError: there are several.
    """
    if len(seeds) > 1:
        raise InputError(
            f"parameters: 'seeds' = {', '.join(map(str, seeds))}: this notebook shows runs of one seed; give one, or run 15_your_own_data "
            "or a table's notebook, which show mean and interval of several"
        )
    return seeds[0]


def unknown_injected(known: Collection[str]) -> list[str]:
    """Parameters that papermill injected and no cell knows: papermill only warns of a mistyped name, and the default would run."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    injected, own = set(), set(known)
    for cell in shell.user_ns.get("In", ()) if shell else ():
        (injected if cell.startswith("# Parameters\n") else own).update(re.findall(r"^(\w+)\s*(?::[^=\n]*)?=(?!=)", cell, re.MULTILINE))
    return sorted(injected - own)


def make_presets(read: Parameters) -> dict[str, Preset]:
    """The preset of each detector that is asked for, with the user's changes; of all that it has recipes for where none is named.

    Raises:
        InputError: the preset has no recipes for a detector, has no such setting, or a change names no field or has a bad value.
    """
    name, wanted = ("detector", (read.detector,)) if read.detectors is None else ("detectors", read.detectors)
    refuse_models(read.changes)
    chosen: list[Preset] = []
    if read.teacher or read.start:  # whose family is meant, since a notebook's one detector is never left empty
        chosen = choose_presets(read.preset, read.detectors or (), read.teacher, read.start, read.changes, say=print)
    presets = {preset.student.detector: preset for preset in chosen}
    for detector in () if presets else wanted or DETECTORS:
        try:
            presets[detector] = get_preset(read.preset, detector)
        except InputError as error:
            if wanted:
                raise InputError(f"parameters: '{name}' = {detector!r}: {error}") from None
    try:
        presets = {detector: change_preset(preset, read.changes) for detector, preset in presets.items()}
    except InputError as error:
        raise InputError(f"parameters: 'changes': {error}") from None
    try:
        next(iter(presets.values())).recipe(read.setting)
    except InputError as error:
        raise InputError(f"parameters: 'setting' = {read.setting!r}: {error}") from None
    return presets


def change_preset(preset: Preset, changes: Mapping[str, Any]) -> Preset:
    """The preset with a user's changes to student, method and teacher.

    Raises:
        InputError: an unknown field, a wrong type, or a value out of range.
    """

    def fields_of(part: str) -> dict[str, Any]:
        return {name.removeprefix(part): value for name, value in changes.items() if name.startswith(part)}

    of_student = {name: value for name, value in changes.items() if not name.startswith(("method.", "teacher."))}
    shared = {name: value for name, value in of_student.items() if name.split(".")[0] in SHARED}
    if fields_of("method."):  # a weight that is stated holds: DETRDistill's are multiplied first, and those of its parts not at all
        tuned = {name: factor for name, factor in preset.tuned.items() if name in METHODS and name != "detrdistill"}
        preset = replace(preset, method=preset.tuned_method("detrdistill"), tuned=tuned)
    return replace(
        preset,
        student=preset.student.replace(**of_student),
        teacher=preset.teacher.replace(**(_own(preset.teacher, shared) | fields_of("teacher."))),
        method=preset.method.replace(**fields_of("method.")),
    )


def _own(teacher: Recipe, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Of fields that students and teachers share, those that this one takes: a published one is measured once, on images of its own."""
    return {name: value for name, value in shared.items() if not teacher.published or name.split(".")[0] == "data"}


def refuse_models(changes: Collection[str]) -> None:
    """Raise InputError where a published detector is named as if it were a field of the recipe."""
    for name in ("teacher", "teacher.weights", "teacher.start", "teacher.start.path", "weights", "start", "start.path"):
        if name in changes:
            part = "teacher" if name.startswith("teacher") else "start"
            raise InputError(f"'{name}' is no field to set; name a published detector with --{part} MODEL (in a notebook: '{part}')")


def require_images(read: Parameters, preset: Preset) -> None:
    """Raise InputError where the parameters number an image that the preset's embedded digits do not have."""
    data = preset.student.data
    if not isinstance(data, Digits):
        return
    for name, value in (("image", read.image), *(("images", one) for one in read.images)):
        if isinstance(value, int) and value >= data.val:
            raise InputError(
                f"parameters: '{name}' = {value}: the validation images of preset {read.preset} are numbered 0 to {data.val - 1}"
            )


def assigned(words: Sequence[str]) -> dict[str, str]:
    """The values of "name=value" words, by name.

    Raises:
        InputError: one has no "=".
    """
    if odd := [word for word in words if not word.partition("=")[0] or "=" not in word]:
        raise InputError(f"'{odd[0]}' is not of the form name=value")
    return {name.strip(): value.strip() for name, _, value in (word.partition("=") for word in words)}


def is_run_id(row: str) -> bool:
    return bool(re.search("-[0-9a-f]{8}$", row))


def named_run(presets: Sequence[Preset], row: str, seed: int) -> tuple[Recipe | CropRecipe, bool] | None:
    """The run of these presets' tables that has this id, whichever detectors the tables are made for, and whether it is `only_parents`.

    None if `row` is no id of one.
    """
    if not is_run_id(row):
        return None
    for chosen in (presets, *([one] for one in presets)):  # a table of one detector depends on which there are
        for pin in (False, True):
            made = [pinned_preset(one) if pin else one for one in chosen]
            tables = [make_table(name, made, (seed,)) for name in possible_tables(made)]
            runs = all_runs(recipe for table in tables for recipe in table.recipes())
            if row in runs:
                return runs[row], row in only_parents(tables)
    before = runs_before_tuning(presets)
    return (before[row], True) if row in before else None


def on_other_data(recipe: Recipe, data: Path) -> Recipe:
    """The recipe and its teacher's on another data folder; a floor stated for the preset's data means nothing there."""
    changes: dict[str, object] = {"data": {"name": "folder", "path": data}}
    if getattr(recipe, "teacher", None) is not None:
        changes |= {"teacher": on_other_data(recipe.teacher, data), "teacher_floor": min(recipe.teacher_floor, 0.0)}
    return recipe.replace(**changes)


def with_switches(recipe: Recipe, changes: dict[str, str]) -> Recipe:
    """The recipe with the changes to its methods, which are taken out of `changes`.

    Raises:
        InputError: a change to a method that the recipe does not have, an unknown switch, or a wrong value.
    """
    stated: dict[str, dict[str, str]] = {}
    for name in [name for name in changes if name.split(".")[0] in METHODS]:
        method, _, switch = name.partition(".")
        stated.setdefault(method, {})[switch] = changes.pop(name)
    held = {method.name: method for method in getattr(recipe, "methods", ())}
    if strange := stated.keys() - held.keys():
        raise InputError(f"'{min(strange)}' is no method of this row; its methods are: {', '.join(held) or 'none'}")
    return recipe.replace(methods=[one.replace(**stated.get(name, {})) for name, one in held.items()]) if stated else recipe


def shared_with_teacher(recipe: Recipe, changes: dict[str, str]) -> dict[str, str]:
    """The changes, and those that decide what images the detectors see and how they compute, for the teacher too."""
    if getattr(recipe, "teacher", None) is None:
        return changes
    shared = _own(recipe.teacher, {name: value for name, value in changes.items() if name.split(".")[0] in SHARED})
    # In this order: what is stated for the teacher holds.
    return {f"teacher.{name}": value for name, value in shared.items()} | changes
