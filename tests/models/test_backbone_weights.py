"""Backbones: shapes, what is frozen, and weights that do not fit or are not weights."""

import copy
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from detrdistill.errors import InputError
from detrdistill.models import backbones
from detrdistill.models.backbones import Backbone, NormedConv, PassedNorm, classifier, file_weights, imagenet_weights
from detrdistill.recipes.parts import BackboneRecipe, CropTraining

THIN = {"name": "thin_resnet", "width": 8}
CHANNELS = {
    "resnet18": [128, 256, 512],
    "resnet50": [512, 1024, 2048],
    "resnet101": [512, 1024, 2048],
    "mobilenet_v2": [32, 96, 1280],
    "thin_resnet": [32, 64, 128],
}


@pytest.mark.parametrize("name", CHANNELS)
def test_channels_and_strides(name):
    backbone = Backbone(BackboneRecipe(name=name, weights="none")).eval()
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, 64, 96))
    assert backbone.channels == [x.shape[1] for x in maps] == CHANNELS[name]
    assert [tuple(x.shape[2:]) for x in maps] == [(8, 12), (4, 6), (2, 3)]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "thin_resnet"])
def test_maps_from_stride_4_on(name):
    backbone = Backbone(BackboneRecipe(name=name, weights="none"), first_level=2)
    assert len(backbone.channels) == 4 and backbone.channels[1:] == CHANNELS[name]
    assert backbone(torch.zeros(2, 3, 64, 64))[0].shape[-1] == 16


def test_depth_and_width_of_thin_backbones():
    wide = Backbone(BackboneRecipe(name="thin_resnet", width=16, blocks=(1, 2, 3, 1), weights="none"))
    assert wide.channels == [32, 64, 128] and [len(wide.body[f"layer{i}"]) for i in (1, 2, 3, 4)] == [1, 2, 3, 1]


def norms(backbone: Backbone) -> set[type]:
    return {type(module) for module in backbone.modules() if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d)}


def test_without_learned_weights_everything_trains():
    for name in ("thin_resnet", "resnet18", "mobilenet_v2"):
        backbone = Backbone(BackboneRecipe(name=name, weights="none"))
        assert norms(backbone) == {nn.BatchNorm2d} and all(p.requires_grad for p in backbone.parameters())


def test_with_learned_weights_the_norms_are_frozen():
    backbone = Backbone(BackboneRecipe(weights="crops", crops=CropTraining(), **THIN)).train()
    assert norms(backbone) == {PassedNorm}
    assert all(p.requires_grad for p in backbone.parameters()), "a backbone of the crops trains from its stem on"
    before = {name: value.clone() for name, value in backbone.named_buffers()}
    backbone(torch.randn(2, 3, 64, 64))[-1].sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in backbone.named_buffers())


@pytest.mark.parametrize(("name", "dilation"), [("thin_resnet", True), ("resnet50", False), ("mobilenet_v2", False)])
def test_frozen_norms_in_the_convolutions_change_rounding_alone(name, dilation):
    """Maps and gradients are those of torchvision's modules, in training and evaluation; the tensors keep their names."""
    torch.manual_seed(0)
    stated = {"weights": "crops", "crops": CropTraining(), "width": 8} if name == "thin_resnet" else {"weights": "imagenet"}
    backbone = Backbone(BackboneRecipe(name=name, dilation=dilation, **stated)).double()
    for buffer, value in backbone.named_buffers():
        value.uniform_(0.5, 1.5) if buffer.endswith(("weight", "var")) else value.normal_(std=0.1)
    plain = copy.deepcopy(backbone)
    for module in plain.modules():
        if isinstance(module, NormedConv):
            module.norm = ()
        elif isinstance(module, PassedNorm):
            module.__class__ = FrozenBatchNorm2d
    assert plain.state_dict().keys() == backbone.state_dict().keys()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    ours, theirs = backbone(images), plain(images)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    upstream = [torch.randn_like(one) for one in ours]
    found, wanted = (
        torch.autograd.grad(maps, [p for p in model.parameters() if p.requires_grad], upstream)
        for maps, model in ((ours, backbone), (theirs, plain))
    )
    assert all(torch.allclose(one, other, rtol=1e-8, atol=1e-8) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("name", "first_trained"), [("resnet18", "layer2.0.conv1.weight"), ("mobilenet_v2", "4.conv.0.0.weight")])
def test_stem_and_first_stage_of_imagenet_get_no_gradient(name, first_trained):
    backbone = Backbone(BackboneRecipe(name=name))
    assert norms(backbone) == {PassedNorm}
    names = [name for name, parameter in backbone.body.named_parameters() if parameter.requires_grad]
    assert names[0] == first_trained
    backbone.train()(torch.randn(1, 3, 64, 64))[-1].sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "thin_resnet"])
def test_a_classifier_s_weights_give_its_maps(name):
    """The classifier in evaluation mode and the body with frozen norms compute the same."""
    recipe = BackboneRecipe(name=name, weights="crops", crops=CropTraining())
    whole = classifier(recipe, 7)
    with torch.no_grad():
        whole.train()(torch.randn(4, 3, 64, 64))  # statistics other than 0 and 1
    backbone = Backbone(recipe).eval()
    backbone.load(whole.state_dict(), "of the test")
    image, whole = torch.randn(1, 3, 64, 64), whole.eval()
    with torch.no_grad():
        found = backbone(image)[-1]
        wanted = whole.features(image) if name == "mobilenet_v2" else nn.Sequential(*list(whole.children())[:-2])(image)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_weights_of_another_architecture_are_refused_and_nothing_is_loaded():
    backbone = Backbone(BackboneRecipe(weights="none", **THIN))
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    good = classifier(BackboneRecipe(weights="none", **THIN), 3).state_dict()
    wider = classifier(BackboneRecipe(name="thin_resnet", width=16, weights="none"), 3).state_dict()
    faults = {
        "misshaped": wider,
        "missing": {name: value for name, value in good.items() if name != "conv1.weight"},
        "unexpected": good | {"layer9.weight": torch.zeros(1)},
    }
    for kind, state in faults.items():
        with pytest.raises(InputError, match=rf"weights mine\.pt do not fit: .*{kind} \['(conv1|layer9)\.weight'") as error:
            backbone.load(state, "mine.pt")
        assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    backbone.load(good, "mine.pt")


def test_weight_files(tmp_path):
    state = classifier(BackboneRecipe(weights="none", **THIN), 3).state_dict()
    torch.save(state, tmp_path / "weights.pt")
    assert file_weights(tmp_path / "weights.pt").keys() == state.keys()
    torch.save({"model": state}, tmp_path / "nested.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("nested.pt", "list.pt"):
        with pytest.raises(InputError, match=rf"backbone weights .*{name}: .* named tensors.*; save model\.state_dict\(\)"):
            file_weights(tmp_path / name)
    for name in ("absent.pt", "."):
        with pytest.raises(InputError, match="backbone weights"):
            file_weights(tmp_path / name)


def test_imagenet_weights_without_network(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    for name in ("resnet50", "mobilenet_v2"):
        with pytest.raises(InputError, match=f"ImageNet weights of {name} could not be downloaded .*connect once, or give") as error:
            imagenet_weights(name)
        assert "\n" not in str(error.value)


def test_imagenet_weights_that_arrive_damaged(monkeypatch, tmp_path):
    """torch.hub reports a wrong hash as a RuntimeError."""

    def damaged(*_, **__):
        raise RuntimeError('invalid hash value (expected "11ad3fa6", got "e3b0c442")')

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", damaged)
    with pytest.raises(InputError, match=r"ImageNet weights of resnet50 .*invalid hash value"):
        backbones.imagenet_weights("resnet50")


# Parameters of the stem, and of each stage after it, begin with these.
PARTS = {
    "resnet18": (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)),
    "thin_resnet": (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)),
    "mobilenet_v2": tuple(tuple(f"{i}." for i in blocks) for blocks in ((0,), (1, 2, 3), (4, 5, 6), range(7, 14), range(14, 19))),
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("stages", [-1, 0, 1, 3, 4])
def test_frozen_stages_are_the_first_ones(name: str, stages: int) -> None:
    stated = {"weights": "crops", "crops": CropTraining()} if name == "thin_resnet" else {}
    backbone = Backbone(BackboneRecipe(name=name, frozen_stages=stages, **stated))
    frozen = {name for name, parameter in backbone.body.named_parameters() if not parameter.requires_grad}
    first = tuple(begin for part in PARTS[name][: stages + 1] for begin in part)
    assert frozen == {name for name, _ in backbone.body.named_parameters() if first and name.startswith(first)}


@pytest.mark.parametrize(("stated", "stages"), [({"weights": "none"}, -1), ({"weights": "crops", "crops": CropTraining()}, -1), ({}, 1)])
def test_what_is_frozen_where_nothing_is_said(stated: dict, stages: int) -> None:
    name = "resnet18"
    found, wanted = (Backbone(BackboneRecipe(name=name, **stated, **more)) for more in ({}, {"frozen_stages": stages}))
    assert [p.requires_grad for p in found.parameters()] == [p.requires_grad for p in wanted.parameters()]


@pytest.mark.parametrize("stages", [-2, 5, "stem"])
def test_stages_that_no_backbone_has_are_refused(stages: object) -> None:
    with pytest.raises(InputError, match="'frozen_stages' = "):
        BackboneRecipe.read({"frozen_stages": stages})


def test_random_weights_are_not_frozen() -> None:
    with pytest.raises(InputError, match=r"frozen_stages 0 would freeze random weights \(weights='none'\); set it to -1, or start from"):
        BackboneRecipe.read({"weights": "none", "frozen_stages": 0})
