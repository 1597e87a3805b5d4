"""The script beside an exported detector: the same pixels as in the kit, without it."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from detrdistill.data.images import to_rgb
from detrdistill.data.transforms import build_transform
from detrdistill.data.transforms import shorter_side as ours
from detrdistill.export.predict import best_pairs, image_files, prepare, read_image, resample, shorter_side
from detrdistill.recipes.parts import Resize
from detrdistill.training.evaluation import detections

RANDOM = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("size", [(160, 213), (96, 128), (64, 640), (481, 640), (482, 639), (7, 9), (2, 3), (900, 41)])
@pytest.mark.parametrize(
    "image", [noise(481, 640, 3), noise(37, 500, 3), np.full((60, 70, 3), 255, np.uint8)], ids=["large", "flat", "white"]
)
def test_images_are_resized_as_torch_does_to_the_last_bit(image: np.ndarray, size: tuple[int, int]) -> None:
    tensor = tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1).contiguous())
    expected = functional.resize(tensor, list(size), antialias=True).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(resample(resample(image, size[1], axis=1), size[0], axis=0), expected)


@pytest.mark.parametrize(("height", "width"), [(480, 640), (640, 480), (100, 900), (77, 77), (33, 50)])
def test_pixels_are_those_of_the_kit(height: int, width: int) -> None:
    resize, image = Resize(short=66, long=130, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)), noise(height, width, 3)
    target = {"boxes": tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(height, width)), "labels": torch.zeros(0)}
    tensor = tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1).contiguous())
    expected = build_transform(resize, train=False)(tensor, target)[0].numpy()
    found = prepare(image, {"short": resize.short, "long": resize.long}, resize.mean, resize.std)
    assert found.dtype == np.float32 and found.flags.c_contiguous
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    square = prepare(image, {"height": 48, "width": 48}, resize.mean, resize.std)
    assert square.shape == (3, 48, 48), "the rule of detectors that want a square"


def test_sides_are_those_of_the_kit() -> None:
    for height, width, short, long in RANDOM.integers(1, 1500, (3000, 4)).tolist():
        assert shorter_side(height, width, short, long) == ours(height, width, short, long)


def test_the_best_pairs_are_those_of_the_kit() -> None:
    logits, boxes = RANDOM.normal(size=(9, 4)).astype(np.float32), RANDOM.uniform(size=(9, 4)).astype(np.float32)
    (expected,) = detections(torch.tensor(logits)[None], torch.tensor(boxes)[None], [(30, 50)], top=12)
    scores, labels, corners = best_pairs(logits, boxes, (30, 50), 12)
    np.testing.assert_allclose(scores, expected["scores"], atol=1e-6)
    np.testing.assert_array_equal(labels, expected["labels"])
    np.testing.assert_allclose(corners, expected["boxes"], atol=1e-4)


def test_images_as_they_are_seen(tmp_path: Path) -> None:
    turned, deep = Image.fromarray(noise(20, 30, 3)), Image.fromarray(RANDOM.integers(0, 65536, (8, 9)).astype(np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    deep.save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png"), np.rot90(np.asarray(turned), -1))
    with Image.open(tmp_path / "deep.png") as image:
        np.testing.assert_array_equal(read_image(tmp_path / "deep.png"), to_rgb(image))
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match="floating point"):
        read_image(tmp_path / "float.tiff")
    (tmp_path / "notes.txt").write_text("no image")
    assert [path.name for path in image_files([str(tmp_path), "other.jpg"])] == ["deep.png", "float.tiff", "turned.png", "other.jpg"]


def test_the_script_is_read_whole_as_package_data() -> None:
    """An installed kit has it beside the code that copies it."""
    spec = importlib.util.find_spec("detrdistill.export.write")
    assert (Path(spec.origin).with_name("predict.py")).read_text(encoding="utf-8").startswith("#!/usr/bin/env python3\n")
