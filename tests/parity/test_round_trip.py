"""Folders for transformers: the same detections there, and the same bits when they come back."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from skimage import data
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from transformers import AutoImageProcessor, AutoModelForObjectDetection, DeformableDetrImageProcessor

from detrdistill.checkpoints.hugging_face import export_hugging_face
from detrdistill.checkpoints.preparation import resize_of
from detrdistill.checkpoints.pretrained import load_pretrained
from detrdistill.data.transforms import build_transform, shorter_side
from detrdistill.errors import InputError
from detrdistill.models import build_detector
from detrdistill.recipes.parts import BackboneRecipe, Resize, Schedule
from detrdistill.recipes.recipe import Recipe
from detrdistill.training.evaluation import detections
from tests.models.small import randomise, small_detector

NAMES = ["astronaut", "cat", "cup of coffee", "chelsea"]
RESIZE = Resize(short=128, long=200)
KINDS = {
    "conditional": {"detector": "conditional_detr"},
    "plain": {"levels": 4},
    "refine": {"form": "box_refine", "levels": 3, "points": 2},
    "two-stage": {"form": "two_stage", "levels": 2},
    "single-level": {"levels": 1},
    "trained-norm": {"levels": 1, "backbone": BackboneRecipe(name="resnet18", weights="none")},
}


def detector_of(kind: str, **changes) -> nn.Module:
    sizes = {"dim": 64, "heads": 4, "ffn": 48, "encoder_layers": 1, "decoder_layers": 3, "queries": 30}
    recipe = {"backbone": BackboneRecipe(name="resnet18", weights="imagenet"), "schedule": Schedule(steps=1)}
    recipe |= sizes | KINDS[kind] | changes
    detector = build_detector(Recipe(**recipe), len(NAMES))
    randomise(detector)
    return detector.eval()


def assert_same_detections(detector: nn.Module, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two photographs of different shapes, by either side's own way from the picture to boxes in pixels."""
    pictures = [Image.fromarray(data.astronaut()[:400]), Image.fromarray(data.chelsea())]
    sizes = [(picture.height, picture.width) for picture in pictures]
    processor, model = AutoImageProcessor.from_pretrained(folder), AutoModelForObjectDetection.from_pretrained(folder).eval()
    assert "MISSING" not in caplog.text and "UNEXPECTED" not in caplog.text
    assert model.config.id2label == dict(enumerate(NAMES))
    inputs = processor(images=pictures, return_tensors="pt")
    with torch.no_grad():
        theirs = processor.post_process_object_detection(model(**inputs), threshold=0.0, target_sizes=sizes)

    transform = build_transform(RESIZE, train=False)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    images = []
    for picture, size in zip(pictures, sizes, strict=True):
        boxes = tv_tensors.BoundingBoxes(nothing["boxes"], format="XYXY", canvas_size=size)
        image, _ = transform(tv_tensors.Image(v2.functional.pil_to_tensor(picture)), nothing | {"boxes": boxes})
        images.append(image.as_subclass(torch.Tensor))
    height, width = (max(image.shape[side] for image in images) for side in (-2, -1))
    pixels, padding = torch.zeros(2, 3, height, width), torch.ones(2, height, width, dtype=torch.bool)
    for i, image in enumerate(images):
        pixels[i, :, : image.shape[1], : image.shape[2]], padding[i, : image.shape[1], : image.shape[2]] = image, False
    assert padding.any()
    torch.testing.assert_close(inputs["pixel_values"], pixels, atol=1e-5, rtol=0)
    assert torch.equal(inputs["pixel_mask"].bool(), ~padding)
    with torch.no_grad():
        (output,) = detector.decode(detector.encode(pixels, padding))
    for size, ours, found in zip(sizes, detections(output.logits[-1], output.boxes[-1], sizes), theirs, strict=True):
        torch.testing.assert_close(ours["scores"], found["scores"], atol=1e-4, rtol=0)
        # Relative to the image, as the networks give them.
        torch.testing.assert_close(ours["boxes"] / max(size), found["boxes"] / max(size), atol=1e-4, rtol=0)
        assert torch.equal(ours["labels"], found["labels"])


@pytest.mark.parametrize("kind", KINDS)
def test_same_detections_and_the_same_bits_back(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    detector = detector_of(kind)
    export_hugging_face(detector, tmp_path, NAMES, RESIZE)
    assert_same_detections(detector, tmp_path, caplog)

    again, about = load_pretrained(tmp_path)
    assert about.names == tuple(NAMES) and about.origin == "Hugging Face"
    # Only trained BatchNorm counts batches; what comes back is frozen.
    sent = {name: value for name, value in detector.state_dict().items() if not name.endswith("num_batches_tracked")}
    back = again.state_dict()
    assert sent.keys() == back.keys()
    assert all(torch.equal(value, back[name]) for name, value in sent.items())


def test_stride_in_1x1_is_known_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    msra = BackboneRecipe(name="resnet50", weights=tmp_path / "msra.pth", stride_in_1x1=True)
    detector = detector_of("single-level", backbone=msra, encoder_layers=0, decoder_layers=1)
    export_hugging_face(detector, tmp_path, NAMES, RESIZE)
    assert_same_detections(detector, tmp_path, caplog)
    again, about = load_pretrained(tmp_path)
    assert about.settings["backbone"]["stride_in_1x1"] and again.backbone.body["layer2"][0].conv1.stride == (2, 2)


@pytest.mark.parametrize("width, height", [(500, 375), (640, 480), (333, 500), (1000, 1000), (640, 128), (97, 500), (500, 331)])
def test_sizes_are_ours_but_for_a_rounding_at_the_limit(width: int, height: int, tmp_path: Path) -> None:
    export_hugging_face(detector_of("conditional", encoder_layers=0, decoder_layers=1), tmp_path, NAMES)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    theirs = processor(images=Image.new("RGB", (width, height)), return_tensors="pt")["pixel_values"].shape[-2:]
    ours = shorter_side(height, width, 800, 1333)
    ratio = max(width, height) / min(width, height)
    # At the limit transformers rounds the shorter side once, the official codes and we twice.
    assert max(abs(a - b) for a, b in zip(theirs, ours, strict=True)) <= (ratio / 2 + 1 if ratio * 800 > 1333 else 0), (theirs, ours)


@pytest.mark.parametrize(
    "build, why",
    [
        (lambda: small_detector("deformable"), r"cannot have a thin_resnet .*7x7"),
        (lambda: small_detector("adamixer"), "transformers has no AdaMixer"),
        (lambda: detector_of("plain", backbone=BackboneRecipe(name="mobilenet_v2")), "cannot have a mobilenet_v2"),
        (lambda: detector_of("conditional", temperature=20), "has the temperature 10000, not 20"),
        (lambda: detector_of("single-level", backbone=BackboneRecipe(name="resnet18", dilation=True)), "cannot be dilated"),
    ],
    ids=["thin", "adamixer", "mobilenet", "temperature", "dilated"],
)
def test_what_transformers_does_not_have_is_refused(build, why: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"export to .*{why}.*; share weights\.safetensors"):
        export_hugging_face(build(), tmp_path / "new", NAMES)
    assert not (tmp_path / "new").exists()


def test_each_class_needs_a_name(tmp_path: Path) -> None:
    for names in (NAMES[:3], [*NAMES[:3], NAMES[0]]):
        with pytest.raises(InputError, match="3 different names for 4 classes"):
            export_hugging_face(detector_of("conditional", encoder_layers=0, decoder_layers=1), tmp_path, names)


OWN = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.5]}


@pytest.mark.parametrize("changes", [{}, OWN, {"do_normalize": False}, OWN | {"do_rescale": False}, OWN | {"rescale_factor": 0.02}])
def test_a_processors_file_gives_its_pixels(changes: dict, tmp_path: Path) -> None:
    config = {"size": {"shortest_edge": 128, "longest_edge": 200}, "do_pad": False} | changes
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config), encoding="utf-8")
    theirs = DeformableDetrImageProcessor(**config)(images=Image.fromarray(data.chelsea()), return_tensors="pt")["pixel_values"][0]
    picture = tv_tensors.Image(torch.from_numpy(data.chelsea()).permute(2, 0, 1))
    boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=tuple(picture.shape[-2:]))
    target = {"boxes": boxes, "labels": torch.zeros(0, dtype=torch.long)}
    ours, _ = build_transform(resize_of(tmp_path), train=False)(picture, target)
    torch.testing.assert_close(ours.as_subclass(torch.Tensor), theirs, atol=1e-5, rtol=1e-5)
