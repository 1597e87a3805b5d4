"""The command: bad input is one line on standard error and exit code 2, and nothing is overwritten."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest

from detrdistill import cli, parameters
from detrdistill.errors import InputError, NonFiniteError
from detrdistill.recipes.identity import run_id
from detrdistill.recipes.parts import Folder
from detrdistill.recipes.presets import get_preset
from detrdistill.runs.pinned import pinned_preset
from detrdistill.runs.provenance import commit
from tests.folders import read_split, write_folder, write_split
from tests.report.test_tables import put

LAUNCH = [sys.executable, "-m", "detrdistill"]


def call(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["detrdistill", *map(str, words)])
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Calls the command, and gives the one line it was refused with."""
    monkeypatch.chdir(tmp_path)

    def line(*words: object) -> str:
        assert call(monkeypatch, *words) == 2
        err = capsys.readouterr().err
        lines = [one for one in err.splitlines() if one and "%|" not in one and not one.startswith("WARNING: ")]
        assert len(lines) == 1 and lines[0].startswith("error: "), err
        return lines[0]

    return line


def test_it_says_its_version_and_commit(monkeypatch, capsys) -> None:
    assert call(monkeypatch, "--version") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"detrdistill {cli.__version__} ({commit() or 'no git checkout'})"


TRAIN = ("train", "smoke", "student", "--device", "cpu", "--results", "results")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "smok", "student"), "preset 'smok' is unknown; known: smoke, quick"),
        (("train", "smoke", "studnet"), "setting 'studnet' is unknown; known: teacher"),
        ((*TRAIN, "--set", "scedule.lr=1"), "'scedule.lr' has no part 'scedule' here; fields: detector"),
        ((*TRAIN, "--set", "schedule.rate=1"), "unknown parameter 'schedule.rate' = '1'; known here: steps"),
        ((*TRAIN, "--set", "schedule.lr=fast"), "'schedule.lr' = 'fast'"),
        ((*TRAIN, "--set", "schedule.lr"), "'schedule.lr' is not of the form name=value"),
        ((*TRAIN, "--set", "queries=0"), "'queries' = '0'"),
        ((*TRAIN, "--data", "absent"), "data folder absent: does not exist; expected there: instances_train.json"),
        ((*TRAIN[:3], "--results", "results", "--device", "tpu"), "device 'tpu' is unknown"),
        ((*TRAIN, "--workers", "-1"), "workers -1: a number of processes; give 0 or more"),
        ((*TRAIN, "--set", "teacher.dim=32"), "'teacher.dim' has no part 'teacher' here"),
        (("check", "absent"), "data folder absent: does not exist"),
        (("report", "--preset", "smok"), "preset 'smok' is unknown"),
        (("notebook", "absent.ipynb", "."), "output .: is a folder; name the notebook to write"),
        (("notebook", "absent.ipynb", "out.ipynb"), "notebook absent.ipynb: no such file"),
        (("notebook", "absent.ipynb", "out.ipynb", "--parameters", "preset"), "'preset' is not of the form name=value"),
    ],
)
def test_bad_arguments(refused, tmp_path, words, message):
    assert message in refused(*words)
    assert not (tmp_path / "results" / "runs").exists() or not list((tmp_path / "results").rglob("record.json"))


def test_unknown_options_are_refused(monkeypatch, capsys):
    for words in (("trian",), ("train", "smoke"), (*TRAIN, "--rate", "3"), (*TRAIN, "--workers", "many"), (*TRAIN, "--seed", "x")):
        assert call(monkeypatch, *words) == 2
        assert capsys.readouterr().err


def test_results_that_are_a_file(refused, tmp_path):
    (tmp_path / "results").write_text("mine")
    assert "results is a file; move it away or choose another folder" in refused(*TRAIN)
    assert (tmp_path / "results").read_text() == "mine"


def test_data_that_cannot_be_used(refused, tmp_path):
    root = write_folder(tmp_path / "mine")
    good = (root / "instances_train.json").read_text()
    (root / "instances_train.json").write_text(good[:-10])
    for words in (("check", root), (*TRAIN, "--data", root)):
        assert "instances_train.json: not valid JSON" in refused(*words)
    (root / "instances_train.json").write_text(good)
    content = read_split(root, "val")
    write_split(root, "val", content | {"categories": [{"id": 3, "name": "cross"}] * 2})
    assert "instances_val.json" in refused("check", root)
    write_split(root, "val", content | {"annotations": [one | {"bbox": [0, 0, 0, 0]} for one in content["annotations"]]})
    assert "instances_val.json" in refused("check", root)


@pytest.mark.filterwarnings("ignore:.*the backbone starts from random weights")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_is_named(refused, tmp_path, finished, workers):
    """Also where a worker process found it."""
    root = write_folder(tmp_path / "mine")
    for path in (root / "images").glob("?.png"):
        path.write_bytes(path.read_bytes()[:-2000])
    found = refused(*TRAIN, "--data", root, "--set", "backbone.weights=none", "--set", "schedule.batch=2", "--workers", workers)
    assert found.startswith("error: image ") and ".png cannot be decoded (" in found and "; replace the file by a whole BMP, " in found


@pytest.mark.parametrize(("content", "reason"), [(None, "no such file"), (b"text", "truncated or damaged")])
def test_backbone_weights_that_cannot_be_used(refused, tmp_path, content, reason):
    if content:
        (tmp_path / "mine.pt").write_bytes(content)
    found = refused(*TRAIN, "--set", "backbone.weights=mine.pt")
    assert f"backbone weights mine.pt: {reason}" in found
    assert not list(tmp_path.rglob("record.json"))


def test_imagenet_without_network(refused, monkeypatch, tmp_path):
    import torch

    def unreachable(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    root = write_folder(tmp_path / "mine")
    changes = ("backbone.name=resnet18", "backbone.width=16", "backbone.weights=imagenet")
    words = ("--data", root, *(word for change in changes for word in ("--set", change)))
    assert "ImageNet weights of resnet18 could not be downloaded (Network is unreachable); connect once" in refused(*TRAIN, *words)


def test_a_damaged_checkpoint(refused, tmp_path, finished):
    from detrdistill.recipes.presets import smoke
    from detrdistill.runs.store import Store

    shutil.copytree(finished, tmp_path / "results")
    folder = Store(tmp_path / "results").folder(smoke().student)
    folder.mkdir()
    (folder / "checkpoint.pt").write_bytes(b"half of it")
    assert "checkpoint.pt: not readable (KeyError); delete it to start this run afresh" in refused(*TRAIN)
    assert (folder / "checkpoint.pt").read_bytes() == b"half of it"


@pytest.mark.parametrize("error", [InputError("it is so"), NonFiniteError("it is so")])
def test_both_kinds_of_errors_are_told_alike(refused, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("detrdistill.recipes.presets.get_preset", fail)
    assert refused("train", "smoke", "student") == "error: it is so"


def test_other_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr("detrdistill.recipes.presets.get_preset", lambda *names: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(monkeypatch, "train", "smoke", "student")


def test_train_with_own_data_and_again(monkeypatch, capsys, tmp_path):
    root = write_folder(tmp_path / "mine")
    words = ("train", "smoke", "detrdistill", "--data", root, "--results", tmp_path / "results", "--device", "cpu")
    words = (*words, "--set", "teacher_floor=-1", "--set", "schedule.lr=1e-4", "--set", "schedule.steps=2", "--set", "schedule.batch=2")
    assert call(monkeypatch, *words) == 0, capsys.readouterr().err
    first = capsys.readouterr().out
    assert first.startswith("deformable_detr-thin8-detrdistill-seed0-") and " AP " in first
    records = {path: path.read_bytes() for path in tmp_path.rglob("record.json")}
    assert len(records) == 3
    assert call(monkeypatch, *words) == 0 and capsys.readouterr().out == first
    assert records == {path: path.read_bytes() for path in tmp_path.rglob("record.json")}


def test_train_by_the_name_of_a_run(monkeypatch, capsys, finished):
    for path in (finished / "runs").iterdir():
        assert call(monkeypatch, "train", "smoke", path.name, "--results", finished) == 0
        assert capsys.readouterr().out.startswith(f"{path.name}: ")


@pytest.fixture
def asked(monkeypatch):
    """Recipes that the command asks for; nothing is trained."""
    from detrdistill.records import Record
    from detrdistill.runs import run as runs

    recipes = []

    def run(recipe, *_, **__):
        recipes.append(runs.pinned(recipe))
        return Record(id="", recipe=recipe, metrics={}, curve=[], cost={}, parents={}, provenance={})

    monkeypatch.setattr(runs, "run", run)
    return recipes


@pytest.mark.parametrize("preset", ["smoke", "quick"])
def test_what_the_detectors_see_is_set_for_the_teacher_too(monkeypatch, tmp_path, asked, preset):
    """One teacher, whether it is trained by itself or for its student; what is stated for it holds."""
    shared = ("--data", write_folder(tmp_path / "mine"), "--set", "resize.short=320", "--set", "precision=bf16")
    assert call(monkeypatch, "train", preset, "teacher", *shared) == 0
    assert call(monkeypatch, "train", preset, "detrdistill", *shared, "--set", "schedule.lr=1e-5") == 0
    assert call(monkeypatch, "train", preset, "detrdistill", *shared, "--set", "teacher.resize.short=64", "--set", "teacher.ffn=128") == 0
    teacher, student, other = asked
    assert run_id(student.teacher) == run_id(teacher) and teacher.resize.short == 320 and student.schedule.lr == 1e-5
    assert (other.resize.short, other.teacher.resize.short, other.teacher.ffn) == (320, 64, 128)


def test_runs_of_a_folder_are_called_by_the_names_that_the_batch_waits_for(monkeypatch, tmp_path, asked, refused):
    from detrdistill.recipes import presets
    from detrdistill.recipes.tables import named_runs

    root = write_folder(tmp_path / "mine")
    folder = {"data": Folder(path=root)}

    def mine(detector="deformable_detr"):
        smoke = presets.smoke()
        return dataclasses.replace(smoke, name="mine", teacher=smoke.teacher.replace(**folder), student=smoke.student.replace(**folder))

    monkeypatch.setitem(presets.PRESETS, "mine", mine)
    monkeypatch.setattr("detrdistill.recipes.presets.DETECTORS", ("deformable_detr",))
    named = lambda preset: named_runs(["components"], [preset], (0, 3))  # noqa: E731
    waited = named(pinned_preset(mine()))
    assert len(waited) == 18 and not waited.keys() & named(mine()).keys()
    for name, recipe in waited.items():
        assert call(monkeypatch, "train", "mine", name, "--seed", getattr(recipe, "seed", 0)) == 0
    assert [run_id(recipe) for recipe in asked] == list(waited)
    assert "setting 'plain-01234567' is unknown" in refused("train", "mine", "plain-01234567")
    shutil.rmtree(root)
    assert "mine: does not exist" in refused("train", "mine", next(iter(waited)))


def test_parents_of_later_seeds_are_found_with_a_student_s_seed():
    """Seed 3 of mini has another teacher, whose own seed is 1, and its backbone."""
    from detrdistill.recipes.presets import get_presets
    from detrdistill.recipes.recipe import Recipe
    from detrdistill.recipes.tables import TABLES, named_runs

    found = {}
    for seed in (3, 0):
        runs = named_runs(TABLES, get_presets("mini"), (seed,))
        found |= {name: seed for name, recipe in runs.items() if not isinstance(recipe, Recipe) or recipe.schedule.steps == 4000}
    assert 1 < list(found.values()).count(3) < len(found), "of either seed"
    assert all(run_id(parameters.named_run(get_presets("mini"), name, seed)[0]) == name for name, seed in found.items())


def test_tune_runs_what_a_row_misses_and_says_what_was_best(monkeypatch, capsys, tmp_path, refused):
    from detrdistill.runs import run as runs
    from detrdistill.runs.store import Store

    asked = []

    def run(recipe, store, **_):
        asked.append(recipe)
        return put(store, recipe, 20.0 - abs(recipe.methods[0].weight - 3e-5) if recipe.methods else 10.0)

    monkeypatch.setattr(runs, "run", run)
    words = ("tune", "smoke", "mgd", "--detector", "adamixer", "--results", tmp_path)
    assert call(monkeypatch, *words) == 0
    out = capsys.readouterr().out
    assert out.startswith("AdaMixer, mgd: x 0.1: ") and out.rstrip().endswith("best x 1") and len(asked) == 4 + 1 + 2
    assert call(monkeypatch, *words) == 0 and len(asked) == 7, "nothing is tried twice"
    assert len(list(Store(tmp_path).root.glob("runs/*/record.json"))) == 7
    assert "row 'mdg' has no weights to tune; known: 'fgd', 'mgd'" in refused("tune", "smoke", "mdg", "--detector", "adamixer")
    assert "preset bccd: weights are tuned on other embedded digits" in refused("tune", "bccd", "mgd")


def test_check_lists_every_fault(monkeypatch, capsys, tmp_path):
    root = write_folder(tmp_path / "mine", images=12)
    content = read_split(root, "train")
    for annotation in content["annotations"][1:]:
        annotation["bbox"] = [5, 5, 0, 10]
    write_split(root, "train", content)
    assert call(monkeypatch, "check", root) == 0
    out = capsys.readouterr().out
    assert all(f"annotation {annotation['id']}: " in out for annotation in content["annotations"][1:]) and " more" not in out


def test_check_lists_faults(monkeypatch, capsys, tmp_path):
    root = write_folder(tmp_path / "mine")
    content = read_split(root, "train")
    content["annotations"][0]["bbox"] = [5, 5, 0, 10]
    write_split(root, "train", content)
    assert call(monkeypatch, "check", root) == 0
    out = capsys.readouterr().out
    assert "train: 4 images, " in out and "val: 4 images" in out and "3 classes" in out and "annotation 0" in out


def test_as_a_module(tmp_path):
    words = [sys.executable, "-X", "importtime", *LAUNCH[1:], "train", "nope", "student"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    imports = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    told = [line for line in done.stderr.splitlines() if line not in imports]
    assert done.returncode == 2 and told == ["error: preset 'nope' is unknown; known: smoke, quick, mini, bccd, coco"]
    imported = {line.rpartition("|")[2].strip() for line in imports}
    assert "detrdistill.recipes.presets" in imported and "torch" not in imported, "a mistyped name does not wait for torch"
    assert list(tmp_path.iterdir()) == []


def test_control_c(monkeypatch):
    def interrupt(*names):
        raise KeyboardInterrupt

    monkeypatch.setattr("detrdistill.recipes.presets.get_preset", interrupt)
    assert call(monkeypatch, "train", "smoke", "student") == 130


def test_switches_of_methods(monkeypatch, tmp_path):
    from detrdistill.recipes.methods import FGD, DETRDistill
    from detrdistill.runs import run as runs

    seen = []
    monkeypatch.setattr(runs, "run", lambda recipe, store, **_: seen.append(recipe) or 1 / 0)
    words = ("train", "smoke", "fgd+detrdistill", "--detector", "adamixer", "--results", str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        call(monkeypatch, *words, "--set", "detrdistill.variant=released", "--set", "fgd.maps=features", "--set", "schedule.steps=3")
    (recipe,) = seen
    assert recipe.detector == "adamixer" and recipe.schedule.steps == 3
    assert recipe.methods == (FGD(maps="features"), DETRDistill(variant="released"))


@pytest.mark.parametrize(
    ("row", "change", "part"),
    [
        ("detrdistill", "fgd.maps=features", "'fgd' is no method of this row; its methods are: detrdistill"),
        ("student", "fgd.maps=features", "its methods are: none"),
        ("fgd", "fgd.mapps=features", "unknown parameter 'mapps' = 'features'; known here: maps, name"),
        ("fgd", "fgd.maps=back", "'maps' = 'back'"),
    ],
)
def test_wrong_switches_are_refused(monkeypatch, capsys, row, change, part):
    assert call(monkeypatch, "train", "smoke", row, "--set", change) == 2
    assert part in capsys.readouterr().err


@pytest.mark.parametrize("detectors", [(), ("deformable_detr",), ("conditional_detr",), ("adamixer",)])
def test_every_run_that_the_batch_names_is_known(detectors):
    """Whatever detectors it was asked for, and whatever seed."""
    from detrdistill.parameters import named_run
    from detrdistill.recipes.presets import get_preset, get_presets
    from detrdistill.recipes.recipe import CropRecipe
    from detrdistill.recipes.tables import TABLES, named_runs

    for table in TABLES:
        for name, recipe in named_runs([table], get_presets("smoke", detectors), (3,)).items():
            assert named_run(get_presets("smoke"), name, 3)[0] == recipe
            break
    names = named_runs(["components", "stage_mapping"], get_presets("smoke", detectors), (3,))
    for name, recipe in names.items():
        is_parent = isinstance(recipe, CropRecipe) or recipe == get_preset("smoke", recipe.detector).teacher
        assert named_run(get_presets("smoke"), name, 3) == (recipe, is_parent)
    assert named_run(get_presets("smoke"), "student", 3) is None and named_run(get_presets("smoke"), "plain-01234567", 3) is None


def test_check_says_what_to_set(monkeypatch, capsys, tmp_path):
    root = write_folder(tmp_path / "mine")
    content = read_split(root, "train")
    more = [{"id": 500 + k, "image_id": 1, "category_id": 3, "bbox": [4, 6, 9 + k % 9, 9 + k // 9], "iscrowd": 0} for k in range(30)]
    write_split(root, "train", content | {"annotations": content["annotations"] + more})
    assert call(monkeypatch, "check", root, "--preset", "smoke") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("train: 4 images, 37 objects, 3 classes; ") and "  objects a class: cross 34, disc 2, bar 1" in lines
    assert "  objects an image: median 2, largest 32" in lines and "  0 crowds; 0 images without objects" in lines
    assert "1 of 4 images have more objects (up to 32) than the detector has queries (20)" in "".join(lines)
    assert lines[-1] == "to set for this data: --set queries=40 --set resize.short=64 --set resize.long=64"
    assert call(monkeypatch, "check", root, "--preset", "smoke", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["splits"]["train"]["objects_an_image"] == {"least": 1, "median": 2, "most": 32}
    assert found["splits"]["train"]["faults"][0]["kind"] == "annotation id" and found["set"][0] == "queries=40"
    assert found["unreadable"] == [] and len(found["warnings"]) == 1


def test_check_takes_what_it_says_to_set(monkeypatch, capsys, tmp_path):
    root = write_folder(tmp_path / "mine")
    assert call(monkeypatch, "check", root) == 0
    said = capsys.readouterr().out.splitlines()[-1].removeprefix("to set for this data: ").split()
    recipe = get_preset("quick").student.replace(**parameters.assigned([word for word in said if word != "--set"]))
    assert (recipe.queries, recipe.resize.short, recipe.resize.long) == (20, 64, 64)


def test_faults_are_told_once_a_command(tmp_path):
    """Teacher, crops and student see the same data."""
    root = write_folder(tmp_path / "mine")
    words = ("train", "smoke", "detrdistill", "--data", root, "--results", tmp_path / "results", "--device", "cpu")
    words = (*LAUNCH, *map(str, words), "--set", "schedule.steps=1", "--set", "schedule.batch=2")
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("1 x annotation id (repair)") == 1 and len(list((tmp_path / "results" / "runs").iterdir())) == 3
