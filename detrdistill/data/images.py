"""Image files: which are read, and what is refused by its header, before a pixel is decoded."""

import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from detrdistill.errors import InputError

# Not EPS among them, which Pillow hands to Ghostscript, so that a file could have code of its own run.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
UNDECODABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)  # what Pillow raises
LONGEST = 100  # times the shorter side; resizing by the shorter side would make the image larger than memory
ORIENTATION, QUARTER_TURNS = 0x0112, (5, 6, 7, 8)  # of EXIF


def check_image(path: Path | str, width: int, height: int) -> None:
    """Refuse by its header a file that is no image or not of the stated size; its pixels are not decoded.

    Raises:
        InputError: what is wrong; the caller says with which image.
    """
    with open_image(path) as image:
        _check_size(image, path, width, height)


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
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


@contextmanager
def open_image(path: Path | str) -> Iterator[Image.Image]:
    """The file, its header read and its pixels not.

    Raises:
        InputError: missing, damaged (also where its pixels are read within the block), of a format not read, or too large: Pillow's
            limit against decompression bombs is 179 million pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on odd headers; what matters of them is checked
            with Image.open(path, formats=FORMATS) as image:
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
