"""Folders of Hugging Face: whole, sharded and of timm's names they give the detector back; those of other functions are refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from detrdistill.checkpoints.formats import read_detector_weights
from detrdistill.checkpoints.hugging_face import export_hugging_face
from detrdistill.checkpoints.pretrained import load_pretrained
from detrdistill.errors import InputError
from detrdistill.models import build_detector
from detrdistill.recipes.parts import BackboneRecipe, Schedule
from detrdistill.recipes.recipe import Recipe as FullRecipe
from tests.checkpoints.test_pretrained import same
from tests.models.small import CLASSES, randomise


def export_small(folder: Path) -> nn.Module:
    """A Deformable DETR as such a folder."""
    recipe = FullRecipe(
        backbone=BackboneRecipe(name="resnet18"), form="box_refine", dim=32, heads=4, ffn=32, encoder_layers=1, decoder_layers=2, queries=5,
        levels=2, points=2, dropout=0.0, schedule=Schedule(steps=1),
    )  # fmt: skip
    detector = build_detector(recipe, CLASSES).eval()
    randomise(detector)
    export_hugging_face(detector, folder, ["a", "b", "c"])
    return detector


def test_bin_and_sharded_folders(tmp_path: Path) -> None:
    detector = export_small(tmp_path)
    whole, _ = load_pretrained(tmp_path / "model.safetensors")  # config.json beside it
    same(detector, whole)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    half = sorted(tensors)[: len(tensors) // 2]
    shards = {"a.safetensors": half, "b.safetensors": sorted(tensors.keys() - set(half))}
    for file, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, tmp_path / file)
    index = {"weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    same(detector, load_pretrained(tmp_path)[0])
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(InputError, match=r"b\.safetensors: no such file"):
        load_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    same(detector, load_pretrained(tmp_path)[0])
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"no weights\.safetensors of a run, and no model\.safetensors"):
        load_pretrained(tmp_path)


def test_backbones_of_timm_have_torchvisions_names(tmp_path: Path) -> None:
    detector = export_small(tmp_path)
    tensors = {key: value for key, value in load_file(tmp_path / "model.safetensors").items() if not key.startswith("model.backbone.")}
    for name, value in detector.backbone.body.state_dict().items():
        tensors[f"model.backbone.conv_encoder.model.{name}"] = value
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config |= {"backbone_config": None, "backbone": "resnet18", "use_timm_backbone": True}
    config["id2label"] = {"0": "N/A", "1": "LABEL_1", "2": "cat"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    again, about = load_pretrained(tmp_path)
    assert about.names == (None, None, "cat")
    same(detector, again)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "yolos"}, "the model is a 'yolos'; the kit reads"),
        ({"activation_function": "gelu"}, "'activation_function' is 'gelu', which makes it another function"),
        ({"position_embedding_type": "learned"}, "'position_embedding_type' is 'learned'"),
        ({"model_type": "conditional_detr", "auxiliary_loss": True}, "'auxiliary_loss' is True"),
        ({"decoder_n_points": 3}, "'encoder_n_points' is 2 and 'decoder_n_points' 3"),
        ({"decoder_attention_heads": 2}, "'encoder_attention_heads' is 4"),
        (None, "not readable as JSON"),
    ],
)
def test_folders_of_other_functions_are_refused(changes: dict | None, message: str, tmp_path: Path) -> None:
    export_small(tmp_path)
    path = tmp_path / "config.json"
    text = path.read_text(encoding="utf-8")
    path.write_text("{" if changes is None else json.dumps(json.loads(text) | changes), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_detector_weights(tmp_path)
