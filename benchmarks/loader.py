"""Images a second and core: our loader against torchvision's detection reference: `python -m benchmarks.loader`.

Both read the same JPEG files of COCO's sizes, drawn here, and make padded batches of them, augmented as in the DETR papers with the same
random numbers. The reference is what torchvision's `references/detection` has: `CocoDetection`, wrapped for v2 transforms; stock v2
transforms; mean, deviation and padding of its models. Only the crop is ours: torchvision has none whose sides are drawn apart. It
rounds sizes in another way, so images differ by a pixel. Its backend "pil", the default, resizes Pillow's images, "tensor" does so with
tensors, as we do.

Times are what the process had a core for, which other work on the machine changes little: of a batch of ours, then of the same batch of
each backend, and again.
"""

import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import process_time

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import v2

from benchmarks.measure import Table, make_parser, spread, table_path
from detrdistill.data.coco import CocoDataset, Key, seeded
from detrdistill.data.transforms import RandomCropOfAnySize, build_transform
from detrdistill.recipes.parts import Resize
from detrdistill.runs.provenance import commit

SCALES = {"full": (8, 36), "quick": (8, 9), "small": (2, 2)}  # images a batch, batches
SIZES = ((640, 480), (640, 427), (480, 640), (500, 375), (640, 640), (427, 640))  # width, height
OBJECTS, CLASSES = 7, 80  # an image's and all, as in COCO
BACKENDS = ("pil", "tensor")
COLUMNS = ("backend", "images a second", "reference's", "ratio", "low", "high", "aim")
Load = Callable[[Sequence[tuple[int, int]]], object]


def write_photographs(folder: Path, count: int, sizes: Sequence[tuple[int, int]] = SIZES) -> None:
    """A COCO folder of JPEG files of these sizes (width, height) in turn, whose two splits are the same."""
    rng, images, annotations = np.random.default_rng(0), [], []
    (folder / "images").mkdir()
    for i in range(count):
        width, height = sizes[i % len(sizes)]
        photograph(rng, width, height).save(folder / "images" / f"{i}.jpg", quality=88)
        images.append({"id": i, "file_name": f"{i}.jpg", "width": width, "height": height})
        for _ in range(OBJECTS):
            w, h = rng.uniform(0.02, 0.6, 2) * (width, height)
            box = [*(rng.uniform(0, 1, 2) * (width - w, height - h)).tolist(), float(w), float(h)]
            about = {"image_id": i, "category_id": int(rng.integers(CLASSES)), "area": box[2] * box[3], "iscrowd": 0}
            annotations.append({"id": len(annotations), "bbox": box, **about})
    categories = [{"id": i, "name": f"class {i}"} for i in range(CLASSES)]
    for split in ("train", "val"):
        content = json.dumps({"images": images, "annotations": annotations, "categories": categories})
        (folder / f"instances_{split}.json").write_text(content, encoding="utf-8")


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Shapes of four sizes and a sensor's noise: about as many bytes as a photograph has."""
    pixels = rng.normal(128, 4, (height, width, 3))
    for cells in (4, 16, 64, 256):
        coarse = rng.normal(128, 256 / cells**0.4, (cells * height // 640 + 1, cells * width // 640 + 1, 3)).clip(0, 255).astype(np.uint8)
        pixels += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)) - 128.0
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def reference(folder: Path, backend: str, resize: Resize) -> Load:
    """torchvision's, with one of its backends."""
    any_scale = v2.RandomShortestSize(list(range(480, 801, 32)), resize.long)
    cropped = v2.Compose([v2.RandomShortestSize([400, 500, 600]), RandomCropOfAnySize(384, 600), v2.ClampBoundingBoxes(), any_scale])
    augmented = [v2.RandomHorizontalFlip(), v2.RandomChoice([any_scale, cropped])]
    boxes = [v2.ConvertBoundingBoxFormat("XYXY"), v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()]
    pixels = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(resize.mean, resize.std), v2.ToPureTensor()]
    first = [v2.ToImage(), *augmented] if backend == "tensor" else [*augmented, v2.ToImage()]
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = CocoDetection(folder / "images", folder / "instances_train.json", transforms=v2.Compose([*first, *boxes, *pixels]))
    dataset = wrap_dataset_for_transforms_v2(dataset, target_keys=("boxes", "labels", "image_id"))
    model = GeneralizedRCNNTransform(resize.short, resize.long, list(resize.mean), list(resize.std))

    def load(keys: Sequence[tuple[int, int]]) -> tuple[Tensor, list[dict]]:
        samples = []
        for index, seed in keys:
            with seeded(seed, index):
                samples.append(dataset[index])
        images, targets = zip(*samples, strict=True)
        return model.batch_images(list(images), size_divisible=1), list(targets)

    return load


def ours(folder: Path, resize: Resize) -> Load:
    dataset = CocoDataset(folder / "instances_train.json", folder / "images", build_transform(resize, train=True))

    def load(keys: Sequence[Key]) -> object:
        dataset.kept.clear()  # of a set of COCO's size nothing is kept
        return dataset.batch(keys)

    return load


def seconds(load: Load, keys: Sequence[tuple[int, int]]) -> float:
    start = process_time()
    load(keys)
    return process_time() - start


def main(words: Sequence[str] | None = None) -> None:
    arguments = make_parser(__doc__).parse_args(words)
    torch.set_num_threads(1)
    size, count = SCALES[arguments.scale]
    resize, images = Resize(train="detr", short=800, long=1333), 3 * size
    table = Table(table_path(arguments, "loader.csv"), COLUMNS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photographs(folder, images)
        kilobytes = [path.stat().st_size / 1000 for path in folder.glob("images/*.jpg")]
        versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
        files = f"JPEG files of {min(kilobytes):.0f} to {max(kilobytes):.0f} kB"
        table.start(f"commit {commit()}; {versions}; one CPU thread; {files}; medians of {count} batches of {size}")
        loads = {"ours": ours(folder, resize), **{backend: reference(folder, backend, resize) for backend in BACKENDS}}
        batches = [[((size * number + i) % images, number) for i in range(size)] for number in range(count)]
        for load in loads.values():
            load(batches[0])
        times = [{who: seconds(load, keys) / size for who, load in loads.items()} for keys in batches]
    for backend in BACKENDS:
        own, theirs = (1 / spread([one[who] for one in times])["value"] for who in ("ours", backend))
        ratios = spread([one[backend] / one["ours"] for one in times], "ratio")
        table.add({"backend": backend, "images a second": own, "reference's": theirs, **ratios, "aim": ">= 1.5"})


if __name__ == "__main__":
    main()
