"""Folders of transformers' DETRs as teachers and as starts: what they say becomes a recipe, and what does not fit is one line."""

import builtins
import errno
import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig

from detrdistill.any_detr.build import _config, build_any, read_family
from detrdistill.checkpoints.formats import read_detector_weights
from detrdistill.checkpoints.hugging_face import export_hugging_face
from detrdistill.checkpoints.locate import locate
from detrdistill.checkpoints.presets import choose_presets
from detrdistill.checkpoints.pretrained import load_pretrained, read_with_settings
from detrdistill.errors import InputError
from detrdistill.recipes.families import FAMILIES
from detrdistill.recipes.parts import Resize, Schedule
from detrdistill.recipes.recipe import Recipe
from tests.any_detr.checks import adapted
from tests.any_detr.tiny import SIDE, tiny_recipe

NAMES = ["cat", "dog", "owl"]
SQUARE = Resize(short=SIDE, long=SIDE, stretch=True, mean=(0, 0, 0), std=(1, 1, 1))
every_family = pytest.mark.parametrize("family", FAMILIES)
Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A family's tiny model as others publish it. Not to be written to."""
    root = tmp_path_factory.mktemp("published")

    @cache
    def write(family: str) -> Path:
        return export_hugging_face(deepcopy(adapted(family)), root / family, NAMES, SQUARE)

    return write


def change(file: Path, **entries: object) -> None:
    """Entries of a JSON file."""
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | entries), encoding="utf-8")


def one_line(error: pytest.ExceptionInfo) -> None:
    assert "\n" not in str(error.value)


@every_family
def test_a_folder_through_a_recipe_is_the_same_configuration(family: str, folder_of: Folders) -> None:
    """Nested parts too, such as the backbone's; and the recipe's model takes the folder's tensors."""
    state, fields, labels = read_family(folder_of(family))
    recipe = Recipe.read(json.loads(json.dumps(fields)) | {"schedule": Schedule(steps=1), "resize": SQUARE})
    made, wanted = (one.to_dict() for one in (_config(recipe, NAMES, transformers), AutoConfig.from_pretrained(folder_of(family))))
    for one in (made, wanted):  # which say whence it came
        # Of the prior only first weights are made.
        for name in (
            "architectures",
            "_name_or_path",
            "dtype",
            "transformers_version",
            "use_pretrained_backbone",
            "initializer_bias_prior_prob",
        ):
            one.pop(name, None)
            (one.get("backbone_config") or {}).pop(name, None)
    assert made == wanted and labels == NAMES
    detector, own = build_any(recipe, NAMES), adapted(family).state_dict()
    detector.load_state_dict(state)
    assert all(torch.equal(value, own[name]) for name, value in detector.state_dict().items())


@every_family
def test_what_a_folder_says_is_what_its_model_is(family: str, folder_of: Folders) -> None:
    detector, about = load_pretrained(folder_of(family))
    wanted = tiny_recipe(family)
    assert about.settings["resize"] == SQUARE and about.names == tuple(NAMES) and not detector.training
    assert all(about.settings[name] == getattr(wanted, name) for name in ("detector", "dim", "queries", "decoder_layers", "levels"))
    assert wanted.levels == detector.levels


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = adapted("detr")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    before = detector.model.config.to_dict()
    for names, folder, message in (
        (["a", "b"], "out", "2 different names for 3 classes; give each class its name"),
        (["a", "b", "b"], "out", "2 different names for 3 classes"),
        (NAMES, "file", "file is a file; move it away or choose another folder"),
        (NAMES, "file/out", "file is a file; move it away or choose another folder"),
    ):
        with pytest.raises(InputError, match=message) as error:
            export_hugging_face(detector, tmp_path / folder, names, SQUARE)
        one_line(error)
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def full(path, **_):
        (path / "config.json").write_text("{", encoding="utf-8")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(detector.model, "save_pretrained", full)
    with pytest.raises(InputError, match=r"out: cannot be written \(No space left on device\); free disk space") as error:
        export_hugging_face(detector, tmp_path / "out", NAMES, SQUARE)
    one_line(error)
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.undo()
    written: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, to: written.append(to.name) or replace(path, to))
    export_hugging_face(detector, tmp_path / "out", NAMES, SQUARE)
    assert written[-1] == "config.json" and {path.name for path in (tmp_path / "out").iterdir()} == {*written}
    assert detector.model.config.to_dict() == before, "the caller's configuration stays as it was"


def head_rows(detector: nn.Module) -> dict[str, Tensor]:
    """Tensors with a row a class."""
    parts = tuple(f".{part}" for part in (*detector.family.classes, "enc_out_class_embed"))
    return {name: value for name, value in detector.state_dict().items() if any(part in name for part in parts)} | {
        name: value for name, value in detector.state_dict().items() if "denoising_class_embed" in name
    }


@every_family
def test_rows_of_the_head_follow_the_names(family: str, folder_of: Folders) -> None:
    """Reordered, one dropped and one new: in every tensor with a row a class, wherever it is."""
    detector, about = load_pretrained(folder_of(family), categories=["owl", "emu", "cat"], replace_head=True)
    own, rows = head_rows(adapted(family)), head_rows(detector)
    assert about.rows == (2, None, 0) and rows.keys() == own.keys() and rows
    for name, value in rows.items():
        assert torch.equal(value[0], own[name][2]) and torch.equal(value[2], own[name][0]), name
        assert len(value) == len(own[name]) and torch.equal(value[3:], own[name][3:]), f"{name}: beyond the classes"
    beyond = {len(value) - 3 for value in own.values()}
    assert beyond == ({1} if family == "detr" else {0, 1} if FAMILIES[family].own == "last" else {0})
    if FAMILIES[family].own == "last":  # the padding row of denoising labels
        (padding,) = [value for name, value in rows.items() if "denoising" in name]
        assert len(padding) == 4
    others, state = detector.state_dict(), adapted(family).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in others.items() if name not in rows)


@pytest.mark.parametrize("family", ["rt_detr_v2", "detr"])
@pytest.mark.parametrize("names", [["dog"], ["dog", "emu", "cat", "owl", "yak"]])
def test_more_or_fewer_classes_than_the_folder(names: list[str], family: str, folder_of: Folders) -> None:
    detector, about = load_pretrained(folder_of(family), categories=names, replace_head=True)
    own = head_rows(adapted(family))
    assert about.rows == tuple(NAMES.index(name) if name in NAMES else None for name in names)
    for name, value in head_rows(detector).items():
        assert torch.equal(value[names.index("dog")], own[name][1])
        assert len(value) - len(names) == len(own[name]) - 3 and torch.equal(value[len(names) :], own[name][3:])


def test_a_teacher_must_know_the_classes(folder_of: Folders) -> None:
    with pytest.raises(InputError, match=r"has other classes than the 2 categories: 1 unknown to it \(emu\), 2 not among them") as error:
        load_pretrained(folder_of("d_fine"), categories=["owl", "emu"])
    one_line(error)


@pytest.mark.parametrize("kind", ["yolos", "grounding-dino", "table-transformer"])
def test_families_that_the_kit_does_not_have_are_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}), encoding="utf-8")
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=f"the model is a '{kind}'; the kit reads conditional_detr, deformable_detr, rt_detr, ") as error:
        choose_presets("smoke", teacher=str(tmp_path), start="", changes={})
    one_line(error)
    assert sorted(tmp_path.iterdir()) == before


DAMAGE = {
    "code of its own": (
        lambda path: change(path / "config.json", auto_map={"AutoModel": "modeling.Mine"}),
        r"'auto_map' asks for code or files beyond the model's own",
    ),
    "weights that are named elsewhere": (
        lambda path: change(path / "config.json", transformers_weights="other.safetensors"),
        "'transformers_weights' asks for code or files beyond",
    ),
    "an adapter of peft's": (lambda path: (path / "adapter_config.json").write_text("{}", encoding="utf-8"), "'adapter_config.json' asks"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), r"no weights\.safetensors of a run, and no model\.safetensors"),
    "half the weights": (lambda path: (path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{"), "cannot open this RT-DETR v2"),
    "no JSON": (lambda path: (path / "config.json").write_text("{", encoding="utf-8"), r"config\.json"),
    "another size": (lambda path: change(path / "config.json", d_model=64), r"\d+ tensors are misshaped: .* \[32\] instead of \[64\]"),
    "a word for a size": (lambda path: change(path / "config.json", d_model="wide"), "cannot open this RT-DETR v2"),
    "another's tensors": (
        lambda path: save_file({"a": torch.zeros(1)}, path / "model.safetensors"),
        r"RT-DETR v2 \(\d+ tensors are missing: ",
    ),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_a_damaged_folder_is_one_line(fault: str, folder_of: Folders, tmp_path: Path) -> None:
    path = tmp_path / "folder"
    shutil.copytree(folder_of("rt_detr_v2"), path)
    damage, message = DAMAGE[fault]
    damage(path)
    before = sorted(path.iterdir())
    with pytest.raises(InputError, match=message) as error:
        choose_presets("smoke", teacher=str(path), start="", changes={})
    one_line(error)
    assert sorted(path.iterdir()) == before


def test_without_transformers_the_extra_is_named(folder_of: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    real, path = builtins.__import__, folder_of("rf_detr")

    def no_transformers(name, *args, **kwargs):
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError(f"No module named '{name}'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_transformers)
    for act in (lambda: load_pretrained(path), lambda: build_any(tiny_recipe("rf_detr"), NAMES)):
        with pytest.raises(InputError, match=r"^RF-DETR is a model of transformers, .* pip install 'detrdistill\[transformers\]'$"):
            act()
    assert '\ntransformers = ["timm>=1.0", "transformers>=' in (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")


def test_height_and_width_stretch_and_a_missing_file_is_asked_for(folder_of: Folders, tmp_path: Path) -> None:
    theirs = tmp_path / "folder"
    shutil.copytree(folder_of("d_fine"), theirs)
    change(theirs / "preprocessor_config.json", size={"height": 64, "width": 96}, do_normalize=False)
    about = read_detector_weights(theirs)[1]
    assert about.settings["resize"] == Resize(short=64, long=96, stretch=True, mean=(0, 0, 0), std=(1, 1, 1))
    (theirs / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"give resize\.short=, resize\.long=, resize\.stretch=, resize\.mean=, resize\.std=$") as error:
        load_pretrained(theirs)
    one_line(error)
    said = {"resize.short": 64, "resize.long": 96, "resize.stretch": True, "resize.mean": (0, 0, 0), "resize.std": (1, 1, 1)}
    assert read_with_settings(theirs, said)[1].settings["resize"] == about.settings["resize"]


@pytest.mark.parametrize(
    ("family", "resize"),
    [
        ("rt_detr_v2", {"short": 600, "long": 640, "stretch": True}),
        ("d_fine", {"short": 640, "long": 650, "stretch": True}),
        ("rf_detr", {"short": 560, "long": 560, "stretch": True}),  # 16 pixels a patch, 2 windows a side
        ("lw_detr", {"short": 648, "long": 640, "stretch": True}),
        ("rt_detr", {"short": 640, "long": 640, "train": "flip"}),  # a folder's images have any shape
    ],
)
def test_sides_that_do_not_divide_are_refused_before_anything_trains(family: str, resize: dict, tmp_path: Path) -> None:
    data, message = (
        {"name": "folder", "path": tmp_path},
        f"{FAMILIES[family].title} takes images whose sides are multiples of 32: set resize",
    )
    with pytest.raises(InputError, match=message):
        tiny_recipe(family).replace(resize=resize, data=data)
    kit = Recipe(schedule=Schedule(steps=1), resize=resize, data=data)  # the kit's own detectors take any
    with pytest.raises(InputError, match=message) as error:  # but a teacher sees the student's images
        kit.replace(teacher=tiny_recipe(family, data=data), methods=[{"name": "detrdistill", "features": 0, "assignment": 0}])
    one_line(error)


def test_square_digits_need_no_stretching() -> None:
    plain = {"short": 96, "long": 96, "train": "jitter"}
    assert tiny_recipe("d_fine", resize=plain).resize.short == 96
    for wrong in ({"short": 90}, {"train": "detr"}):  # the last has several sizes, and crops
        with pytest.raises(InputError, match="multiples of 32"):
            tiny_recipe("d_fine", resize=plain | wrong)
    assert tiny_recipe("detr", resize=plain | {"train": "detr", "short": 90}).resize.short == 90


def test_a_student_of_transformers_needs_a_start_and_another_predictions_alone(folder_of: Folders) -> None:
    teacher = str(folder_of("d_fine"))
    with pytest.raises(InputError, match=r"detector 'd_fine': preset smoke has no recipe for .* \(--start MODEL\), or") as error:
        choose_presets("smoke", teacher=teacher, changes={})
    one_line(error)
    alone = {"detrdistill.features": 0, "detrdistill.assignment": 0}
    (preset,) = choose_presets("smoke", ["deformable_detr"], teacher=teacher, changes=alone)
    recipe = preset.recipe("detrdistill")
    assert recipe.detector == "deformable_detr" and recipe.teacher.detector == "d_fine" and recipe.resize.stretch


def test_a_configuration_that_transformers_refuses_is_one_line() -> None:
    with pytest.raises(
        InputError, match=r"^D-FINE: transformers refuses the recipe's 'config' \(.*encoder_ffn_dim.*\); correct it$"
    ) as error:
        build_any(tiny_recipe("d_fine").replace(**{"config.encoder_ffn_dim": "wide"}), NAMES)
    one_line(error)


def test_a_published_pair_becomes_a_recipe(folder_of: Folders) -> None:
    """Features are left out until they are measured; images are the teacher's, their statistics each detector's own."""
    pair = {"teacher": str(folder_of("d_fine")), "start": str(folder_of("rt_detr_v2"))}
    preset, *_ = choose_presets("smoke", changes={}, **pair)
    recipe = preset.recipe("detrdistill")
    assert (recipe.detector, recipe.teacher.detector) == ("rt_detr_v2", "d_fine") and recipe.query_form == recipe.teacher.query_form
    (method,) = recipe.methods
    assert method.features == 0 and method.normalised and method.logits and method.assignment
    assert recipe.resize.stretch and (recipe.resize.short, recipe.resize.long) == (SIDE, SIDE)
    assert recipe.start == locate(folder_of("rt_detr_v2")) and recipe.config == json.loads(json.dumps(recipe.config))


def test_first_weights_are_the_seed_s_and_train(folder_of: Folders) -> None:
    """transformers freezes the whole of its own ResNet in DETR; fresh weights all train, learned ones from the second stage on."""
    recipe = tiny_recipe("detr")
    first, again, other = (build_any(one, NAMES) for one in (recipe, recipe, recipe.replace(seed=1)))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), other.state_dict().values(), strict=True))
    assert all(p.requires_grad for p in first.parameters())
    started = build_any(recipe.replace(start={"path": folder_of("detr"), "sha256": "0" * 64}), NAMES)
    stages = {name: p.requires_grad for name, p in started.named_parameters() if ".backbone." in name}
    assert {train for name, train in stages.items() if "embedder." in name or "stages.0." in name} == {False}
    assert {train for name, train in stages.items() if "stages.1." in name or "stages.3." in name} == {True}
