"""How images are resized and augmented: torchvision's v2 transforms, and the two steps of the DETR papers that it lacks.

A transform takes `(tv_tensors.Image uint8 [3 H W], {"boxes": tv_tensors.BoundingBoxes [N 4], "labels": [N]})` and returns the same
with a normalised float image and boxes inside it. All randomness comes from torch's default generator.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from detrdistill.recipes.parts import Resize

Target = dict[str, Any]


@dataclass(frozen=True)
class ImageTransform:
    """What is done to an image and its boxes.

    Attributes:
        fixed: what comes first and gives the same each time: a dataset may keep it.
        drawn: what follows, with random numbers; pixels are still bytes.
        mean, std: of red, green and blue from 0 to 1, for `normalise`.
    """

    fixed: Callable[..., Any]
    drawn: Callable[..., Any]
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, image: tv_tensors.Image, target: Target) -> tuple[tv_tensors.Image, Target]:
        image, target = self.drawn(*self.fixed(image, target))
        return tv_tensors.Image(self.normalise(torch.empty(image.shape, dtype=torch.float32), image)), target

    def normalise(self, place: Float[Tensor, "3 H W"], image: UInt8[Tensor, "3 H W"]) -> Float[Tensor, "3 H W"]:
        """Write an image to `place`, scaled and normalised as v2.ToDtype and v2.Normalize do it, to the last bit; returns `place`.

        These keep the layout of a decoded image, channels last, in which arithmetic by channel takes several times as long.
        """
        return F.normalize_image(place.copy_(image).mul_(1 / 255), list(self.mean), list(self.std), inplace=True)


def build_transform(resize: Resize, train: bool) -> ImageTransform:
    """The augmentation of `resize.train`, or for evaluation the resize alone.

    The numbers of "detr" are those of the papers, which have 800 pixels on the shorter side; here they scale with `resize.short`.
    """
    scale = resize.short / 800
    fixed: Any = Stretch((resize.short, resize.long)) if resize.stretch else ShorterSide([resize.short], resize.long)
    flip = v2.RandomHorizontalFlip()
    drawn: list[Any] = []
    if train and resize.train == "flip":
        drawn = [flip]
    elif train and resize.train == "detr":
        sides = [round(side * scale) for side in range(480, 801, 32)]
        any_scale = fixed if resize.stretch else ShorterSide(sides, resize.long)
        before_crop = ShorterSide([round(side * scale) for side in (400, 500, 600)])
        crop = RandomCropOfAnySize(round(384 * scale), round(600 * scale))
        fixed, drawn = v2.Identity(), [flip, v2.RandomChoice([any_scale, v2.Compose([before_crop, crop, clamped, any_scale])])]
    elif train and resize.train == "jitter":
        # 0 after normalisation, as the padding of a batch is, as far as a pixel can be.
        fill = {tv_tensors.Image: [min(max(round(255 * mean), 0), 255) for mean in resize.mean], "others": 0}
        affine = v2.RandomAffine(0, translate=(0.05, 0.05), scale=(0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR, fill=fill)
        drawn = [affine, v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3)]
    return ImageTransform(fixed, v2.Compose([*drawn, clamped, visible]), resize.mean, resize.std)


def renormalised(
    pixels: Float[Tensor, "B 3 H W"], padding: Bool[Tensor, "B H W"], made: Resize, wanted: Resize
) -> Float[Tensor, "B 3 H W"]:
    """A batch normalised with mean and deviation of `made`, as those of `wanted` make it; padding stays 0."""
    if (made.mean, made.std) == (wanted.mean, wanted.std):
        return pixels
    mean, std, its_mean, its_std = (pixels.new_tensor(x)[:, None, None] for x in (made.mean, made.std, wanted.mean, wanted.std))
    return ((pixels * std + mean - its_mean) / its_std).masked_fill(padding[:, None], 0)


def shorter_side(height: int, width: int, short: int, long: int | None) -> tuple[int, int]:
    """DETR's rule: the shorter side becomes `short`, or less so that the longer does not exceed `long`. Returns height, width.

    torchvision's own rule (RandomShortestSize) rounds otherwise, which moves boxes by a pixel against the published evaluations.
    """
    low, high = min(height, width), max(height, width)
    if long is not None and high / low * short > long:
        short = max(1, round(long * low / high))
    if low == short:
        return height, width
    return (int(short * height / width), short) if width < height else (short, int(short * width / height))


# What follows takes image and target. As v2.Transforms these would look through both at each step to find what they must change.


def clamped(image: Any, target: Target) -> tuple[Any, Target]:
    """Boxes end where the image does."""
    return image, target | {"boxes": F.clamp_bounding_boxes(target["boxes"])}


def visible(image: Any, target: Target) -> tuple[Any, Target]:
    """Clamped boxes that have a pixel left, and their labels."""
    boxes, kept = F.sanitize_bounding_boxes(target["boxes"])
    return image, {"boxes": boxes, "labels": target["labels"][kept]}


def resized(image: Any, target: Target, size: tuple[int, int]) -> tuple[Any, Target]:
    """To `size` (height, width)."""
    return F.resize(image, list(size), antialias=True), target | {"boxes": F.resize(target["boxes"], list(size))}


class ShorterSide:
    """Resize by `shorter_side`, to one of `sides` at random."""

    def __init__(self, sides: list[int], long: int | None = None) -> None:
        self.sides, self.long = [max(1, side) for side in sides], long

    def __call__(self, image: Any, target: Target) -> tuple[Any, Target]:
        pick = int(torch.randint(len(self.sides), ())) if len(self.sides) > 1 else 0
        return resized(image, target, shorter_side(*F.get_size(image), self.sides[pick], self.long))


class Stretch:
    """Resize to `size` (height, width) whatever the shape, as the detectors do that take square images alone."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, image: Any, target: Target) -> tuple[Any, Target]:
        return resized(image, target, self.size)


class RandomCropOfAnySize:
    """DETR's RandomSizeCrop: height and width drawn apart from `least` to `most` pixels, never more than the image has."""

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = max(1, least), max(1, most)

    def __call__(self, image: Any, target: Target) -> tuple[Any, Target]:
        sides = F.get_size(image)
        lengths = [self._draw(min(self.least, side), min(self.most, side)) for side in sides]
        box = [*(self._draw(0, side - length) for side, length in zip(sides, lengths, strict=True)), *lengths]
        return F.crop(image, *box), target | {"boxes": F.crop(target["boxes"], *box)}

    @staticmethod
    def _draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, ()))
