"""A run on a user's folder: D-FINE teaches an RT-DETR v2 that starts from a folder, and the student goes back to transformers."""

from copy import deepcopy
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForObjectDetection

from detrdistill import commands
from detrdistill.checkpoints.hugging_face import export_hugging_face
from detrdistill.checkpoints.presets import choose_presets
from detrdistill.checkpoints.pretrained import load_pretrained
from detrdistill.errors import InputError
from detrdistill.recipes.parts import Resize
from detrdistill.recipes.recipe import Recipe
from detrdistill.runs.pinned import pinned
from detrdistill.runs.run import run
from detrdistill.runs.store import Store
from tests.any_detr.checks import adapted, as_classes_alone, largest
from tests.any_detr.tiny import SIDE
from tests.folders import read_split, write_folder, write_split

NAMES = ["zebra", "cat", "person"]
TEACHES, STARTS = ["person", "zebra", "cat"], ["dog", "cat", "person"]  # what the published ones call their classes
QUICK = {"schedule.steps": 2, "schedule.evaluations": 1, "schedule.batch": 2, "resize.train": "flip"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_folder(tmp_path_factory.mktemp("data") / "mine")
    for split in ("train", "val"):
        content = read_split(root, split)
        names = [one | {"name": name} for one, name in zip(content["categories"], NAMES, strict=True)]
        write_split(root, split, content | {"categories": names})
    return root


def published(family: str, names: list[str], folder: Path, mean: float) -> str:
    resize = Resize(short=SIDE, long=SIDE, stretch=True, mean=(mean,) * 3, std=(1, 1, 1))
    return str(export_hugging_face(deepcopy(adapted(family)), folder, names, resize))


def distilled(teacher: str, start: str, data: Path, root: Path, teaches: list[str] = TEACHES) -> Recipe:
    """A row of the smoke preset with a published teacher and a published start, under all three losses."""
    folders = {"teacher": published(teacher, teaches, root / "teacher", 0.1), "start": published(start, STARTS, root / "start", 0)}
    (preset,) = choose_presets("smoke", changes={}, **folders)
    recipe, spec = preset.recipe("detrdistill"), {"name": "folder", "path": data}
    methods = (recipe.methods[0].replace(features=1),)
    return recipe.replace(methods=methods, data=spec, teacher_floor=-1, **{"teacher.data": spec}, **QUICK)


@pytest.mark.parametrize(("teacher", "start"), [("d_fine", "rt_detr_v2"), ("rf_detr", "rf_detr"), ("detr", "detr")])
def test_a_published_one_teaches_another_which_transformers_then_opens(teacher: str, start: str, data: Path, tmp_path: Path) -> None:
    recipe, store = pinned(distilled(teacher, start, data, tmp_path)), Store(tmp_path / "results")
    record = run(recipe, store, device="cpu", progress=False)
    assert record.provenance["versions"]["transformers"] == version("transformers")
    about = record.parents["start"]
    assert about["classes"] == "2 of 3 outputs" and "zebra" in about["fresh"] and "dog" in about["dropped"]
    log = (store.folder(recipe) / "log.jsonl").read_text(encoding="utf-8")
    assert all(f'"{part}' in log for part in ("detection/loss_", "logits/", "features", "assignment/"))
    folder = store.folder(recipe)
    commands.export(folder, tmp_path / "exported")
    theirs = AutoModelForObjectDetection.from_pretrained(tmp_path / "exported").eval()
    ours, own = load_pretrained(folder)
    assert own.settings["resize"] == recipe.resize and list(theirs.config.id2label.values()) == NAMES
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (found,) = ours.decode(ours.encode(pixels, torch.zeros(1, SIDE, SIDE, dtype=torch.bool)))
        wanted = theirs(pixels)
    assert largest((found.boxes[-1], wanted.pred_boxes), (found.logits[-1], as_classes_alone(wanted.logits, start))) <= 1e-5
    moved = [name for name, value in ours.state_dict().items() if not torch.equal(value, adapted(start).state_dict()[name])]
    assert len(moved) > 50


def test_a_teacher_without_a_class_of_the_data_is_one_line_and_nothing_is_trained(data: Path, tmp_path: Path) -> None:
    recipe = distilled("d_fine", "rt_detr", data, tmp_path, teaches=STARTS)
    with pytest.raises(InputError, match=r"weights of a D-FINE\) does not know the data's class 'zebra'") as error:
        run(recipe, Store(tmp_path / "results"), device="cpu", progress=False)
    assert "\n" not in str(error.value) and not list((tmp_path / "results").rglob("*.safetensors"))
