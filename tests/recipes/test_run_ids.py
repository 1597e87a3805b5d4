"""No change of the code may rename a run: what is stored is found by its name.

`run_ids.txt` was written before the house was rebuilt. A run that is added on purpose is added to it by
`python -m tests.recipes.test_run_ids`; a name that goes missing is a stored run that nobody finds any more.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from detrdistill.recipes.identity import run_id
from detrdistill.recipes.presets import IF_NAMED, get_presets
from detrdistill.recipes.tables import TABLES, named_runs, possible_tables
from detrdistill.runs.tuning import FIRST, SEEDS, rows_to_tune, runs_before_tuning

FILE = Path(__file__).with_name("run_ids.txt")
PRESETS: dict[str, Sequence[int]] = {"smoke": (0, 1), "quick": (0, 1, 2), "mini": range(6), "coco": (0,)}


def names() -> Iterator[str]:
    """Preset and name of every run of every table, for all detectors together and each alone; and of the first trials of the tuning."""
    for name, seeds in PRESETS.items():
        presets, others = get_presets(name), get_presets(name, IF_NAMED[name]) if name in IF_NAMED else []
        found = {run for some in (presets, *([one] for one in presets)) for run in named_runs(TABLES, some, tuple(seeds))}
        found |= {run for one in others for run in named_runs(possible_tables([one]), [one], tuple(seeds))}
        if name in ("smoke", "mini"):
            found |= set(runs_before_tuning(presets))
            found |= {run_id(row.trial(factor, seed)) for row in rows_to_tune(presets) for factor in FIRST for seed in SEEDS}
        yield from (f"{name} {run}" for run in sorted(found))


def test_runs_are_called_what_they_were_called() -> None:
    known, today = FILE.read_text(encoding="utf-8").splitlines(), list(names())
    assert not set(known) - set(today), "stored runs of these names would not be found any more"
    assert today == known, "new runs: add them on purpose, as said above"


if __name__ == "__main__":
    FILE.write_text("\n".join(names()) + "\n", encoding="utf-8")
