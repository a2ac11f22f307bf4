"""Pixels of decoded images, compared with the arrays that were written."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from ssl_runner.data import decode
from ssl_runner.data.decode import pixels

RAMP = np.arange(48).reshape(6, 8)


def reopened(image: Image.Image, kind: str, **options: object) -> Image.Image:
    """The image as read from a file of this format."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(file)


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        (RAMP * 1300, "PNG", RAMP * 1300 // 256),
        (RAMP * 87, "PNG", np.rint(RAMP * 87 * 255 / 4095)),
        (RAMP * 5, "PNG", RAMP * 5),
        (RAMP * 1300, "TIFF", RAMP * 1300 // 256),
        (RAMP * 0, "PNG", RAMP * 0),
        (np.array([[0, 4095], [1, 2048]]), "PNG", np.array([[0, 255], [0, 128]])),
        (np.array([[0, 4096], [1, 65535]]), "PNG", np.array([[0, 16], [0, 255]])),
    ],
)
def test_16_bit_images_are_scaled_by_their_largest_value(values, kind, expected) -> None:
    image = reopened(Image.fromarray(values.astype(np.uint16)), kind)
    assert np.array_equal(pixels(image, None), np.stack([expected] * 3))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (RAMP * 1300, RAMP * 1300 // 256),
        (RAMP * 87, np.rint(RAMP * 87 * 255 / 4095)),
        (RAMP * 5, RAMP * 5),
    ],
)
def test_32_bit_integers_follow_the_rule_of_16_bits(values, expected) -> None:
    image = reopened(Image.fromarray(values.astype(np.int32)), "TIFF")
    assert image.mode == "I"
    assert np.array_equal(pixels(image, None, channels=1)[0], expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (RAMP / 47, np.rint(RAMP.astype(np.float32) / np.float32(47) * 255)),
        (RAMP / 94, np.rint(RAMP.astype(np.float32) / np.float32(94) * 255)),
        (RAMP * 5.0, RAMP * 5),
        (RAMP * 1300.0, RAMP * 1300 // 256),
        (RAMP * 0.0, RAMP * 0),
        (RAMP / 47 * (1 + 3e-7) - 1e-9, np.rint(RAMP * (255 / 47) - 1e-6)),
        (RAMP * 5.0 - 1e-4, RAMP * 5),
        (RAMP * (65535.0009 / 47), RAMP * (65535.0 / 47) // 256),
    ],
)
def test_float_images_keep_their_content(values, expected) -> None:
    image = reopened(Image.fromarray(values.astype(np.float32)), "TIFF")
    assert image.mode == "F"
    assert np.array_equal(pixels(image, None, channels=1)[0], expected)


@pytest.mark.parametrize(
    "values",
    [
        np.full((2, 2), np.nan, np.float32),
        np.array([[0, np.nan]], np.float32),
        np.array([[-0.1, 1]], np.float32),
        np.array([[0, np.inf]], np.float32),
        np.array([[0, 1.2]], np.float32),
        np.array([[0, 70_000]], np.float32),
        np.array([[0, 65_536]], np.int32),
        np.array([[-1, 3]], np.int32),
    ],
)
def test_values_of_no_scale_raise_value_error(values) -> None:
    with pytest.raises(ValueError, match=r"values .*expected 0 to "):
        pixels(Image.fromarray(values), None)


def png16(samples: list[int], colour: int, transparent: bytes | None = None) -> Image.Image:
    """A PNG of 2 x 2 equal pixels with 16 bits per sample, which Pillow cannot write. colour: its type."""
    row = b"\0" + struct.pack(f">{len(samples)}H", *samples) * 2
    chunks = [
        (b"IHDR", struct.pack(">2I5B", 2, 2, 16, colour, 0, 0, 0)),
        *([(b"tRNS", transparent)] if transparent else []),
        (b"IDAT", zlib.compress(row * 2)),
        (b"IEND", b""),
    ]
    data = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    return Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + data))


RGB, GRAY_ALPHA, RGBA = 2, 4, 6  # colour types of PNG


@pytest.mark.parametrize(
    ("samples", "colour", "expected"),
    [
        ([40_000, 0, 0], RGB, [40_000 >> 8, 0, 0]),
        ([40_000, 0, 0, 65_535], RGBA, [40_000 >> 8, 0, 0]),
        ([40_000, 65_535], GRAY_ALPHA, [40_000 >> 8] * 3),
        ([4000, 0, 0], RGB, None),
        ([4000, 0, 0, 65_535], RGBA, None),
        ([4000, 65_535], GRAY_ALPHA, None),
        ([200, 0, 0], RGB, None),
        ([200, 0, 0, 65_535], RGBA, None),
        ([200, 65_535], GRAY_ALPHA, None),
    ],
)
def test_16_bit_colour_that_uses_few_bits_raises_value_error(samples, colour, expected) -> None:
    image = png16(samples, colour)
    if expected is None:
        with pytest.raises(ValueError, match="16-bit colour"):
            pixels(image, None)
    else:
        assert pixels(image, None)[:, 0, 0].tolist() == expected


@pytest.mark.parametrize(
    ("samples", "colour", "transparent", "expected"),
    [
        ([25_600], 0, [25_600], [255] * 3),
        ([25_601], 0, [25_600], [100] * 3),
        ([25_600, 0, 5120], RGB, [25_600, 0, 5120], [255] * 3),
        ([25_600, 0, 5120], RGB, [0, 0, 0], [100, 0, 20]),
    ],
)
def test_transparent_colour_of_16_bits_is_white(samples, colour, transparent, expected) -> None:
    image = png16(samples, colour, struct.pack(f">{len(transparent)}H", *transparent))
    assert pixels(image, None)[:, 0, 0].tolist() == expected


def test_image_of_too_many_pixels_raises_value_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MOST_PIXELS", 47)
    with pytest.raises(ValueError, match="8 x 6 pixels, expected at most 47 in all"):
        pixels(Image.fromarray(RAMP.astype(np.uint8)), None)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_1_bit_images_become_0_and_255(kind) -> None:
    mask = RAMP % 3 == 0
    image = reopened(Image.fromarray(mask), kind)
    assert np.array_equal(pixels(image, None), np.stack([mask * 255] * 3))


def test_palette_images_keep_their_colours() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (48, 3), dtype=np.uint8)
    image = Image.fromarray(RAMP.astype(np.uint8)).convert("P")
    image.putpalette(colours.tobytes())
    assert np.array_equal(pixels(reopened(image, "PNG"), None), colours[RAMP].transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_white(mode) -> None:
    """Opaque black on the left, transparent black on the right."""
    values = np.zeros((6, 8, 4), np.uint8)
    values[:, :4, 3] = 255
    image = Image.fromarray(values)
    image = image.quantize() if mode == "P" else image.convert(mode)
    expected = np.zeros((3, 6, 8)) + 255 * (np.arange(8) >= 4)
    assert np.array_equal(pixels(reopened(image, "PNG"), None), expected)


def test_partial_transparency_is_blended_with_white() -> None:
    image = Image.new("RGBA", (2, 2), (100, 0, 200, 128))
    expected = np.array([100, 0, 200]) * 128 / 255 + 127
    assert np.abs(pixels(image, None)[:, 0, 0] - expected).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation) -> None:
    inverse = {  # the transform whose inverse the orientation asks for
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: np.transpose,
        6: np.rot90,
        7: lambda a: np.rot90(a.T, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    image = Image.fromarray(np.ascontiguousarray(inverse(RAMP)).astype(np.uint8))
    exif = image.getexif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels(reopened(image, "PNG", exif=exif), None, channels=1)[0], RAMP)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK", "YCbCr"])
@pytest.mark.parametrize("channels", [1, 3])
def test_8_bit_modes_are_those_of_pillow_cropped_and_resized(mode, channels) -> None:
    values = np.random.default_rng(0).integers(0, 256, (20, 32, 3), dtype=np.uint8)
    image = Image.fromarray(values).convert(mode)
    plain = image.convert("RGB" if channels == 3 else "L")
    expected = np.asarray(ImageOps.fit(plain, (8, 8), Image.Resampling.BICUBIC)).reshape(8, 8, channels)
    assert np.array_equal(pixels(image, 8, channels), expected.transpose(2, 0, 1))
    assert pixels(image, None, channels).shape == (channels, 20, 32)
