"""Claims, weighed with hand-made records."""

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from detrdistill.experiments.claims import (
    ALL,
    CHANGES,
    CLAIMS,
    HALFWAY,
    claim_cells,
    claims_of,
    measured_difference,
    verdict,
    weigh,
    write_claims,
)
from detrdistill.experiments.paper_tables import TABLES, full_schedule, main_results, make_table
from detrdistill.experiments.presets import PRESETS, get_preset, get_presets
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
    assert helps["difference"] == pytest.approx(2.0) and helps["half"] < 0.3 and helps["status"] == "shows"
    assert helps["published"] == pytest.approx(2.5) and (helps["seeds"], helps["seeds_wanted"]) == (3, 3)
    faster, steadier = of(weighed, "DETRDistill is ahead halfway"), of(weighed, "DETRDistill's assignments are steadier")
    assert (faster["measure"], faster["difference"], faster["status"]) == (HALFWAY, pytest.approx(2.0), "within noise")
    assert (steadier["measure"], steadier["difference"], steadier["status"]) == (CHANGES, pytest.approx(-0.5), "within noise")
    text = claim_cells(weighed).set_index("Claim")
    assert text.loc["DETRDistill helps the student", ["Difference", "Published", "Seeds", "Status"]].tolist() == [
        "+2.0 ± 0.2", "+2.5", "3 of 3", "shows",
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
    ("difference", "half", "seeds", "ran", "word"),
    [
        (2.0, 1.9, 3, True, "shows"),
        (-2.0, 1.9, 3, True, "opposite"),
        (2.0, 2.0, 3, True, "within noise"),
        (2.0, math.nan, 1, True, "one seed"),
        (math.nan, math.nan, 0, True, "not stored"),
        (math.nan, math.nan, 0, False, "not run"),
    ],
)
def test_verdicts(difference: float, half: float, seeds: int, ran: bool, word: str) -> None:
    assert verdict(difference, half, seeds, ran) == word


def test_what_was_not_run_or_not_measured_has_no_difference(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, QUICK.recipe("student"), 10.0)
    put(store, QUICK.recipe("detrdistill"), 12.0)  # by code that did not count changes
    weighed = weigh([main_results([QUICK], [0]), full_schedule([QUICK], [0])], store)
    assert of(weighed, "DETRDistill helps the student")["status"] == "one seed"
    assert of(weighed, "DETRDistill's assignments are steadier")["status"] == "not stored"
    assert of(weighed, "A distilled student passes its teacher")["status"] == "not run"
    csv, markdown = (path.read_text() for path in write_claims(weighed, "Measured somewhere.", tmp_path))
    assert ",," not in csv and "|  |" not in markdown and "| +2.0 | +2.5 | 1 of 1 | one seed |" in markdown
    assert markdown.endswith("Measured somewhere.\n") and set(weighed["measured_on"]) == {"embedded digits, 96 px; not a COCO result"}


def test_seeds_that_differ_are_not_paired(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, QUICK.recipe("student", 0), 10.0)
    put(store, QUICK.recipe("detrdistill", 1), 12.0)
    line = of(weigh([main_results([QUICK], [0, 1])], store), "DETRDistill helps the student")
    assert line["seeds"] == 0 and line["status"] == "not run"


def test_a_row_inside_the_schedule_is_read_there(tmp_path: Path) -> None:
    store, table = Store(tmp_path), make_table("prior_methods", get_presets("mini", ["adamixer"]), [0])
    rows = {row.setting: row for row in table.rows}
    put(store, rows["student at whole"].recipes[0], 20.0, halfway=5.0)
    put(store, rows["fkd at whole"].recipes[0], 21.0, halfway=8.0)
    at = lambda part: measured_difference(rows[f"fkd at {part}"], rows[f"student at {part}"], "AP", store)[0][0]  # noqa: E731
    assert (at("2/3"), at("whole")) == (pytest.approx(3.0), pytest.approx(1.0))


def test_nothing_to_decide_writes_nothing(tmp_path: Path) -> None:
    table = make_table("follow_ups", [QUICK], [0])
    weighed = weigh([replace(table, rows=table.rows[:2])], Store(tmp_path))  # teacher and student
    assert weighed.empty and write_claims(weighed, "", tmp_path) == [] and claim_cells(weighed).empty


def test_published_differences_are_those_of_the_paper(tmp_path: Path) -> None:
    presets = get_presets("coco")
    tables = [make_table(name, presets, [0]) for name in ("encoder_decoder", "light_backbones", "logits", "components")]
    known = {
        (line["claim"], line["detector"], line["ahead"], line["than"]): line["published"]
        for line in weigh(tables, Store(tmp_path)).to_dict("records")
    }
    depth = [value for key, value in known.items() if key[0].startswith("The decoder's depth")]
    assert depth == [pytest.approx(33.0 - 30.3)]
    light = [value for key, value in known.items() if "lighter" in key[0] and key[1] == "Deformable DETR"]
    assert light == pytest.approx([3.3, 3.5])
    together = {key[3]: value for key, value in known.items() if key[0].startswith("All losses")}
    assert together["Logits + features"] == pytest.approx(0.4) and math.isnan(together["Features + assignment"])
    assert all(math.isnan(value) for key, value in known.items() if key[0] in ("Negatives help", "Teaching every stage helps"))


def test_every_claim_finds_its_rows() -> None:
    """On COCO, with all detectors and rivals; other presets lack some rows, and leave their claims out."""
    presets = get_presets("coco")
    for name in TABLES:
        table = make_table(name, presets, [0])
        for detector in {row.detector for row in table.rows}:
            assert set(CLAIMS.get(name, ())) <= set(claims_of(table, detector)), f"a row of {name} has another name"
    switches = claims_of(make_table("discrepancies", presets, [0]), "Deformable DETR")
    assert {claim.ahead for claim in switches} == {"detrdistill"} and len(switches) == 8
    assert switches[-1].than == "released" and "student" not in {claim.than for claim in switches}
    fewer = [claim.ahead for claim in claims_of(make_table("encoder_decoder", presets, [0]), "Conditional DETR")]
    assert fewer == ["detrdistill 6/3", "detrdistill 3/6", "detrdistill 3/3", "student 3/6"]
    all_sets = {row.setting for row in make_table("components", presets, [0]).rows} - {"student", ALL}
    assert {claim.than for claim in CLAIMS["components"] if claim.ahead == ALL} == all_sets
    passing = "A distilled student passes its teacher"
    trained_as_long = {
        one: passing in {claim.text for claim in claims_of(main_results([get_preset(one)], [0]), "Deformable DETR")} for one in PRESETS
    }
    assert trained_as_long == {"smoke": True, "quick": False, "mini": False, "bccd": True, "coco": True}
    few = {claim.than for claim in claims_of(main_results([replace(QUICK, rivals=())], [0]), "Deformable DETR")}
    assert few == {"student", "detrdistill"}
