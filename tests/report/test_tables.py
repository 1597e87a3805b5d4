"""Tables and reports from hand-made records: statuses, gaps, refusals, and equal bytes."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from detrdistill.errors import InputError
from detrdistill.recipes.identity import run_id
from detrdistill.recipes.parts import Digits, Folder
from detrdistill.recipes.presets import get_preset, get_presets
from detrdistill.recipes.recipe import Recipe
from detrdistill.recipes.rows import measured_on
from detrdistill.recipes.tables import main_results, make_table
from detrdistill.recipes.words import METRICS
from detrdistill.records import Record
from detrdistill.report.comparisons import Comparisons
from detrdistill.report.formats import write_table
from detrdistill.report.tables import cells, collect, conditions, little_to_teach, note_below, provenance_line, styled, summarise
from detrdistill.report.write import stored_seeds, write_report
from detrdistill.runs.store import Store
from detrdistill.statistics import mean_and_half

QUICK, SMOKE = get_preset("quick"), [replace(get_preset("smoke"), rivals=())]


def put(store: Store, recipe: Recipe, ap: float, *, data: str = "d" * 64, weights: str = "w" * 64, teacher: str = "w" * 64) -> Record:
    """Store a record with that AP; no object is large."""
    if isinstance(recipe.data, Folder):
        pin = lambda one: one.replace(data=one.data.replace(sha256=data, path=Path("elsewhere")))  # noqa: E731
        recipe = pin(recipe.replace(teacher=pin(recipe.teacher)) if recipe.teacher else recipe)
    record = Record(
        id=run_id(recipe),
        recipe=recipe,
        metrics=dict.fromkeys(METRICS, ap / 2) | {"AP": ap, "APl": None, "ARl": None},
        curve=[{"step": 300, "AP": ap / 2}, {"step": 600, "AP": ap}],
        cost={"seconds": 1.0, "steps": 600},
        parents={"teacher": {"run": run_id(recipe.teacher), "weights_sha256": teacher}} if recipe.teacher else {},
        provenance={"data_sha256": data, "weights_sha256": weights, "commit": "0123456789abcdef"},
    )
    store.write(record)
    return record


def fill(store: Store, preset=QUICK, teacher: float | None = 57.0, student=(16.0, 15.0, 17.0), distilled=(18.1, 17.0, 19.2)) -> None:
    if teacher is not None:
        put(store, preset.teacher, teacher)
    for setting, values in (("student", student), ("detrdistill", distilled)):
        for seed, value in enumerate(values):
            if value is not None:
                put(store, preset.recipe(setting, seed), value)


def table_of(store: Store, preset=QUICK, seeds=(0, 1, 2)) -> tuple[pd.DataFrame, pd.DataFrame]:
    table = main_results([preset], seeds)
    summary = summarise(table, collect(table, store), Comparisons([table], store))
    return summary.set_index("setting"), cells(summary).set_index("Setting")


def test_the_teacher_is_one_run_for_all_seeds() -> None:
    table = main_results([QUICK], [0, 1, 2])
    assert [(row.name, len(row.recipes)) for row in table.rows] == [("teacher", 1), ("student", 3), ("detrdistill", 3)]
    assert table.rows[2].recipes[1] == QUICK.recipe("detrdistill", 1)


@pytest.mark.parametrize(("planned", "counted"), [(2, "2 of 2"), (1, "2 of 2"), (6, "2 of 3"), (0, "2 of 3"), (None, "2 of 3")])
def test_no_more_seeds_are_wanted_than_are_planned(planned: int | None, counted: str, tmp_path: Path) -> None:
    fill(Store(tmp_path), student=(16.0, 15.0, None))
    table = main_results([QUICK], [0, 1, 2])
    plans = {("quick", "main_results", "Deformable DETR", "detrdistill", "student", "AP"): planned} if planned is not None else {}
    summary = summarise(table, collect(table, Store(tmp_path)), Comparisons([table], Store(tmp_path)), plans)
    wanted = cells(summary).set_index("Setting")["Seeds"]
    assert wanted["Student"] == counted
    assert wanted["DETRDistill"] == "3 of 3"


@pytest.mark.parametrize(
    ("planned", "teachers", "students"), [(2, "1 of 1", "2 of 2"), (4, "1 of 2", "2 of 4"), (None, "1 of 2", "2 of 5")]
)
def test_no_more_teachers_are_wanted_than_planned_students_need(planned: int | None, teachers: str, students: str, tmp_path: Path) -> None:
    preset, store = replace(QUICK, students_a_teacher=3), Store(tmp_path)
    fill(store, preset, student=(16.0, 15.0), distilled=(17.0, 18.0))
    table = main_results([preset], range(5))
    plans = {("quick", "main_results", "Deformable DETR", "detrdistill", "student", "AP"): planned} if planned else {}
    wanted = cells(summarise(table, collect(table, store), Comparisons([table], store), plans)).set_index("Setting")["Seeds"]
    assert (wanted["Teacher"], wanted["Student"]) == (teachers, students)


def test_no_seeds_are_refused() -> None:
    with pytest.raises(InputError, match="no seeds"):
        make_table("main_results", [QUICK], [])


def test_mean_and_interval() -> None:
    mean, half = mean_and_half(pd.Series([1.0, 2.0, 3.0, math.nan]))
    assert mean == 2 and half == pytest.approx(4.302652729911275 / math.sqrt(3))  # t(2, 0.975) of the tables
    assert mean_and_half(pd.Series([5.0]))[0] == 5 and math.isnan(mean_and_half(pd.Series([5.0]))[1])
    assert all(math.isnan(value) for value in mean_and_half(pd.Series([], dtype=float)))


def test_gain_is_paired_by_seed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, student=(10.0, 20.0, 30.0), distilled=(12.0, 22.1, 31.9))
    summary, text = table_of(store)
    # Unpaired, seeds that differ by 10 AP would drown a gain of 2.
    assert summary.loc["detrdistill", "gain"] == pytest.approx(2.0)
    assert summary.loc["detrdistill", "gain_half"] < 0.3 < 20 < summary.loc["detrdistill", "AP_half"]
    assert text.loc["DETRDistill", "Gain"] == "+2.0 ± 0.2"


def test_cells_name_ours_and_theirs(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store)
    text = table_of(store)[1]
    assert text.loc["Teacher", ["AP", "Gain", "Published AP", "Published gain", "Seeds", "Status"]].tolist() == [
        "57.0", "-", "45.5", "-", "1 of 1", "measured",
    ]  # fmt: skip
    assert text.loc["DETRDistill", ["Published AP", "Published gain", "Status"]].tolist() == ["46.6", "+2.5", "holds"]
    assert set(text["Measured on"]) == {"embedded digits, 96 px; not a COCO result"}
    assert set(text["APl"]) == {"n/a"}


@pytest.mark.parametrize(
    ("distilled", "status"),
    [
        ((18.1, 17.0, 19.2), "holds"),
        ((13.9, 13.0, 15.2), "against"),
        ((16.9, 16.0, 18.1), "holds (small)"),
        ((16.4, 15.6, 16.6), "no effect above the margin"),
        ((13.0, 15.0, 15.0), "no gain above the margin"),
        ((18.0, 13.0, 17.5), "undecided (about 6 seeds)"),
        ((16.0, 15.0, 17.0), "no effect above the margin"),
        ((18.0, None, None), "one seed"),
        ((None, None, None), "not run"),
    ],
)
def test_status_of_a_small_preset(tmp_path: Path, distilled, status: str) -> None:
    store = Store(tmp_path)
    fill(store, distilled=distilled)
    assert table_of(store)[0].loc["detrdistill", "status"] == status


def test_status_is_never_reproduced_off_coco(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, teacher=45.5, student=(44.1, 44.1, 44.1), distilled=(46.5, 46.6, 46.7))
    summary = table_of(store)[0]
    assert summary["status"].tolist() == ["measured", "measured", "holds"]


@pytest.mark.parametrize(
    ("teacher", "student", "distilled", "statuses"),
    [
        (45.5, (44.0,), (46.2,), ["reproduced", "reproduced", "reproduced"]),
        (44.8, (44.6,), (47.1,), ["measured", "reproduced", "reproduced"]),
        (44.8, (43.0,), (45.0,), ["measured", "one seed", "one seed"]),
        (45.0, (43.0, 43.2), (45.0, 45.3), ["reproduced", "measured", "holds"]),
    ],
)
def test_status_on_coco(tmp_path: Path, teacher, student, distilled, statuses) -> None:
    store, preset = Store(tmp_path), replace(get_preset("coco"), rivals=())
    fill(store, preset, teacher, student, distilled)
    assert table_of(store, preset, range(len(student)))[0]["status"].tolist() == statuses
    assert measured_on(preset) == "folder coco, shorter side 800 px"


def test_missing_runs_are_said_to_be_missing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, teacher=None, student=(None, None, None), distilled=(18.0, 17.0, None))
    _, text = table_of(store)
    assert text.loc["Student", ["AP", "APs", "Seeds", "Status"]].tolist() == ["not run", "not run", "0 of 3", "not run"]
    assert text.loc["DETRDistill", ["Gain", "Seeds", "Status"]].tolist() == ["student not run", "2 of 3", "measured"]
    table = main_results([QUICK], [0, 1, 2])
    frame = collect(table, store)
    paths = write_table(table, frame, summarise(table, frame, Comparisons([table], store)), tmp_path / "tables")
    csv, markdown, latex = (path.read_text() for path in paths)
    assert ",," not in csv and "|  |" not in markdown and "&  &" not in latex
    back = pd.read_csv(tmp_path / "tables" / "main_results.csv", na_values=["not run", "n/a"], keep_default_na=False)
    assert back["AP"].notna().sum() == 2 and back["AP"].dtype == float
    assert back.loc[back["AP"].notna(), "commit"].tolist() == ["0123456789abcdef"] * 2


def test_what_was_tuned_stands_beside_what_it_was_before(tmp_path: Path) -> None:
    store, tuned = Store(tmp_path), replace(QUICK, tuned={"detrdistill": 3.0})
    assert make_table("main_results", [QUICK], [0]).rows[2].untuned == {}, "nothing was tuned"
    fill(store, tuned, distilled=(20.0, 21.0))
    for seed, ap in enumerate((10.0, 12.0, 14.0)):
        put(store, QUICK.recipe("detrdistill", seed), ap)
    table = make_table("main_results", [tuned], [0, 1, 2])
    frame = collect(table, store)
    text = cells(summarise(table, frame, Comparisons([table], store))).set_index("Setting")
    assert text.loc["DETRDistill", "AP before tuning"] == "12.0" and text.loc["DETRDistill", "Seeds"] == "2 of 3"
    assert text.loc["Student", "AP before tuning"] == "-" and "over the seeds that were run so" in note_below(table, frame)
    assert note_below(table, frame) in styled(table, summarise(table, frame, Comparisons([table], store)), frame).to_html()
    (path, *_) = write_table(table, frame, summarise(table, frame, Comparisons([table], store)), tmp_path / "tables")
    back = pd.read_csv(path, na_values=["not run", "n/a"])
    assert back.loc[back["setting"] == "detrdistill", "AP_untuned"].tolist() == [10.0, 12.0, 14.0]
    assert len(table.recipes()) == 7, "the runs before tuning need not be made"


@pytest.mark.parametrize(
    ("teacher", "named"),
    [(57.0, False), (18.0, False), (17.9, True), (15.0, True), (None, False)],  # the plain students' mean is 16.0
)
def test_a_teacher_that_is_hardly_ahead_is_named(tmp_path: Path, teacher: float | None, named: bool) -> None:
    store = Store(tmp_path)
    fill(store, teacher=teacher)
    table = main_results([QUICK], [0, 1, 2])
    frame = collect(table, store)
    about = f"Teachers with little to teach, less than 2 AP ahead of the plain student: Deformable DETR's ({teacher} against 16.0)."
    assert little_to_teach(frame) == (about if named else "")
    assert note_below(table, frame).endswith(about) is named


def test_what_sets_the_rows_of_detectors_apart_is_said(tmp_path: Path) -> None:
    def said(preset: str, detectors: list[str], name: str = "main_results") -> str:
        table = make_table(name, get_presets(preset, detectors), [0])
        return conditions(table, collect(table, Store(tmp_path)))

    assert said("mini", ["deformable_detr", "adamixer"]) == "", "one schedule, tuned weights, all losses"
    assert said("mini", ["adamixer"], "components") == "", "rows without the feature loss are not called DETRDistill"
    assert said("quick", ["deformable_detr"]) == "Weights of losses are as published, or ours, and not tuned: Deformable DETR."
    assert said("mini", ["deformable_detr", "conditional_detr", "d_fine"]) == (
        "Students differ: Deformable DETR, D-FINE 600 steps at 96 px; Conditional DETR 2,000 steps at 192 px. "
        "Weights of losses are as published, or ours, and not tuned: Conditional DETR, D-FINE. "
        "DETRDistill is without its feature loss: D-FINE."
    )
    assert said("coco", ["deformable_detr", "adamixer"]).startswith(
        "Students differ: Deformable DETR 50 epochs at 800 px; AdaMixer 12 epochs at"
    )


def test_the_commits_of_a_continued_run_are_named_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store)
    table = main_results([QUICK], [0, 1, 2])
    frame = collect(table, store)
    frame.loc[0, "commit"] = "fedcba9876543210, 0123456789abcdef"
    assert "; commits 01234567, fedcba98; " in provenance_line(frame)


def test_the_best_of_several_evaluations_is_called_that(tmp_path: Path) -> None:
    store, table = Store(tmp_path), main_results([QUICK], (0, 1, 2))
    fill(store)
    assert "optimistic" not in provenance_line(collect(table, store))
    record = store.record(QUICK.recipe("student", 1))
    store.write(record.replace(kept={"step": 400, "AP": 15.0, "split": "val", "of": 6}))
    frame = collect(table, store)
    assert sorted(set(frame["status"])) == ["measured", "measured, best of 6"]
    assert "runs of their best evaluation, which was chosen on the same images" in provenance_line(frame)


def test_nothing_run_at_all(tmp_path: Path) -> None:
    table = main_results([QUICK], [0])
    frame = collect(table, Store(tmp_path))
    assert set(frame["status"]) == {"not run"} and provenance_line(frame).endswith("not run yet.")
    assert set(cells(summarise(table, frame, Comparisons([table], Store(tmp_path))))["Status"]) == {"not run"}


def test_a_run_on_a_data_folder_is_found_without_the_folder(tmp_path: Path) -> None:
    store, student = Store(tmp_path), get_preset("coco").student
    record = put(store, student, 44.0)
    assert store.record(student) == record
    assert store.record(student.replace(**{"schedule.lr": 1e-3})) is None
    put(store, student, 44.0, data="e" * 64)
    with pytest.raises(InputError, match="differ only in the content of their data"):
        store.record(student)


def test_runs_of_other_digits_do_not_count(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, QUICK.student.replace(data=Digits(size=64)), 12.0)
    assert store.record(QUICK.student) is None


def test_equal_records_give_equal_bytes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store)
    (store.folder(QUICK.recipe("detrdistill")) / "log.jsonl").write_text(
        "".join(json.dumps({"step": i, "lr": 1e-3, "loss": 3.0, "detection/class": 2 / i, "features": 1 / i}) + "\n" for i in range(1, 9))
    )
    first = {path.relative_to(tmp_path): path.read_bytes() for path in write_report("quick", [0, 1, 2], tmp_path)}
    second = {path.relative_to(tmp_path): path.read_bytes() for path in write_report("quick", [0, 1, 2], tmp_path)}
    assert first == second
    assert {str(path) for path in first} == {f"tables/main_results.{suffix}" for suffix in ("csv", "md", "tex")} | {
        "tables/claims.csv", "tables/claims.md", "index.html",
    } | {
        f"figures/{name}.{suffix}"
        for name in ("main_results", "convergence", "figure1", "loss_parts", "forest", "residuals")
        for suffix in ("png", "pdf")
    }  # fmt: skip
    markdown, latex = first[Path("tables/main_results.md")].decode(), first[Path("tables/main_results.tex")].decode()
    for text in (markdown, latex):
        assert "embedded digits, 96 px; not a COCO result; data dddddddd; commit 01234567; 3 seeds" in text
    assert latex.count(r"\toprule") == latex.count(r"\bottomrule") == 1 and "±" not in latex


def test_report_of_an_empty_store_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from detrdistill.report.write import write_report; "
        f"assert len(write_report('quick', [0], {str(tmp_path)!r})) == 14; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert "not run" in (tmp_path / "tables" / "main_results.md").read_text()


def test_seeds_that_are_not_stated_are_those_stored(tmp_path: Path) -> None:
    """The teacher's own seed is none of them."""
    store, smoke = Store(tmp_path), get_preset("smoke")
    assert stored_seeds("smoke", store=store) == (0,)
    put(store, smoke.teacher, 50.0)
    assert smoke.teacher.seed == 1 and stored_seeds("smoke", store=store) == (0,)
    for seed in (4, 2):
        put(store, smoke.recipe("detrdistill", seed), 20.0)
    put(store, get_preset("smoke", "adamixer").recipe("student", 5), 20.0)
    put(store, smoke.student.replace(seed=7, queries=19), 20.0)  # a trial, of no table
    assert stored_seeds("smoke", store=store) == (2, 4, 5)
    assert stored_seeds("smoke", ["components"], ["deformable_detr"], store) == (2, 4)


def test_the_page_shows_what_makes_no_table(tmp_path: Path) -> None:
    fill(Store(tmp_path))
    write_report("quick", [0], tmp_path)
    nothing = (tmp_path / "index.html").read_text().split('<section id="where_to_look">')[1]
    assert "Query masks single out objects" in nothing and "<img" not in nothing and ".ipynb" not in nothing
    for name in (
        "notebooks/01_main_results.ipynb",
        "notebooks/10_query_masks.ipynb",
        "notebooks/12.failed.ipynb",
        "figures/figure4.png",
        "figures/convergence_adamixer.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    write_report("quick", [0], tmp_path)
    before, after = (tmp_path / "index.html").read_text().split('<section id="where_to_look">')
    assert "01_main_results" in before and "main_results.png" in before and "01_main_results" not in after
    assert "convergence" not in after, "of a report of more detectors, before"
    assert 'href="notebooks/10_query_masks.ipynb"' in after and 'src="figures/figure4.png"' in after and "failed" not in after


def test_unknown_preset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown"):
        write_report("enormous", [0], tmp_path)


def test_a_report_of_the_reference_says_so_and_unknown_formats_are_refused(tmp_path: Path) -> None:
    source = Store(tmp_path / "reference")
    fill(source)
    with pytest.raises(InputError, match="format 'gif' of figures is unknown; known: png, pdf"):
        write_report("quick", [0], tmp_path / "own", source=source, formats=["gif"])
    assert not (tmp_path / "own").exists()
    write_report("quick", [0], tmp_path / "own", source=source, formats=["png"])
    said = "Nothing of it was run here"
    assert said in (tmp_path / "own" / "index.html").read_text() and not list((tmp_path / "own").rglob("*.pdf"))
    write_report("quick", [0], source.root, formats=["png"])
    assert said not in (source.root / "index.html").read_text()
