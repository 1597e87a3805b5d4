"""What is missing, and how long it would take."""

import pytest

from detrdistill.errors import InputError
from detrdistill.recipes.identity import parents
from detrdistill.recipes.presets import get_preset, get_presets
from detrdistill.recipes.tables import make_table
from detrdistill.runs import reference
from detrdistill.runs.plan import duration, expected_seconds, missing_runs, plan_text, takable
from detrdistill.runs.store import Store
from tests.report.test_tables import put

QUICK = get_preset("quick")


@pytest.fixture
def no_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "FOLDER", tmp_path / "nowhere")


def test_runs_and_what_they_depend_on(tmp_path, no_reference):
    store = Store(tmp_path)
    wanted = make_table("main_results", get_presets("quick"), [0]).recipes()
    assert len(missing_runs(wanted, store)) == 5, "teacher, student, DETRDistill, and two backbones"
    put(store, QUICK.teacher, 60.0)
    put(store, QUICK.student, 24.0)
    missing = missing_runs(wanted, store)
    assert list(missing.values()) == [QUICK.recipe("detrdistill"), parents(QUICK.student)["backbone"]], "a stored teacher asks for nothing"
    put(store, QUICK.recipe("detrdistill"), 29.0)
    assert missing_runs(wanted, store) == {} and plan_text("quick", [0], store=store) == "All runs are stored."


def test_time_is_judged_by_the_most_similar_runs(tmp_path):
    store = Store(tmp_path)
    slow, fast = QUICK.recipe("detrdistill"), QUICK.student
    known = [put(store, recipe, 20.0) for recipe in (slow, fast)]
    known[0].cost.update(seconds=1200.0), known[1].cost.update(seconds=600.0)
    assert expected_seconds(QUICK.recipe("detrdistill", 5), known) == 1200
    assert expected_seconds(QUICK.recipe("fgd"), known) == 1200 and expected_seconds(QUICK.student.replace(seed=3), known) == 600
    assert expected_seconds(QUICK.teacher, known) == 4000, "another backbone, but plain as well: a second a step"
    assert expected_seconds(get_preset("smoke", "adamixer").student, known) is None
    assert expected_seconds(parents(QUICK.student)["backbone"], known) is None


def test_parents_in_the_committed_reference_are_not_missing(tmp_path):
    """But a row is, whatever is committed: it is measured anew."""
    presets = get_presets("quick")
    missing = missing_runs(make_table("main_results", presets, [0]).recipes(), Store(tmp_path), takable(presets, [0]))
    assert list(missing.values()) == [QUICK.student, QUICK.recipe("detrdistill")]


def test_text(tmp_path, no_reference):
    text = plan_text("quick", [0, 1], ["components"], store=Store(tmp_path))
    lines = text.splitlines()
    assert len(lines) == 16 + 3 + 1 and lines[-1].startswith("19 runs are missing: ")
    assert "-plain-seed1-" in text and lines[0].endswith((" s", " min"))
    with pytest.raises(InputError, match="table 'tabel7' is unknown; known: main_results, prior_methods"):
        plan_text("quick", [0], ["tabel7"], store=Store(tmp_path))


def test_durations():
    assert [duration(seconds) for seconds in (None, 20, 89.6, 600, 7200)] == ["unknown", "20 s", "90 s", "10 min", "2.0 h"]
