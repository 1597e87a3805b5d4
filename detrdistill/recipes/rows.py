"""A table as runs to compare, and its rows: the same setting under several seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from detrdistill.recipes.methods import Method
from detrdistill.recipes.parts import Digits
from detrdistill.recipes.presets import Preset
from detrdistill.recipes.recipe import Recipe
from detrdistill.recipes.words import NAMES, TITLES


@dataclass(frozen=True)
class Row:
    """One line of a table: the same setting under several seeds.

    Attributes:
        detector: its name in words.
        name: unique for a detector.
        family: the preset's setting that it is, such as "teacher", "student" or "detrdistill"; "" for a method with other switches.
        title: what the table calls it, `variant` at its end.
        baseline: the setting whose AP of the same seed the gain is over; "" for a row that is no method.
        published: the row's name in the published table; "" where the paper has no such row, or has it for another detector.
        column: the column there; its gain is called the same with "gain" for "AP".
        at: the part of the schedule after which AP is read off the curve; 1 is the end, and has all numbers.
        variant: what tells it from other rows of its family, such as a backbone; "" where it is the only one.
        tuned_as: the name that a weight of the row's own was tuned under, in `Preset.tuned`; "" for a row that has none.
        untuned: the same runs with the weights before tuning, which need not be run; empty in a table without a row that was tuned.
    """

    detector: str
    name: str
    family: str
    recipes: Mapping[int, Recipe]
    title: str
    baseline: str = ""
    published: str = ""
    column: str = "AP"
    at: float = 1.0
    variant: str = ""
    tuned_as: str = ""
    untuned: Mapping[int, Recipe] = field(default_factory=dict)

    @property
    def of_published(self) -> bool:
        """Whether a published detector takes part, so that the row is not the paper's."""
        return any(one.start is not None for recipe in self.recipes.values() for one in (recipe, recipe.teacher) if one is not None)


@dataclass(frozen=True)
class Table:
    """Runs to compare.

    Attributes:
        name: of the files, and of the notebook.
        published: the paper's table that these rows stand beside, such as "table3"; "" where there is none.
        title: what is compared, in words.
        measured_on: data and image size, in words.
    """

    name: str
    preset: str
    published: str
    title: str
    measured_on: str
    rows: tuple[Row, ...]

    def recipes(self) -> list[Recipe]:
        """All runs of the table."""
        return [recipe for row in self.rows for recipe in row.recipes.values()]


def measured_on(preset: Preset) -> str:
    """Data and image size of a preset, and whether that is COCO."""
    data = preset.student.data
    if isinstance(data, Digits):
        name = f"embedded digits, {data.size} px"
    else:
        name = f"folder {data.path.name}, shorter side {preset.student.resize.short} px"
    taught, started = preset.teacher.published, preset.student.start is not None
    name += "; taught by a published detector" * taught + f"; started from {'one' if taught else 'a published detector'}" * started
    return name if preset.name == "coco" else f"{name}; not a COCO result"


GAP = "not found"  # stands in the paper, but not in any source we could reach
Presets = Sequence[Preset]
Seeds = Sequence[int]


def row(
    preset: Preset,
    seeds: Seeds,
    setting: str,
    name: str,
    title: str = "",
    baseline: str = "student",
    published: str = "",
    variant: str = "",
) -> Row:
    """A setting of the preset under a name of its own; a method's gain is over `baseline`."""
    recipes = [preset.recipe(setting, seed) for seed in seeds]
    plain = setting in ("teacher", "student")
    # By the recipe's own seed: a teacher of several students is one run.
    by_seed = {recipe.seed: recipe for recipe in recipes}
    detector = NAMES[preset.student.detector]
    if published != GAP and not published.startswith(detector):
        published = ""  # what the paper measured with another detector does not belong beside this one
    title = ", ".join(filter(None, [title or TITLES[setting], variant]))
    return Row(detector, name, setting, by_seed, title, "" if plain else baseline, published, variant=variant)


def switched_row(
    preset: Preset,
    seeds: Seeds,
    name: str,
    title: str,
    changes: Mapping[str, object] | Method,
    published: str = "",
    tuned_as: str = "",
    variant: str = "",
) -> Row:
    """DETRDistill with other switches, or a method just as it is.

    Args:
        tuned_as: name of the row whose weight was tuned alone; "": the weights of DETRDistill as a whole.
        variant: what the title ends with, as in `Row`.
    """
    method = changes if isinstance(changes, Method) else preset.tuned_method("detrdistill", changes, tuned_as or "detrdistill")
    made = row(replace(preset, method=method, tuned={}), seeds, "detrdistill", name, title, published=published)
    return replace(made, family="", variant=variant, tuned_as=tuned_as)


def table(name: str, presets: Presets, published: str, title: str, rows: Sequence[Row]) -> Table:
    return Table(name, presets[0].name, published, title, measured_on(presets[0]), tuple(rows))


def best(presets: Presets, detector: str) -> Preset:
    """The preset of the detector that the paper's table is about, or the first."""
    return next((preset for preset in presets if preset.student.detector == detector), presets[0])


def half(layers: int) -> int:
    return max(1, layers // 2)
