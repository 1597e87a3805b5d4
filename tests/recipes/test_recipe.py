"""Recipes refuse what they do not know, accept numbers as text, and name runs by all that changes them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from detrdistill.errors import InputError
from detrdistill.files import file_hash
from detrdistill.models.backbones import file_weights
from detrdistill.recipes.identity import parents, run_id
from detrdistill.recipes.methods import FGD, KDDETR, METHODS, DETRDistill
from detrdistill.recipes.parts import BackboneRecipe, CropTraining, Digits, Folder, Resize, Schedule, WeightsFile
from detrdistill.recipes.presets import PRESETS, get_preset, get_presets, smoke
from detrdistill.recipes.recipe import Recipe
from detrdistill.recipes.tables import TABLES, named_runs
from detrdistill.runs.pinned import pinned_preset
from tests.folders import write_folder

STUDENT, TEACHER, DISTILLED = (smoke().recipe(setting) for setting in ("student", "teacher", "detrdistill"))


def refusal(**changes: Any) -> str:
    with pytest.raises(InputError) as error:
        DISTILLED.replace(**changes)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("qeries", 30, ["unknown parameter 'qeries' = 30", "queries"]),
        ("schedule.learning_rate", 1e-3, ["unknown parameter 'schedule.learning_rate' = 0.001", "lr", "warmup"]),
        ("backbone.crops.step", 3, ["unknown parameter 'backbone.crops.step' = 3; known here: steps, batch"]),
        ("data.sise", 3, ["unknown parameter 'data.digits.sise' = 3; known here: name, size, train"]),
        ("teacher.schedule.step", 3, ["unknown parameter 'teacher.schedule.step' = 3; known here: steps, epochs"]),
        (
            "methods",
            [{"name": "detrdistill", "gama": 1}],
            ["unknown parameter 'methods.0.detrdistill.gama' = 1; known here: name, variant"],
        ),
        ("methods", [{"name": "fgd", "alpha": 1}], ["unknown parameter 'methods.0.fgd.alpha' = 1; known here: maps, name, foreground"]),
        ("methods", [{"name": "detrdistill", "mask": "circle"}], ["'methods.0.detrdistill.mask' = 'circle'", "'quality', 'query'"]),
        ("methods", [{"name": "detrdistill", "contrast": 0.2}], ["compares the pairs of matching='joint'"]),
        ("methods", [{"name": "mgd", "masked": 2}], ["'methods.0.mgd.masked' = 2", "less than or equal to 1"]),
        ("schedule.lr", "fast", ["'schedule.lr' = 'fast'", "number"]),
        ("schedule.lr", -1e-4, ["'schedule.lr' = -0.0001", "greater than 0"]),
        ("schedule.lr", "nan", ["'schedule.lr' = 'nan'", "finite"]),
        ("schedule.lr", float("inf"), ["'schedule.lr' = inf", "finite"]),
        ("schedule.steps", 2.5, ["'schedule.steps' = 2.5", "integer"]),
        ("schedule.steps", -1, ["'schedule.steps' = -1", "greater than or equal to 0"]),
        ("schedule.steps", 0, ["schedule.steps 0 trains nothing", "--start MODEL"]),
        ("start", {"path": "a.pth", "sha256": "0"}, ["'start.sha256' = '0'", "should match pattern"]),
        ("schedule.epochs", 3, ["give either 'steps' or 'epochs', not both"]),
        ("schedule.accumulate", 3, ["'batch' 4 is not a multiple of 'accumulate' 3"]),
        ("seed", -1, ["'seed' = -1"]),
        ("queries", None, ["'queries' = None", "integer"]),
        ("dropout", 1.5, ["'dropout' = 1.5", "less than or equal to 1"]),
        ("form", "three_stage", ["'form' = 'three_stage'", "'box_refine'"]),
        ("detector", "yolo", ["'detector' = 'yolo'", "deformable_detr"]),
        ("methods", "fitnets", ["'fitnets'", "'fitnet'"]),
        ("methods", ["detrdistill", "detrdistill"], ["names one method twice: detrdistill"]),
        ("methods", [], ["give both or neither"]),
        ("teacher", None, ["give both or neither"]),
        ("teacher_floor", 101, ["'teacher_floor' = 101"]),
        ("dim", 30, ["'dim' 30 must be a multiple of 'heads' 4"]),
        ("dim", 48, ["multiple of 32"]),
        ("backbone.weights", "imagenet", ["no ImageNet weights exist for thin_resnet"]),
        ("backbone.name", "resnet18", ["resnet18 has no width", "(width 8, blocks (1, 1, 1, 1))", "set width 16, blocks (1, 1, 1, 1)"]),
        (
            "backbone",
            {"name": "resnet50", "blocks": [1, 1, 2, 1]},
            ["resnet50 has no width and no blocks to choose", "blocks (1, 1, 2, 1)"],
        ),
        ("backbone.crops", None, ["weights='crops' needs 'crops'"]),
        ("backbone.blocks", [1, 1, 1], ["'backbone.blocks"]),
        ("data.size", 8, ["'data.digits.size' = 8"]),
        ("data.name", "imagenet", ["'data'", "'digits', 'folder'"]),
        ("levels", 2, ["'levels' 2 must be the teacher's 3", "detrdistill compares level with level"]),
        ("backbone.dilation", True, ["'backbone.dilation' must be the teacher's", "cell by cell"]),
        ("form", "two_stage", ["take a teacher of the same 'form'"]),
        ("schedule.lr.value", 3, ["'schedule.lr.value' has no part 'lr'"]),
        ("scedule.lr", 3, ["'scedule.lr' has no part 'scedule'"]),
    ],
)
def test_faults_are_named_on_one_line(name, value, parts):
    message = refusal(**{name: value})
    for part in parts:
        assert part in message, message


def test_all_faults_are_told_at_once():
    with pytest.raises(InputError, match=r"^parameters of the notebook: 'seed' = 'x'.*; unknown parameter 'qeries' = 3"):
        Recipe.read({"qeries": 3, "seed": "x", "schedule": {"steps": 3}}, where="parameters of the notebook")


def test_text_is_read_as_numbers():
    """papermill's YAML hands "1e-4" over as text."""
    numbers = {"schedule.lr": 1e-4, "schedule.steps": 7, "seed": 3, "backbone.blocks": (1, 2, 1, 1)}
    text = {"schedule.lr": "1e-4", "schedule.steps": "7", "seed": "3", "backbone.blocks": ["1", "2", "1", "1"]}
    assert STUDENT.replace(**text) == STUDENT.replace(**numbers) and run_id(STUDENT.replace(**text)) == run_id(STUDENT.replace(**numbers))


def test_short_forms_of_methods():
    for form in ("detrdistill", ["detrdistill"], [{"name": "detrdistill"}], (DETRDistill(),)):
        assert DISTILLED.replace(methods=form).methods == (DETRDistill(),)
    assert STUDENT.replace(methods="none") == STUDENT


def test_recipes_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        STUDENT.seed = 3


def test_epochs_or_steps():
    assert Schedule(steps=30).total_steps(1000) == 30
    assert Schedule(epochs=0.5, batch=16).total_steps(1000) == 31 and Schedule(epochs=1e-9).total_steps(5) == 1


# A different value for every field that may change a number.
OTHER = {
    "form": "plain", "backbone.width": 16, "backbone.blocks": (1, 1, 2, 1), "backbone.weights": "none", "backbone.crops.steps": 5,
    "backbone.crops.batch": 8, "backbone.crops.lr": 1e-3, "backbone.crops.weight_decay": 0.0, "backbone.crops.size": 16,
    "backbone.crops.seed": 1, "backbone.crops.precision": "fp32",
    "backbone.name": "resnet18", "dim": 64, "heads": 8, "ffn": 128, "encoder_layers": 2, "decoder_layers": 1,
    "queries": 7, "levels": 2, "points": 2, "dropout": 0.1, "teacher_floor": 3.0, "data.size": 40, "data.train": 31, "data.val": 9,
    "data.seed": 1, "resize.train": "flip", "resize.stretch": True, "resize.short": 63, "resize.long": 65, "resize.mean": (0, 0, 0),
    "resize.std": (1, 1, 1), "schedule.steps": 7, "schedule.batch": 8, "schedule.accumulate": 2,
    "schedule.lr": 2e-3, "schedule.backbone_lr": 0.1, "schedule.sampling_lr": 0.1, "schedule.weight_decay": 0.0,
    "schedule.clip_norm": 0.5, "schedule.warmup": 1, "schedule.decay": "step", "schedule.drops": (0.5,), "schedule.evaluations": 2,
    "schedule.keep": "best", "schedule.ema": 0.9, "backbone.frozen_stages": 1,
    "precision": "bf16", "seed": 5,
}  # fmt: skip
BACKBONE = {name for name in OTHER if name.startswith(("backbone.", "data."))} - {"backbone.weights", "backbone.frozen_stages"}


def test_every_field_has_another_value_here():
    """So that no field that is added later is forgotten in a run's name."""
    told = {"config", "detector", "methods", "teacher", "start", "schedule.epochs", "data.name", "backbone.dilation"}
    told |= {"backbone.stride_in_1x1"}
    adamixers = {"temperature", "feature_dim", "in_points", "out_points", "groups"}
    models = {"": Recipe, "backbone.": BackboneRecipe, "backbone.crops.": CropTraining}
    models |= {"data.": Digits, "resize.": Resize, "schedule.": Schedule}
    nested = {name.rstrip(".") for name in models if name}
    fields = {prefix + name for prefix, model in models.items() for name in model.model_fields}
    assert fields - nested - told - adamixers == set(OTHER)


@pytest.mark.parametrize("name", OTHER)
def test_one_field_changes_exactly_what_depends_on_it(name):
    needed = {"backbone.width": 16} if name == "backbone.name" else {}  # a ResNet-18 has but one
    changed = STUDENT.replace(**{name: OTHER[name]} | needed)
    assert run_id(changed) != run_id(STUDENT)
    if name != "backbone.weights":
        same = run_id(parents(changed)["backbone"]) == run_id(parents(STUDENT)["backbone"])
        assert same == (name not in BACKBONE)


def test_a_teacher_s_fields_change_teacher_and_student_alone():
    for name, value in {"schedule.steps": 7, "seed": 9}.items():
        changed = DISTILLED.replace(teacher=TEACHER.replace(**{name: value}))
        assert run_id(changed) != run_id(DISTILLED) and run_id(parents(changed)["teacher"]) != run_id(parents(DISTILLED)["teacher"])
        assert run_id(parents(changed)["backbone"]) == run_id(parents(DISTILLED)["backbone"])
    for name, value in {"seed": 3, "teacher_floor": 1.0, "methods": [{"name": "detrdistill", "gamma": 0.1}]}.items():
        changed = DISTILLED.replace(**{name: value})
        assert run_id(changed) != run_id(DISTILLED) and parents(changed) == parents(DISTILLED)


@pytest.mark.parametrize(("name", "value"), [("logits", 0), ("features", 2), ("assignment", 0.5), ("gamma", 0.25)])
def test_a_method_s_fields_change_the_name(name, value):
    assert run_id(DISTILLED.replace(methods=[{"name": "detrdistill", name: value}])) != run_id(DISTILLED)


def test_fields_at_their_default_are_not_part_of_the_name():
    stated = STUDENT.replace(**{"schedule.accumulate": 1, "precision": "fp32", "teacher_floor": 0})
    assert run_id(stated) == run_id(STUDENT) and run_id(STUDENT).startswith("deformable_detr-thin8-plain-seed0-")


def test_a_moved_folder_keeps_the_name_and_other_content_does_not():
    at = lambda path, sha: STUDENT.replace(data=Folder(path=Path(path), sha256=sha))  # noqa: E731
    assert run_id(at("here", "a" * 64)) == run_id(at("there", "a" * 64)) != run_id(at("here", "b" * 64))
    assert run_id(at("here", None)) != run_id(at("there", None))


def test_data_and_weights_are_found_from_a_notebook_s_folder(tmp_path, monkeypatch):
    """Papermill and JupyterLab run notebooks where they lie, a folder below the data."""
    write_folder(tmp_path / "data" / "bccd")
    (tmp_path / "data" / "weights").mkdir()
    torch.save({"fc.weight": torch.zeros(2)}, path := tmp_path / "data" / "weights" / "mobilenet_v2.pth")
    weights = WeightsFile(name=path.name, sha256=file_hash(path))
    (tmp_path / "notebooks").mkdir()
    found = []
    for folder in (tmp_path, tmp_path / "notebooks"):
        monkeypatch.chdir(folder)
        preset = pinned_preset(get_preset("bccd"))
        assert "fc.weight" in file_weights(weights) and "fc.weight" in file_weights(Path("data/weights/mobilenet_v2.pth"))
        found.append((run_id(preset.teacher), run_id(preset.recipe("detrdistill"))))
    assert found[0] == found[1]


def test_weights_known_by_their_hash_are_looked_for_when_a_run_needs_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = get_preset("bccd").student.backbone.weights
    with pytest.raises(
        InputError, match=r"backbone weights mobilenet_v2.pth \(dfcc5335\): no file data/weights/mobilenet_v2.pth .*put it there"
    ):
        file_weights(weights)
    (tmp_path / "data" / "weights").mkdir(parents=True)
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "data" / "weights" / weights.name)
    with pytest.raises(InputError, match=f"their hash is .*, the recipe says {weights.sha256}; put the recipe's file there"):
        file_weights(weights)
    with pytest.raises(InputError, match=r"'backbone.weights.WeightsFile.sha256' = 'dfcc'"):
        STUDENT.replace(**{"backbone.weights": {"name": "mobilenet_v2.pth", "sha256": "dfcc"}})


def test_presets_know_their_runs():
    for name in PRESETS:
        runs = named_runs(TABLES, get_presets(name), (0, 1))
        assert all(run_id(recipe) == key for key, recipe in runs.items())
        assert all(run_id(parent) in runs for recipe in runs.values() for parent in parents(recipe).values())
    with pytest.raises(InputError, match="preset 'qiuck' is unknown; known: smoke, quick"):
        get_preset("qiuck")
    with pytest.raises(InputError, match="setting 'techer' is unknown; known: teacher, student"):
        smoke().recipe("techer")


# A value for each switch of each method that is not its default.
SWITCHES = {
    "detrdistill": {
        "logits": 2, "features": 0, "assignment": 0.5, "gamma": 0.25, "stages": "last", "matching": "positives", "normaliser": "pairs",
        "mask": "ones", "maps": "neck", "mask_queries": "initial", "adapter": False, "pairing": "student", "references": "student",
        "normalised": True,
    },
    "fitnet": {"weight": 1, "maps": "features"},
    "fgd": {"foreground": 0, "background": 0, "attention": 0, "relation": 0, "temperature": 1, "maps": "features"},
    "mgd": {"weight": 1, "masked": 0.5, "maps": "features"},
    "fkd": {"feature": 0, "channel": 0, "spatial": 0, "relation": 0, "temperature": 1, "maps": "features"},
    "fgfi": {"weight": 1, "threshold": 0.3, "scales": (4,), "ratios": (1,), "maps": "features"},
    "pkd": {"weight": 6, "maps": "features"},
    "cwd": {"weight": 1, "temperature": 2, "maps": "features"},
    "kd_detr": {"form": "tprd", "specific": 0, "general": 0, "general_queries": 7, "temperature": 1, "stages": "grouped"},
    "d3etr": {"adaptive": 0, "fixed": 0, "self_attention": 0, "cross_attention": 0, "stages": "first"},
}  # fmt: skip


def test_every_switch_has_another_value_here():
    assert SWITCHES.keys() == METHODS.keys()
    for name, method in METHODS.items():
        assert SWITCHES[name].keys() == method.model_fields.keys() - {"name", "variant", "contrast"}


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in SWITCHES.items() for field in fields])
def test_every_switch_is_part_of_the_run_s_name(name, field):
    plain, changed = (DISTILLED.replace(methods=[{"name": name} | fields]) for fields in ({}, {field: SWITCHES[name][field]}))
    assert run_id(plain) != run_id(changed) and f"-{name}-" in run_id(plain)


def test_lists_may_be_text():
    assert DISTILLED.replace(methods=[{"name": "fgfi", "scales": "2, 4"}]).methods[0].scales == (2.0, 4.0)
    with pytest.raises(InputError, match=r"'methods.0.fgfi.ratios' = .*at least 1"):
        DISTILLED.replace(methods=[{"name": "fgfi", "ratios": []}])


def test_variants_set_all_switches_together():
    released = DETRDistill(variant="released")
    same = {"name", "gamma", "mask_queries", "normalised", "logits", "features", "assignment"}
    assert {field for field in DETRDistill.model_fields if getattr(released, field) == getattr(DETRDistill(), field)} == same
    stated = DETRDistill(variant="released", mask="ones", contrast=0)
    assert stated.mask == "ones" and stated.contrast == 0 and stated.matching == "joint"
    assert KDDETR(form="tprd").stages == "grouped" and KDDETR(form="tprd", stages="last").stages == "last"
    for replaced in (DETRDistill(gamma=0.3, mask="ones").replace(variant="released"), DETRDistill(variant="released", gamma=0.3)):
        assert replaced == released.replace(gamma=0.3) and replaced.mask == "released"
    assert released.replace(variant="paper", mask="ones") == DETRDistill(mask="ones")
    for preset in PRESETS:  # whose lambdas are its own
        assert get_preset(preset).method.replace(variant="released") == released
    quick = get_preset("quick").method
    assert quick.replace(variant="released", features=0.3).features == 0.3 and quick.replace(variant="paper") == quick
    assert KDDETR().replace(form="tprd") == KDDETR(form="tprd")
    read_again = DISTILLED.replace(methods=(stated,)).replace(seed=3).methods
    assert read_again == (stated,)


def test_methods_joined_in_a_setting():
    both = smoke().recipe("fgd+detrdistill")
    assert both.methods == (FGD(), smoke().method) and both.title == "deformable_detr-thin8-fgd+detrdistill-seed0"
    assert both.replace(methods="fgd+detrdistill").methods == (FGD(), DETRDistill())
    with pytest.raises(InputError, match="setting 'fgdd' is unknown; known: teacher, student, detrdistill, fitnet"):
        smoke().recipe("detrdistill+fgdd")


ADAMIXER, OTHER_WIDTH = smoke("adamixer").student, smoke("adamixer").student.replace(feature_dim=64)
TWO_STAGE = STUDENT.replace(form="two_stage")


@pytest.mark.parametrize(
    ("student", "teacher", "method", "reason"),
    [
        (ADAMIXER, TEACHER, {"name": "detrdistill"}, "features and queries of detector deformable_detr mean something else to adamixer"),
        (ADAMIXER, TEACHER, {"name": "fgd"}, "take a teacher whose queries have the same form"),
        (ADAMIXER, TEACHER, {"name": "kd_detr"}, "take a teacher whose queries have the same form"),
        (ADAMIXER, TEACHER, {"name": "detrdistill", "features": 0, "assignment": 0}, None),
        (STUDENT.replace(levels=2), TEACHER, {"name": "cwd"}, "cwd compares level with level"),
        (STUDENT.replace(levels=2), TEACHER, {"name": "kd_detr"}, None),
        (STUDENT.replace(levels=2), TEACHER, {"name": "d3etr"}, "d3etr compares level with level"),
        (STUDENT.replace(levels=2), TEACHER, {"name": "d3etr", "cross_attention": 0}, None),
        (TWO_STAGE, TEACHER, {"name": "kd_detr"}, "kd_detr cannot hand them on"),
        (TWO_STAGE, TEACHER, {"name": "d3etr", "fixed": 0}, None),
        (TWO_STAGE, TWO_STAGE, {"name": "detrdistill", "references": "student"}, "no layer that makes reference points"),
        (ADAMIXER, OTHER_WIDTH, {"name": "detrdistill"}, "multiplies the teacher's features"),
        (ADAMIXER, OTHER_WIDTH, {"name": "detrdistill", "mask": "boxes"}, None),
        (STUDENT.replace(decoder_layers=1), TEACHER, {"name": "detrdistill"}, None),
    ],
)
def test_teachers_that_cannot_teach_are_refused(student, teacher, method, reason):
    if reason is None:
        assert student.replace(methods=[method], teacher=teacher).methods[0].name == method["name"]
        return
    with pytest.raises(InputError, match=reason):
        student.replace(methods=[method], teacher=teacher)


def test_parts_of_a_schedule_can_be_written_as_text():
    """As the command line hands them over; nothing: the learning rate never falls, so that more steps can follow."""
    found = {text: Schedule.read({"steps": 1, "drops": text}) for text in ("", "0.5", "0.5, 0.75", "0.5 0.75")}
    assert [one.drops for one in found.values()] == [(), (0.5,), (0.5, 0.75), (0.5, 0.75)]
    assert [one.open_ended for one in found.values()] == [True, False, False, False]
    assert not Schedule(steps=1, drops=(), decay="cosine").open_ended


def test_the_best_of_one_evaluation_is_refused():
    with pytest.raises(InputError, match="keep='best' chooses among evaluations, and there is only one; set 'evaluations' to 2 or more"):
        Schedule.read({"steps": 1, "keep": "best"})
