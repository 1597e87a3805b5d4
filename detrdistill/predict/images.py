"""Which images a word of the command line means, and how boxes are drawn into them. No torch here."""

import math
from collections.abc import Iterable, Sequence
from functools import cache
from glob import glob, has_magic
from pathlib import Path
from tempfile import TemporaryFile

import matplotlib
from PIL import Image, ImageDraw, ImageFont, ImageOps

from detrdistill.data.images import open_image, to_rgb
from detrdistill.errors import InputError
from detrdistill.figures import style
from detrdistill.files import make_folder, writing

SUFFIXES = (".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
DRAWN = (".jpeg", ".jpg", ".png")  # keep their suffix; others are drawn as PNG
PIXELS = 480  # smaller images are enlarged to about this side, so that labels do not cover them
COLOURS = (style.RED, style.BLUE, style.GREEN, style.AMBER, style.VIOLET, style.BROWN, "#b0478f", "#4d6b8a")


def check_options(threshold: float, batch: int) -> None:
    """Raise InputError where one is out of range."""
    if not (math.isfinite(threshold) and 0 <= threshold <= 1):
        raise InputError(f"threshold {threshold:g}: a score from 0 to 1; give such as 0.5")
    if batch < 1:
        raise InputError(f"batch {batch}: a number of images; give 1 or more")


def require_writable(folder: Path) -> None:
    """Raise InputError now where files could not be written later; nothing is left."""
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not there.is_dir():
        make_folder(folder)  # says that a file stands there
    with writing(folder), TemporaryFile(dir=there):
        pass


def find_images(images: str, leave_out: Path) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the image files in order.

    Args:
        images: a folder (with those within), a pattern such as "photos/*.jpg", or a file.
        leave_out: a folder whose files are not meant: what is written.

    Raises:
        InputError: there are none.
    """
    path = Path(images).expanduser()
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        root, found = path, path.rglob("*")
    elif has_magic(images):
        root = next(folder for folder in path.parents if not has_magic(str(folder)))
        found = map(Path, glob(str(path), recursive=True))
    else:
        raise InputError(f"images {images}: no such file or folder; give a folder, a pattern in quotes, or an image")
    kept = sorted(one for one in found if _is_image(one) and leave_out.resolve() not in one.resolve().parents)
    if not kept:
        raise InputError(f"images {images}: no image there; the suffixes read are {', '.join(SUFFIXES)}")
    return root, kept


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def read_upright(path: Path) -> Image.Image:
    """The image in RGB, turned as EXIF says: as viewers show it.

    Data of a training says by its sizes whether boxes are those of the stored pixels; here nobody says anything.

    Raises:
        InputError: missing, damaged, or of a format that is not read.
    """
    with open_image(path) as image:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))


def drawn_name(name: Path) -> Path:
    return name if name.suffix.lower() in DRAWN else name.with_name(f"{name.name}.png")


def draw(image: Image.Image, boxes: Iterable[Sequence[float]], labels: Sequence[str], colours: Sequence[str]) -> Image.Image:
    """A copy with boxes and labels, the last ones lowest.

    Args:
        boxes: x0 y0 x1 y1 in pixels, best first.
    """
    times = max(1, PIXELS // max(image.size))
    picture = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    pen, font = ImageDraw.Draw(picture), _font(max(12, max(picture.size) // 60))
    thick = max(2, max(picture.size) // 400)
    for box, label, colour in reversed(list(zip(boxes, labels, colours, strict=True))):
        x0, y0, x1, y1 = (times * float(side) for side in box)
        pen.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=colour, width=thick)
        left, top, right, bottom = pen.textbbox((0, 0), label, font=font)
        wide, tall = right - left + 6, bottom - top + 6
        x = min(max(x0, 0), max(0, picture.width - wide))
        y = y0 - tall if y0 >= tall else min(max(y0, 0), max(0, picture.height - tall))
        pen.rectangle((x, y, x + wide, y + tall), fill=colour)
        pen.text((x + 3 - left, y + 3 - top), label, fill="white", font=font)
    return picture


def colours_of(labels: Iterable[int]) -> list[str]:
    """A colour a class, the same on every image."""
    return [COLOURS[label % len(COLOURS)] for label in labels]


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: Pillow's own has Latin letters alone."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
