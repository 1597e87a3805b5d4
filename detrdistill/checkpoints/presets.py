"""Presets whose teacher, or whose students' start, is a published detector: its sizes are read from its files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from detrdistill.checkpoints.locate import locate
from detrdistill.errors import InputError
from detrdistill.recipes.families import FAMILIES
from detrdistill.recipes.parts import BackboneRecipe, Resize, Schedule
from detrdistill.recipes.presets import Preset, get_preset, get_presets
from detrdistill.recipes.recipe import Recipe
from detrdistill.recipes.words import DEFORMABLE

NEEDED = ("heads", "points", "queries")  # what a file's tensors do not show, and what lies beside them may not say
PREPARED = ("resize.short", "resize.long", "resize.stretch", "resize.mean", "resize.std")  # which a file may say in several ways
MEASURED = Schedule(steps=0, batch=4)  # so many images at once
FOLLOWED = ("detector", "form", "levels", "backbone.dilation", "resize.short", "resize.long")
OF_TEACHER, OF_STUDENT = "teacher.", ""  # how changes call their fields


@dataclass(frozen=True)
class Published:
    """A detector that others trained, as a recipe's fields.

    Attributes:
        fields: `start` and the architecture.
        resize: how it wants its images prepared: as the file says, or else as the published DETRs do.
    """

    fields: dict[str, Any]
    resize: Resize

    @property
    def detector(self) -> str:
        return self.fields["detector"]

    def recipe(self, like: Recipe, **changes: Any) -> Recipe:
        """A recipe of it on the data of `like`, and with its precision, seed and schedule."""
        own = ("dropout",) if self.detector not in FAMILIES else ()
        kept = {name: getattr(like, name) for name in ("data", "precision", "seed", "schedule", *own)}
        resize = self.resize.replace(train=like.resize.train)
        return Recipe.read(kept | {"resize": resize} | self.fields | changes, where=str(self.fields["start"].path))


def choose_presets(
    name: str,
    detectors: Sequence[str] = (),
    teacher: str = "",
    start: str = "",
    changes: Mapping[str, Any] | None = None,
    say: Callable[[str], object] | None = None,
) -> list[Preset]:
    """The presets called `name`, with a published detector as teacher, or as what students start from.

    Students follow their teacher where methods need it: its family, two-stage form, levels, dilation, and the sizes of its images. A
    published teacher needs an AP above 0 to teach; a preset's own floor is for its own teacher.

    Args:
        detectors: of the students; without, those of the preset, or of the family of the published detector.
        teacher, start: as `locate` takes them; "" for none.
        changes: what the user states: settings that the files do not tell, such as "teacher.heads" or "points"; None where it cannot.
        say: called with a line on what follows the published detector instead of the preset.

    Raises:
        InputError: an unknown preset or detector, a file that cannot be read, or that does not tell all settings.
    """
    if not teacher and not start:
        return get_presets(name, detectors)
    teaches = read_published(teacher, changes, OF_TEACHER) if teacher else None
    starts = read_published(start, changes, OF_STUDENT) if start else None
    changes = changes or {}
    family = (starts or teaches).detector
    if starts and (other := [one for one in detectors if one != family]):
        raise InputError(f"detector '{other[0]}': a student that starts from {start} is a {family}; leave the detector out")
    made = []
    for detector in detectors or [family]:
        if detector in FAMILIES and not starts:
            raise InputError(
                f"detector '{detector}': preset {name} has no recipe for a student of transformers' families; name the model that it "
                "starts from (--start MODEL), or take another detector under predictions alone (--detector deformable_detr --set "
                "detrdistill.features=0 --set detrdistill.assignment=0)"
            )
        # A model of transformers brings its own architecture; the rest is the preset's.
        preset = get_preset(name, DEFORMABLE if starts and detector in FAMILIES else detector)
        changed = _with_published(preset, teaches, starts, changes)
        if say:
            say(f"as the published detector has it: {', '.join([f'preset {name} for {detector} alone', *_followed(preset, changed)])}")
        made.append(changed)
    return made


def report_folder(root: Path, presets: Sequence[Preset]) -> Path:
    """Where tables, figures and page of these presets go: those with a published detector do not overwrite the preset's own in `root`."""
    starts = {"taught": presets[0].teacher.start, "started": presets[0].student.start}
    name = "-".join(f"{word}-{start.sha256[:8]}" for word, start in starts.items() if start is not None)
    return root / f"published-{name}" if name else root


def read_published(model: str, changes: Mapping[str, Any] | None, part: str) -> Published:
    """What a recipe needs to know of the detector called `model`.

    Args:
        part: "teacher." or "": what its settings are called in `changes`.

    Raises:
        InputError: it is not found, cannot be read, or does not tell all settings.
    """
    from detrdistill.checkpoints.pretrained import read_with_settings  # only now: torch takes seconds

    ask, hint = f"--set {part}{{}}=", ""
    if changes is None:  # a run's record says them all
        ask, hint, changes = (
            "--set teacher.{}=",
            f" to 'detrdistill train PRESET teacher --teacher {model}', then name that run's id here",
            {},
        )
    start = locate(model).replace(part=changes.get(f"{part}start.part", ""))
    stated = {name: changes[part + name] for name in (*NEEDED, *PREPARED) if part + name in changes}
    _, about = read_with_settings(start.path, stated, part=start.part or None, ask=ask, hint=hint)
    known = dict(about.settings)
    resize = known.pop("resize", Resize())
    if known["detector"] in FAMILIES:
        return Published({"start": start} | known, resize)
    backbone = dict(known["backbone"])
    if backbone["weights"] == "crops":  # which freeze no stage by default, where weights of a start freeze one
        backbone["frozen_stages"] = known["backbone"].stages_frozen
    # Norms that were trained go on training in the kit's own runs alone: elsewhere they are frozen, or in evaluation mode.
    trained = about.origin == "kit" and backbone["weights"] == "none"
    known["backbone"] = BackboneRecipe.read(backbone | {"weights": "none" if trained else "start", "crops": None}, where=str(start.path))
    return Published({"start": start} | known, resize)


def _with_published(preset: Preset, teaches: Published | None, starts: Published | None, changes: Mapping[str, Any]) -> Preset:
    student, teacher, method = preset.student, preset.teacher, preset.method
    if starts:
        student = starts.recipe(student)
        if student.family:  # of whose maps nothing was measured yet
            method = method.replace(features=0.0, normalised=True)
    if teaches:
        teacher = teaches.recipe(
            student, schedule=MEASURED, seed=0, precision="fp32", **({} if teaches.detector in FAMILIES else {"dropout": 0.0})
        )
        teacher = teacher.replace(**{"resize.train": "none"})
        student = student if starts else student.replace(**_needs(teacher, student))
        if teacher.query_form != student.query_form:  # the method that the user makes of it must fit before the rest is changed
            parts = {part: changes[f"detrdistill.{part}"] for part in ("features", "assignment") if f"detrdistill.{part}" in changes}
            method = method.replace(**parts)
        preset = replace(preset, floor=min(preset.floor, 0.0), students_a_teacher=None)
    elif starts:
        teacher = teacher.replace(**_needs(student, teacher))
    return replace(preset, teacher=teacher, student=student, method=method)


def _needs(leading: Recipe, following: Recipe) -> dict[str, Any]:
    """Sizes of images, and what must be alike for the methods that compare maps and share queries, taken from `leading`."""
    sizes = {f"resize.{side}": getattr(leading.resize, side) for side in ("short", "long", "stretch")}
    if leading.detector != following.detector or leading.family:
        return sizes
    other_form = (leading.form == "two_stage") != (following.form == "two_stage")
    form = {"form": leading.form} if other_form else {}
    return sizes | form | {"levels": leading.levels, "backbone.dilation": leading.backbone.dilation}


def _followed(before: Preset, after: Preset) -> list[str]:
    """What differs from the preset in the students, or in a teacher that follows them."""

    def value(recipe: Recipe, name: str) -> Any:
        part, _, inner = name.partition(".")
        return getattr(getattr(recipe, part), inner) if inner else getattr(recipe, part)

    found = []
    for who in ("student", "teacher"):
        old, new = getattr(before, who), getattr(after, who)
        if new.start is None:
            pairs = [(name, value(old, name), value(new, name)) for name in FOLLOWED]
            found += [f"the {who}'s {name} {now} ({then} in the preset)" for name, then, now in pairs if now != then]
    return found
