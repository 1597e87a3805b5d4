"""Figure 4's claims: measured on a stored teacher, kept beside its record, weighed image by image, and refused where files do not fit."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from detrdistill.analysis import where_to_look
from detrdistill.errors import InputError
from detrdistill.recipes.presets import Preset, get_preset, get_presets, smoke
from detrdistill.recipes.tables import all_compared, make_table
from detrdistill.records import InsideObjects, Record, read_record, record_text
from detrdistill.report.board import verdicts
from detrdistill.report.claims import board, claim_cells, weigh, write_claims
from detrdistill.report.comparisons import Comparisons
from detrdistill.report.page import STATUSES
from detrdistill.report.register import planned_seeds, register
from detrdistill.report.write import write_report
from detrdistill.runs import reference
from detrdistill.runs.load import load_detector, open_split
from detrdistill.runs.store import SHARES, Store
from detrdistill.statistics import AGAINST, HOLDS, NO_EFFECT, NO_GAIN, SMALL
from tests.report.test_claims import put

TEACHER, GAMMA, COMMIT = smoke().teacher, smoke().method.gamma, "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Store:
    return Store(shutil.copytree(finished, tmp_path / "own"))


def shares_of(record: Record, images: list[int], **percent: list[float | None]) -> InsideObjects:
    about = record.provenance
    return InsideObjects(
        run=record.id,
        weights_sha256=about["weights_sha256"],
        data_sha256=about["data_sha256"],
        gamma=0.5,
        images=images,
        percent=percent,
        provenance={"commit": COMMIT},
    )


def put_shares(store: Store, preset: Preset, seed: int, images: list[int], queries: list[float | None], alike: list[float]) -> None:
    recipe = preset.recipe("teacher", seed)
    put(store, recipe, 50.0)
    area = [25.0] * len(images)
    store.write_inside(recipe, shares_of(store.record(recipe), images, queries=queries, alike=alike, area=area))


def test_a_detector_is_measured_once_and_then_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    record = store.record(TEACHER)
    found = where_to_look.inside_objects(record, store, gamma=GAMMA)
    val = open_split(TEACHER, "val")
    by_image = where_to_look.shares(load_detector(TEACHER, store, val), val, range(len(val)), gamma=GAMMA)
    assert found.images == list(by_image.index) and found.run == record.id
    measured = pd.DataFrame(found.percent, index=found.images, dtype=float)
    assert np.allclose(measured, 100 * by_image, rtol=1e-4) and not np.allclose(measured["queries"], measured["alike"])
    (line,) = where_to_look.shares_table({"A": found}).to_dict("records")
    assert line["area of the boxes"] == pytest.approx(measured["area"].mean())
    other = where_to_look.inside_objects(record, store, gamma=0.9)
    assert other.percent["alike"] == found.percent["alike"] and other.percent["queries"] != found.percent["queries"]
    monkeypatch.setattr(where_to_look, "shares", None)
    assert where_to_look.inside_objects(record, store, gamma=GAMMA) == found == store.inside_objects(record), "another gamma is not kept"


def test_other_weights_and_edited_files_are_refused(store: Store) -> None:
    record, path = store.record(TEACHER), store.folder(TEACHER) / SHARES
    good = shares_of(record, [0, 1], queries=[30.0, 31.0], alike=[26.0, 27.0], area=[25.0, 25.0])
    store.write_inside(TEACHER, good)
    assert store.inside_objects(record) == good
    path.write_text(path.read_text().replace("31.0", "41.0"))
    with pytest.raises(InputError, match=r"shares .*: its content .* does not fit the hash .* edited or damaged"):
        store.inside_objects(record)
    for change in ({"weights_sha256": "f" * 64}, {"data_sha256": "f" * 64}, {"run": "another"}):
        path.write_text(record_text(good.replace(**change)))
        with pytest.raises(InputError, match=r"the record beside it is of run .*; delete it to measure again"):
            store.inside_objects(record)
    path.write_text("[]")
    with pytest.raises(InputError, match=r"shares .*: not a JSON object; delete it to measure again"):
        store.inside_objects(record)
    path.unlink()
    with store.weights(TEACHER).open("ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match="differ from its record"):
        where_to_look.inside_objects(record, store, gamma=GAMMA)


def test_shares_go_with_the_run_from_and_into_the_reference(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "FOLDER", tmp_path / "reference")
    record = store.record(TEACHER).replace(provenance=store.record(TEACHER).provenance | {"commit": COMMIT})
    for path in (store.root / "runs").iterdir():
        if path.name != record.id:
            shutil.rmtree(path)
    store.write(record)
    reference.bring("smoke", store.root, [record.id])
    committed, good = Store(tmp_path / "reference" / "smoke"), shares_of(record, [0], queries=[30.0], alike=[26.0], area=[25.0])
    assert committed.inside_objects(record) is None
    store.write_inside(TEACHER, good.replace(provenance={"commit": f"{COMMIT}+changes"}))
    with pytest.raises(InputError, match=r"shares of run .*: made by code that is in no commit .*\+changes.*make it again from a clone"):
        reference.bring("smoke", store.root)
    store.write_inside(TEACHER, good)
    assert reference.bring("smoke", store.root) == [] and committed.inside_objects(record) == good, "also of a run that was there"
    other = Store(tmp_path / "other")
    assert other.inside_objects(reference.take(TEACHER, other)) == good


def test_claims_are_taken_image_by_image(tmp_path: Path) -> None:
    store, preset = Store(tmp_path), get_preset("mini", "adamixer")
    put_shares(store, preset, 0, [0, 1, 3, 4], [50.0, 60.0, 70.0, None], [30.0, 31.0, 32.0, 33.0])
    put_shares(store, preset, 3, [0, 1, 2, 3], [52.0, 61.0, 0.0, 72.0], [29.0, 31.0, 0.0, 32.0])
    tables = all_compared([preset], range(6))
    weighed = weigh(tables, Comparisons(tables, store), planned_seeds(tables))
    lines = weighed[weighed["table"] == "where_to_look"].set_index("claim")
    by_image = {"Query masks single out objects": [26.0, 35.5, 46.0], "Quality scores sharpen query masks": [21.5, 29.5, 39.0]}
    for claim, values in by_image.items():
        line, test = lines.loc[claim], ttest_1samp(values, 0)
        assert line["difference"] == pytest.approx(np.mean(values)) and (line["seeds"], line["images"], line["margin"]) == (2, 3, 5.0)
        assert line["half"] == line["adjusted_half"] == pytest.approx(np.mean(values) - test.confidence_interval(0.95).low)
    text = claim_cells(weighed).set_index("Claim").loc["Query masks single out objects"]
    assert (
        text["Seeds"] == "2 of 2 teachers (+35.0, +36.7), 3 images" and text["Measure"] == "weight inside objects, percent, image by image"
    )
    verdict = board(weighed).set_index("Claim").loc["Query masks single out objects", "Verdict"]
    assert verdict.startswith("holds on AdaMixer (+35.8 points [+11.0, +60.7], by teacher +35.0 and +36.7)")
    places = {claim.text: list(claim.where) for claim in verdicts(weighed, {})}
    assert places["Query masks single out objects"] == ["AdaMixer (2 teachers)"] and places["DETRDistill helps the student"] == ["AdaMixer"]
    assert all("5 points, by images" in STATUSES[word][2] for word in (HOLDS + SMALL, AGAINST + SMALL, NO_EFFECT, NO_GAIN))
    csv, _ = write_claims(weighed, "", tmp_path)
    images = pd.read_csv(csv).set_index("claim")["images"]
    assert images["Query masks single out objects"] == "3" and images["DETRDistill helps the student"] == "none"


def test_teachers_that_point_opposite_ways_take_no_side(tmp_path: Path) -> None:
    """However sure an interval over images is of their mean."""
    store, preset = Store(tmp_path), get_preset("mini", "adamixer")
    put_shares(store, preset, 0, [0, 1, 2], [30.0, 31.1, 32.0], [31.0, 32.0, 33.0])
    put_shares(store, preset, 3, [0, 1, 2], [30.0, 31.0, 32.1], [27.0, 28.0, 29.0])
    tables = all_compared([preset], range(6))
    weighed = weigh(tables, Comparisons(tables, store), planned_seeds(tables))
    line = weighed[weighed["claim"] == "Quality scores sharpen query masks"].iloc[0]
    assert line["difference"] > line["adjusted_half"] > 0 and line["by_teacher"] == pytest.approx((-0.9667, 3.0333), abs=1e-3)
    assert line["status"] == "no effect above the margin", "and not 'holds (small)'"
    assert claim_cells(weighed).loc[line.name, "Seeds"] == "2 of 2 teachers (-1.0, +3.0), 3 images"


def test_more_seeds_would_not_decide_them(tmp_path: Path) -> None:
    store, presets = Store(tmp_path), get_presets("mini", ["adamixer", "conditional_detr"])
    put_shares(store, presets[0], 0, [0, 1, 2], [20.0, 31.0, 25.5], [20.0, 30.8, 25.0])
    put(store, presets[1].recipe("teacher", 0), 50.0)  # not measured
    table = make_table("where_to_look", presets, [0])
    lines = weigh([table], Comparisons([table], store)).set_index(["claim", "detector"])["status"]
    assert lines["Query masks single out objects", "AdaMixer"] == "undecided"
    assert lines["Quality scores sharpen query masks", "AdaMixer"] == "no effect above the margin"
    assert (lines.xs("Conditional DETR", level="detector") == "not run").all()


def test_they_are_shown_with_the_main_results(tmp_path: Path) -> None:
    texts = []
    for name in ("main_results", "self_distillation"):
        write_report("quick", [0], tmp_path / name, [name], formats=["png"])
        texts.append((tmp_path / name / "tables" / "claims.md").read_text())
    assert "Query masks single out objects" in texts[0] and "Query masks single out objects" not in texts[1]


def test_the_list_says_when_a_claim_was_listed() -> None:
    """Those of Figure 4 were, of two detectors, when a teacher was stored; none of preset mini can claim to be first but untrained ones."""
    lines = register().set_index(["preset", "table", "detector"])["listed"].groupby(level=[0, 1, 2]).first()
    assert lines["mini", "where_to_look"].to_dict() == {"AdaMixer": "after", "Conditional DETR": "before", "Deformable DETR": "in part"}
    assert lines["mini", "full_schedule", "Deformable DETR"] == "after" and set(lines["bccd"]) == {"before"}
    assert lines["mini", "main_results"].to_dict() == {
        "AdaMixer": "in part",
        "Conditional DETR": "before",
        "D-FINE": "before",
        "Deformable DETR": "in part",
        "RT-DETR v2": "before",
    }


def test_committed_shares_were_measured_by_a_commit() -> None:
    paths = sorted(reference.FOLDER.glob(f"*/runs/*/{SHARES}"))
    assert {path.parts[-4] for path in paths} >= {"mini", "quick"}
    for path in paths:
        found = Store(path.parents[2]).inside_objects(read_record(path.with_name("record.json")))
        assert found.gamma == GAMMA and found.provenance["commit"] and "+changes" not in found.provenance["commit"]
