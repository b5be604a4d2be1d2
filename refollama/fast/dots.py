"""Tokens in whole numbers, and the sum that processors have an instruction for.

    32 values of a token      x ≈ unit · n,   n = 256 · high + low, two bytes     (or n, one byte)
    four codes of a row       a word of 32 bits
    dots                      a sum + code · byte, four products for each pair of words
    pairs                     a sum of two products of 16 bits by 16 for each (`fixed.py`)

So a token has 16 bits, the largest of each 32 values all of them: a product is off by some 0.00003,
where keys and values in float16 are off by ten times as much. All sums of 32 are whole numbers,
and exact. With one byte a product is off by 0.5 %: that is what llama.cpp does, with its Q8_0 for
tokens; its kernels for AVX2 and VNNI multiply as `dots` does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

GROUP = 32  # values of a token that share a unit
WORD = 32  # bits
HALF = WORD // 2
BYTES = 4  # of a word
MOST = 127  # of a byte; −128 would have no counterpart
TINY = 1e-30  # a group of nothing but zeros has a unit, too


@torch.library.custom_op("refollama::dots", mutates_args=())
def dots(start: Tensor, codes: Sequence[Tensor], numbers: Tensor, bits: int) -> Tensor:
    """start + Σ over words, over their four bytes:  code · n.

    Compiled, it is some instructions of the processor (`instructions.py`).
    start (…, L) int32; codes: W times (…, L) int32, bytes from 0 to 2 ^ bits − 1; numbers
    (…, nbytes, W) int32, as `in_bytes` makes them, one for all L → (…, L) int32. Sizes of 1
    stretch. A code that is larger than its bits say would overflow on some processors.
    """
    found = start
    for at, word in enumerate(codes):
        for byte, its in enumerate(numbers[..., at].unbind(-1)):
            for up in range(0, WORD, 8):
                n = its[..., None] << WORD - 8 - up >> WORD - 8
                found = found + ((word >> up & 255) * n << 8 * byte)
    return found


@dots.register_fake
def _(start: Tensor, codes: Sequence[Tensor], numbers: Tensor, bits: int) -> Tensor:
    return start + codes[0] + numbers[..., 0, :1]  # of the same shape


@torch.library.custom_op("refollama::pairs", mutates_args=())
def pairs(codes: Sequence[Tensor], numbers: Tensor) -> Tensor:
    """Σ over words, over their two halves:  code · n, both from −2 ^ 15 to 2 ^ 15 − 1.

    codes: W times (…, L) int32; numbers (…, W) int32, one for all L → (…, L) int32. Sizes of 1
    stretch. Whoever wants all of a sum sees to it that 32 bits hold it.
    """
    found = torch.zeros(1, dtype=torch.int32)
    for at, word in enumerate(codes):
        for up in (HALF, 0):
            n = numbers[..., at, None] << up >> HALF
            found = found + (word << up >> HALF) * n
    return found


@pairs.register_fake
def _(codes: Sequence[Tensor], numbers: Tensor) -> Tensor:
    return codes[0] + numbers[..., :1]


@dataclass
class Rounded:
    """Tokens in whole numbers.  G times M of them, N groups of 32 values each."""

    whole: Tensor  # (G, N, M, 32) int32
    unit: Tensor  # (G, N, M) float32: of one group
    nbytes: int  # of each number: 2, or 1
    _known: dict[int, Numbers] = field(default_factory=dict)

    def by(self, group: int) -> Numbers:
        """As codes want them that go in groups of so many, 16 or 32."""
        if group not in self._known:
            self._known[group] = self._numbers(group)
        return self._known[group]

    def _numbers(self, group: int) -> Numbers:
        G, N, M, _ = self.whole.shape
        parts = GROUP // group
        n = N * parts
        whole = self.whole.view(G, N, M, parts, group).transpose(2, 3)
        units = self.unit[:, :, None].expand(G, N, parts, M)
        words = in_bytes(whole, self.nbytes)
        if self.nbytes == 1:  # as tokens lie, or a compiler would make them number by number
            words = once(words.movedim(3, 1)).movedim(1, 3)
        return Numbers(
            once(words.flatten(1)).view(G, n, M, self.nbytes, group // BYTES),
            whole.float().sum(-1).view(G, n, M),  # below 2 ^ 24: exact
            once(units.flatten(1)).view(G, n, M),
        )


@dataclass(frozen=True)
class Numbers:
    """What is multiplied together lies together, for N groups as codes have them."""

    words: Tensor  # (G, N, M, nbytes, group / 4) int32: first of the low bytes
    sums: Tensor  # (G, N, M) float32: of a group's whole numbers
    units: Tensor  # (G, N, M) float32


def rounded(x: Tensor, groups: int, nbytes: int = 2) -> Rounded:
    """Tokens in whole numbers of two bytes, or one.  x (G, M, in) float32, in = groups · 32"""
    G, M, _ = x.shape
    values = x.view(G, M, groups, GROUP).transpose(1, 2)
    return Rounded(*whole_numbers(values, most_of(nbytes)), nbytes)


def most_of(nbytes: int) -> int:
    """The largest number of so many bytes, of which each is `MOST` at most."""
    return MOST << 8 * (nbytes - 1)


def whole_numbers(x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """x ≈ unit · n, the largest n of each row is `most`: (…, n) → (…, n) int32, (…) float32"""
    largest = largest_of(x).clamp(min=TINY)
    return torch.round(x * (most / largest)[..., None]).int(), largest / most


def largest_of(x: Tensor) -> Tensor:
    """(…, n) → (…), without signs.  Of few numbers by halves: a loop through them would be shared
    by all threads, and begun anew for each row."""
    x = x.abs()
    if x.shape[-1] >= GROUP:
        return x.amax(-1)
    while x.shape[-1] > 1:
        x = torch.maximum(*x.chunk(2, -1))
    return once(x.flatten(1)).view(x.shape[:-1])


def in_bytes(whole: Tensor, nbytes: int) -> Tensor:
    """Four bytes in each word, the low ones of all numbers before the high ones.

    Those of a word are a quarter of the row apart: so vectors of neighbours become vectors of
    words.  (…, n) int32 → (…, nbytes, n / 4) int32
    """
    high = whole + 128 >> 8
    found = []
    for one in (whole,) if nbytes == 1 else (whole - (high << 8), high):
        quarters = one.reshape(*one.shape[:-1], BYTES, one.shape[-1] // BYTES).unbind(-2)
        words = [(its & 255) << up for its, up in zip(quarters, range(0, WORD, 8), strict=True)]
        found.append(words[0] | words[1] | words[2] | words[3])
    return torch.stack(found, -2)


def once(x: Tensor) -> Tensor:
    """x, which a compiler would else compute anew for each number that is made of it."""
    strides = [math.prod(x.shape[at:]) for at in range(1, x.dim() + 1)]
    return x.contiguous().as_strided(x.shape, strides)
