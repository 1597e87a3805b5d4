"""Costs beside AP: shown where a run's record of them is stored, nowhere else; refused where they do not fit; carried with the run."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from detrdistill.errors import InputError
from detrdistill.files import file_hash
from detrdistill.recipes.presets import get_preset
from detrdistill.recipes.tables import make_table
from detrdistill.records import Cost, Record, record_text
from detrdistill.report.comparisons import Comparisons
from detrdistill.report.formats import write_table
from detrdistill.report.tables import cells, collect, provenance_line, summarise
from detrdistill.runs import reference
from detrdistill.runs.store import COST, Store
from tests.report.test_tables import fill, put

QUICK, SMOKE = get_preset("quick"), [replace(get_preset("smoke"), rivals=())]
COMMIT = "0123456789abcdef"


def cost_of(record: Record, milliseconds: float = 12.3456, **changes) -> Cost:
    return Cost(
        run=record.id,
        weights_sha256=record.provenance["weights_sha256"],
        data_sha256=record.provenance["data_sha256"],
        parameters=605_980,
        gflops=0.0532275,
        counter="a counter",
        images={"96 x 96": 20},
        milliseconds={"median": milliseconds, "low": 10.0, "high": 20.0},
        peak_mib=None,
        runtime="torch",
        threads=1,
        hardware="a CPU",
        provenance={"commit": COMMIT},
    ).replace(**changes)


def written(store: Store, folder: Path, name: str = "main_results") -> dict[str, bytes]:
    table = make_table(name, [QUICK], [0, 1, 2])
    frame = collect(table, store)
    return {
        path.suffix: path.read_bytes() for path in write_table(table, frame, summarise(table, frame, Comparisons([table], store)), folder)
    }


def test_without_costs_nothing_changes_and_with_them_they_are_shown(tmp_path: Path) -> None:
    store = Store(tmp_path / "results")
    fill(store)
    before, components = written(store, tmp_path / "before"), written(store, tmp_path / "before", "components")
    assert b"GFLOPs" not in b"".join(before.values()) and b"cost" not in before[".csv"]
    for seed, milliseconds in ((0, 10.0), (2, 13.0)):
        recipe = QUICK.recipe("student", seed)
        store.write_cost(recipe, cost_of(store.record(recipe), milliseconds))
    assert written(store, tmp_path / "other", "components") == components, "they belong to the main tables"
    after = written(store, tmp_path / "after")
    assert after == written(store, tmp_path / "again") != before
    table = make_table("main_results", [QUICK], [0, 1, 2])
    frame = collect(table, store)
    text = cells(summarise(table, frame, Comparisons([table], store))).set_index("Setting")
    assert text.loc["Student", ["Parameters (M)", "GFLOPs", "ms"]].tolist() == ["0.61", "0.0532", "11.5"]
    assert text.loc["Teacher", ["Parameters (M)", "GFLOPs", "ms"]].tolist() == ["-", "-", "-"]
    assert "GFLOPs (a multiply-add is two)" in provenance_line(frame) and "measured on a CPU, 1 thread, torch." in provenance_line(frame)
    lines = pd.read_csv(tmp_path / "after" / "main_results.csv", na_values=["not measured"])
    assert lines["parameters"].notna().sum() == 2 and set(lines["cost_measured_on"].dropna()) == {"a CPU, 1 thread, torch"}
    assert b"@{}lrrrrrrrrrrll@{}" in after[".tex"] and b"GFLOPs" in after[".tex"] and b"| 0.0532 |" in after[".md"]
    (store.folder(QUICK.recipe("student", 0)) / COST).unlink()
    (store.folder(QUICK.recipe("student", 2)) / COST).unlink()
    assert written(store, tmp_path / "once more") == before


def test_costs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    store, recipe = Store(tmp_path), QUICK.student
    record = put(store, recipe, 20.0)
    store.write_cost(recipe, cost_of(record, weights_sha256="0" * 64))
    with pytest.raises(InputError, match=r"costs .*cost\.json: of run .*, weights 00000000, .*delete it to measure again"):
        collect(make_table("main_results", [QUICK], [0]), store)
    path = store.folder(recipe) / COST
    path.write_text(record_text(cost_of(record)).replace("605980", "605981"))
    with pytest.raises(InputError, match=r"costs .*does not fit the hash in it.*delete it to measure again \(detrdistill compare\)"):
        store.cost(record)


def test_they_go_with_their_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into the committed reference, and from it to a user's own results."""
    monkeypatch.setattr(reference, "FOLDER", tmp_path / "reference")
    store, teacher = Store(tmp_path / "own"), SMOKE[0].teacher
    record = put(store, teacher, 20.0)
    store.write_cost(teacher, cost_of(record, provenance={"commit": f"{COMMIT}+changes"}))
    with pytest.raises(InputError, match=r"costs of run .*: made by code that is in no commit .*\+changes"):
        reference.bring("smoke", store.root)
    good = cost_of(record)
    store.write_cost(teacher, good)
    weights = store.weights(teacher)
    weights.write_bytes(b"weights")
    fitting = record.replace(provenance=record.provenance | {"weights_sha256": file_hash(weights)})
    store.write(fitting)
    store.write_cost(teacher, good.replace(weights_sha256=file_hash(weights)))
    reference.bring("smoke", store.root, [record.id])
    assert Store(tmp_path / "reference" / "smoke").cost(fitting) == store.cost(fitting)
    other = Store(tmp_path / "other")
    assert other.cost(reference.take(teacher, other)) == store.cost(fitting)
