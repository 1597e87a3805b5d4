"""Convolutional backbones: torchvision's ResNets and MobileNetV2, and thin ResNets for the embedded data."""

from collections.abc import Callable, Iterable
from http.client import HTTPException
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision import models
from torchvision.models import WeightsEnum
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, conv3x3
from torchvision.ops import FrozenBatchNorm2d

from detrdistill.errors import InputError
from detrdistill.files import file_hash, nearby
from detrdistill.models.weights import named_tensors, read_pickle
from detrdistill.recipes.parts import BackboneRecipe, WeightsFile

Norm = Callable[[int], nn.Module]

# Where each family's stages of stride 4, 8, 16, 32 end.
_RESNET_STAGES = ("layer1", "layer2", "layer3", "layer4")
_MOBILENET_STAGES = ("3", "6", "13", "18")


class NormedConv(nn.Conv2d):
    """A convolution that computes the frozen BatchNorm behind it as well, by scaling its weights: the same but for rounding.

    The BatchNorm keeps its place and its tensors, under torchvision's names, and is passed through.
    """

    norm: tuple[FrozenBatchNorm2d, ...] = ()  # none before `fold`; in a tuple, so that its tensors do not belong to this module as well

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D _ _"]:
        if not self.norm:
            return self._conv_forward(x, self.weight, None)
        (norm,) = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return self._conv_forward(x, self.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale)


class PassedNorm(FrozenBatchNorm2d):
    """The BatchNorm of a `NormedConv`, which has computed it."""

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H W"]:
        return x


def fold(module: nn.Module) -> None:
    """Let each convolution that a frozen BatchNorm follows compute it, two passes over its map less."""
    for one, after in pairwise(module.children()):
        if isinstance(one, nn.Conv2d) and isinstance(after, FrozenBatchNorm2d):
            if not isinstance(one, NormedConv):
                one.__class__ = NormedConv
            after.__class__ = PassedNorm
            one.norm = (after,)
    for child in module.children():
        fold(child)


class Shortcut(NormedConv):
    """A 1x1 convolution that leaves out pixels before it computes.

    Left to its stride, torch's oneDNN (seen with torch 2.15, AVX-512, 8 channels of 48 x 48 pixels) writes beyond its memory in the
    backward pass where channels are fewer than fill a register: oneDNN's issue 6035. The numbers are the same, to the last bit.
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows, columns = self.stride
        return F.conv2d(x[..., ::rows, ::columns], weight, bias)


class ThinResNet(nn.Module):
    """A ResNet of basic blocks with any width and depth, and a 3x3 stem: for images of some 100 pixels, trained from scratch.

    Its modules carry torchvision's names, so that the same code takes its stages.
    """

    def __init__(self, width: int, blocks: tuple[int, ...], classes: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, width, stride=2)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inputs = width
        for stage, count in enumerate(blocks):
            outputs, stride = width * 2**stage, 1 if stage == 0 else 2
            layers = []
            for block in range(count):
                step = stride if block == 0 else 1
                reshape = None
                if step != 1 or inputs != outputs:
                    reshape = nn.Sequential(Shortcut(inputs, outputs, 1, step, bias=False), norm(outputs))
                layers.append(BasicBlock(inputs, outputs, step, reshape, norm_layer=norm))
                inputs = outputs
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C"]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for name in _RESNET_STAGES:
            x = getattr(self, name)(x)
        return self.fc(self.avgpool(x).flatten(1))


def classifier(recipe: BackboneRecipe, classes: int, norm: Norm = nn.BatchNorm2d) -> nn.Module:
    """The complete image classifier that a recipe's backbone is the body of, with fresh weights."""
    if recipe.name == "thin_resnet":
        return ThinResNet(recipe.width, recipe.blocks, classes, norm)
    whole = getattr(models, recipe.name)(weights=None, num_classes=classes, norm_layer=norm)
    if recipe.stride_in_1x1:
        for stage in (whole.layer2, whole.layer3, whole.layer4):
            stage[0].conv1.stride, stage[0].conv2.stride = stage[0].conv2.stride, stage[0].conv1.stride
    return whole


def dilate(blocks: Iterable[nn.Module]) -> None:
    """Trade a stage's stride for dilation (DC5). The first block keeps its kernels undilated, as torchvision's ResNets do."""
    for i, block in enumerate(blocks):
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
                if i > 0 and module.kernel_size == (3, 3):
                    module.dilation = module.padding = (2, 2)


class Backbone(nn.Module):
    """Feature maps C3, C4, C5 (strides 8, 16, 32; the last one 16 with dilation), or from C2 on.

    Attributes:
        channels: of the maps returned.
        strides: of the maps returned, in pixels.

    With learned weights every BatchNorm is frozen (statistics and affine), and unless `frozen_stages` says otherwise the stem and first
    stage of an ImageNet backbone get no gradient, as in the official DETRs. These have no MobileNetV2; DETRDistill's released
    configuration freezes no stage of it, here what comes before its stage of stride 8 is frozen as in a ResNet. A backbone without learned
    weights trains whole, since frozen statistics of random weights learn nothing.

    `frozen_stages` counts as mmdetection's ResNet does. Stages 1 to 4 are those of stride 4, 8, 16 and 32, in MobileNetV2 too, where
    mmdetection counts seven groups of blocks.
    """

    def __init__(self, recipe: BackboneRecipe, first_level: int = 3) -> None:
        super().__init__()
        whole = classifier(recipe, 1, FrozenBatchNorm2d if recipe.frozen_norm else nn.BatchNorm2d)
        mobile = recipe.name == "mobilenet_v2"
        if recipe.dilation:
            dilate(whole.features[14:18] if mobile else whole.layer4)
        self.strides = [4, 8, 16, 16 if recipe.dilation else 32][first_level - 2 :]
        stages = (_MOBILENET_STAGES if mobile else _RESNET_STAGES)[first_level - 2 :]
        self.body = IntermediateLayerGetter(whole.features if mobile else whole, {stage: stage for stage in stages})
        self.learned = recipe.weights != "none"
        fold(self.body)
        for module in self._up_to(recipe.stages_frozen, mobile):
            module.requires_grad_(False)
        with torch.no_grad():
            self.channels = [x.shape[1] for x in self.eval()(torch.zeros(1, 3, 64, 64))]
        self.train()

    def _up_to(self, stage: int, mobile: bool) -> list[nn.Module]:
        """The stem (stage 0) and the stages up to one; nothing for stage -1."""
        ends = ("0", *_MOBILENET_STAGES) if mobile else ("maxpool", *_RESNET_STAGES)
        names = list(self.body)
        return [self.body[name] for name in names[: names.index(ends[stage]) + 1]] if stage >= 0 else []

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _ _ _"]]:
        return list(self.body(images).values())

    def freeze_after(self, maps: int) -> None:
        """No gradient for what only later maps than the first `maps` need; they keep their weights, so that names stay complete."""
        stages = list(self.body)
        for stage in stages[stages.index(list(self.body.return_layers)[maps - 1]) + 1 :]:
            self.body[stage].requires_grad_(False)

    def load(self, state: dict[str, Tensor], source: str) -> None:
        """Load a classifier's weights; its head is left out.

        Raises:
            InputError: missing, unexpected or misshaped tensors.
        """
        state = {name.removeprefix("features."): value for name, value in state.items()}
        own = self.body.state_dict()
        # torchvision's files hold a batch counter that frozen BatchNorm does not have, and the classification head.
        extra = [n for n in state if n not in own and not n.startswith(("fc.", "classifier.")) and not n.endswith("num_batches_tracked")]
        missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
        shapes = [name for name in own if name in state and state[name].shape != own[name].shape]
        if extra or missing or shapes:
            raise InputError(
                f"backbone weights {source} do not fit: missing {missing[:3]}, unexpected {extra[:3]}, misshaped {shapes[:3]} "
                f"({len(missing)}, {len(extra)}, {len(shapes)} in all); give the weights of this architecture"
            )
        self.body.load_state_dict({name: state[name].to(own[name].dtype) for name in own if name in state}, strict=False)


def imagenet_version(name: str) -> WeightsEnum:
    """Which of torchvision's weights of a model: the first version, which the official DETRs start from, and not whichever is newest."""
    return models.get_model_weights(name)["IMAGENET1K_V1"]


def imagenet_weights(name: str) -> dict[str, Tensor]:
    """torchvision's ImageNet weights, downloaded once into torch's cache.

    Raises:
        InputError: no network and not in the cache, or a damaged file.
    """
    weights = imagenet_version(name)
    file = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
    try:
        # torch compares the hash in the file's name when it downloads, and never again.
        if file.is_file() and not file_hash(file).startswith(torch.hub.HASH_REGEX.search(file.name)[1]):
            raise InputError(f"ImageNet weights of {name}: {file} is damaged, its hash is not that of its name; delete it")
        return weights.get_state_dict(progress=False, check_hash=True)
    except InputError:
        raise
    except (OSError, HTTPException, RuntimeError) as error:  # torch reports a wrong hash and a damaged file as RuntimeError
        raise InputError(
            f"ImageNet weights of {name} could not be downloaded ({str(error)[:200]}); connect once, or give a state_dict "
            "file as backbone.weights, or set backbone.weights='none'"
        ) from None


def weights_path(weights: Path | WeightsFile) -> Path:
    """Where a file of weights lies.

    Raises:
        InputError: a file that is known by its hash is missing, or is another.
    """
    if isinstance(weights, Path):
        return nearby(weights)
    path = nearby(Path("data/weights", weights.name))
    if not path.is_file():
        raise InputError(
            f"backbone weights {weights}: no file {path} (looked in {Path.cwd()} and above); put it there, or set backbone.weights to "
            "another file or to 'imagenet' (torchvision's)"
        )
    if (found := file_hash(path)) != weights.sha256:
        raise InputError(f"backbone weights {path}: their hash is {found}, the recipe says {weights.sha256}; put the recipe's file there")
    return path


def file_weights(weights: Path | WeightsFile) -> dict[str, Tensor]:
    """A state_dict file of torch.save; nothing in it is executed.

    Raises:
        InputError: the file is missing, damaged, another than the recipe says, or holds more than tensors.
    """
    path = weights_path(weights)
    try:
        return named_tensors(read_pickle(path), path)
    except InputError as error:
        raise InputError(f"backbone {error}") from None
