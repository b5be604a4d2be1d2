"""Pictures of one to four coloured shapes on a coloured ground, from a seed.

    rng ──► Drawing: ground, things ── Pillow ──► 96 × 96 pixels, as a model looks at them
                                             └──► a PNG file, as a user would send it

    ┌───────────┐    Nine places, at most one thing in each: "at the top left", "in the middle".
    │ ●  ·  ★   │    A thing is big or small; nothing lies between, so that no answer is a matter
    │ ·  ■  ·   │    of taste. Where a thing is alone it may be larger than its place.
    │ ·  ·  ▲   │
    └───────────┘

How many of which shape and colour (three red stars) is kept for evaluation by the rule of the
world, about one combination in ten. Each word of it is seen in others.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from refollama.fable.exchange import choose
from refollama.fable.world import COLOURS, NUMBERS, words
from refollama.pictures import Pixels, padded

SIDE = 96  # pixels; 8 × 8 patches of 12
MEAN = STD = (0.5, 0.5, 0.5)
MOST_THINGS = 4
CANVAS = 2 * SIDE  # drawn so large, then made smaller: edges become smooth
OBLONG = 0.1  # how often a picture is no square
NOISE = 12  # of 255: the most that a pixel is off

SHAPES = words("circle square triangle star cross ring")
PLACES = (
    "at the top left",
    "at the top",
    "at the top right",
    "on the left",
    "in the middle",
    "on the right",
    "at the bottom left",
    "at the bottom",
    "at the bottom right",
)
GROUNDS = ("white", "white", "white", "white", "black", "black")  # beside all other colours

RGB = tuple[int, int, int]
# Each colour lies somewhere between two.
PAINTS: Mapping[str, tuple[RGB, RGB]] = {
    "red": ((255, 0, 0), (200, 35, 40)),
    "blue": ((0, 0, 255), (50, 100, 215)),
    "green": ((0, 128, 0), (50, 220, 60)),
    "yellow": ((255, 255, 0), (240, 215, 60)),
    "black": ((0, 0, 0), (35, 35, 35)),
    "white": ((255, 255, 255), (236, 236, 236)),
    "brown": ((110, 65, 25), (160, 95, 55)),
    "grey": ((112, 112, 112), (165, 165, 165)),
    "orange": ((255, 165, 0), (240, 130, 40)),
    "pink": ((255, 192, 203), (240, 120, 180)),
    "purple": ((128, 0, 128), (150, 70, 210)),
}

# Half the width of a thing, as a part of the picture's shorter side: among others, and alone.
SPREADS = {"small": (0.065, 0.085), "big": (0.12, 0.15)}
ALONE = {"small": (0.065, 0.11), "big": (0.2, 0.4)}
EDGE = 0.015  # that stays free


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape: where its middle is, and half its width, in parts of the shorter side."""

    shape: str
    colour: str
    size: str  # "big" or "small"
    place: int  # of PLACES
    x: float
    y: float
    r: float

    @property
    def kind(self) -> str:
        """red circle"""
        return f"{self.colour} {self.shape}"

    @property
    def row(self) -> int:
        return self.place // 3

    @property
    def column(self) -> int:
        return self.place % 3


@dataclass(frozen=True, slots=True)
class Drawing:
    """What is in a picture; its things stand as one reads, from the top left on."""

    ground: str
    things: tuple[Thing, ...]
    width: float  # in parts of the shorter side, as the height
    height: float
    seed: int  # of shades and noise

    def count(self, colour: str = "", shape: str = "") -> int:
        """How many things are of this colour and shape?  Empty: of any."""
        return sum(colour in ("", one.colour) and shape in ("", one.shape) for one in self.things)


# ── what is drawn ─────────────────────────────────────────────────────────────────────────────


def drawing(rng: Random, held: bool = False) -> Drawing:
    """A picture; `held`: all that is in it is in numbers that training never shows."""
    kinds = _kinds(rng, held)
    width, height = rng.choice(((1, 0.75), (0.75, 1))) if rng.random() < OBLONG else (1, 1)
    sides = width / min(width, height), height / min(width, height)
    spots = sorted(rng.sample(range(9), len(kinds)))
    pairs = zip(kinds, spots, strict=True)
    things = tuple(_thing(rng, kind, spot, sides, len(kinds)) for kind, spot in pairs)
    used = {colour for colour, _ in kinds}
    ground = rng.choice([one for one in (*GROUNDS, *COLOURS) if one not in used])
    return Drawing(ground, things, *sides, rng.getrandbits(32))


def _kinds(rng: Random, held: bool) -> list[tuple[str, str]]:
    """Colour and shape of one to four things, in any order."""
    left, found, taken = rng.randint(1, MOST_THINGS), [], set()
    colours, shapes = _palette(rng, held)
    while left:
        count = rng.randint(1, left)
        _, colour, shape = choose(rng, held, (NUMBERS[count],), colours, shapes)
        if (colour, shape) not in taken:
            taken.add((colour, shape))
            found += [(colour, shape)] * count
            left -= count
    rng.shuffle(found)
    return found


def _palette(rng: Random, held: bool) -> tuple[Sequence[str], Sequence[str]]:
    """Now and then only a few colours or shapes, so that things have something in common.

    Not where all must be kept out: of a few colours perhaps none is.
    """
    if held or rng.random() < 0.6:
        return COLOURS, SHAPES
    if rng.random() < 0.5:
        return rng.sample(COLOURS, 3), SHAPES
    return COLOURS, rng.sample(SHAPES, 2)


def _thing(
    rng: Random, kind: tuple[str, str], place: int, sides: tuple[float, float], count: int
) -> Thing:
    size = rng.choice(("small", "big"))
    r = rng.uniform(*(ALONE if count == 1 else SPREADS)[size])
    x = _middle(rng, place % 3, sides[0], r)
    y = _middle(rng, place // 3, sides[1], r)
    if r > 0.28:  # it would not fit anywhere else
        place, x, y = 4, sides[0] / 2, sides[1] / 2
    colour, shape = kind
    return Thing(shape, colour, size, place, x, y, r)


def _middle(rng: Random, third: int, side: float, r: float) -> float:
    """Somewhere near the middle of a third of the side, so that all of it is seen."""
    play = max(0.0, min(0.05, side / 6 - r - EDGE))
    at = (third + 0.5) * side / 3 + rng.uniform(-play, play)
    return min(max(at, r + EDGE), side - r - EDGE)


# ── how it is drawn ───────────────────────────────────────────────────────────────────────────


def drawn(one: Drawing) -> Image.Image:
    """The picture in RGB, 96 pixels on its longer side."""
    rng = Random(one.seed)
    scale = CANVAS / max(one.width, one.height)
    canvas = Image.new("RGB", (round(one.width * scale), round(one.height * scale)))
    canvas.paste(_shade(rng, one.ground), (0, 0, *canvas.size))
    pen = ImageDraw.Draw(canvas)
    for thing in one.things:
        pen.polygon(_corners(thing, scale), fill=_shade(rng, thing.colour))
    small = canvas.resize((canvas.width // 2, canvas.height // 2), Image.Resampling.BOX)
    return _noisy(small, one.seed, rng.randrange(NOISE))


def _noisy(image: Image.Image, seed: int, most: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-most, most + 1, (*image.size[::-1], 3))
    return Image.fromarray((np.asarray(image, np.int64) + noise).clip(0, 255).astype(np.uint8))


def _shade(rng: Random, colour: str) -> RGB:
    part = rng.random()
    first, second = PAINTS[colour]
    red, green, blue = (round(a + part * (b - a)) for a, b in zip(first, second, strict=True))
    return red, green, blue


def pixels(one: Drawing) -> Pixels:
    """What a model sees of it, as of a file: (3, 96, 96) float32."""
    square = padded(drawn(one), MEAN)
    values = (np.asarray(square, np.float32) / 255 - np.array(MEAN)) / np.array(STD)
    return np.ascontiguousarray(values.transpose(2, 0, 1), np.float32)


@lru_cache(maxsize=64)
def png(one: Drawing) -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    drawn(one).save(buffer, "PNG")
    return buffer.getvalue()


def covers(one: Drawing, patch: int) -> list[Thing | None]:
    """What most of each patch shows, row by row: a thing, or None for the ground.

    patch: pixels of its side, of the square that a model looks at. A thing that fills a sixth of a
    patch is what it shows.
    """
    scale = SIDE / max(one.width, one.height)
    left, top = (SIDE - scale * one.width) / 2, (SIDE - scale * one.height) / 2
    found: list[Thing | None] = [None] * (SIDE // patch) ** 2
    for thing in one.things:
        mask = Image.new("F", (SIDE, SIDE))
        ImageDraw.Draw(mask).polygon(_corners(thing, scale, left, top), fill=1.0)
        filled = np.asarray(mask.resize((SIDE // patch,) * 2, Image.Resampling.BOX)).ravel()
        for at in np.flatnonzero(filled >= 1 / 6):
            found[at] = thing
    return found


def middle(one: Drawing, thing: Thing, patch: int) -> int:
    """The number of the patch in which the middle of a thing lies."""
    scale = SIDE / max(one.width, one.height)
    x = (SIDE - scale * one.width) / 2 + scale * thing.x
    y = (SIDE - scale * one.height) / 2 + scale * thing.y
    return int(y // patch) * (SIDE // patch) + int(x // patch)


def _corners(thing: Thing, scale: float, left: float = 0, top: float = 0) -> Points:
    """Its outline in pixels."""
    return [
        (left + scale * (thing.x + thing.r * x), top + scale * (thing.y + thing.r * y))
        for x, y in OUTLINES[thing.shape]()
    ]


# Outlines of shapes within −1 … 1, y downwards.
Points = list[tuple[float, float]]


def _around(corners: int, radii: Sequence[float], start: float = -90) -> Points:
    """Points around the middle, at these distances in turn, the first at the top."""
    angles = (math.radians(start + 360 * at / corners) for at in range(corners))
    return [
        (radii[at % len(radii)] * math.cos(angle), radii[at % len(radii)] * math.sin(angle))
        for at, angle in enumerate(angles)
    ]


def _ring() -> Points:
    """There and back again: what the inner circle bounds stays free."""
    outer, inner = _around(48, (1,)), _around(48, (0.55,))
    return [*outer, outer[0], inner[0], *reversed(inner)]


def _cross() -> Points:
    a = 0.34
    quarter = [(-a, -1.0), (a, -1.0), (a, -a)]
    turned = quarter
    found: Points = []
    for _ in range(4):
        found += turned
        turned = [(-y, x) for x, y in turned]
    return found


OUTLINES: Mapping[str, Callable[[], Points]] = {
    "circle": lambda: _around(48, (1,)),
    "square": lambda: _around(4, (1.25,), start=-135),
    "triangle": lambda: _around(3, (1.1,)),
    "star": lambda: _around(10, (1.1, 0.45)),
    "cross": _cross,
    "ring": _ring,
}
