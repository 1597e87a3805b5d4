"""The embedded data set: handwritten digits on photographs, in COCO format, a pure function of its recipe.

Digits are the 8x8 images that scikit-learn ships (UCI optical digits); photographs are PNG files inside the scikit-image wheel, so
nothing is downloaded. All drawing is integer arithmetic, so the same recipe gives the same pixels on every machine. Each image is
drawn from its own generator, so a small set is the beginning of a large one with the same seed.
"""

import importlib.resources
import json
import logging
import shutil
import tempfile
from hashlib import sha256
from io import BytesIO
from itertools import count
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image

from detrdistill.errors import InputError
from detrdistill.files import file_hash, make_folder, writing
from detrdistill.recipes.parts import Digits

log = logging.getLogger(__name__)

REVISION = 1  # raise when the drawing changes: the cache folder's name depends on it
SPLITS = ("train", "val")
VAL_DIGITS = 360  # the last fifth of scikit-learn's 1797 samples; in file order, so whatever the seed, no val digit is ever trained on
MOST_OBJECTS = 8
CATEGORIES = [{"id": k + 1, "name": str(k), "supercategory": "digit"} for k in range(10)]
MOST_OVERLAP = 0.25  # of the smaller of two boxes
CONTRAST = 80  # least distance of ink and ground in luminance, of 255
LICENCES = [
    {
        "id": 1,
        "name": "Creative Commons Attribution 4.0 (UCI Optical Recognition of Handwritten Digits)",
        "url": "https://archive.ics.uci.edu/dataset/80",
    },
    {
        "id": 2,
        "name": "CC0 or public domain (photographs, see README.md)",
        "url": "https://scikit-image.org/docs/stable/api/skimage.data.html",
    },
]
# split -> photograph in the scikit-image wheel -> (start of the file's SHA-256, licence as scikit-image states it). PNG only: JPEG
# decoders differ by a grey level. rocket.jpg, retina.jpg and hubble_deep_field.jpg are left out for that, and the Middlebury
# motorcycle because no licence is stated.
PHOTOS = {
    "train": {
        "astronaut.png": ("88431cd9653c", "Eileen Collins, NASA Great Images database; public domain"),
        "coffee.png": ("cc02f8ca188b", "Rachel Michetti; CC0"),
        "ihc.png": ("f8dd1aa387dd", "stained tissue, Center for Microscopy and Molecular Imaging; no known copyright restrictions"),
        "coins.png": ("f8d773fc9cfa", "Greek coins, Brooklyn Museum; no known copyright restrictions"),
        "brick.png": ("7966caf324f6", "CC0Textures; CC0"),
        "gravel.png": ("c48615b451bf", "CC0Textures; CC0"),
    },
    "val": {
        "chelsea.png": ("596aa1e7cb87", "Stefan van der Walt; CC0"),
        "camera.png": ("b0793d2adda0", "Lav Varshney; CC0"),
        "grass.png": ("b6b6022426b3", "linolafett, DeviantArt; CC0"),
    },
}


def write_digits(spec: Digits, root: Path) -> Path:
    """The folder of the data set under `root`, written if it is not there, written again if it is damaged.

    It appears as a whole or not at all: a killed writer leaves only a hidden folder that the next one clears away, and of two
    processes the second waits for the first. Every file is checked against `SHA256SUMS` at each call.

    Raises:
        InputError: scikit-image lacks the photographs, or `root` cannot be a folder or written to.
    """
    key = sha256(json.dumps([REVISION, spec.model_dump(mode="json")], sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(root) / f"digits-{key}"
    if folder.exists() and not damage(folder, spec):
        return folder
    make_folder(root)
    with writing(folder), FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.exists():
            if not (fault := damage(folder, spec)):
                return folder
            log.warning("%s is damaged (%s); writing it again", folder, fault)
        for leftover in folder.parent.glob(f".{folder.name}.*.part"):
            shutil.rmtree(leftover, ignore_errors=True)
        # Not files.atomic a file: 4400 flushes to disk take minutes, and a power cut is found out by SHA256SUMS.
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
        try:
            _fill(temporary / "new", spec)
            if folder.exists():
                folder.rename(temporary / "damaged")
            (temporary / "new").rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def damage(folder: Path, spec: Digits) -> str:
    """What is wrong with a written data set, in a few words; empty if every file is as it was written."""
    try:
        sums = dict(reversed(line.split("  ", 1)) for line in (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines())
        if len(sums) != spec.train + spec.val + 3:
            return f"SHA256SUMS names {len(sums)} files, not {spec.train + spec.val + 3}"
        return next((f"{name} has changed" for name, digest in sums.items() if file_hash(folder / name) != digest), "")
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def _fill(folder: Path, spec: Digits) -> None:
    from sklearn.datasets import load_digits  # here: takes a second, and only the first run needs it

    digits = load_digits()
    samples = {"train": np.arange(len(digits.target) - VAL_DIGITS), "val": np.arange(len(digits.target) - VAL_DIGITS, len(digits.target))}
    glyphs = (digits.images * 255 / 16).astype(np.uint8)
    photos_of = {split: _photos(split) for split in SPLITS}
    sums, boxes = {}, {}
    for number, split in enumerate(SPLITS):
        images, annotations = [], []
        photos = photos_of[split]
        (folder / "images" / split).mkdir(parents=True)
        for i in range(getattr(spec, split)):
            rng = np.random.default_rng([spec.seed, number, i])
            name = str(rng.choice(list(photos)))
            pixels, objects = _compose(rng, photos[name], glyphs, samples[split], spec.size)
            path = f"{split}/{i:06d}.png"
            buffer = BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
            (folder / "images" / path).write_bytes(buffer.getvalue())
            sums[f"images/{path}"] = sha256(buffer.getvalue()).hexdigest()
            image = {"id": i + 1, "file_name": path, "width": spec.size, "height": spec.size, "license": 2, "photo": name}
            # The pixels' own hash, so that the hash of this file covers them whatever the PNG encoder did.
            images.append(image | {"sha256": sha256(pixels.tobytes()).hexdigest()})
            for sample, (x, y, w, h) in objects:
                annotation = {"id": len(annotations) + 1, "image_id": i + 1, "category_id": int(digits.target[sample]) + 1}
                annotations.append(annotation | {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0, "sample": sample})
        content = {
            "info": {"description": "handwritten digits on photographs", "version": str(REVISION), "contributor": "detrdistill"},
            "licenses": LICENCES,
            "categories": CATEGORIES,
            "images": images,
            "annotations": annotations,
        }
        sums[f"instances_{split}.json"] = _write(folder / f"instances_{split}.json", json.dumps(content, separators=(",", ":")))
        boxes[split] = len(annotations)
    sums["README.md"] = _write(folder / "README.md", _card(spec, boxes))
    _write(folder / "SHA256SUMS", "".join(f"{digest}  {name}\n" for name, digest in sums.items()))


def _write(path: Path, text: str) -> str:
    path.write_bytes(text.encode())
    return sha256(text.encode()).hexdigest()


def _photos(split: str) -> dict[str, Image.Image]:
    photos = {}
    for name, (digest, _) in PHOTOS[split].items():
        source = importlib.resources.files("skimage") / "data" / name
        content = source.read_bytes() if source.is_file() else b""
        if not sha256(content).hexdigest().startswith(digest):
            raise InputError(f"scikit-image: bundled photograph data/{name} is missing or another one; install scikit-image 0.26")
        photos[name] = Image.open(BytesIO(content)).convert("RGB")
    return photos


def _compose(
    rng: np.random.Generator, photo: Image.Image, glyphs: np.ndarray, samples: np.ndarray, size: int
) -> tuple[np.ndarray, list[tuple[int, tuple[int, int, int, int]]]]:
    """One image uint8 [size, size, 3] and its objects, (sample, (x, y, w, h)) each; at least one."""
    pixels = _ground(rng, photo, size)
    objects: list[tuple[int, tuple[int, int, int, int]]] = []
    wanted = rng.integers(1, MOST_OBJECTS, endpoint=True)
    for attempt in count():
        if len(objects) == wanted or attempt == 5 * MOST_OBJECTS:
            return pixels, objects
        sample = rng.choice(samples)
        height = int(rng.integers(size * 12 // 96, size * 48 // 96, endpoint=True))
        ink = _ink(glyphs[sample], height, height * int(rng.integers(90, 130)) // 100)  # up to 1.3: the 8x8 originals are narrow
        h, w = ink.shape
        x, y = rng.integers(0, size - w, endpoint=True), rng.integers(0, size - h, endpoint=True)
        box = (int(x), int(y), w, h)
        if any(_overlap(box, other) > MOST_OVERLAP for _, other in objects):
            continue
        patch = pixels[y : y + h, x : x + w].astype(np.int32)
        alpha = ink[..., None].astype(np.int32) * rng.integers(200, 255, endpoint=True) // 255
        pixels[y : y + h, x : x + w] = (patch * (255 - alpha) + _colour(rng, patch) * alpha) // 255
        objects.append((int(sample), box))


def _ground(rng: np.random.Generator, photo: Image.Image, size: int) -> np.ndarray:
    """A square piece of the photograph, up to three times as wide as the image, mirrored and turned at random."""
    shortest = min(photo.size)
    side = int(rng.integers(min(size, shortest), min(3 * size, shortest), endpoint=True))
    x, y = (int(rng.integers(0, length - side, endpoint=True)) for length in photo.size)
    pixels = np.asarray(photo.crop((x, y, x + side, y + side)).resize((size, size), Image.Resampling.BILINEAR))
    pixels = pixels[:, :: -1 if rng.integers(2) else 1]
    return np.rot90(pixels, rng.integers(4)).copy()


def _ink(glyph: np.ndarray, height: int, width: int) -> np.ndarray:
    """The digit at `height` x `width` pixels with sharp edges, cropped to its ink: opacity uint8 [h, w]."""
    drawn = np.asarray(Image.fromarray(glyph).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int32)
    alpha = np.clip((drawn - 85) * 2, 0, 255).astype(np.uint8)
    seen = alpha >= 64
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _colour(rng: np.random.Generator, patch: np.ndarray) -> np.ndarray:
    """The first of 16 random colours [3] that stands out from the patch [h, w, 3], else the one that does most."""
    weights = np.array([77, 150, 29])
    colours = rng.integers(0, 255, endpoint=True, size=(16, 3))
    ground = int((patch @ weights).sum()) // (patch.shape[0] * patch.shape[1])
    contrast = np.abs(colours @ weights - ground) // 256
    return colours[np.argmax(contrast >= CONTRAST) if (contrast >= CONTRAST).any() else np.argmax(contrast)]


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(w, 0) * max(h, 0) / min(a[2] * a[3], b[2] * b[3])


def _card(spec: Digits, boxes: dict[str, int]) -> str:
    photos = "\n".join(f"| {split} | {name} | {licence} |" for split in SPLITS for name, (_, licence) in PHOTOS[split].items())
    return f"""# Handwritten digits on photographs

Made by detrdistill from `{spec.model_dump_json()}` (revision {REVISION} of the drawing); the same recipe gives the same pixels.

| split | annotations | images | boxes | digit samples |
| --- | --- | --- | --- | --- |
| train | `instances_train.json` | {spec.train} | {boxes["train"]} | the first {1797 - VAL_DIGITS} of 1797 |
| val | `instances_val.json` | {spec.val} | {boxes["val"]} | the last {VAL_DIGITS} of 1797 |

Images are {spec.size} x {spec.size} RGB PNG with 1 to {MOST_OBJECTS} objects of 10 classes, `0` to `9`, category ids 1 to 10. Digits are
{spec.size * 12 // 96} to {spec.size * 48 // 96} pixels high before they are cropped to their ink and overlap at most a quarter of the
smaller box. Boxes are tight around the ink; `area` is the box's; no crowds, no masks. `sample` of an annotation is the
digit's index in scikit-learn, `photo` of an image the file in scikit-image, `sha256` the hash of its decoded RGB bytes.
No digit sample and no photograph is in both splits, whatever the seed. `sha256sum -c SHA256SUMS` checks every file.

**Digits**: scikit-learn's copy of the test set of UCI Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak, 1998),
8 x 8 pixels, CC BY 4.0.

**Photographs**, as bundled in the scikit-image wheel:

| split | file | source and licence as scikit-image states them |
| --- | --- | --- |
{photos}
"""
