"""The same tuning for every method: what its weights are multiplied by, found on other digits than those that are reported.

Every row has the same trials: all `FIRST` multipliers with one seed, further ones while the best is at an end, smaller ones while even
the best is below the plain student, and the best two again with a second seed. What was tried is read off the records, so an interrupted
tuning continues, and the table of it is a pure function of records. The multipliers that were found are frozen in `presets.TUNED`. No
torch here.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from detrdistill.errors import InputError, NonFiniteError
from detrdistill.recipes.identity import all_runs
from detrdistill.recipes.parts import Digits
from detrdistill.recipes.presets import Preset
from detrdistill.recipes.recipe import CropRecipe, Recipe
from detrdistill.recipes.rows import Presets
from detrdistill.recipes.tables import components, feature_masks, follow_ups, logits, main_results, prior_methods
from detrdistill.recipes.words import ADAMIXER, NAMES, TITLES
from detrdistill.records import Record
from detrdistill.runs.store import Store

SEEDS = FIRST_SEED, SECOND_SEED = 100, 101  # of no reported run
FIRST = (0.1, 0.3, 1.0, 3.0)
PLAIN = 0.0  # no distillation: what a multiplier must not be worse than; it is not chosen
MOST = 10  # multipliers a row; more than any row may want, so that all have as many as they need
OTHER_DIGITS = 1  # seed of the data: other crops and other digits, of the same two collections


@dataclass(frozen=True)
class TunedRow:
    """A row of the reported tables whose weights are tuned.

    Attributes:
        key: the detector as recipes name it; `detector` is its name in words.
        name: the method, or the row of Tables 7 to 9; as in `Preset.tuned`.
        recipes: of the two seeds, on the tuning's data, with the weights that are multiplied.
    """

    key: str
    name: str
    title: str
    recipes: Mapping[int, Recipe]

    @property
    def detector(self) -> str:
        return NAMES[self.key]

    @property
    def slug(self) -> str:
        """Detector and name as a file's name."""
        return re.sub(r"[^a-z0-9]+", "_", f"{self.key} {self.name}".lower()).strip("_")

    def trial(self, factor: float, seed: int) -> Recipe:
        """One run: the row's weights times `factor`; of `PLAIN` the student without a teacher."""
        recipe = self.recipes[seed]
        if factor == PLAIN:
            return recipe.replace(methods=(), teacher=None, teacher_floor=0.0)
        return recipe.replace(methods=[method.times(factor) for method in recipe.methods])


@dataclass(frozen=True)
class Trial:
    """What one multiplier gave: AP with the first seed, and with the second where it was among the best two."""

    factor: float
    first: Record
    second: Record | None = None

    @property
    def mean(self) -> float:
        """AP over the seeds that were run."""
        found = [_ap(record) for record in (self.first, self.second) if record]
        return sum(found) / len(found)


def rows_to_tune(presets: Presets) -> list[TunedRow]:
    """Every method of main results, prior methods and follow-ups as a whole, and every row of Tables 7 to 9 that has one weight.

    Raises:
        InputError: the presets are not on the embedded digits, of which others can be drawn.
    """
    found: dict[tuple[str, str], TunedRow] = {}
    for preset in map(on_other_digits, presets):
        detector = preset.student.detector
        paper_s = detector == ADAMIXER
        for make in (main_results, prior_methods, follow_ups) if paper_s else (main_results, follow_ups):
            if make.__name__ in preset.left_out:
                continue
            students = [recipe for row in make([preset], SEEDS).rows for recipe in row.recipes.values() if recipe.methods]
            for name in dict.fromkeys(recipe.methods[0].name for recipe in students):
                recipes = {seed: preset.recipe(name, seed) for seed in SEEDS}
                found[detector, name] = TunedRow(detector, name, TITLES[name], recipes)
        # The single losses of Table 7 stand in Tables 8 and 9 again, under the same name; sums take the weights found alone.
        for make in (components, logits, feature_masks) if paper_s else ():
            for row in make([preset], SEEDS).rows:
                if row.tuned_as:
                    found.setdefault((detector, row.tuned_as), TunedRow(detector, row.tuned_as, row.title, row.recipes))
    return list(found.values())


def on_other_digits(preset: Preset) -> Preset:
    """The preset as it is tuned: other digits, one teacher and backbones of their own, weights as they were published."""
    if not isinstance(preset.student.data, Digits):
        raise InputError(
            f"preset {preset.name}: weights are tuned on other embedded digits, and its data is a folder; it has the digits' weights"
        )
    data = preset.student.data.replace(seed=OTHER_DIGITS)
    teacher, student = preset.teacher.replace(data=data), preset.student.replace(data=data)
    return replace(preset, teacher=teacher, student=student, tuned={}, students_a_teacher=None)


def find_row(presets: Presets, name: str) -> TunedRow:
    """The row called `name` of the first preset that has one.

    Raises:
        InputError: there is none.
    """
    rows = rows_to_tune(presets)
    for row in rows:
        if row.name == name:
            return row
    raise InputError(f"row '{name}' has no weights to tune; known: {', '.join(dict.fromkeys(repr(row.name) for row in rows))}")


def tried(row: TunedRow, store: Store) -> list[Trial]:
    """The multipliers that were run, the smallest first."""
    return [trial for trial in _trials(row, store).values() if trial]


def next_trials(row: TunedRow, store: Store) -> list[tuple[float, int]]:
    """Multiplier and seed of what is to be run now; empty when the row is tuned."""
    trials = _trials(row, store)
    if missing := [factor for factor, trial in trials.items() if trial is None]:
        return [(factor, FIRST_SEED) for factor in missing]
    if store.record(row.trial(PLAIN, FIRST_SEED)) is None:
        return [(PLAIN, FIRST_SEED)]
    return [(one.factor, SECOND_SEED) for one in _best_two(trials.values()) if one.second is None]


def best_trial(row: TunedRow, store: Store) -> Trial | None:
    """The better of the best two over both seeds; None before the row is tuned."""
    trials = _trials(row, store)
    two = _best_two(trials.values()) if all(trials.values()) else []
    return max(two, key=lambda trial: trial.mean) if two and all(trial.second for trial in two) else None


def tune(row: TunedRow, store: Store, train: Callable[[Recipe], object]) -> None:
    """Run what the row still misses, one trial after another.

    Args:
        train: trains a recipe and leaves its record in `store`.

    Raises:
        NonFiniteError: a trial met a NaN or an infinity; names the row and its multiplier.
    """
    while waiting := next_trials(row, store):
        factor, seed = waiting[0]
        try:
            train(row.trial(factor, seed))
        except NonFiniteError as error:
            raise NonFiniteError(f"{row.detector}, row '{row.name}', weights x {factor:g}, seed {seed}: {error}") from None


def runs_before_tuning(presets: Presets) -> dict[str, Recipe | CropRecipe]:
    """What the trials of these presets learn from, start from and are held against, by run id; empty where nothing is tuned."""
    digits = [preset for preset in presets if isinstance(preset.student.data, Digits)]
    rows = rows_to_tune(digits)
    trials = all_runs([recipe for row in rows for recipe in (*row.recipes.values(), row.trial(PLAIN, FIRST_SEED))])
    return {name: recipe for name, recipe in trials.items() if not (isinstance(recipe, Recipe) and recipe.methods)}


def _trials(row: TunedRow, store: Store) -> dict[float, Trial | None]:
    """By multiplier, those to run with the first seed as far as is known by now."""
    plain = store.record(row.trial(PLAIN, FIRST_SEED))
    trials = {factor: _trial(row, factor, store) for factor in FIRST}
    while all(trials.values()) and len(trials) < MOST:
        best = max(trials.values(), key=lambda trial: _ap(trial.first))
        if best.factor == max(trials):
            further = _step(best.factor, 1)
        elif best.factor == min(trials) or (plain is not None and _ap(best.first) < _ap(plain)):
            further = _step(min(trials), -1)
        else:
            break
        trials[further] = _trial(row, further, store)
    return dict(sorted(trials.items()))


def _step(factor: float, by: int) -> float:
    """The next of 0.1, 0.3, 1, 3, 10 and so on: steps of about three."""
    place = round(2 * math.log10(factor)) + by
    return float(f"{(3 if place % 2 else 1) * 10.0 ** (place // 2):g}")


def _trial(row: TunedRow, factor: float, store: Store) -> Trial | None:
    first, second = (store.record(row.trial(factor, seed)) for seed in SEEDS)
    return None if first is None else Trial(factor, first, second)


def _best_two(trials: Iterable[Trial]) -> list[Trial]:
    return sorted(trials, key=lambda trial: _ap(trial.first), reverse=True)[:2]


def _ap(record: Record) -> float:
    return record.metrics["AP"] or 0.0
