#!/usr/bin/env python3
"""Detect objects in images with the exported detector beside this file. Needs onnxruntime, numpy and Pillow, nothing else.

    python predict.py photo.jpg folder/ --threshold 0.5 --out found.json --draw drawn/

Everything about the detector (classes, size of images, statistics of pixels) is read from the metadata of the .onnx file. The result is
a JSON list with an entry an image: `file`, `width`, `height`, and `detections`, each with `class`, `category_id`, `score` and `bbox` (x, y,
width, height in pixels of the image as it is seen, that is, turned as EXIF says). Images that cannot be read are named and passed over.

The same pixels reach the detector as in the kit that trained it: images are resized as torch resizes them, to the last bit. (Pillow's
own bilinear filter differs by one grey level of 255 in some pixels, since torch keeps its weights in 16 bits.)
"""

import argparse
import json
import os
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps

SUFFIXES = (".bmp", ".gif", ".jpg", ".jpeg", ".jp2", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class Detector:
    """An exported detector, and what its file says of it.

    Attributes:
        classes: of each output, `id` in the annotations and `name`.
        rule: how images are resized: "short" and "long", or "height" and "width".
        top: detections that are kept of an image.

    Raises:
        ValueError: not a file that detrdistill exported.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            about = self.session.get_modelmeta().custom_metadata_map
            self.classes, self.rule, self.mean, self.std = (json.loads(about[key]) for key in ("classes", "resize", "mean", "std"))
            self.top = int(about["top"])
        except Exception as error:  # onnxruntime's own have no common name
            raise ValueError(f"model {path}: not a detector that detrdistill exported ({' '.join(str(error).split())[:160]})") from None
        self.inputs = [one.name for one in self.session.get_inputs()]

    def __call__(self, image: Image.Image) -> Sequence[np.ndarray]:
        """The best detections of an RGB image: scores [K], labels [K], boxes [K 4] (xyxy in its pixels), best first."""
        original = np.array([[image.height, image.width]])
        pixels = prepare(np.asarray(image), self.rule, self.mean, self.std)
        given = {"pixels": pixels[None], "sizes": np.array([pixels.shape[1:]]), "original_sizes": original}
        found = [one[0] for one in self.session.run(None, {name: given[name] for name in self.inputs})]
        return found if len(found) == 3 else best_pairs(*found, original[0], self.top)


def prepare(pixels: np.ndarray, rule: dict[str, int], mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Bytes [H W 3] resized by the rule and normalised, as floats [3 H W]."""
    size = (rule["height"], rule["width"]) if "height" in rule else shorter_side(*pixels.shape[:2], rule["short"], rule["long"])
    resized = resample(resample(pixels, size[1], axis=1), size[0], axis=0)
    scaled = resized.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (mean, std))
    return np.ascontiguousarray((scaled - mean) / std)


def shorter_side(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """DETR's rule: the shorter side becomes `short`, or less so that the longer does not exceed `long`. Returns height, width."""
    low, high = min(height, width), max(height, width)
    if high / low * short > long:
        short = max(1, round(long * low / high))
    if low == short:
        return height, width
    return (int(short * height / width), short) if width < height else (short, int(short * width / height))


def resample(pixels: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Bytes resized along an axis by torch's antialiased linear filter, whose weights are whole numbers of at most 16 bits."""
    length = pixels.shape[axis]
    if size == length:
        return pixels
    scale = length / size
    reach = max(scale, 1.0)  # pixels that a result reaches on either side
    centres = scale * (np.arange(size) + 0.5)
    first = np.maximum((centres - reach + 0.5).astype(int), 0)
    count = np.minimum((centres + reach + 0.5).astype(int), length) - first
    taps = np.arange(count.max())
    places = first[:, None] + taps
    weights = np.maximum(1 - np.abs((places - centres[:, None] + 0.5) * (1 / reach)), 0) * (taps < count[:, None])
    weights /= weights.sum(1, keepdims=True)
    bits = 0
    while bits < 22 and int(0.5 + weights.max() * 2 ** (bits + 1)) < 2**15:
        bits += 1
    whole = (0.5 + weights * 2**bits).astype(np.int32)
    lines = np.moveaxis(pixels, axis, 0)
    total = np.full((size, *lines.shape[1:]), 2 ** (bits - 1), np.int32)
    for tap in taps:
        total += whole[:, tap, None, None] * lines[np.minimum(places[:, tap], length - 1)]
    return np.moveaxis((total >> bits).clip(0, 255).astype(np.uint8), 0, axis)


def best_pairs(logits: np.ndarray, boxes: np.ndarray, original_size: Sequence[int], top: int) -> Sequence[np.ndarray]:
    """The `top` best pairs of query and class, as the detector's evaluation takes them."""
    scores = 1 / (1 + np.exp(-logits.astype(np.float64))).ravel()
    best = np.argsort(-scores, kind="stable")[:top]
    query, label = np.divmod(best, logits.shape[-1])
    height, width = original_size
    centre, size = np.split(boxes[query] * np.tile([width, height], 2), 2, axis=1)
    return scores[best], label, np.concatenate((centre - size / 2, centre + size / 2), axis=1)


def read_image(path: Path) -> Image.Image:
    """The image in RGB, turned as EXIF says; 16-bit grey is scaled down."""
    with Image.open(path, formats=FORMATS) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode == "F":
            raise ValueError("pixels of floating point, whose range is not known")
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        return image.convert("RGB")


def image_files(paths: Sequence[str]) -> Iterator[Path]:
    """The files among `paths`, and the images of the folders among them."""
    for path in map(Path, paths):
        if path.is_dir():
            yield from sorted(one for one in path.rglob("*") if one.suffix.lower() in SUFFIXES)
        else:
            yield path


def entry(
    path: Path, image: Image.Image, found: Sequence[np.ndarray], classes: Sequence[dict[str, Any]], threshold: float
) -> dict[str, Any]:
    """What is told of an image."""
    detections = []
    for score, label, (left, top, right, bottom) in zip(*found, strict=True):
        if score >= threshold:
            one = classes[int(label)]
            box = [round(float(value), 2) for value in (left, top, right - left, bottom - top)]
            detections.append({"class": one["name"], "category_id": one["id"], "score": round(float(score), 6), "bbox": box})
    return {"file": str(path), "width": image.width, "height": image.height, "detections": detections}


def draw(image: Image.Image, told: dict[str, Any], path: Path) -> None:
    """Write the image with its boxes."""
    pen = ImageDraw.Draw(image)
    thick = max(1, min(image.size) // 200)
    for one in told["detections"]:
        x, y, width, height = one["bbox"]
        pen.rectangle((x, y, x + max(width, 0), y + max(height, 0)), outline="red", width=thick)
        pen.text((x + thick + 1, y + thick), f"{one['class']} {one['score']:.2f}", fill="red")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def write(path: Path, text: str) -> None:
    """The whole file or nothing."""
    part = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", help="image files, or folders of them")
    parser.add_argument("--model", type=Path, default=Path(__file__).with_name("model.onnx"), help="by default model.onnx beside this file")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score that is told, 0 to 1")
    parser.add_argument("--out", type=Path, help="JSON file; without, it is printed")
    parser.add_argument("--draw", type=Path, help="folder for the images with their boxes")
    parser.add_argument("--threads", type=int, default=0, help="of onnxruntime; 0: as many as there are cores")
    words = parser.parse_args()
    if not 0 <= words.threshold <= 1:
        parser.exit(2, f"error: threshold {words.threshold}: a score; give 0 to 1\n")
    if not words.model.is_file():
        parser.exit(2, f"error: model {words.model}: no such file; give the exported .onnx as --model\n")
    try:
        detector = Detector(words.model, words.threads)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    told, passed_over = [], 0
    try:
        for path in image_files(words.images):
            try:
                image = read_image(path)
            except UNREADABLE as error:
                passed_over += 1
                print(f"passed over: {path} ({' '.join(str(error).split())[:160]})", file=sys.stderr)
                continue
            told.append(entry(path, image, detector(image), detector.classes, words.threshold))
            if words.draw:
                draw(image, told[-1], words.draw / f"{len(told):05d}_{path.stem}.png")
        if not told:
            parser.exit(2, f"error: no image that can be read in {', '.join(words.images)} ({passed_over} passed over)\n")
        text = json.dumps(told, indent=1) + "\n"
        if words.out:
            write(words.out, text)
        else:
            sys.stdout.write(text)
    except OSError as error:
        parser.exit(2, f"error: {error.filename} cannot be written or read ({error.strerror}); choose another folder\n")


if __name__ == "__main__":
    main()
