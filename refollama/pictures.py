"""A picture's file → the square of numbers that a vision model looks at.

    ┌────────┐      ┌────────┐        bytes    decoded, turned as its camera held it, on white
    │  🐈    │  ──► │ colour │  ──►   padded   to a square, with the mean colour on two sides
    └────────┘      │  🐈    │        resized  to what the model was trained on, bicubic
                    │ colour │        scaled   (value − mean) / std, channel by channel
                    └────────┘

A picture comes from a stranger: how large it is becomes known, and is checked, before a single
pixel is decoded. Source: Liu et al. 2023, "Improved Baselines with Visual Instruction Tuning",
arXiv 2310.03744, and the preprocessing published with its weights.
"""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from refollama.errors import BadRequest, NotFound

Pixels = npt.NDArray[np.float32]
Channels = tuple[float, float, float]  # red, green, blue

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MOST_BYTES = 100 << 20  # of a file; as much as Ollama sends
MOST_PIXELS = 1 << 26  # 67 million; the cameras of phones have up to 50
LONGEST_SIDE = 1 << 15
LARGE = 4096  # pixels of a side; what is larger is made smaller before it becomes a square
WHITE = (255, 255, 255)


class Seen(Protocol):
    """A picture as a model knows it: ids behind those of its vocabulary, one for each row."""

    @property
    def ids(self) -> range: ...


_one_at_a_time = threading.Lock()  # decoding takes up to half a GB, and all cores are busy anyway


def pixels(file: bytes, size: int, mean: Channels, std: Channels) -> Pixels:
    """The picture as the model sees it.  → (3, size, size) float32

    mean, std: of the pictures it was trained on, for values from 0 to 1.
    Raises: BadRequest for what is no picture, is damaged, or is too large.
    """
    with _one_at_a_time:
        square = padded(decoded(file), mean).resize((size, size), Image.Resampling.BICUBIC)
    values = np.asarray(square, np.float32) / 255  # (size, size, 3)
    scaled = (values - np.array(mean)) / np.array(std)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1), np.float32)


def decoded(file: bytes) -> Image.Image:
    """The picture in RGB, upright, what is transparent on white; of several the first.

    Raises: as `pixels` does.
    """
    image = _opened(file)
    try:
        image.load()
        turn = _TURNS.get(_orientation(image))
        flat = _flat(_smaller(_plain(image)))
    except Exception as error:  # decoders raise whatever they meet: struct.error, EOFError, …
        raise BadRequest(f"this {image.format} picture is damaged: {error}") from None
    return flat if turn is None else flat.transpose(turn)


def file_of(picture: bytes | str | Path) -> bytes:
    """A picture's file, by its path; bytes are one already.  Raises: NotFound."""
    if isinstance(picture, bytes):
        return picture
    try:
        return Path(picture).expanduser().read_bytes()
    except OSError as error:
        raise NotFound(f"{picture}: {error.strerror}") from None


def padded(image: Image.Image, mean: Channels) -> Image.Image:
    """In the middle of a square, the rest of which has the mean colour."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _opened(file: bytes) -> Image.Image:
    """Its header alone is read."""
    if len(file) > MOST_BYTES:
        raise BadRequest(f"the file has {len(file)} bytes; at most {MOST_BYTES} are looked at")
    try:
        image = Image.open(io.BytesIO(file), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadRequest(f"more than {MOST_PIXELS} pixels: the picture is too large") from None
    except Exception:  # as in `decoded`
        raise BadRequest(f"no picture that can be read: those are {', '.join(FORMATS)}") from None
    width, height = image.size
    if width * height > MOST_PIXELS or max(width, height) > LONGEST_SIDE:
        raise BadRequest(
            f"the picture has {width} × {height} pixels; at most {MOST_PIXELS} are looked at, "
            f"and {LONGEST_SIDE} on a side"
        )
    return image


def _plain(image: Image.Image) -> Image.Image:
    """Values of 8 bits that can be mixed: no palette, no bits, no 16 bits of grey."""
    if image.mode in ("1", "P", "PA"):
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    if image.mode.startswith(("I", "F")):  # `convert` would cut them off at 255
        return Image.fromarray((np.asarray(image) / 256).clip(0, 255).astype(np.uint8))
    return image


def _smaller(image: Image.Image) -> Image.Image:
    """At most LARGE on a side."""
    if max(image.size) <= LARGE:
        return image
    width, height = (max(1, round(side * LARGE / max(image.size))) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2)


def _flat(image: Image.Image) -> Image.Image:
    """Red, green and blue, and nothing to look through."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    seen = image.convert("RGBA")
    page = Image.new("RGBA", seen.size, (*WHITE, 255))
    return Image.alpha_composite(page, seen).convert("RGB")


# How to turn what the camera noted as …  Source: EXIF 2.3, tag 0x0112, Orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    """How the camera was held; notes that cannot be read say nothing."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # as in `decoded`
        return 1
