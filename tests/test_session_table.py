"""What a table notebook asks of its one object, with hand-made records."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from matplotlib import pyplot as plt
from matplotlib.text import Text

from detrdistill.errors import InputError
from detrdistill.recipes.identity import run_id
from detrdistill.recipes.presets import get_presets
from detrdistill.recipes.recipe import Recipe
from detrdistill.recipes.tables import TABLES, make_table
from detrdistill.recipes.words import METRICS
from detrdistill.records import Record
from detrdistill.report.claims import board, weigh
from detrdistill.report.comparisons import Comparisons
from detrdistill.report.register import planned_seeds
from detrdistill.runs.store import Store
from detrdistill.runs.tuning import FIRST
from detrdistill.session_table import SessionTable, SessionWeights

PRESETS, SEEDS = get_presets("smoke"), (0, 2)  # a student with seed 1 would be smoke's teacher


class Trainer:
    """Stores a record instead of training; the AP grows with the number of methods and the seed."""

    def __init__(self, store: Store) -> None:
        self.store, self.trained, self.from_reference = store, [], set()

    def __call__(self, recipe: Recipe, reference: bool) -> Record:
        ap = 20.0 + 10 * len(recipe.methods) + recipe.seed + 0.1 * (len(self.trained) % 3)
        curve = [{"step": step, "AP": ap * step / 600, "changes_between_stages": 1.0} for step in (200, 400, 600)]
        about = {"data_sha256": "d" * 64, "weights_sha256": "w" * 64, "commit": "0123456789abcdef", "device": "cpu"}
        record = Record(
            id=run_id(recipe),
            recipe=recipe,
            metrics=dict.fromkeys(METRICS, ap),
            curve=curve,
            cost={"seconds": 1.0, "steps": 600},
            parents={},
            provenance=about,
        )
        self.store.write(record)
        self.trained.append(record.id)
        self.from_reference |= {record.id} if reference else set()
        return record


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    yield Trainer(Store(tmp_path))
    plt.close("all")


def table_of(name: str, trainer: Trainer) -> SessionTable:
    return SessionTable(name, PRESETS, SEEDS, trainer.store, trainer)


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_shown_drawn_and_weighed(name: str, trainer: Trainer) -> None:
    """First without any run, then with all, though the object was asked before."""
    table = table_of(name, trainer)
    assert "not run" in table.show().to_html() and set(table.summary["seeds"]) == {0}
    table.verdicts(), table.plot(), table.curves()
    table.run()
    assert (
        len(trainer.trained) == len(set(trainer.trained)) == len({run_id(recipe) for recipe in make_table(name, PRESETS, SEEDS).recipes()})
    )
    assert trainer.from_reference <= {run_id(preset.teacher) for preset in PRESETS}, "no other row may come from the committed reference"
    assert bool(trainer.from_reference) >= any(row.family == "teacher" for row in table.rows)
    assert table.summary["AP"].notna().all() and table.provenance in table.show().to_html() + table.verdicts().to_html()
    assert sorted(path.name for path in (trainer.store.root / "figures").iterdir()) == [f"{name}.pdf", f"{name}.png"]


def test_verdicts_are_those_of_the_report(trainer: Trainer) -> None:
    """Weighed within all tables, of which only this one's claims are shown."""
    for name in ("main_results", "components"):
        table_of(name, trainer).run()
    tables = [make_table(name, PRESETS, SEEDS) for name in TABLES]
    weighed = weigh(tables, Comparisons(tables, trainer.store), planned_seeds(tables))
    expected = board(weighed[weighed["table"] == "components"])
    shown = table_of("components", trainer).verdicts()
    assert shown.data["Verdict"].tolist() == expected["Verdict"].tolist()
    assert shown.data["Claim"].tolist() == ["Each loss helps alone", "All losses together help most"]


def test_the_store_is_read_once(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of("components", trainer)
    table.run()
    frame, summary = table.frame, table.summary
    table.show(), table.plot(), table.verdicts()
    assert table.frame is frame and table.summary is summary
    table.run()
    assert table.frame is not frame and table.summary is not summary


def test_curves_know_methods_by_name_and_their_variants_by_title(trainer: Trainer) -> None:
    names = {"prior_methods": {"Student", "FGD", "DETRDistill"}, "components": {"Student", "Logits + features"}}
    names |= {"discrepancies": {"DETRDistill", "No adapter", "Teacher"}, "encoder_decoder": {"Student, 1 encoder, 2 decoder layers"}}
    for name, wanted in names.items():
        table = table_of(name, trainer)
        table.run()
        texts = [text.get_text().replace("\n", " ") for text in table.curves().findobj(Text)]
        for title in wanted:
            assert any(text.startswith(f"{title} ") for text in texts), (name, title, texts)


def test_records_are_those_of_the_first_detector(trainer: Trainer) -> None:
    table = table_of("main_results", trainer)
    assert not any(table.records().values())
    table.run()
    assert {name: len(runs) for name, runs in table.records().items()}["detrdistill"] == len(SEEDS)
    assert {run.recipe.detector for runs in table.records().values() for run in runs} == {"deformable_detr"}
    assert len(table.figure1().axes) == 2 and table.loss_parts().axes


def test_what_is_unknown_is_refused(trainer: Trainer) -> None:
    with pytest.raises(InputError, match="table 'tables' is unknown; known: main_results"):
        table_of("tables", trainer)
    with pytest.raises(InputError, match="row 'fgdd' has no weights to tune; known: 'fgd'"):
        SessionWeights(PRESETS, ("fgdd",), trainer.store, trainer)


def test_weights_are_tried_and_shown(trainer: Trainer) -> None:
    weights = SessionWeights(PRESETS[:1], ("fgd",), trainer.store, trainer)
    assert weights.show().data["Multiplier"].tolist().count("not run") == len(weights.show().data)
    weights.run()
    assert len(trainer.trained) >= len(FIRST)
    (line,) = weights.show().data.query("Row == 'FGD'").to_dict("records")
    assert int(line["Trials"]) >= len(FIRST) and line["Multiplier"] != "not run"
    assert weights.plot().axes and (trainer.store.root / "figures" / "weights.png").is_file()
