"""Pictures of strangers become numbers: as published, upright, and never at a high price."""

import json
import struct
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refollama import pictures
from refollama.errors import BadRequest
from refollama.pictures import decoded, padded, pixels
from tests.golden.small_llava import MEAN, STD, VISION, picture
from tests.tiny_llava import encoded

GOLDEN = json.loads((Path(__file__).parent / "golden" / "llava.json").read_text())
SIZE = VISION["image_size"]
RED, BLUE = (255, 0, 0), (0, 0, 255)


def halves(left=RED, right=BLUE, size=(40, 20), mode="RGB"):
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


# ── against others ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", GOLDEN["pixels"])
def test_pixels_are_those_of_the_published_preprocessing(shape, measured):
    height, width = map(int, shape.split(" x "))
    found = pixels(encoded(Image.fromarray(picture(height, width))), SIZE, MEAN, STD)
    off = np.abs(found - np.array(GOLDEN["pixels"][shape])).max()
    assert found.dtype == np.float32 and off < 1e-4
    measured("models", "transformers/pictures", "transformers", off, found.size)


@pytest.mark.parametrize("size", [12, 24, 37])
@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (9, 14)])
def test_pixels_are_those_of_the_definition(shape, size):
    """Nothing of Pillow is used here but to pack the picture into a file."""
    image = picture(*shape)
    found = pixels(encoded(Image.fromarray(image)), size, MEAN, STD)
    side, (height, width) = max(shape), shape
    square = np.empty((side, side, 3))
    square[:] = [int(255 * value) for value in MEAN]
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    small = bicubic(bicubic(square, size).swapaxes(0, 1), size).swapaxes(0, 1)
    expected = ((small / 255 - MEAN) / STD).transpose(2, 0, 1)
    level = 1 / 255 / min(STD)  # a value may be rounded to the next one
    assert np.abs(found - expected).max() < 1.01 * level
    assert np.abs(found - expected).mean() < 0.05 * level


def bicubic(image, size):
    """(h, w, 3) → (h, size, 3), in levels of 8 bits.  Source: Keys 1981, with a = −1/2.

    When a picture becomes smaller, the kernel becomes as much wider: nothing is left out.
    """
    scale = image.shape[1] / size
    wide = max(scale, 1)
    found = np.empty((image.shape[0], size, 3))
    for at in range(size):
        centre = (at + 0.5) * scale
        places = np.arange(image.shape[1])
        weights = keys((places + 0.5 - centre) / wide)
        found[:, at] = np.tensordot(weights / weights.sum(), image, (0, 1))
    return np.floor(found.clip(0, 255) + 0.5)


def keys(x):
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


# ── kinds of files ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("format", pictures.FORMATS)
def test_every_format_is_read(format):
    found = np.asarray(decoded(encoded(halves(), format)).convert("RGB"), int)
    assert found.shape == (20, 40, 3)
    assert np.abs(found[10, 5] - RED).max() < 40 and np.abs(found[10, 35] - BLUE).max() < 40


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_colour_is_read(mode):
    if mode == "I;16":
        ramp = np.full((20, 40), 257 * 200, np.uint16)
        image, left = Image.fromarray(ramp), (200, 200, 200)
    else:
        image, left = halves((255, 255, 255), (0, 0, 0)).convert(mode), (255, 255, 255)
    found = decoded(encoded(image, "JPEG" if mode == "CMYK" else "PNG"))
    assert found.mode == "RGB" and np.abs(np.asarray(found, int)[10, 5] - left).max() < 3


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_white(mode):
    image = Image.new(mode, (8, 8), (0,) * len(mode))
    assert decoded(encoded(image)).getpixel((4, 4)) == (255, 255, 255)


def test_half_of_a_colour_is_mixed_with_white():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    assert decoded(encoded(image)).getpixel((4, 4)) == (255, 127, 127)


def test_a_transparent_colour_of_a_palette_is_white():
    image = halves().convert("P")
    data = encoded(image, "GIF", transparency=image.getpixel((0, 0)))
    found = decoded(data)
    assert found.getpixel((5, 10)) == (255, 255, 255) and found.getpixel((35, 10)) == BLUE


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_of_several_pictures_the_first_is_seen(format):
    more = {"save_all": True, "append_images": [halves(BLUE, BLUE)], "lossless": True}
    found = np.asarray(decoded(encoded(halves(RED, RED), format, **more)), int)
    assert np.abs(found[10, 10] - RED).max() < 10


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_picture_is_turned_as_its_camera_was_held(orientation, format):
    """The file holds the picture as the sensor saw it; upright, its top left corner is red."""
    upright = np.full((24, 40, 3), 255, np.uint8)
    upright[:12, :20] = RED
    stored = {  # what EXIF says of where the first row and the first column of the file belong
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: x[::-1].swapaxes(0, 1)[::-1, ::-1],
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: x.swapaxes(0, 1)[:, ::-1],
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored))
    found = np.asarray(decoded(encoded(image, format, exif=exif, quality=95)), int)
    assert found.shape == upright.shape
    assert np.abs(found[4, 6] - RED).max() < 20 and found[20, 6].min() > 230


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_notes_of_a_camera_that_make_no_sense_are_nothing():
    data = encoded(halves(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert decoded(data).size == (40, 20)


# ── what strangers send ───────────────────────────────────────────────────────────────────────


def png_of(width, height, data=b""):
    """A PNG that says that it is so large."""

    def chunk(name, body):
        whole = name + body
        return struct.pack(">I", len(body)) + whole + struct.pack(">I", zlib.crc32(whole))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


BOMB = zlib.compress(bytes(20_001 * 20_000), 9)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no picture"),
        (b"hello", "no picture"),
        (b"\x89PNG\r\n\x1a\n", "no picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "PNG, JPEG, WEBP, GIF, BMP"),
        (png_of(20_000, 20_000, BOMB), "too large"),
        (png_of(10_000, 10_000, BOMB), "pixels"),
        (png_of(8_000, 9_000, BOMB), "8000 × 9000 pixels; at most 67108864"),
        (png_of(40_000, 1), "32768 on a side"),
        (png_of(2**31 - 1, 2**31 - 1), "too large"),
        (png_of(30, 30), "damaged"),
        (png_of(30, 30, zlib.compress(b"")), "damaged"),
        (encoded(halves(size=(400, 400)), "JPEG")[:900], "this JPEG picture is damaged"),
        (encoded(Image.fromarray(picture(99, 99)), "WEBP")[:-900], "picture"),
        (encoded(Image.fromarray(picture(99, 99)), "GIF")[:2000], "this GIF picture is damaged"),
        (encoded(Image.fromarray(picture(99, 99)), "BMP")[:2000], "this BMP picture is damaged"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_good_picture_is_refused_at_once(data, words):
    tracemalloc.start()
    began = time.monotonic()
    with pytest.raises(BadRequest, match=words):
        decoded(data)
    assert time.monotonic() - began < 2
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_a_file_that_is_too_large_is_not_even_opened(monkeypatch):
    monkeypatch.setattr(pictures, "MOST_BYTES", 1000)
    with pytest.raises(BadRequest, match="1001 bytes; at most 1000"):
        decoded(encoded(halves())[:60] + bytes(941))


@pytest.mark.parametrize("format", pictures.FORMATS)
def test_broken_bytes_are_refused_or_seen_but_nothing_else_happens(format):
    data, rng = encoded(Image.fromarray(picture(20, 20)), format), np.random.RandomState(5)
    for _ in range(60):
        broken = bytearray(data[: rng.randint(20, len(data) + 1)])
        for _ in range(rng.randint(0, 4)):
            broken[rng.randint(0, len(broken))] = rng.randint(256)
        try:
            assert pixels(bytes(broken), 8, MEAN, STD).shape == (3, 8, 8)
        except BadRequest as error:
            assert "picture" in str(error)


@pytest.mark.parametrize("size", [(9000, 30), (30, 9000)])
def test_a_large_picture_is_seen_whole(size):
    image = halves(size=size)
    found = decoded(encoded(image))
    assert max(found.size) == pictures.LARGE
    assert found.getpixel((5, 3)) == RED and found.getpixel((found.width - 5, 3)) == BLUE


def test_a_square_has_the_picture_in_its_middle():
    found = padded(halves(size=(6, 2)), (0.5, 0.25, 0.0))
    assert found.size == (6, 6)
    assert [found.getpixel((0, y)) for y in range(6)] == [(127, 63, 0)] * 2 + [RED] * 2 + [
        (127, 63, 0)
    ] * 2
