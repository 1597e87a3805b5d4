"""What a recipe, a file beside a folder's own, and a step refuse: on one line, by name."""

import json
from pathlib import Path

import pytest
import torch

from detrdistill.any_detr.adapter import AnyDETR
from detrdistill.any_detr.build import build_any
from detrdistill.checkpoints.formats import read_detector_weights
from detrdistill.checkpoints.hugging_face import export_hugging_face
from detrdistill.distill.distiller import Distiller
from detrdistill.errors import InputError, NonFiniteError
from detrdistill.recipes.families import FAMILIES
from detrdistill.recipes.parts import Resize
from detrdistill.training.optimizer import make_optimizer
from tests.any_detr.checks import some_targets
from tests.any_detr.tiny import CLASSES, SIDE, tiny, tiny_recipe
from tests.models.small import batch

NAMES = [f"class {row}" for row in range(CLASSES)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    square = Resize(short=SIDE, long=SIDE, stretch=True)
    return export_hugging_face(AnyDETR(tiny("rt_detr_v2"), FAMILIES["rt_detr_v2"]), tmp_path_factory.mktemp("f") / "v2", NAMES, square)


@pytest.mark.parametrize("name", ["best.safetensors", "official.pth", "nothing.pth"])
def test_another_file_beside_a_folders_own_is_never_taken_for_it(name: str, folder: Path) -> None:
    with pytest.raises(InputError, match=f"weights {folder / name}: beside a config.json of transformers.* give the folder"):
        read_detector_weights(folder / name)
    assert read_detector_weights(folder / "model.safetensors")[1].settings["detector"] == "rt_detr_v2"


def test_a_folder_within_a_runs_is_read(folder: Path) -> None:
    record = folder.parent / "record.json"
    record.write_text("{}", encoding="utf-8")
    try:
        assert read_detector_weights(folder)[1].origin == "Hugging Face"
    finally:
        record.unlink()


@pytest.mark.parametrize(
    ("kept", "asked"),
    [
        ({"size"}, {"resize.mean", "resize.std"}),
        ({"do_normalize"}, {"resize.short", "resize.long", "resize.stretch"}),
        ({"size", "do_normalize"}, set()),
    ],
)
def test_what_a_processor_does_not_say_is_asked(kept: set[str], asked: set[str], folder: Path) -> None:
    """These families have other defaults than the kit: 640 x 640, and pixels from 0 to 1."""
    path = folder / "preprocessor_config.json"
    before = path.read_text(encoding="utf-8")
    said = {"size": {"height": SIDE, "width": SIDE}, "do_normalize": False}
    path.write_text(json.dumps({name: said[name] for name in kept}), encoding="utf-8")
    try:
        assert set(read_detector_weights(folder)[1].unclear) == asked
    finally:
        path.write_text(before, encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": 0.5}, "d_fine has no 'dropout'"),
        ({"heads": 4}, "d_fine has no 'heads'"),
        ({"ffn": 64}, "d_fine has no 'ffn'"),
        ({"backbone.name": "resnet18"}, "D-FINE has its backbone in 'config.backbone_config'"),
    ],
)
def test_fields_that_would_change_nothing(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_recipe("d_fine").replace(**changes)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"num_denoisin": 3}, "config.num_denoisin: D-FINE has no such entry; it has .*num_denoising"),
        ({"attn_implementation": "someone/kernel"}, "config.attn_implementation: asks for code or files beyond the recipe"),
    ],
)
def test_entries_of_a_configuration(entry: dict, message: str) -> None:
    recipe = tiny_recipe("d_fine")
    with pytest.raises(InputError, match=message):
        build_any(recipe.replace(config=recipe.config | entry), NAMES)


@pytest.mark.parametrize("part", [{"patch_size": 0}, {"num_windows": "two"}])
def test_windows_that_are_none(part: dict) -> None:
    recipe = tiny_recipe("rf_detr")
    (name,) = part
    with pytest.raises(InputError, match=f"'config.backbone_config.{name}' is .*, not a whole number above 0"):
        recipe.replace(config=recipe.config | {"backbone_config": recipe.config["backbone_config"] | part})


@pytest.mark.parametrize("family", ["d_fine", "rf_detr"])
def test_a_prediction_that_is_not_finite_is_named(family: str) -> None:
    """By the kit's own error, which keeps the batch; transformers fails on such boxes with all their numbers."""
    detector = AnyDETR(tiny(family), FAMILIES[family]).train()
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if "class_embed" in name and "enc" not in name and name.endswith("bias"):
                parameter.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="a predicted logit or box is NaN or infinite"):
        Distiller(detector)(*batch((SIDE, SIDE)), some_targets(2))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_backbone_has_a_rate_of_its_own(family: str) -> None:
    detector = AnyDETR(tiny(family), FAMILIES[family]).requires_grad_(True)
    optimizer = make_optimizer(Distiller(detector), tiny_recipe(family).schedule.replace(backbone_lr=0.1))
    own = {id(one) for group in optimizer.param_groups if group["factor"] == 0.1 for one in group["params"]}
    assert own == {id(one) for one in detector.model.get_submodule(FAMILIES[family].backbone).parameters()}
