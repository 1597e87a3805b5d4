"""The paper's claims, weighed with hand-made records."""

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from detrdistill.experiments.claims import CHANGES, CLAIMS, HALFWAY, claim_cells, claims_of, measured, verdict, weigh, write_claims
from detrdistill.experiments.paper_tables import TABLES, full_schedule, main_results, make_table
from detrdistill.experiments.presets import get_preset, get_presets
from detrdistill.experiments.recipes import Recipe, run_id
from detrdistill.experiments.store import Record, Store
from detrdistill.experiments.tables import METRICS

QUICK = get_preset("quick")


def put(store: Store, recipe: Recipe, ap: float, halfway: float = 0.0, changes: float | None = None) -> None:
    last = {"step": 600, "AP": ap} | ({} if changes is None else {"changes_between_stages": changes})
    record = Record(
        id=run_id(recipe),
        recipe=recipe,
        metrics=dict.fromkeys(METRICS, ap),
        curve=[{"step": 300, "AP": halfway}, last],
        cost={"seconds": 1.0, "steps": 600},
        parents={},
        provenance={"data_sha256": "d" * 64, "weights_sha256": "w" * 64, "commit": "0123456789abcdef"},
    )
    store.write(record)


def of(weighed: pd.DataFrame, text: str) -> dict:
    (line,) = weighed[weighed["claim"] == text].to_dict("records")
    return line


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for seed, (plain, distilled) in enumerate([(10.0, 12.0), (20.0, 22.1), (30.0, 31.9)]):
        put(store, QUICK.recipe("student", seed), plain, halfway=5.0 - seed, changes=2.0)
        put(store, QUICK.recipe("detrdistill", seed), distilled, halfway=5.0 + seed, changes=2.0 + seed / 2)
    weighed = weigh([main_results([QUICK], [0, 1, 2])], store)
    helps = of(weighed, "DETRDistill helps the student")
    assert helps["difference"] == pytest.approx(2.0) and helps["half"] < 0.3 and helps["status"] == "holds"
    assert helps["published"] == pytest.approx(2.5) and (helps["seeds"], helps["seeds_wanted"]) == (3, 3)
    faster, steadier = of(weighed, "It learns faster"), of(weighed, "Its assignments are steadier")
    assert (faster["measure"], faster["difference"], faster["status"]) == (HALFWAY, pytest.approx(2.0), "within noise")
    assert (steadier["measure"], steadier["difference"], steadier["status"]) == (CHANGES, pytest.approx(-0.5), "within noise")
    text = claim_cells(weighed).set_index("Claim")
    assert text.loc["DETRDistill helps the student", ["Difference", "Published", "Seeds", "Status"]].tolist() == [
        "+2.0 ± 0.2", "+2.5", "3 of 3", "holds",
    ]  # fmt: skip


def test_the_teacher_is_compared_with_every_seed(tmp_path: Path) -> None:
    store, table = Store(tmp_path), full_schedule([QUICK], [0, 1])
    rows = {row.setting: row for row in table.rows}
    (teacher,) = rows["teacher"].recipes.values()
    put(store, teacher, 57.0)
    for seed, ap in enumerate((55.0, 56.0)):
        put(store, rows["detrdistill"].recipes[seed], ap)
    line = of(weigh([table], store), "A distilled student passes its teacher")
    assert line["difference"] == pytest.approx(-1.5) and line["seeds"] == 2 and line["status"] == "within noise"
    assert line["published"] == pytest.approx(46.6 - 45.5)
    assert rows["student"].recipes[0].schedule == teacher.schedule, "trained as long"


@pytest.mark.parametrize(
    ("difference", "half", "seeds", "word"),
    [
        (2.0, 1.9, 3, "holds"),
        (-2.0, 1.9, 3, "opposite"),
        (2.0, 2.0, 3, "within noise"),
        (2.0, math.nan, 1, "one seed"),
        (math.nan, math.nan, 0, "not run"),
    ],
)
def test_verdicts(difference: float, half: float, seeds: int, word: str) -> None:
    assert verdict(difference, half, seeds) == word


def test_what_was_not_run_or_not_measured_has_no_difference(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, QUICK.recipe("student"), 10.0)
    put(store, QUICK.recipe("detrdistill"), 12.0)  # by code that did not count changes
    table = main_results([QUICK], [0])
    weighed = weigh([table], store)
    assert of(weighed, "DETRDistill helps the student")["status"] == "one seed"
    assert of(weighed, "Its assignments are steadier")["status"] == "not run"
    assert measured(table.rows[0], "AP", store) != measured(table.rows[0], "AP", store), "NaN for a teacher that was not run"
    csv, markdown = (path.read_text() for path in write_claims(weighed, "quick", tmp_path))
    assert ",," not in csv and "|  |" not in markdown and "| +2.0 | +2.5 | 1 of 1 | one seed |" in markdown
    assert write_claims(weigh([], store), "quick", tmp_path)[0].read_text().startswith("claim,table,")


def test_every_claim_finds_its_rows() -> None:
    """On COCO, with all detectors and rivals; other presets lack some rows, and leave their claims out."""
    presets = get_presets("coco")
    for name in TABLES:
        table = make_table(name, presets, [0])
        detectors = {row.detector for row in table.rows}
        for detector in detectors:
            assert set(CLAIMS.get(name, ())) <= set(claims_of(table, detector)), f"a row of {name} has another name"
    assert len(claims_of(make_table("encoder_decoder", presets, [0]), "Conditional DETR")) == 5
    few = {claim.than for claim in claims_of(main_results([replace(QUICK, rivals=())], [0]), "Deformable DETR")}
    assert few == {"student", "detrdistill"}
