"""One image, in any mode that Pillow reads -> uint8 pixels."""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps

VERSION = 3  # of the pixels that `pixels` returns; part of the name of a cache
DAMAGED = (  # what Pillow and `pixels` raise for a file that cannot be read
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
MOST_PIXELS = 2**30  # of an image: 3 GiB as RGB
TOLERANCE = 1e-3  # of float values outside their range, which are clipped


@contextmanager
def large_images() -> Iterator[None]:
    """Context manager in which Pillow opens images of any size. `pixels` refuses those above MOST_PIXELS."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def pixels(image: Image.Image, size: int | None, channels: int = 3) -> np.ndarray:
    """Return the first frame of an image as (channels, H, W) uint8, with channels 3 (RGB) or 1 (luminance).

    The EXIF orientation is applied, and transparency is composited over white. With `size`, the image is
    centre-cropped to a square and resized to size x size with a bicubic filter.

    8-bit modes and palettes keep their values, and 1-bit images become 0 and 255. The scale of wider values
    is chosen per file, by its largest value:

    integers   < 256 are 8-bit values, < 4096 are scaled by 255 / 4095, <= 65535 are divided by 256
    floats     <= 1 are scaled by 255; from 2 on as integers; 0.001 beyond 0, 1 and 65535 is clipped

    Raises ValueError for more than MOST_PIXELS pixels, for values outside 0 ... 65535, for NaN, for floats
    with a maximum between 1.001 and 2, and for 16-bit colour, or gray with an alpha channel, that uses at
    most 12 bits or is black: Pillow reads the upper 8 bits of it only.
    """
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, expected at most {MOST_PIXELS:,} in all")
    deep = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    upright = ImageOps.exif_transpose(image)
    if upright.mode[0] in "IF":
        values = np.asarray(upright)
        gray = _to_8_bits(values)
        if isinstance(upright.info.get("transparency"), int):
            gray[values == upright.info["transparency"]] = 255
        upright = Image.fromarray(gray)
    elif deep and np.asarray(upright.convert(upright.mode.rstrip("A"))).max() < 16:
        raise ValueError("16-bit colour that uses at most 12 bits: convert it to 8 bits per channel")
    elif deep and isinstance(upright.info.get("transparency"), tuple):
        upright.info["transparency"] = tuple(value >> 8 for value in upright.info["transparency"])
    if upright.has_transparency_data:
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
    plain = upright.convert("RGB" if channels == 3 else "L")
    if size is not None and plain.size != (size, size):
        plain = ImageOps.fit(plain, (size, size), Image.Resampling.BICUBIC)
    array = np.asarray(plain)
    return array.transpose(2, 0, 1) if array.ndim == 3 else array[None]


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scale the values (H, W) of a 16-bit, 32-bit or float image to uint8, as `pixels` states."""
    low, high = float(values.min()), float(values.max())
    beyond = TOLERANCE if values.dtype.kind == "f" else 0
    if not (low >= -beyond and high - 65535 <= beyond):
        raise ValueError(f"values from {low:.9g} to {high:.9g}, expected 0 to 65535")
    if values.dtype.kind == "f":
        if high <= 1 + beyond:
            return (values * 255).round().clip(0, 255).astype(np.uint8)
        if high < 2:
            raise ValueError(f"float values up to {high:.9g}, expected 0 to 1, 0 to 255 or 0 to 65535")
        values = values.clip(0, 65535)
    if high < 256:
        return values.round().clip(0, 255).astype(np.uint8)
    if high < 4096:
        return (values * (255 / 4095)).round().clip(0, 255).astype(np.uint8)
    return (values // 256).astype(np.uint8)
