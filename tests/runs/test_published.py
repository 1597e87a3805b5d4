"""A published detector teaches, and is where a student starts: each format in its own names, and what does not fit is refused."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from detrdistill.checkpoints.hugging_face import export_hugging_face
from detrdistill.checkpoints.locate import weights_hash
from detrdistill.checkpoints.presets import choose_presets, report_folder
from detrdistill.checkpoints.pretrained import load_pretrained
from detrdistill.errors import InputError
from detrdistill.models import build_detector
from detrdistill.recipes.identity import parents, run_id
from detrdistill.recipes.parts import BackboneRecipe, Resize, Schedule
from detrdistill.recipes.recipe import Recipe
from detrdistill.recipes.rows import measured_on
from detrdistill.recipes.tables import make_table, possible_tables
from detrdistill.report.write import write_report
from detrdistill.runs import run as runs
from detrdistill.runs.load import load_detector, open_split, start_detector
from detrdistill.runs.pinned import pinned
from detrdistill.runs.run import run
from detrdistill.runs.store import Store
from detrdistill.training import checkpointing, trainer
from tests.checkpoints.test_formats import FORMS, mmdet3_state, without_neck_bias
from tests.checkpoints.test_pretrained import mmdet_state, of_classes, official_state
from tests.folders import read_split, write_folder, write_split
from tests.models.small import randomise, small_detector

NAMES = ["zebra", "cat", "person"]  # of COCO's classes
UNTOLD = {"mmdetection 2": {"heads": 4}}  # what a file of this format does not tell
OFFICIAL = ("official deformable", "official conditional", "official two-stage")
FORMATS = (*OFFICIAL, "mmdetection 2", "mmdetection 3", "adamixer", "hugging face")
QUICK = {"backbone.weights": "crops", "backbone.crops.steps": 1, "schedule.steps": 2, "schedule.evaluations": 1, "schedule.batch": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with three of COCO's classes."""
    root = write_folder(tmp_path_factory.mktemp("data") / "mine")
    for split in ("train", "val"):
        content = read_split(root, split)
        names = [one | {"name": name} for one, name in zip(content["categories"], NAMES, strict=True)]
        write_split(root, split, content | {"categories": names})
    return root


def write_model(kind: str, folder: Path) -> Path:
    """A detector with random weights as others publish it."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "hugging face":
        recipe = Recipe(
            backbone=BackboneRecipe(name="resnet18"), form="box_refine", dim=32, heads=4, ffn=32, encoder_layers=1, decoder_layers=2,
            queries=5, levels=2, points=2, dropout=0.0, schedule=Schedule(steps=1),
        )  # fmt: skip
        detector = build_detector(recipe, 4)
        randomise(detector)
        return export_hugging_face(detector, folder / "model", ["dog", *NAMES], Resize(short=64, long=64))
    path = folder / "model.pth"
    if kind in OFFICIAL:  # with COCO's 91 outputs
        of_classes({"official two-stage": "deformable-two-stage"}.get(kind, kind.split()[1]), 91, path)
        return path
    classes = [NAMES[2], NAMES[0], NAMES[1]]
    if kind == "mmdetection 3":
        state = mmdet3_state("deformable-refine", without_neck_bias("deformable-refine"))
        meta = {"cfg": f"model = dict(bbox_head=dict({FORMS['deformable-refine']}))", "dataset_meta": {"classes": classes}}
    else:
        state = official_state(kind, small_detector(kind)) if kind == "adamixer" else mmdet_state(without_neck_bias("deformable", 3))
        meta = {"CLASSES": classes}
    torch.save({"state_dict": state, "meta": meta}, path)
    return path


def chosen(setting: str, data: Path, kind: str = "", **models: str) -> Recipe:
    """A row of the smoke preset on `data`, with published detectors, on small images."""
    changes = {f"{part}{name}": value for name, value in UNTOLD.get(kind, {}).items() for part in ("teacher.", "")}
    preset, *_ = choose_presets("smoke", teacher=models.get("teacher", ""), start=models.get("start", ""), changes=changes)
    recipe = preset.recipe(setting)
    quick = {name: value for name, value in QUICK.items() if not (name.startswith("backbone") and recipe.start)}
    small = {"data": {"name": "folder", "path": data}, "resize.short": 64, "resize.long": 64}
    of_teacher = {f"teacher.{name}": value for name, value in small.items()} | {"teacher_floor": -1} if recipe.teacher else {}
    return recipe.replace(**(quick if setting != "teacher" else {}), **small, **of_teacher)


def go(recipe: Recipe, root: Path):
    return run(recipe, Store(root), device="cpu", progress=False)


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_teaches_and_is_a_start(kind: str, data: Path, tmp_path: Path) -> None:
    path = write_model(kind, tmp_path / "theirs")
    recipe = chosen("detrdistill", data, kind, teacher=str(path), start=str(path))
    record, store = go(recipe, tmp_path / "results"), Store(tmp_path / "results")
    teacher = store.record(pinned(recipe).teacher)
    about = teacher.parents["start"]
    outputs = 91 if kind in OFFICIAL else 4 if kind == "hugging face" else 3
    assert about["file"] == path.name and about["sha256"] == pinned(recipe).start.sha256
    assert about["classes"] == f"3 of {outputs} outputs" and about["origin"] in ("official", "mmdetection", "Hugging Face")
    assert ("dropped" in about) == (outputs > 3) and "fresh" not in about
    assert teacher.cost["steps"] == 0 and [point["step"] for point in teacher.curve] == [0] and "-published-" in teacher.id
    # The student's record says what it learned from, and how good that was.
    assert record.parents["teacher"] == about | {
        "run": teacher.id,
        "weights_sha256": teacher.provenance["weights_sha256"],
        "AP": teacher.metrics["AP"] or 0.0,
    }
    assert record.parents["start"] == about and set(record.parents) == {"teacher", "start"}
    # What taught is what the file holds.
    again = load_detector(pinned(recipe).teacher, store, open_split(recipe, "val")).state_dict()
    theirs, _ = load_pretrained(path, categories=NAMES, replace_head=True, **UNTOLD.get(kind, {}))
    assert all(torch.equal(value, again[name]) for name, value in theirs.state_dict().items() if "num_batches" not in name)


def test_a_smaller_student_from_a_hugging_face_folder_with_two_commands(data: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    from tests.test_cli import call

    monkeypatch.chdir(tmp_path)
    write_model("hugging face", tmp_path)
    words = ("--data", data, "--teacher", "model", "--results", "mine", "--device", "cpu")
    assert call(monkeypatch, "train", "smoke", "teacher", *words) == 0
    said = capsys.readouterr()
    assert "preset smoke for deformable_detr alone, the student's levels 2 (3 in the preset)" in said.err
    assert "-published-" in said.out
    for change in ("schedule.steps=2", "schedule.evaluations=1", "schedule.batch=2", "teacher_floor=-1"):
        words += ("--set", change)
    assert call(monkeypatch, "train", "smoke", "detrdistill", *words) == 0
    (path,) = (tmp_path / "mine" / "runs").glob("*-detrdistill-*/record.json")
    record = json.loads(path.read_text())
    assert record["parents"]["teacher"]["file"] == "model" and record["recipe"]["backbone"]["name"] == "thin_resnet"
    assert record["recipe"]["levels"] == 2 and record["recipe"]["resize"]["short"] == 64
    assert len(list((tmp_path / "mine" / "runs").glob("*-published-*"))) == 1, "what was measured in the first command teaches"
    for words, message in (
        (("--set", "teacher=model"), "'teacher' is no field to set; name a published detector with --teacher MODEL"),
        (("--set", "teacher.weights=model"), "with --teacher MODEL"),
        (("--teacher", "model.pth"), "model 'model.pth': no such file or folder"),
        (("--teacher", "model", "--detector", "conditional_detr"), "mean something else to conditional_detr"),
        (("--start", "model", "--detector", "adamixer"), "a student that starts from model is a deformable_detr; leave the detector out"),
    ):
        assert call(monkeypatch, "train", "smoke", "detrdistill", *words) == 2
        assert message in capsys.readouterr().err


def test_all_but_the_head_is_a_start_whose_outputs_have_no_names(data: Path, tmp_path: Path) -> None:
    recipe = chosen("student", data, start=str(write_model("official deformable", tmp_path / "theirs")))
    afresh = recipe.replace(**{"start.outputs": [""] * 91})
    assert run_id(pinned(afresh)) != run_id(pinned(recipe))
    start = go(afresh, tmp_path / "results").parents["start"]
    assert start["fresh"] == ", ".join(NAMES) and start["classes"].startswith("0 of 91")


def test_a_weak_teacher_is_refused_before_a_backbone_is_trained(data: Path, tmp_path: Path) -> None:
    recipe = chosen("detrdistill", data, teacher=str(write_model("official deformable", tmp_path / "theirs")))
    with pytest.raises(InputError, match=r"-published-.* must exceed teacher_floor 50\.0 to teach"):
        go(recipe.replace(teacher_floor=50), tmp_path / "results")
    assert [path.parent.name[:15] for path in (tmp_path / "results" / "runs").glob("*/record.json")] == ["deformable_detr"], "no crops"


def test_measured_once_a_file_and_a_data_set(data: Path, tmp_path: Path, monkeypatch) -> None:
    path = write_model("official deformable", tmp_path / "theirs")
    measured, kept = [], runs.evaluate
    monkeypatch.setattr(runs, "evaluate", lambda detector, *rest, **how: measured.append(detector) or kept(detector, *rest, **how))
    recipe = chosen("detrdistill", data, teacher=str(path))
    first = go(recipe, tmp_path / "results")
    assert len(measured) == 2, "teacher and student"
    with pytest.raises(InputError, match=r"the teacher .*-published-.* must exceed teacher_floor 50\.0 to teach"):
        go(recipe.replace(teacher_floor=50), tmp_path / "results")
    moved = shutil.move(path, tmp_path / "elsewhere.pth")
    second = chosen("detrdistill", data, teacher=str(moved)).replace(seed=1)
    assert go(second, tmp_path / "results").parents["teacher"] == first.parents["teacher"] and len(measured) == 3
    Path(moved).unlink()
    third = go(second.replace(seed=2), tmp_path / "results")
    assert third.parents["teacher"] == first.parents["teacher"] and len(measured) == 4, "the run has the weights, the file is not needed"


def test_a_teacher_is_gated_on_images_normalised_as_when_it_teaches(data: Path, tmp_path: Path, monkeypatch) -> None:
    seen, kept = [], runs.evaluate
    monkeypatch.setattr(runs, "evaluate", lambda detector, val, *rest, **how: seen.append(val[0]) or kept(detector, val, *rest, **how))
    recipe = chosen("detrdistill", data)
    own = {"teacher.resize.mean": (0.5, 0.5, 0.5), "teacher.resize.std": (0.1, 0.2, 0.3), "teacher.backbone.crops.steps": 1}
    own |= {f"teacher.schedule.{name.partition('.')[2]}": value for name, value in QUICK.items() if name.startswith("schedule")}
    go(recipe.replace(**own), tmp_path / "results")
    trained, gated, student = (sample[0] for sample in seen)
    assert torch.equal(gated, trained) and not torch.equal(gated, student)


def test_a_start_from_a_run_freezes_what_the_run_froze(data: Path, tmp_path: Path) -> None:
    for frozen in (None, 2):
        first = go(chosen("student", data).replace(**{"backbone.frozen_stages": frozen}), tmp_path / "results")
        folder = Store(tmp_path / "results").folder(first.recipe)
        (preset,) = choose_presets("smoke", start=str(folder))
        assert preset.student.backbone.stages_frozen == first.recipe.backbone.stages_frozen


def test_resume_after_a_kill_is_exact(data: Path, tmp_path: Path, monkeypatch) -> None:
    path = write_model("official two-stage", tmp_path / "theirs")
    recipe = chosen("detrdistill", data, teacher=str(path)).replace(**{"schedule.steps": 4, "schedule.evaluations": 2})
    whole = go(recipe, tmp_path / "whole")

    def interrupt(values: dict[str, float], step: int, images: list[int]) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "refuse_non_finite", interrupt)
        patch.setattr(checkpointing, "CHECKPOINT_SECONDS", -1)
        with pytest.raises(KeyboardInterrupt):
            go(recipe, tmp_path / "broken")
    broken = go(recipe, tmp_path / "broken")
    assert broken.cost["resumed"] == 1 and (broken.metrics, broken.curve, broken.parents) == (whole.metrics, whole.curve, whole.parents)
    for name in ("weights.safetensors", "log.jsonl"):
        one, other = (Store(tmp_path / root).folder(whole.recipe) / name for root in ("whole", "broken"))
        assert one.read_bytes() == other.read_bytes(), name


def test_classes_that_are_unknown(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A student learns them afresh, and both says so and writes it down; a teacher that lacks one is refused by its name."""
    path = tmp_path / "model.pth"
    torch.save({"state_dict": official_state("adamixer", small_detector("adamixer")), "meta": {"CLASSES": ("cat", "dog", "cow")}}, path)
    with caplog.at_level(logging.WARNING):
        record = go(chosen("student", data, start=str(path)), tmp_path / "results")
    about = record.parents["start"]
    assert (about["classes"], about["fresh"], about["dropped"]) == ("1 of 3 outputs", "zebra, person", "dog, cow")
    assert "not taken of its head: classes fresh: zebra, person; dropped: dog, cow" in caplog.text
    taught = chosen("detrdistill", data, teacher=str(path))
    with pytest.raises(
        InputError, match=r"does not know the data's class 'zebra' \(2 of 3 are unknown to it; it names cat, dog, cow\)"
    ) as error:
        go(taught, tmp_path / "results")
    assert "\n" not in str(error.value) and Store(tmp_path / "results").record(pinned(taught).teacher) is None
    # Where the file does not say them, the user does.
    torch.save(official_state("adamixer", small_detector("adamixer")), path)
    nameless = chosen("teacher", data, teacher=str(path))
    with pytest.raises(InputError, match=r"names none of its 3 outputs; name them in start\.outputs"):
        go(nameless, tmp_path / "results")
    named = go(nameless.replace(**{"start.outputs": "person, cat,zebra"}), tmp_path / "results")
    assert named.parents["start"]["classes"] == "3 of 3 outputs"


def test_a_start_that_is_replaced_after_its_run_was_named_is_refused(data: Path, tmp_path: Path) -> None:
    path = write_model("official deformable", tmp_path)
    recipe = pinned(chosen("student", data, start=str(path)))
    torch.save(torch.load(path, weights_only=False) | {"epoch": 7}, path)
    with pytest.raises(InputError, match=r"their hash is [0-9a-f]{64}, the recipe says [0-9a-f]{64}; put the recipe's weights there"):
        start_detector(build_detector(recipe, 3), recipe, NAMES)


def test_a_table_says_what_is_published(tmp_path: Path) -> None:
    path = str(write_model("official deformable", tmp_path))
    said = [measured_on(choose_presets("smoke", **models)[0]) for models in ({"start": path}, {"teacher": path, "start": path})]
    assert "; started from a published detector" in said[0] and "; taught by a published detector; started from one" in said[1]


def test_a_report_with_a_published_detector_does_not_replace_the_preset_s_own(data: Path, tmp_path: Path) -> None:
    path, root = write_model("official deformable", tmp_path), tmp_path / "results"
    (root / "tables").mkdir(parents=True)
    for name in ("index.html", "tables/main_results.csv", "tables/components.csv"):
        (root / name).write_text("the preset's own")
    written = write_report("quick", [0], root, formats=["png"], teacher=str(path))
    (folder,) = root.glob("published-*")
    assert folder.name == f"published-taught-{weights_hash(path)[:8]}" and folder / "index.html" in written
    assert all(file.is_relative_to(folder) for file in written)
    assert not (folder / "tables" / "components.csv").exists(), "a table of the preset's own asks for none here"
    (preset,) = choose_presets("quick", teacher=str(path), start=str(path))
    assert report_folder(root, [preset]).name == f"{folder.name}-started-{weights_hash(path)[:8]}"


def test_refusals(data: Path, tmp_path: Path, trained: list[str]) -> None:
    path = write_model("official deformable", tmp_path)
    recipe = chosen("detrdistill", data, teacher=str(path), start=str(path))
    with pytest.raises(InputError, match=r"their hash is [0-9a-f]{64}, the recipe says 0{64}; put the recipe's weights there"):
        go(recipe.replace(**{"start.sha256": "0" * 64}), tmp_path)
    wrong = recipe.replace(dim=64)  # refused before its teacher is measured
    with pytest.raises(InputError, match=r"model\.pth .* do not fit this DeformableDETR: .* misshaped \(level_embed"):
        go(wrong, tmp_path)
    other = Recipe(start=recipe.start, detector="conditional_detr", data=recipe.data, backbone=recipe.backbone, schedule=recipe.schedule)
    with pytest.raises(InputError, match=r"official weights of a Deformable DETR.* cannot be loaded into a ConditionalDETR"):
        go(other, tmp_path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(InputError, match="truncated or damaged"):
        choose_presets("smoke", teacher=str(path))
    torch.save({"model": official_state("deformable", small_detector("deformable"))}, path)
    with pytest.raises(InputError, match=r"nothing tells these settings of it; give --set teacher\.heads=, --set teacher\.points="):
        choose_presets("smoke", teacher=str(path))
    with pytest.raises(InputError, match=r"give --set heads=, --set points= as the model was trained$"):
        choose_presets("smoke", start=str(path), changes={})
    for models in ({"teacher": str(path)}, {"start": str(path)}):  # of commands that cannot state them
        with pytest.raises(
            InputError, match=r"teacher\.points= as the model was trained to 'detrdistill train PRESET teacher --teacher .*run's id"
        ):
            choose_presets("smoke", **models)
    assert trained == []


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """Titles of the runs that were trained or measured."""
    titles = []
    for name in ("_run_detector", "_run_published"):
        kept = getattr(runs, name)
        monkeypatch.setattr(
            runs,
            name,
            lambda *words, kept=kept: ((made := kept(*words)) and titles.append(made.id)) or made,  # after it succeeded
        )
    return titles


def test_a_recipe_says_what_it_starts_from(tmp_path: Path) -> None:
    path = write_model("official conditional", tmp_path)
    (preset,) = choose_presets("smoke", teacher=str(path), start=str(path))
    teacher, student = preset.recipe("teacher", 5), preset.recipe("student")
    assert teacher.published and not student.published and preset.recipe("teacher") == teacher, "one teacher for all seeds"
    assert student.start.sha256 and not parents(student) and student.detector == "conditional_detr" and student.temperature == 10000
    moved = student.replace(**{"start.path": "elsewhere", "start.source": "org/name@main"})
    assert run_id(moved) == run_id(student) != run_id(student.replace(**{"start.sha256": "0" * 64}))
    with pytest.raises(InputError, match="trains nothing: name a detector that others trained"):
        student.replace(start=None)
    with pytest.raises(InputError, match="which nobody teaches"):
        preset.recipe("detrdistill").replace(**{"schedule.steps": 0})
    # Tables that change what a published detector is cannot be made.
    assert "main_results" in possible_tables([preset]) and "encoder_decoder" not in possible_tables([preset])
    with pytest.raises(InputError, match="table 'self_distillation' trains other teachers or students than the published detector"):
        make_table("self_distillation", [preset], [0])
    for name in possible_tables([preset]):
        assert make_table(name, [preset], [0, 1]).rows


@pytest.mark.parametrize("kind", ["official deformable", "official two-stage", "adamixer"])
def test_all_tables_of_a_published_teacher(kind: str, tmp_path: Path) -> None:
    """The students fit it in every row, or the table is left out."""
    (preset,) = choose_presets("coco", teacher=str(write_model(kind, tmp_path)))
    assert (preset.student.form == "two_stage") == ("two-stage" in kind) and preset.student.backbone.name == "resnet50"
    assert {"encoder_decoder", "light_backbones"} <= set(possible_tables([preset])) and preset.floor == 0
    for name in possible_tables([preset]):
        assert make_table(name, [preset], [0]).rows


def test_across_families_predictions_alone(tmp_path: Path) -> None:
    path = str(write_model("official deformable", tmp_path))
    (preset,) = choose_presets("smoke", ["adamixer"], path)
    with pytest.raises(InputError, match="compare predictions alone"):
        preset.recipe("detrdistill")
    stated = {"detrdistill.features": "0", "detrdistill.assignment": "0"}
    (preset,) = choose_presets("smoke", ["adamixer"], path, changes=stated)
    assert preset.recipe("detrdistill").teacher.detector == "deformable_detr"


def test_a_session_with_a_published_teacher(data: Path, tmp_path: Path, capsys) -> None:
    """What notebook 15 does with it."""
    from detrdistill.session import open_session

    path, results = write_model("hugging face", tmp_path), str(tmp_path / "own")
    changes = {"schedule.steps": 2, "schedule.evaluations": 1, "schedule.batch": 2}
    session = open_session(
        preset="smoke", seeds=[0], device="cpu", progress=False, data=str(data), teacher=str(path), results=results, changes=changes
    )
    assert "the student's levels 2" in capsys.readouterr().out
    teacher, student = session.run("teacher"), session.run("student")
    assert (
        "-published-" in teacher.id
        and session.detections({"teacher": teacher}, [0])
        and session.summary(teacher=teacher, student=student) is not None
    )
    own = session.val(teacher)
    other = session.val(teacher.model_copy(update={"recipe": teacher.recipe.replace(**{"resize.mean": (0.1, 0.2, 0.3)})}))
    assert not torch.equal(own[0][0], other[0][0]) and torch.equal(own[0][0], session.val()[0][0])
    assert session.curves({"student": [student], "teacher": [teacher]})
