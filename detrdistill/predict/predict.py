"""Images in, pictures with boxes, COCO results and a table out."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from detrdistill.errors import InputError
from detrdistill.files import atomic, write_text
from detrdistill.predict.images import check_options, colours_of, draw, drawn_name, find_images, read_upright, require_writable
from detrdistill.predict.models import Model, prepare

HEADER = ("file", "class", "score", "x", "y", "w", "h")


@dataclass
class Predictions:
    """What was found.

    Attributes:
        images: of COCO's format: id, file_name, width, height.
        results: of COCO's result format, and the file's name.
        lines: of the table: file, class, score, x, y, w, h in pixels of the upright image.
        passed_over: why, of each image that could not be read.
    """

    images: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    lines: list[tuple[str, str, float, float, float, float, float]] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)

    def text(self) -> str:
        """In a line."""
        seen = f"{len(self.images)} image{'s' * (len(self.images) != 1)}, {len(self.results)} detection{'s' * (len(self.results) != 1)}"
        return seen + (f"; {len(self.passed_over)} passed over" if self.passed_over else "")


def predict(
    model: Model, images: str, out: Path, *, threshold: float = 0.5, batch: int = 1, drawn: bool = True, progress: bool = True
) -> Predictions:
    """Detect on images; write `images/` (drawn), `results.json`, `images.json` and `detections.csv` into `out`.

    `results.json` is a list in COCO's result format, whose entries name their file too. `images.json` lists images and categories, as an
    annotation file does: by it ids are matched with files. Both are written when all images are done. Boxes go into what the detector
    sees: they are not clipped.

    Args:
        images: a folder, a pattern or a file.
        threshold: the least score.
        batch: images at once; padding changes the numbers of some detectors a little.

    Raises:
        InputError: an option is out of range, images as they are prepared have shapes that the detector does not take, `out` cannot be
            written to, there are no images, or none can be read.
        NonFiniteError: a prediction is NaN or infinite.
    """
    check_options(threshold, batch)
    model.check_sides()
    root, paths = find_images(images, out)
    require_writable(out)
    found = Predictions()
    with tqdm(total=len(paths), desc="images", unit="image", disable=None if progress else True, mininterval=0.5) as bar:
        for some in _batches(paths, batch, found, bar):
            ids = range(len(found.images) + 1, len(found.images) + len(some) + 1)
            seen = model.detect(prepare([image for _, image in some], ids, model.transform))
            for id, (path, image), one in zip(ids, some, seen, strict=True):
                _keep(found, model, id, path.relative_to(root), image, one, threshold, out if drawn else None)
    if not found.images:
        more = f"; {len(paths)} images alike" if len(paths) > 1 else ""
        raise InputError(f"images {images}: none can be read: {found.passed_over[0]}{more}")
    categories = [{"id": id, "name": name} for id, name in zip(model.ids, model.names, strict=True) if name is not None]
    write_text(out / "images.json", json.dumps({"images": found.images, "categories": sorted(categories, key=lambda one: one["id"])}))
    write_text(out / "detections.csv", _csv(found.lines))
    write_text(out / "results.json", json.dumps(found.results))
    return found


def _batches(paths: Sequence[Path], size: int, found: Predictions, bar: tqdm) -> Iterator[list[tuple[Path, Image.Image]]]:
    """Images that can be read, some at once; others are named and passed over."""
    some: list[tuple[Path, Image.Image]] = []
    for path in paths:
        try:
            some.append((path, read_upright(path)))
        except InputError as reason:
            found.passed_over.append(str(reason))
        if len(some) == size:
            yield some
            bar.update(len(some))
            some = []
    if some:
        yield some
    bar.update(len(paths) - bar.n)


def _keep(
    found: Predictions, model: Model, id: int, name: Path, image: Image.Image, seen: dict[str, Tensor], threshold: float, out: Path | None
) -> None:
    text, sure = name.as_posix(), int((seen["scores"] >= threshold).sum())  # best first
    scores, labels, boxes = (seen[key][:sure].tolist() for key in ("scores", "labels", "boxes"))
    found.images.append({"id": id, "file_name": text, "width": image.width, "height": image.height})
    for score, label, (x0, y0, x1, y1) in zip(scores, labels, boxes, strict=True):
        box = [x0, y0, x1 - x0, y1 - y0]
        found.results.append({"image_id": id, "category_id": model.ids[label], "bbox": box, "score": score, "file_name": text})
        found.lines.append((text, str(model.names[label]), score, *box))
    if out is not None:
        words = [f"{model.names[label]} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
        with atomic(out / "images" / drawn_name(name)) as temporary:
            picture = draw(image, boxes, words, colours_of(labels))
            picture.save(temporary, format="PNG" if drawn_name(name).suffix.lower() == ".png" else "JPEG", quality=92)


def _csv(lines: Sequence[tuple]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows([file, name, f"{score:.4f}", *(f"{side:.1f}" for side in box)] for file, name, score, *box in lines)
    return buffer.getvalue()
