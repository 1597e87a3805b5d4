"""Claims, weighed with hand-made records."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from detrdistill.errors import InputError
from detrdistill.recipes.claims import ALL, CHANGES, CLAIMS, HALFWAY, MARGINS, Claim, claims_of
from detrdistill.recipes.identity import block, run_id, treatment
from detrdistill.recipes.presets import PRESETS, get_preset, get_presets
from detrdistill.recipes.recipe import Recipe
from detrdistill.recipes.rows import Table
from detrdistill.recipes.tables import BESIDE, TABLES, full_schedule, main_results, make_table
from detrdistill.recipes.words import METRICS
from detrdistill.records import Record
from detrdistill.report.claims import board, claim_cells, sentence, weigh, write_claims
from detrdistill.report.comparisons import Comparisons
from detrdistill.report.register import PATH, planned_seeds, refuse_unknown_rows, register, write_register
from detrdistill.report.write import write_report
from detrdistill.runs.store import Store
from detrdistill.statistics import VERDICTS

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


def weighed_of(tables: Sequence[Table], store: Store) -> pd.DataFrame:
    return weigh(tables, Comparisons(tables, store))


def of(weighed: pd.DataFrame, text: str) -> dict:
    (line,) = weighed[weighed["claim"] == text].to_dict("records")
    return line


def test_differences_are_taken_seed_by_seed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for seed, (plain, distilled) in enumerate([(10.0, 12.5), (20.0, 22.6), (30.0, 32.4)]):
        put(store, QUICK.recipe("student", seed), plain, halfway=5.0 - seed, changes=2.0)
        put(store, QUICK.recipe("detrdistill", seed), distilled, halfway=5.0 + seed, changes=2.0 + seed / 2)
    weighed = weighed_of([main_results([QUICK], [0, 1, 2])], store)
    helps = of(weighed, "DETRDistill helps the student")
    # Seeds differ by 10 AP, the gain does not.
    assert helps["difference"] == pytest.approx(2.5) and helps["half"] == helps["adjusted_half"] < 0.3 and helps["status"] == "holds"
    assert helps["published"] == pytest.approx(2.5) and (helps["seeds"], helps["seeds_planned"]) == (3, 3)
    faster, steadier = of(weighed, "DETRDistill is ahead halfway"), of(weighed, "DETRDistill's assignments are steadier")
    assert (faster["measure"], faster["difference"]) == (HALFWAY, pytest.approx(2.0)) and faster["status"].startswith("undecided (about")
    assert (steadier["measure"], steadier["difference"]) == (CHANGES, pytest.approx(-0.5)) and math.isnan(steadier["margin"])
    text = claim_cells(weighed).set_index("Claim")
    assert text.loc["DETRDistill helps the student", ["Difference", "Adjusted", "Published", "Seeds", "Status"]].tolist() == [
        "+2.5 ± 0.2", "[+2.3, +2.7]", "+2.5", "3 of 3", "holds",
    ]  # fmt: skip


def test_runs_that_tables_share_count_once(tmp_path: Path) -> None:
    """The students of the main results are those of the components too; counted twice, their noise would seem half as large."""
    store, seeds = Store(tmp_path), [0, 1, 2]
    tables = [make_table(name, [QUICK], seeds) for name in ("main_results", "components", "prior_methods")]
    for seed, (plain, distilled) in enumerate([(10.0, 12.0), (11.0, 15.0), (12.0, 13.0)]):
        put(store, QUICK.recipe("student", seed), plain)
        put(store, QUICK.recipe("detrdistill", seed), distilled)
    once, thrice = Comparisons(tables[:1], store), Comparisons(tables, store)
    assert len(once.runs) == len(thrice.runs) == 6
    rows = {row.name: row for row in tables[0].rows}
    assert once.difference(rows["detrdistill"], rows["student"]) == thrice.difference(rows["detrdistill"], rows["student"])


def test_methods_are_treatments_and_students_blocks() -> None:
    mini = get_preset("mini")
    plain, ours, fgd = (mini.recipe(setting, 1) for setting in ("student", "detrdistill", "fgd"))
    assert block(plain) == block(ours) == block(fgd) != block(mini.recipe("fgd", 2))
    assert treatment(ours) == treatment(mini.recipe("detrdistill", 2)) != treatment(fgd)
    # Another teacher's seed leaves a method what it is; another width, depth or schedule of the student makes other blocks.
    assert treatment(ours.replace(teacher=ours.teacher.replace(seed=5))) == treatment(ours)
    for change in ({"decoder_layers": 2}, {"schedule.steps": 4000}, {"backbone": mini.light[0]}):
        assert block(ours.replace(**change)) not in (block(ours), block(mini.teacher))


def test_the_teacher_shares_no_block_and_is_compared_unpaired(tmp_path: Path) -> None:
    store, table = Store(tmp_path), full_schedule([QUICK], [0, 1])
    rows = {row.name: row for row in table.rows}
    (teacher,) = rows["teacher"].recipes.values()
    put(store, teacher, 57.0)
    for seed, (plain, ap) in enumerate(((51.0, 55.0), (56.6, 56.0))):
        put(store, rows["student"].recipes[seed], plain)
        put(store, rows["detrdistill"].recipes[seed], ap)
    comparisons = Comparisons([table], store)
    line = of(weigh([table], comparisons), "A distilled student passes its teacher")
    assert line["difference"] == pytest.approx(-1.5) and line["seeds"] == 2 and line["status"].startswith("undecided")
    assert line["published"] == pytest.approx(46.6 - 45.5)
    found = comparisons.difference(rows["detrdistill"], rows["teacher"])
    residual = comparisons.fit("Deformable DETR").residual_sd
    assert found.error == pytest.approx(math.sqrt(residual**2 + 0.5 / 2)), "the teacher's own spread is not known"
    assert rows["student"].recipes[0].schedule == teacher.schedule, "trained as long"


def test_comparisons_of_a_claim_are_adjusted_for_each_other(tmp_path: Path) -> None:
    store, mini = Store(tmp_path), get_preset("mini")
    for seed, noise in enumerate((0.0, 0.5, -0.4)):
        for place, (setting, ap) in enumerate({"student": 20, "fgd": 21, "mgd": 22, "fitnet": 24, "detrdistill": 24.5}.items()):
            put(store, mini.recipe(setting, seed), ap + 3 * seed + noise * (-1) ** place * (1 + place / 3))
    weighed = weighed_of([main_results([mini], [0, 1, 2])], store)
    rivals = weighed[weighed["than"].isin(["FGD", "MGD", "FitNet"])].set_index("than")
    assert rivals["family"].to_dict() == {"FGD": 3, "MGD": 2, "FitNet": 1} and of(weighed, "DETRDistill helps the student")["family"] == 1
    assert (rivals["adjusted_half"] / rivals["half"]).round(2).tolist() == sorted((rivals["adjusted_half"] / rivals["half"]).round(2))[::-1]
    line = board(weighed).set_index("Claim").loc["DETRDistill is ahead of methods made for convolutional detectors"]
    assert line["Parts"] == "2 of 3 hold"
    assert line["Verdict"].startswith("holds on Deformable DETR: over FGD (+3.6 [")
    assert "; undecided on Deformable DETR: over FitNet (+0.6 [" in line["Verdict"]


def test_the_verdict_is_a_sentence() -> None:
    about = {"claim": "It helps", "part": "DETRDistill over Student"}
    lines = [
        {"detector": "Deformable DETR", "difference": 4.6, "adjusted_half": 2.5, "verdict": "holds"},
        {"detector": "Conditional DETR", "difference": 12.7, "adjusted_half": 17.8, "verdict": "undecided", "seeds_to_decide": 9},
        {"detector": "AdaMixer", "difference": 6.1, "adjusted_half": 2.1, "verdict": "holds"},
        {"detector": "Other", "difference": math.nan, "adjusted_half": math.nan, "verdict": "not run"},
    ]
    parts = pd.DataFrame([about | {"seeds_to_decide": 0} | line for line in lines])
    counted = board(parts.assign(source="Table 3", verdict=["holds", "against", "holds (small)", "not run"]))
    assert counted["Parts"].tolist() == ["2 of 4 hold, 1 against, 1 not run"]
    assert sentence(parts) == (
        "holds on Deformable DETR (+4.6 [+2.1, +7.1]) and AdaMixer (+6.1 [+4.0, +8.2]); "
        "undecided on Conditional DETR (+12.7 [-5.1, +30.5], about 9 seeds); not run on Other"
    )


def test_what_was_not_run_or_not_measured_has_no_difference(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, QUICK.recipe("student"), 10.0)
    put(store, QUICK.recipe("detrdistill"), 12.0)  # by code that did not count changes
    weighed = weighed_of([main_results([QUICK], [0]), full_schedule([QUICK], [0])], store)
    assert of(weighed, "DETRDistill helps the student")["status"] == "one seed"
    assert of(weighed, "DETRDistill's assignments are steadier")["status"] == "not run"
    assert of(weighed, "A distilled student passes its teacher")["status"] == "not run"
    csv, markdown = (path.read_text() for path in write_claims(weighed, "Measured somewhere.", tmp_path))
    assert ",," not in csv and "|  |" not in markdown and "| +2.0 | - | +2.5 | 1 of 1 | one seed |" in markdown
    assert markdown.endswith("Measured somewhere.\n") and set(weighed["measured_on"]) == {"embedded digits, 96 px; not a COCO result"}


def test_seeds_that_differ_are_not_paired(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, QUICK.recipe("student", 0), 10.0)
    put(store, QUICK.recipe("detrdistill", 1), 12.0)
    line = of(weighed_of([main_results([QUICK], [0, 1])], store), "DETRDistill helps the student")
    assert line["seeds"] == 1 and line["status"] == "one seed"


def test_a_row_inside_the_schedule_is_read_there(tmp_path: Path) -> None:
    store, table = Store(tmp_path), make_table("prior_methods", get_presets("mini", ["adamixer"]), [0])
    rows = {row.name: row for row in table.rows}
    put(store, rows["student at whole"].recipes[0], 20.0, halfway=5.0)
    put(store, rows["fkd at whole"].recipes[0], 21.0, halfway=8.0)
    comparisons = Comparisons([table], store)
    found = [comparisons.difference(rows[f"fkd at {part}"], rows[f"student at {part}"]).mean for part in ("2/3", "whole")]
    assert found == pytest.approx([3.0, 1.0])


def test_nothing_to_decide_writes_nothing(tmp_path: Path) -> None:
    table = make_table("follow_ups", [QUICK], [0])
    weighed = weighed_of([replace(table, rows=table.rows[:2])], Store(tmp_path))  # teacher and student
    assert weighed.empty and write_claims(weighed, "", tmp_path) == [] and claim_cells(weighed).empty


def test_published_differences_are_those_of_the_paper(tmp_path: Path) -> None:
    presets = get_presets("coco")
    tables = [make_table(name, presets, [0]) for name in ("encoder_decoder", "light_backbones", "logits", "components")]
    known = {
        (line["claim"], line["detector"], line["ahead"], line["than"]): line["published"]
        for line in weighed_of(tables, Store(tmp_path)).to_dict("records")
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
    all_sets = {row.name for row in make_table("components", presets, [0]).rows} - {"student", ALL}
    assert {claim.than for claim in CLAIMS["components"] if claim.ahead == ALL} == all_sets
    passing = "A distilled student passes its teacher"
    trained_as_long = {
        one: passing in {claim.text for claim in claims_of(main_results([get_preset(one)], [0]), "Deformable DETR")} for one in PRESETS
    }
    assert trained_as_long == {"smoke": True, "quick": False, "mini": False, "bccd": True, "coco": True}
    few = {claim.than for claim in claims_of(main_results([replace(QUICK, rivals=())], [0]), "Deformable DETR")}
    assert few == {"student", "detrdistill"}


def test_the_committed_list_of_claims_is_that_of_the_code(tmp_path: Path) -> None:
    write_register(tmp_path / "register.csv")
    assert PATH.read_text() == (tmp_path / "register.csv").read_text(), "write it again: python -m detrdistill.report.register"
    lines = register()
    assert set(lines["preset"]) == {"mini", "bccd"} and (lines["measure"].map(MARGINS).isna() == (lines["margin"] == "none")).all()
    assert not lines.duplicated(["preset", "table", "detector", "ahead", "than", "measure"]).any()


def test_planned_seeds_are_those_of_the_committed_list() -> None:
    planned = planned_seeds([make_table("main_results", get_presets("mini"), [0])])
    assert planned["mini", "main_results", "AdaMixer", "detrdistill", "fgd", "AP"] == 6
    assert planned["mini", "main_results", "Conditional DETR", "detrdistill", "student", "AP"] == 4
    assert planned_seeds([make_table("main_results", [QUICK], [0])]) == {}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("detrdistill,mgd,AP,2", "detrdistill,mdg,AP,2", "table main_results has no row 'mdg' of Deformable DETR; known: detrdistill, fgd"),
        ("AP halfway,2", "AP halfway,3", "the margin of 'AP halfway' is 2, but 3 is stated; write 2"),
        ("AP halfway,2", "AP halfway,none", "the margin of 'AP halfway' is 2, but none is stated; write 2"),
        ('an image",none', 'an image",2', "measure 'changes between stages, an image' has no margin, but 2 is stated; write 'none'"),
        ("AP halfway,2", "AP later,2", "measure 'AP later' is unknown; known: AP, AP halfway"),
        ("detrdistill,mgd,AP,2,6", "detrdistill,mgd,AP,2,six", "seeds 'six' is no number; state how many are planned, such as 6"),
        ("preset,table", "preset,tables", "columns are preset, tables, .*; restore it with git"),
    ],
)
def test_a_list_of_claims_that_cannot_be_is_refused_and_nothing_is_written(
    old: str, new: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, path = PATH.read_text(), tmp_path / "claims_register.csv"
    path.write_text(text.replace(old, new, 1))
    monkeypatch.setattr("detrdistill.report.write.planned_seeds", lambda tables: planned_seeds(tables, path))
    assert old in text
    with pytest.raises(InputError, match=message) as error:
        write_report("mini", [0], tmp_path / "results", ["main_results"], ["deformable_detr"])
    assert "\n" not in str(error.value) and not (tmp_path / "results").exists()


def test_a_claim_on_rows_or_measures_that_do_not_exist_is_refused() -> None:
    refuse_unknown_rows()
    for claim, message in (
        (Claim("It helps", "Table 3", "detrdistil", "student"), "claim 'It helps' of table main_results: no preset has a row 'detrdistil'"),
        (Claim("It helps", "Table 3", "detrdistill", "student", "mAP"), "measure 'mAP' is unknown; known: AP, AP halfway"),
    ):
        with pytest.raises(InputError, match=message):
            refuse_unknown_rows({"main_results": [claim]})


def test_words_of_a_report_are_those_that_are_explained(tmp_path: Path) -> None:
    weighed = weighed_of([main_results([QUICK], [0])], Store(tmp_path))
    assert set(weighed["status"]) == {"not run"} and set(CLAIMS) <= TABLES.keys() | BESIDE
    committed = pd.read_csv(PATH.parent / "reference" / "mini" / "tables" / "claims.csv")
    words = set(committed["status"].str.replace(r" \((about|over) \d+ seeds\)", "", regex=True))
    assert words <= {*VERDICTS, "not run"}


def test_prose_says_what_the_committed_comparisons_say() -> None:
    def flat(path: str) -> str:
        return " ".join((root / path).read_text().split())

    root = PATH.parents[1]
    empty = {key: ["not run", "no interval"] for key in ("difference", "half", "adjusted_half", "equivalence_half")}
    committed = pd.read_csv(
        root / "results" / "reference" / "mini" / "tables" / "claims.csv", na_values=empty | {"published": ["unknown"], "margin": ["none"]}
    )
    page = flat("docs/results.md")
    # The worked example. (README's findings: tests/test_docs.py.)
    main = committed[(committed["table"] == "main_results") & (committed["detector"] == "Deformable DETR") & (committed["measure"] == "AP")]
    for line in main.to_dict("records"):
        interval = f"{line['difference']:+.1f} ± {line['half']:.1f}"
        assert (f"the interval is {interval}" if line["than"] == "Student" else f"{line['than']}: {interval}") in page
    (line,) = main[main["than"] == "FGD"].to_dict("records")
    low, high = (line["difference"] + sign * line["adjusted_half"] for sign in (-1, 1))
    assert line["status"] == "holds" and f"[{low:+.1f}, {high:+.1f}]" in page
    for than in ("MGD", "FitNet"):
        assert f"*{main.set_index('than').loc[than, 'status']}*" in page
    runs = pd.read_csv(root / "results" / "reference" / "mini" / "tables" / "main_results.csv")
    runs = runs[(runs["detector"] == "Deformable DETR") & runs["setting"].isin(["student", "detrdistill"]) & (runs["AP"] != "not run")]
    runs = runs.astype({"AP": float})
    plain, distilled = (runs.loc[runs["setting"] == name, "AP"].to_numpy() for name in ("student", "detrdistill"))
    five = ", ".join(["{:.1f}"] * 5)
    told = [f"{five} and {{:.1f}}".format(*values) for values in (plain, distilled)]
    assert f"AP of {told[0]}, the distilled one {told[1]}" in page
    assert f"The gains are {five} and {{:.1f}}".replace(":", ":+").format(*(distilled - plain)) in page


@pytest.mark.parametrize("name", TABLES)
def test_any_table_alone_can_be_weighed(name: str, tmp_path: Path) -> None:
    """Also where all of its comparisons belong to one claim, or where there is one alone."""
    table = make_table(name, get_presets("mini"), [0, 1])
    weighed = weigh([table], Comparisons([table], Store(tmp_path)))
    assert set(weighed["status"]) == {"not run"} and weighed["part"].str.len().gt(0).all()


def test_a_report_of_one_table_in_an_empty_folder(tmp_path: Path) -> None:
    for name in ("self_distillation", "weights"):
        written = write_report("quick", [0], tmp_path, [name])
        assert tmp_path / "index.html" in written


def test_a_claim_s_parts_are_tested_together_whichever_tables_are_written(tmp_path: Path) -> None:
    store, presets = Store(tmp_path), get_presets("mini", ["adamixer"])
    for seed in (0, 1, 2):
        for i, row in enumerate(["student", "detrdistill", "fgd", "mgd", "fitnet", "fkd", "fgfi"]):
            put(store, presets[0].recipe(row, seed), 20.0 + i + (seed * i % 3) / 5)
    halves = []
    for tables in (["main_results"], ["main_results", "prior_methods"]):
        write_report("mini", [0, 1, 2], tmp_path, tables, ["adamixer"])
        lines = pd.read_csv(tmp_path / "tables" / "claims.csv", na_values=["not run", "no interval"])
        halves.append(lines.loc[lines["than"] == "FGD", "adjusted_half"].iloc[0])
    assert halves[0] == halves[1]
