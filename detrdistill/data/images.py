"""Image files: which are read, and what is refused by its header, before a pixel is decoded."""

import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from detrdistill.data.values import show
from detrdistill.errors import InputError

# Not EPS among them, which Pillow hands to Ghostscript, so that a file could have code of its own run.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
UNDECODABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)  # what Pillow raises
LONGEST = 100  # times the shorter side; resizing by the shorter side would make the image larger than memory
ORIENTATION, QUARTER_TURNS = 0x0112, (5, 6, 7, 8)  # of EXIF
DEEP = 65535  # 16-bit grey goes from 0 to this
LOOKED_AT = 8  # images of 16-bit grey whose pixels are looked at when a file is opened
FLAT = 8  # grey levels of 255 between the darkest and the brightest pixel of an image that shows next to nothing


@dataclass(frozen=True)
class Header:
    """What an image's header says beside its size.

    Attributes:
        mode: Pillow's.
        turned: "" where EXIF turns nothing, "seen" or "stored" where the annotations' size tells which of the two they mean, "unknown".
    """

    mode: str
    turned: str


def check_image(path: Path | str, width: int, height: int) -> Header:
    """Refuse by its header a file that is no image or not of the stated size; its pixels are not decoded.

    Raises:
        InputError: what is wrong; the caller says with which image.
    """
    with open_image(path) as image:
        _check_size(image, path, width, height)
        # A PNG whose note on EXIF comes after its pixels would be decoded for it.
        turn = image.getexif().get(ORIENTATION, 1) if image.format != "PNG" or "exif" in image.info else 1
        if turn == 1 or turn not in range(1, 9):
            return Header(image.mode, "")
        if turn not in QUARTER_TURNS or width == height:
            return Header(image.mode, "unknown")
        return Header(image.mode, "stored" if image.size == (width, height) else "seen")


def read_image(path: Path | str, width: int, height: int) -> Image.Image:
    """The image in RGB, turned as EXIF says if only then it has the stated size.

    Raises:
        InputError: as `check_image`, or damaged.
    """
    with open_image(path) as image:
        _check_size(image, path, width, height)
        return to_rgb(image if image.size == (width, height) else ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB; 16-bit grey is scaled down (Pillow would cut it off at 255)."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, DEEP) // 257).astype(np.uint8)).convert("RGB")
    image.load()  # its file may be closed next
    return image if image.mode == "RGB" else image.convert("RGB")


def doubts(headers: Mapping[str, Header], folder: Path) -> Iterator[str]:
    """Warnings about images, by their names in `folder`: what nothing in their files can decide."""
    unknown = [name for name, header in headers.items() if header.turned == "unknown"]
    if unknown:
        stored, seen = (sum(header.turned == how for header in headers.values()) for how in ("stored", "seen"))
        yield (
            f"{len(unknown)} images are turned by EXIF and of the same size either way, such as {show(unknown[0])}: boxes are taken as "
            f"those of the stored pixels (the sizes of {stored} others say so, of {seen} the opposite); look at some drawn"
        )
    deep = [name for name, header in headers.items() if header.mode.startswith("I")][:LOOKED_AT]
    try:
        brightest = max(map(_brightest, (folder / name for name in deep)), default=DEEP)
    except InputError:  # told when all images are decoded
        return
    if not DEEP // 8 <= brightest <= DEEP:
        yield (
            f"images are of 16-bit grey, and the largest value of the first {len(deep)}, such as {show(deep[0])}, is {brightest} of "
            f"{DEEP}: they are seen with {min(255, max(0, brightest // 257))} of 255 grey levels; scale them to the full range"
        )


def _brightest(path: Path) -> int:
    with open_image(path) as image:
        return int(np.asarray(image).max())


def hardly_differs(image: Image.Image) -> bool:
    """Whether an RGB image is all but of one colour."""
    return all(high - low <= FLAT for low, high in image.getextrema())


@contextmanager
def open_image(path: Path | str) -> Iterator[Image.Image]:
    """The file, its header read and its pixels not.

    Raises:
        InputError: missing, damaged (also where its pixels are read within the block), of a format not read, of floating point, or too
            large: Pillow's limit against decompression bombs is 179 million pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on odd headers; what matters of them is checked
            with Image.open(path, formats=FORMATS) as image:
                if image.mode == "F":
                    raise InputError(
                        f"{path} has pixels of floating point, whose range is not known; write it with 8 or 16 bits over the full range"
                    )
                yield image
    except InputError:  # a ValueError too
        raise
    except FileNotFoundError:
        raise InputError(f"{path} is missing; put the file back or name another") from None
    except UNDECODABLE as error:
        if isinstance(error, OSError) and error.errno is not None:  # the file may be whole
            raise InputError(f"{path} cannot be read ({os.strerror(error.errno)}); make it readable, or try again") from None
        raise InputError(f"{path} cannot be decoded ({str(error)[:100]}); replace the file by a whole {', '.join(FORMATS)}") from None


def _check_size(image: Image.Image, path: Path | str, width: int, height: int) -> None:
    turned = image.size == (height, width) != (width, height) and image.getexif().get(ORIENTATION) in QUARTER_TURNS
    if image.size != (width, height) and not turned:
        sizes = f"{image.width} x {image.height} pixels, the annotations say {width} x {height}"
        raise InputError(f"{path} has {sizes}; correct width and height and its boxes, or replace the file")
