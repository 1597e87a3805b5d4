"""Charts as PNG less than half as large, since hundreds of them are kept with the results."""

from io import BytesIO

from PIL import Image

FEW = 8192  # colours of a chart whose lines shine through each other; photographs with boxes on them have 20,000


def shrunk(png: bytes) -> bytes:
    """An opaque RGBA image of few colours with a palette of 256: a chart's are shades between some. Others stay as they are."""
    with Image.open(BytesIO(png)) as image:
        image.load()
    if image.mode != "RGBA" or image.getextrema()[3][0] < 255:
        return png
    flat, buffer = image.convert("RGB"), BytesIO()
    if flat.getcolors(FEW) is None:
        return png
    flat.quantize(256, dither=Image.Dither.NONE).save(buffer, format="png", optimize=True, dpi=image.info.get("dpi"))
    return buffer.getvalue()
