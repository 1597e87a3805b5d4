"""Weights that are cut, overwritten, of another model, or hold code: refused with the reason, and nothing is executed or loaded in part."""

import argparse
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from detrdistill.checkpoints.hugging_face import export_hugging_face
from detrdistill.checkpoints.pretrained import load_detector_weights, load_pretrained
from detrdistill.errors import InputError
from detrdistill.models import build_detector
from detrdistill.models.backbones import Backbone, classifier, file_weights, imagenet_weights
from detrdistill.recipes.identity import parents
from detrdistill.recipes.parts import BackboneRecipe, Schedule
from detrdistill.recipes.presets import smoke
from detrdistill.recipes.recipe import Recipe
from detrdistill.runs.run import run
from detrdistill.runs.store import Store
from tests.models.small import CLASSES, small_detector, small_recipe

THIN = BackboneRecipe(name="thin_resnet", width=8, weights="none")


class Attack:
    """What a malicious pickle looks like: to load it is to call `os.mkdir`."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """What an attack that works makes."""
    return tmp_path / "made by the attack"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder. Not to be written to."""
    root = tmp_path_factory.mktemp("hugging") / "face"
    recipe = Recipe(
        backbone=BackboneRecipe(name="resnet18"), form="two_stage", dim=32, heads=4, ffn=32, encoder_layers=1, decoder_layers=2,
        queries=5, levels=2, points=2, dropout=0.0, schedule=Schedule(steps=1),
    )  # fmt: skip
    return export_hugging_face(build_detector(recipe, CLASSES), root, ["a", "b", "c"])


def copy(folder: Path, to: Path, **config: Any) -> Path:
    """The folder with other entries in config.json; its weights are linked."""
    to.mkdir(exist_ok=True)
    told = json.loads((folder / "config.json").read_text(encoding="utf-8")) | config
    (to / "config.json").write_text(json.dumps(told), encoding="utf-8")
    if not (to / "model.safetensors").exists():
        (to / "model.safetensors").symlink_to(folder / "model.safetensors")
    return to


def official(kind: str = "adamixer") -> dict[str, Any]:
    """A file's content in the way of the official codes, under the kit's names."""
    return {"model": small_detector(kind).state_dict(), "args": argparse.Namespace(nheads=4), "optimizer": {"state": {}}, "epoch": 49}


# Code


@pytest.mark.parametrize("where", ["model", "args", "meta", "bare", "plain pickle", "old pickle", "folder", "shard", "backbone"])
def test_code_is_refused_and_none_runs(where: str, folder: Path, tmp_path: Path, target: Path, tries) -> None:
    path, evil, content = tmp_path / "evil.pth", Attack(target), official()
    if where == "plain pickle":
        path.write_bytes(pickle.dumps({"model": evil}))
    elif where == "old pickle":
        torch.save(content | {"model": evil}, path, _use_new_zipfile_serialization=False)
    elif where in ("folder", "shard"):
        path = copy(folder, tmp_path / "folder")
        (path / "model.safetensors").unlink()
        torch.save({"model.level_embed": evil}, path / ("pytorch_model.bin" if where == "folder" else "a.bin"))
        (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"model.level_embed": "../folder/a.bin"}}))
    else:
        spoilt = {"model": {"model": content["model"] | {"x": evil}}, "args": {"args": argparse.Namespace(nheads=4, evil=evil)}}
        spoilt |= {"meta": {"meta": {"CLASSES": evil}}, "bare": {"model": evil}, "backbone": {"conv1.weight": evil}}
        torch.save(content | spoilt[where], path)
    with tries("code in a pickle"):
        with pytest.raises(InputError, match=r"weights .*: not read, since it holds .*none was run.*if you trust it, save its") as error:
            file_weights(path) if where == "backbone" else load_pretrained(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value) and not target.exists()


def test_the_attack_works_where_it_is_let(target: Path) -> None:
    pickle.loads(pickle.dumps(Attack(target)))
    assert target.exists()


def test_code_in_the_cache_of_imagenet_weights(tmp_path: Path, target: Path, tries, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch compares hashes only when it downloads; a file that lies there already must have that of its name, too."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(pickle.dumps({"conv1.weight": Attack(target)}))
    with tries("wrong hash in torch's cache"):
        with pytest.raises(InputError, match=r"ImageNet weights of resnet18: .*f37072fd\.pth is damaged, its hash .*; delete it"):
            imagenet_weights("resnet18")
        assert not target.exists()


@pytest.mark.parametrize("kind", ["deformable_detr", "my_detr"])
def test_remote_code_is_refused(kind: str, folder: Path, tmp_path: Path, target: Path, tries) -> None:
    entry = {"AutoConfig": "evil.EvilConfig", "AutoModelForObjectDetection": "evil.EvilModel"}
    path = copy(folder, tmp_path / "folder", model_type=kind, auto_map=entry)
    (path / "evil.py").write_text(f"import os\nos.mkdir({str(target)!r})\n")
    with tries("Hugging Face folder with code of its own"):
        for given in (path, path / "model.safetensors"):
            with pytest.raises(InputError, match=r"config\.json: 'auto_map' asks to run the folder's own code .*never does; if .* take"):
                load_pretrained(given)
        assert not target.exists()


# Damage


def saved(form: str, path: Path) -> tuple[Path, Callable[[], object], nn.Module | None]:
    """A whole file, how it is loaded, and into what."""
    if form == "backbone":
        body = Backbone(THIN)
        torch.save(classifier(THIN, 3).state_dict(), path)
        return path, lambda: body.load(file_weights(path), str(path)), body
    if form == "safetensors":
        path, detector = path.with_suffix(".safetensors"), small_detector("adamixer", seed=7)
        save_file({name: value.clone() for name, value in official()["model"].items()}, path)
        return path, lambda: load_detector_weights(detector, path), detector
    detector = small_detector("adamixer", seed=7)
    torch.save(official(), path, _use_new_zipfile_serialization=form == "zip")
    return path, lambda: load_detector_weights(detector, path), detector


def refused_or_whole(load: Callable[[], object], path: Path, module: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    """Whether it was loaded; if not, the module is as it was and the message names file and remedy."""
    try:
        load()
    except InputError as refusal:
        text = str(refusal)
        assert "\n" not in text and str(path) in text and re.search(r"; [a-z]+ ", text), text
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        return False
    module.load_state_dict(before)
    return True


@pytest.mark.parametrize("form", ["zip", "old pickle", "safetensors", "backbone"])
def test_truncated_anywhere(form: str, tmp_path: Path, tries, times, chance) -> None:
    path, load, module = saved(form, tmp_path / "w.pth")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    whole = path.read_bytes()
    assert refused_or_whole(load, path, module, before)
    for length in (0, 1, len(whole) - 1, *(chance.randrange(2, len(whole) - 1) for _ in range(times(5, 100)))):
        path.write_bytes(whole[:length])
        with tries("truncated checkpoint"):
            assert not refused_or_whole(load, path, module, before)


@pytest.mark.parametrize("form", ["zip", "old pickle", "safetensors", "backbone"])
def test_overwritten_anywhere(form: str, tmp_path: Path, tries, times, chance) -> None:
    """Half of the bytes are written where names and shapes lie. What lies among the numbers only a hash would show."""
    path, load, module = saved(form, tmp_path / "w.pth")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    whole = path.read_bytes()
    for k in range(times(12, 400)):
        harmed = bytearray(whole)
        for _ in range(4):
            harmed[chance.randrange(len(whole) if k % 2 else 3000)] = chance.randrange(256)
        path.write_bytes(harmed)
        with tries("overwritten checkpoint"):
            refused_or_whole(load, path, module, before)


def test_a_run_s_weights_have_its_hash(finished: Path, tmp_path: Path, tries) -> None:
    """One bit of a teacher's weights has changed since it was trained."""
    copytree(finished, tmp_path / "results")
    recipe, store = smoke().recipe("detrdistill", seed=1), Store(tmp_path / "results")
    weights = store.weights(parents(recipe)["teacher"])
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    load_pretrained(weights)  # as a file nothing is wrong with it
    with tries("weights of another hash than their record"):
        with pytest.raises(InputError, match=r"run .*: weights .* differ from its record; restore them, or delete the folder"):
            run(recipe, store, device="cpu", progress=False)
        assert store.record(recipe) is None


# Other models


OTHERS = {
    "another family": ("conditional", {}, r"of a AdaMixer\) cannot be loaded into a ConditionalDETR; give weights of that detector"),
    "another width": ("adamixer", {"dim": 64}, r"do not fit this AdaMixer: .*misshaped \(.* instead of .*\); it may be of a variant"),
    "another depth": ("adamixer", {"decoder_layers": 3}, r"do not fit this AdaMixer: .*missing \(stages\.2\..*\); it may be of a variant"),
}


@pytest.mark.parametrize("fault", OTHERS)
def test_another_architecture(fault: str, tmp_path: Path, tries) -> None:
    kind, changes, text = OTHERS[fault]
    path, detector = tmp_path / "w.pth", small_detector(kind, **changes)
    torch.save(official(), path)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    with tries("checkpoint of " + fault):
        with pytest.raises(InputError, match=rf"^{path}.*{text}"):
            load_detector_weights(detector, path)
        assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())


def test_another_class_count(tmp_path: Path, tries) -> None:
    path = tmp_path / "w.pth"
    torch.save(official(), path)
    with tries("checkpoint of another class count"):
        with pytest.raises(InputError, match=r"AdaMixer\) has 3 class outputs, the detector 7; give the names of the classes"):
            load_detector_weights(build_detector(small_recipe("adamixer"), 7), path)
        with pytest.raises(InputError, match=r"does not say its classes; name its 3 outputs as 'outputs', or say replace_head=True"):
            load_pretrained(path, categories=["a", "b", "c"])


def test_a_file_s_own_classes_are_never_taken_for_cocos(tmp_path: Path, tries) -> None:
    """91 outputs and names for 90 of them: COCO's would fit, and be wrong."""
    path = tmp_path / "w.pth"
    torch.save({"state_dict": build_detector(small_recipe("adamixer"), 91).state_dict(), "meta": {"CLASSES": ["mine"] * 90}}, path)
    with tries("names of other classes than the head has"):
        assert load_pretrained(path)[1].names == (None,) * 91


def test_classes_that_differ_by_capitals(tmp_path: Path, tries) -> None:
    path = tmp_path / "w.pth"
    torch.save({"state_dict": official()["model"], "meta": {"CLASSES": ["cat", "Cat", "dog"]}}, path)
    with tries("classes that differ by capitals"):
        assert load_pretrained(path, categories=["dog", "Cat", "cat"])[1].rows == (2, 1, 0)


ODD = {
    "sparse": lambda value: value.to_sparse(),
    "complex": lambda value: value.to(torch.complex64),
    "quantized": lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
    "larger than its file": lambda value: torch.zeros(1).expand(10**6, 10**6),
    "no tensor": lambda value: 3,
}


@pytest.mark.parametrize("fault", ODD)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_odd_tensors(fault: str, tmp_path: Path, tries) -> None:
    content, path = official(), tmp_path / "w.pth"
    content["model"] = content["model"] | {"init_content.weight": ODD[fault](content["model"]["init_content.weight"])}
    torch.save(content, path)
    torch.save(content["model"], tmp_path / "backbone.pth")
    with tries("tensor that is " + fault):
        with pytest.raises(InputError, match=rf"weights {path}: .*; save model\.state_dict"):
            load_pretrained(path)
        with pytest.raises(InputError, match=r"backbone weights .*: .*; save model\.state_dict"):
            file_weights(tmp_path / "backbone.pth")


# What lies beside the tensors

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 40) | st.sampled_from([10**9, 10**30, 0.5, "", "8", "relu", "resnet18"]) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["0", "1", "-1", "x", "99999999999"]), inner, max_size=3),
    max_leaves=4,
)

# What configs of mmdetection may say.
TEXTS = st.lists(
    st.sampled_from(
        ["num_heads=4", "num_heads=0", "num_points=2", "num_points=99", "std=[0, 1, 1]", "mean=[1.., 2, 3]", "mean=[1., 2, 3.5]"]
    )
    | st.sampled_from(["scale=(0, 9)", "img_scale=(9, 99)", "with_box_refine=True", "as_two_stage=True", "num_query=0", "to_rgb=False"]),
    max_size=4,
).map(", ".join)


def test_broken_config(folder: Path, tmp_path: Path, tries, examples) -> None:
    keys = sorted(json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"dilation": 0, "position_embedding_type": 0})

    @examples(15, 300)
    @given(st.dictionaries(st.sampled_from(keys), VALUES, min_size=1, max_size=3))
    def attempt(changes: dict[str, Any]) -> None:
        path = copy(folder, tmp_path / "folder", **changes)
        with tries("broken config.json"):
            try:
                load_pretrained(path)
            except InputError as refusal:
                assert str(path) in str(refusal) and "\n" not in str(refusal)

    attempt()
    for text in ("[" * 100_000, "[]", "{", "\xff"):
        (tmp_path / "folder" / "config.json").write_text(text, encoding="latin-1")
        with tries("broken config.json"), pytest.raises(InputError, match=r"config\.json: not .*; restore it"):
            load_pretrained(tmp_path / "folder")


@pytest.mark.parametrize("listed", [None, 3, [], {"a": 3}, {"a": None}])
def test_broken_list_of_shards(listed: object, folder: Path, tmp_path: Path, tries) -> None:
    path = copy(folder, tmp_path / "folder")
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    with tries("broken list of shards"), pytest.raises(InputError, match=r"index\.json: 'weight_map' is .*; restore it"):
        load_pretrained(path)


def test_broken_arguments(tmp_path: Path, tries, examples) -> None:
    """What official checkpoints and mmdetection's say of themselves."""
    path, state = tmp_path / "w.pth", official("deformable")["model"]
    names = ["nheads", "dropout", "dilation", "with_box_refine", "two_stage", "enc_n_points", "dec_n_points", "num_queries"]

    @examples(15, 300)
    @given(
        st.dictionaries(st.sampled_from(names), VALUES),
        st.dictionaries(st.sampled_from(["CLASSES", "dataset_meta", "cfg", "config", "mmengine_version"]), VALUES | TEXTS),
        st.dictionaries(st.sampled_from(["ema", "model_ema", "ema_state_dict", "module", "state_dict"]), VALUES),
        st.sampled_from([None, argparse.Namespace, dict]),
    )
    def attempt(args: dict[str, Any], meta: dict[str, Any], others: dict[str, Any], kind: type | None) -> None:
        content = others | {"model": state, "meta": meta} | ({"args": kind(**args)} if kind else {})
        torch.save(content, path)
        with tries("broken arguments in a checkpoint"):
            try:
                load_pretrained(path)
            except InputError as refusal:
                assert str(path) in str(refusal) and "\n" not in str(refusal)

    attempt()
