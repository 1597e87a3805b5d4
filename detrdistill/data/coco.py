"""COCO-style data: one dataset class for the embedded digits, COCO itself and a user's folder, and how samples become a batch."""

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection, VisionDataset
from torchvision.transforms import v2

from detrdistill.data.images import read_image
from detrdistill.data.layout import data_hash, layout
from detrdistill.data.layouts import Split
from detrdistill.data.transforms import ImageTransform
from detrdistill.data.validation import load_annotations
from detrdistill.errors import InputError
from detrdistill.models.outputs import Targets
from detrdistill.recipes.parts import Digits, Folder

Sample = tuple[Float[Tensor, "3 H W"], dict[str, Any]]
Drawn = tuple[UInt8[Tensor, "3 H W"], dict[str, Any]]
Key = int | tuple[int, int]
Prepared = tuple[tv_tensors.Image, dict[str, Tensor]]
KEPT = 2**28  # bytes of decoded images that a process keeps of a split; of larger splits none


@dataclass(frozen=True)
class Category:
    """A class: its index in logits and labels, its id in the annotations, its name."""

    index: int
    id: int
    name: str


class CocoDataset(CocoDetection):
    """Images and targets of one annotation file, validated when it is opened.

    Attributes:
        coco: the cleaned annotations as pycocotools has them, crowds included: what evaluation compares with.
        categories: the classes in order of their ids; gaps between ids do not matter.
        ids: image ids in order; `dataset[i]` is image `ids[i]`.
        report: what validation found and did.
        kept: images and targets by index after `transform.fixed`, if they all take at most `KEPT` bytes.

    Args:
        transform: None for a dataset whose samples nobody asks for.

    Raises:
        InputError: the annotations are refused.
    """

    def __init__(self, annotations: Path, images: Path, transform: ImageTransform | None) -> None:
        cleaned, self.report = load_annotations(annotations, images)
        # Not CocoDetection's own init: it reads the file once more, unvalidated.
        VisionDataset.__init__(self, images, transforms=transform)
        self.coco = COCO()
        self.coco.dataset = cleaned
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco.createIndex()
        self.ids = sorted(self.coco.imgs)
        self.categories = [Category(i, c["id"], c["name"]) for i, c in enumerate(sorted(cleaned["categories"], key=lambda c: c["id"]))]
        self.index_of = {category.id: category.index for category in self.categories}
        self.kept: dict[int, Prepared] = {}

    def __getitem__(self, index: int) -> Sample:
        return self.sample(index, 0)

    def sample(self, index: int, seed: int) -> Sample:
        """Image and target, transformed with random numbers that depend on `index` and `seed` alone.

        So neither workers, nor resuming, nor the number of processes change what is seen.

        Returns:
            image: normalised, [3 H W].
            target: labels [n] (class indices), boxes [n 4] (cxcywh, relative), image_id and original_size (height, width).
                Crowds are not among them.

        Raises:
            InputError: the image cannot be decoded or is not of the size that the annotations say.
        """
        image, target = self._drawn(index, seed)
        return self.transforms.normalise(torch.empty(image.shape, dtype=torch.float32), image), target

    def batch(self, keys: Iterable[Key]) -> "Batch":
        """What `collate` makes of samples, but each is normalised in its place in the batch.

        Args:
            keys: an index, or a pair of index and seed as in training, of each.

        Raises:
            InputError: as `sample`.
        """
        return _assemble([self._drawn(*_pair(key)) for key in keys], self.transforms.normalise)

    def _drawn(self, index: int, seed: int) -> Drawn:
        """A sample before it is normalised."""
        image, target = self.kept.get(index) or self._prepare(index)
        image_id = self.ids[index]
        size = self.coco.imgs[image_id]["height"], self.coco.imgs[image_id]["width"]
        with seeded(seed, index):
            image, target = self.transforms.drawn(image, target)
        height, width = image.shape[-2:]
        boxes = v2.functional.convert_bounding_box_format(target["boxes"], new_format="CXCYWH").as_subclass(Tensor)
        boxes = boxes / torch.tensor([width, height, width, height])
        where = {"image_id": image_id, "original_size": size}
        return image.as_subclass(Tensor), {"labels": target["labels"], "boxes": boxes, **where}

    def _prepare(self, index: int) -> Prepared:
        """Decode an image and do to it what is the same each time; kept while all of them take little memory."""
        image_id = self.ids[index]
        image = v2.functional.pil_to_tensor(self.load_image(image_id))
        objects = [a for a in self._load_target(image_id) if not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32).reshape(-1, 4)
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYWH", canvas_size=tuple(image.shape[-2:]))
        target = {
            "boxes": v2.functional.convert_bounding_box_format(boxes, new_format="XYXY"),
            "labels": torch.tensor([self.index_of[a["category_id"]] for a in objects], dtype=torch.long),
        }
        prepared = self.transforms.fixed(tv_tensors.Image(image), target)
        if prepared[0].nbytes * len(self.ids) <= KEPT:
            self.kept[index] = prepared
        return prepared

    def load_image(self, id: int) -> Image.Image:
        """The image in RGB, as its annotations see it.

        COCO's sizes and boxes are those of the stored pixels, so a rotation noted in EXIF is applied only where the annotations'
        size is that of the rotated image and not of the stored one.

        Raises:
            InputError: the image cannot be decoded or is not of the size that the annotations say.
        """
        entry = self.coco.imgs[id]
        try:
            return read_image(Path(self.root) / entry["file_name"], entry["width"], entry["height"])
        except InputError as fault:
            raise InputError(f"image {id}: {fault}") from None


def _pair(key: Key) -> tuple[int, int]:
    return key if isinstance(key, tuple) else (key, 0)


@contextlib.contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """torch's random numbers depend on `numbers` alone, and go on as before when the block ends."""
    with torch.random.fork_rng(devices=[]):
        # The default generator, not torch.manual_seed, which would seed the GPU as well and not give its state back.
        torch.default_generator.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))
        yield


def open_dataset(spec: Digits | Folder, split: Split, cache: Path, transform: ImageTransform | None) -> CocoDataset:
    """One split of a recipe's data; the embedded digits are written under `cache` if they are not there.

    Raises:
        InputError: the folder is missing or not laid out as expected, its hash is another than the recipe's, or its content is refused.
    """
    if isinstance(spec, Folder) and spec.sha256:
        data_hash(spec, cache)
    return CocoDataset(*layout(spec, split, cache), transform)


def require_same_categories(train: CocoDataset, val: CocoDataset) -> None:
    """A class index must mean the same in training and in evaluation.

    Raises:
        InputError: the two files list different categories.
    """
    if train.categories != val.categories:
        one, other = ({(c.id, c.name) for c in dataset.categories} for dataset in (train, val))
        odd = ", ".join(f"{id} {name!r}" for id, name in sorted(one ^ other)[:5])
        raise InputError(f"{val.report.file}: categories differ from those of {train.report.file} ({odd}); list the same in both")


@dataclass(frozen=True)
class Batch:
    """Images padded at the bottom and on the right to the largest of the batch.

    Attributes:
        padding: True on padding.
        original_sizes: (height, width) of each image in its file, which the annotations' boxes refer to.
    """

    pixels: Float[Tensor, "B 3 H W"]
    padding: Bool[Tensor, "B H W"]
    targets: Targets
    image_ids: list[int]
    original_sizes: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.image_ids)

    def to(self, device: torch.device | str) -> Self:
        """The same on another device, copied without waiting."""
        pixels, padding = (tensor.to(device, non_blocking=True) for tensor in (self.pixels, self.padding))
        return replace(self, pixels=pixels, padding=padding, targets=self.targets.to(device))

    def pin_memory(self) -> Self:
        """For DataLoader(pin_memory=True); the targets are too small to matter."""
        return replace(self, pixels=self.pixels.pin_memory(), padding=self.padding.pin_memory())


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples of a `CocoDataset` as one batch."""
    return _assemble(samples, Tensor.copy_)


def _assemble(samples: Sequence[Sample | Drawn], write: Callable[[Tensor, Tensor], object]) -> Batch:
    """A batch into which `write` puts each image, in its place."""
    images, targets = zip(*samples, strict=True)
    height, width = (max(image.shape[side] for image in images) for side in (-2, -1))
    # numpy's zeros come from the system when they are touched, in huge pages where it has them. torch would write them once more.
    pixels = torch.from_numpy(np.zeros((len(images), 3, height, width), np.float32))
    padding = torch.ones(len(images), height, width, dtype=torch.bool)
    for i, image in enumerate(images):
        h, w = image.shape[-2:]
        write(pixels[i, :, :h, :w], image)
        padding[i, :h, :w] = False
    ids, original_sizes = ([target[key] for target in targets] for key in ("image_id", "original_size"))
    packed = Targets.pack([target["labels"] for target in targets], [target["boxes"] for target in targets])
    return Batch(pixels, padding, packed, ids, original_sizes)
