"""Backbones in every variant: strides and channels, dilation, and where the stride lies."""

import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torchvision import models

from detrdistill.models.backbones import Backbone, Shortcut, classifier
from detrdistill.recipes.identity import parents
from detrdistill.recipes.parts import BackboneRecipe as Recipe
from detrdistill.recipes.parts import CropTraining, Digits, Schedule
from detrdistill.recipes.recipe import Recipe as RunRecipe
from tests.models.small import randomise

CHANNELS = {
    "thin_resnet": [16, 32, 64, 128],
    "resnet18": [64, 128, 256, 512],
    "resnet50": [256, 512, 1024, 2048],
    "mobilenet_v2": [24, 32, 96, 1280],
}


@pytest.mark.parametrize("name", CHANNELS)
@pytest.mark.parametrize("dilation", [False, True], ids=["strided", "dilated"])
@pytest.mark.parametrize("first_level", [2, 3])
def test_strides_and_channels(name: str, dilation: bool, first_level: int) -> None:
    backbone = Backbone(Recipe(name=name, weights="none", dilation=dilation), first_level).eval()
    maps = backbone(torch.zeros(1, 3, 64, 128))
    assert backbone.strides == [4, 8, 16, 16 if dilation else 32][first_level - 2 :]
    assert backbone.channels == [x.shape[1] for x in maps] == CHANNELS[name][first_level - 2 :]
    assert [x.shape[2:] for x in maps] == [(64 // stride, 128 // stride) for stride in backbone.strides]


def test_dilation_is_torchvisions() -> None:
    ours = Backbone(Recipe(name="resnet50", weights="imagenet", dilation=True))
    theirs = models.resnet50(weights=None, replace_stride_with_dilation=[False, False, True])
    found = {name: (conv.stride, conv.dilation, conv.padding) for name, conv in ours.body.named_modules() if isinstance(conv, nn.Conv2d)}
    expected = {name: (conv.stride, conv.dilation, conv.padding) for name, conv in theirs.named_modules() if isinstance(conv, nn.Conv2d)}
    assert found == expected


def test_stride_in_1x1_moves_the_stride_only() -> None:
    plain, moved = (classifier(Recipe(name="resnet50", weights="none", stride_in_1x1=there), 5) for there in (False, True))
    randomise(plain)
    moved.load_state_dict(plain.state_dict())
    for stage in (moved.layer2, moved.layer3, moved.layer4):
        assert stage[0].conv1.stride == (2, 2) and stage[0].conv2.stride == (1, 1) and stage[0].downsample[0].stride == (2, 2)
    assert moved.layer1[0].conv1.stride == (1, 1)
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plain.eval(), moved.eval()
    assert not torch.allclose(plain(images), moved(images))


@pytest.mark.parametrize(
    "values", [{"name": "resnet18", "weights": "none"}, {"name": "mobilenet_v2", "weights": "none"}, {"name": "resnet50"}]
)
def test_stride_in_1x1_is_refused_where_no_such_weights_exist(values: dict) -> None:
    with pytest.raises(ValidationError, match="MSRA"):
        Recipe(**values, stride_in_1x1=True)


def test_crops_are_learned_undilated() -> None:
    backbone = Recipe(name="thin_resnet", weights="crops", crops=CropTraining(), dilation=True)
    runs = [
        parents(RunRecipe(backbone=one, data=Digits(), schedule=Schedule(steps=1))) for one in (backbone, backbone.replace(dilation=False))
    ]
    assert runs[0] == runs[1] and not runs[0]["backbone"].backbone.dilation
    assert backbone.title == "thin16-dc5"


@pytest.mark.parametrize("name", CHANNELS)
def test_freeze_after_spares_what_the_first_maps_need(name: str) -> None:
    backbone = Backbone(Recipe(name=name, weights="none"))
    backbone.freeze_after(2)
    sum(level.sum() for level in backbone(torch.randn(2, 3, 64, 64))[:2]).backward()
    frozen = [parameter for parameter in backbone.parameters() if not parameter.requires_grad]
    assert frozen and all((parameter.grad is not None) == parameter.requires_grad for parameter in backbone.parameters())
    backbone = Backbone(Recipe(name=name, weights="none"))
    backbone.freeze_after(3)
    assert all(parameter.requires_grad for parameter in backbone.parameters())


TRAIN = """
import sys, torch
from detrdistill.recipes.parts import BackboneRecipe as Recipe
from detrdistill.models.backbones import Backbone
backbone = Backbone(Recipe(name="thin_resnet", width=int(sys.argv[1]), weights="none")).to(memory_format=torch.channels_last)
for _ in range(3):
    images = torch.randn(16, 3, 192, 192).contiguous(memory_format=torch.channels_last)
    sum(level.sum() for level in backbone(images)).backward()
"""


@pytest.mark.parametrize("width", [4, 8])  # fewer channels than an AVX2 or an AVX-512 register holds
def test_few_channels_do_not_crash(width: int) -> None:
    """In a process of its own, which oneDNN's fault would end."""
    done = subprocess.run([sys.executable, "-c", TRAIN, str(width)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)


def test_shortcuts_are_strided_convolutions() -> None:
    ours = Shortcut(12, 24, 1, 2, bias=False)
    torchs = nn.Conv2d(12, 24, 1, 2, bias=False)
    torchs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 12, 9, 7)
    torch.testing.assert_close(ours(images), torchs(images))
