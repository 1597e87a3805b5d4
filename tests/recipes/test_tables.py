"""Which runs make which table."""

import pytest

from detrdistill.errors import InputError
from detrdistill.parameters import named_run
from detrdistill.published import published
from detrdistill.recipes.family_presets import SMALL
from detrdistill.recipes.identity import run_id
from detrdistill.recipes.methods import METHODS, DETRDistill
from detrdistill.recipes.presets import PRESETS, detectors_of, get_preset, get_presets
from detrdistill.recipes.rows import GAP
from detrdistill.recipes.tables import TABLES, all_compared, make_table, only_parents, possible_tables, usual_tables

every_table = pytest.mark.parametrize("name", TABLES)
every_preset = pytest.mark.parametrize("preset", PRESETS)


@every_preset
@every_table
def test_every_preset_makes_every_table(name, preset):
    table = make_table(name, get_presets(preset), [0, 3])
    assert table.name == name and table.preset == preset and table.rows
    keys = [(row.detector, row.name) for row in table.rows]
    assert len(set(keys)) == len(keys), "a row's name is its own"
    titles = [(row.detector, row.title) for row in table.rows]
    assert len(set(titles)) == len(titles), "and so is what the reader sees"
    for row in table.rows:
        if row.family == "teacher":  # of mini's seeds 0 and 3 each has its own
            assert list(row.recipes) == [recipe.seed for recipe in row.recipes.values()] and len(row.recipes) == 1 + (preset == "mini")
        else:
            assert row.recipes.keys() == {0, 3}
        assert (row.detector, row.baseline) in keys or not row.baseline
        methods = [recipe.methods for recipe in row.recipes.values()]
        assert all(bool(one) == bool(row.baseline) or row.family == "student" for one in methods)


@every_table
def test_published_names_are_those_of_the_published_tables(name):
    """On COCO, where every detector is there; a name that is not in the table is a gap that was found in no source."""
    table = make_table(name, get_presets("coco"), [0])
    named = [row for row in table.rows if row.published]
    if not table.published:
        assert not named
        return
    values = published(table.published)
    stated = set(zip(values["row"], values["column"], strict=True))
    assert all((row.published, row.column) in stated for row in named if row.published != GAP)
    if name in ("main_results", "prior_methods", "encoder_decoder", "components", "light_backbones"):
        ours = {(row.published, row.column) for row in named}
        theirs = {(row, column) for row, column in stated if column.startswith("AP") and column.partition(" ")[0] == "AP"}
        assert theirs <= ours, f"rows of the paper that are not made: {sorted(theirs - ours)}"


def test_what_the_paper_measured_with_another_detector_stays_away():
    (quick,) = get_presets("quick")
    for name in ("prior_methods", "encoder_decoder", "components"):
        assert {row.published for row in make_table(name, [quick], [0]).rows} <= {"", GAP}


def test_tables_of_one_detector_take_the_paper_s():
    presets = get_presets("coco")
    wanted = {
        "prior_methods": "AdaMixer",
        "components": "AdaMixer",
        "encoder_decoder": "Conditional DETR",
        "stage_mapping": "Conditional DETR",
    }
    for name, detector in wanted.items():
        assert {row.detector for row in make_table(name, presets, [0]).rows} == {detector}
        assert {row.detector for row in make_table(name, presets[:1], [0]).rows} == {"Deformable DETR"}


def test_halved_decoders_and_encoders():
    rows = {row.name: row.recipes[0] for row in make_table("encoder_decoder", [get_preset("coco", "conditional_detr")], [0]).rows}
    sizes = {name: (one.encoder_layers, one.decoder_layers) for name, one in rows.items()}
    assert sizes["student 6/3"] == sizes["detrdistill 6/3"] == (6, 3) and sizes["detrdistill 3/6"] == (3, 6) and sizes["teacher"] == (6, 6)
    adamixer = make_table("encoder_decoder", [get_preset("coco", "adamixer")], [0])
    assert [row.recipes[0].decoder_layers for row in adamixer.rows] == [6, 6, 6, 3, 3], "without an encoder"


def test_components_are_all_combinations():
    table = make_table("components", [get_preset("quick")], [0])
    found = [tuple(bool(getattr(method, part)) for part in ("logits", "features", "assignment")) for method in methods(table)]
    assert len(set(found)) == len(found) == 7 and all(any(one) for one in found)


def test_discrepancies_turn_one_switch_at_a_time_and_then_all():
    table = make_table("discrepancies", [get_preset("quick")], [0])
    paper, *switched, released = methods(table)
    assert paper == get_preset("quick").method and released == DETRDistill(variant="released")
    told = set()
    for method in switched:
        told |= {name for name in DETRDistill.model_fields if getattr(method, name) != getattr(paper, name)}
    different = {name for name in DETRDistill.model_fields if getattr(released, name) != getattr(paper, name)}
    assert told == different - {"variant", "stages"}, "stages differ for unequal depths alone"


def test_every_method_stands_in_a_table():
    used = {method.name for name in TABLES for recipe in make_table(name, get_presets("coco"), [0]).recipes() for method in recipe.methods}
    assert used == METHODS.keys()


def test_self_distillation_has_one_backbone():
    for row in make_table("self_distillation", get_presets("coco"), [0]).rows:
        recipe = row.recipes[0]
        assert recipe.teacher is None or recipe.teacher.backbone == recipe.backbone


def test_a_table_s_runs_are_few_where_rows_share_them():
    table = make_table("prior_methods", [get_preset("quick")], [0])
    assert len(table.rows) == 21 and len({run_id(recipe) for recipe in table.recipes()}) == 7


def test_half_of_an_encoder_of_one_layer_is_none_and_not_the_paper_s():
    rows = {row.name: row for row in make_table("encoder_decoder", get_presets("mini"), [0]).rows}
    assert list(rows) == ["teacher", *(f"{one} {size}" for size in ("1/4", "1/2", "0/4", "0/2") for one in ("student", "detrdistill"))]
    assert {name for name, row in rows.items() if not row.published} == {name for name in rows if " 0/" in name}


def test_seeds_share_teachers_by_threes():
    preset = get_preset("mini", "adamixer")
    assert preset.teacher_of(2) == preset.teacher != preset.teacher_of(3) == preset.teacher_of(5) != preset.teacher_of(6)
    assert preset.recipe("teacher", 4) == preset.recipe("fgd", 4).teacher == preset.teacher_of(3)
    second = preset.teacher_of(3)
    assert (second.seed, second.backbone.crops.seed) == (1, 1), "a backbone of its own too"
    assert second.replace(**{"seed": 0, "backbone.crops.seed": 0}) == preset.teacher
    table = make_table("self_distillation", [preset], [0, 3])
    own = next(row for row in table.rows if row.family == "teacher")
    assert [recipe.teacher for recipe in table.rows[-1].recipes.values()] == list(own.recipes.values())
    assert get_preset("bccd").teacher_of(5) == get_preset("bccd").teacher


def test_refusals():
    with pytest.raises(InputError, match="table 'table7' is unknown; known: main_results, prior_methods"):
        make_table("table7", get_presets("quick"), [0])
    with pytest.raises(InputError, match="no seeds given"):
        make_table("components", get_presets("quick"), [])
    assert usual_tables(get_presets("quick")) == ("main_results",) and set(usual_tables(get_presets("coco"))) == set(TABLES)


def methods(table) -> list[DETRDistill]:
    """Of the rows that have one."""
    return [row.recipes[0].methods[0] for row in table.rows if row.baseline]


def test_a_run_that_is_a_row_of_its_own_is_no_parent_alone() -> None:
    """The plain student that trains as long as the teacher also teaches, in self-distillation; it is measured all the same."""
    tables = [make_table(name, get_presets("mini"), (0,)) for name in TABLES]
    students = {run_id(recipe) for table in tables for row in table.rows if row.family == "student" for recipe in row.recipes.values()}
    teachers = {run_id(recipe) for table in tables for row in table.rows if row.family == "teacher" for recipe in row.recipes.values()}
    assert students & teachers and not students & only_parents(tables)
    assert teachers - students <= only_parents(tables)


def test_small_families_are_there_where_they_are_named():
    assert [preset.student.detector for preset in get_presets("mini")] == ["deformable_detr", "conditional_detr", "adamixer"]
    presets = get_presets("mini", SMALL)
    assert possible_tables(presets) == usual_tables(presets) == ("main_results",)
    rows = make_table("main_results", presets, [0]).rows
    assert {row.detector for row in rows} == {"RT-DETR v2", "D-FINE"} and not any(row.published for row in rows)
    assert [row.name for row in rows[:4]] == ["teacher", "student", "fitnet", "detrdistill"]
    with pytest.raises(InputError, match="table 'logits' is not made for D-FINE; their tables: main_results"):
        make_table("logits", presets[1:], [0])
    mixed = get_presets("mini", ["adamixer", "d_fine"])
    assert {row.detector for row in make_table("logits", mixed, [0]).rows} == {"AdaMixer"}
    assert all_compared(presets, [0])[-1].name == "main_results"
    with pytest.raises(InputError, match="preset coco has no recipes for detector 'd_fine'"):
        get_presets("coco", ["d_fine"])
    run = run_id(presets[1].recipe("detrdistill", 2))
    assert named_run(get_presets("mini", detectors_of("mini")), run, 2) == (presets[1].recipe("detrdistill", 2), False)
