"""Sixteen rows side by side: matrices that are multiplied as they lie packed, and round nothing.

    a file's rows      row 0: a block, a block, …   row 1: a block, a block, …
    laid in lanes      the same code of rows 0 … 15, the next code of rows 0 … 15, …

What stands side by side goes through a processor's vectors side by side: one number of a token
times sixteen weights, added to sixteen outputs. No sum crosses a vector, and every bit of a block
is kept: codes, the steps of blocks and those of their groups.

    y = Σ over blocks, groups   d · s · Σ (q − middle) · x   −   m · least · Σ x

Codes fill words of 32 bits, and stay where they lie in them. A code that begins at bit 12 is 2 ^ 12
times as large there, so its number of the token is divided by that, once for all rows: to unpack it
is to mask it, and to make a float of it.

It is written as torch does it, and worth something only compiled (`routines.py`): code by code,
torch's own passes would take a hundred times as long. Each sum is added in the same order beside
however many other tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from refollama.weights.blocks import BLOCKS, TYPE_ID
from refollama.weights.fields import fields, numbers
from refollama.weights.quants import LAYOUTS, scales_and_minima, six_bits

LANES = 16  # rows: one vector of float32 where vectors have 512 bits, two of 256
WORD = 32  # bits
AT_ONCE = 8  # codes that are multiplied at a time, or more: until they fill words
BYTES = 4  # of a word: steps of so many groups
CHAINS = 2  # sums that are added to in turn: a processor need not wait for the one before

Inner = Callable[[Tensor], Tensor]  # (n, nbytes) uint8 → (n, groups), −128 to 127


@dataclass(frozen=True)
class Code:
    """How a block stores its values: d · s · (q − middle) − m · least.

    What its bytes mean stands in `weights/quants.py` and `codebooks.py`.
    """

    bits: int  # of q, which is never negative
    group: int  # values that share s and least
    middle: int  # far from small codes (Q8_0) it costs them an eighth of a float's 24 bits
    d: int  # the byte where it begins, a float16
    s: Inner | None = None  # None: 1
    m: int | None = None  # as d; None: 0
    least: Inner | None = None  # None: −1


def _six_bits_signed(block: Tensor) -> Tensor:
    return six_bits(block[:, 96:108]).view(torch.int8) - 32


def _iq4_scales(block: Tensor) -> Tensor:
    high = fields(numbers(block, 2, 4, torch.int16), range(0, 16, 2), 3)
    return ((fields(block[:, 4:8], (0, 4), 15) | high << 4) - 32).to(torch.int8)


def _k_scales(block: Tensor) -> Tensor:
    return scales_and_minima(block[:, 4:16])[0]


def _k_minima(block: Tensor) -> Tensor:
    return scales_and_minima(block[:, 4:16])[1]


CODE: Mapping[str, Code] = {
    "Q4_0": Code(4, 32, 8, d=0),
    "Q4_1": Code(4, 32, 0, d=0, m=2),
    "Q5_0": Code(5, 32, 16, d=0),
    "Q5_1": Code(5, 32, 0, d=0, m=2),
    "Q8_0": Code(8, 32, 128, d=0),
    "Q2_K": Code(
        2, 16, 0, 80, lambda block: block[:, :16] & 15, 82, lambda block: block[:, :16] >> 4
    ),
    # Of its 3 bits sixteen codes would fill no words; a fourth costs no time.
    "Q3_K": Code(4, 16, 4, 108, _six_bits_signed),
    "Q4_K": Code(4, 32, 0, 0, _k_scales, 2, _k_minima),
    "Q5_K": Code(5, 32, 0, 0, _k_scales, 2, _k_minima),
    "Q6_K": Code(6, 16, 32, 208, lambda block: block[:, 192:208].view(torch.int8)),
    "TQ1_0": Code(2, 32, 1, d=52),
    "TQ2_0": Code(2, 32, 1, d=64),
    "IQ4_NL": Code(8, 32, 128, d=0),
    "IQ4_XS": Code(8, 32, 128, 0, _iq4_scales),
}


# ── where codes lie ───────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Field:
    """Some bits of a code, those from `base` on, and where they are: from `shift` on in a word."""

    column: int  # of the run: which code
    base: int
    width: int
    word: int  # of the run
    shift: int

    @property
    def mask(self) -> int:
        """Of its bits, where they begin at 0."""
        return (1 << self.width) - 1

    @property
    def has_sign(self) -> bool:
        """Does it end with the bit that makes a word negative?"""
        return self.shift + self.width == WORD


def run_of(bits: int) -> int:
    """How many codes are multiplied at a time: they fill some words."""
    return max(AT_ONCE, WORD // math.gcd(WORD, bits))


@cache
def fields_of(bits: int) -> list[Field]:
    """Of a run of codes. As many as find room fill each word from its lowest bit on; bits that are
    left, two of a word where codes have 5 or 6, hold the last codes of the run in pieces.

        4 bits   │ 7 │ 6 │ 5 │ 4 │ 3 │ 2 │ 1 │ 0 │
        6 bits   │15│  4  │  3  │  2  │  1  │  0  │   and two more words alike
    """
    run, whole = run_of(bits), WORD // bits
    words, left = run * bits // WORD, WORD - whole * bits
    found = [
        Field(word * whole + at, 0, bits, word, at * bits)
        for word in range(words)
        for at in range(whole)
    ]
    at = 0  # of all bits that are left, one word's after the other's
    while at < left * words:
        (word, shift), (column, base) = divmod(at, left), divmod(at, bits)
        width = min(left - shift, bits - base)
        found.append(Field(words * whole + column, base, width, word, WORD - left + shift))
        at += width
    return found


# ── laying ────────────────────────────────────────────────────────────────────────────────────


def fits(kind: str, rows: int) -> bool:
    """Can a matrix of this type, with so many rows, be laid in lanes?"""
    return kind in CODE and rows % LANES == 0


def form(kind: str, rows: int, width: int) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """Types and shapes of what `laid` makes."""
    return [(dtype, (rows // LANES, *shape)) for dtype, shape in _form_of_a_tile(kind, width)]


@cache
def _form_of_a_tile(kind: str, width: int) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """Of sixteen rows, tried once: a load asks for that of each matrix several times."""
    block = BLOCKS[TYPE_ID[kind]]
    some = torch.zeros(LANES, width // block.values * block.nbytes, dtype=torch.uint8)
    return [(one.dtype, tuple(one.shape[1:])) for one in laid(some, kind)]


def laid(weight: Tensor, kind: str) -> list[Tensor]:
    """Packed rows, a multiple of 16, in lanes.  (r, row_bytes) uint8 →
    words of codes: (T, N, group · bits / 32, 16) int32;
    d (T, B, 16) float16; s, if it has one, (T, B, N / B / 4, 16) int32, of four groups in a word;
    m and least alike.  T: rows / 16, N: groups of a row, B: blocks of a row.
    """
    code, r = CODE[kind], len(weight)
    blocks = weight.reshape(-1, LAYOUTS[TYPE_ID[kind]].block.nbytes)
    d, s = numbers(blocks, code.d, code.d + 2, torch.float16), code.s and code.s(blocks)
    m, least = None, code.least and code.least(blocks)
    if code.m is not None:
        m = numbers(blocks, code.m, code.m + 2, torch.float16)
        m = m if code.least else -m  # what Q4_1 and Q5_1 add, others take away
    q = _in_lanes(_codes_of(blocks, kind, s).view(r, -1, code.group))
    steps = d[:, 0], s, None if m is None else m[:, 0], least
    small = [_in_lanes(one.reshape(r, -1, *one.shape[1:])) for one in steps if one is not None]
    return [_words(q, code.bits), *(one if one.dim() == 3 else _four(one) for one in small)]


def _codes_of(blocks: Tensor, kind: str, s: Tensor | None) -> Tensor:
    """Their q: (n, groups, group) uint8; where s is 0, any will do.

    If d is 1 and m is 0, a block unpacks to s · (q − middle), in whole numbers.
    """
    code, blocks = CODE[kind], blocks.clone()
    blocks[:, code.d : code.d + 2] = torch.tensor([1.0], dtype=torch.float16).view(torch.uint8)
    if code.m is not None:
        blocks[:, code.m : code.m + 2] = 0
    values = LAYOUTS[TYPE_ID[kind]].unpack(blocks).view(len(blocks), -1, code.group)
    if s is not None:
        values = values / s.unsqueeze(-1).float().masked_fill(s.unsqueeze(-1) == 0, 1)
    return values.add_(code.middle).to(torch.uint8)


def _in_lanes(rows: Tensor) -> Tensor:
    """(r, …) → (r / 16, …, 16)"""
    return rows.view(-1, LANES, *rows.shape[1:]).movedim(1, -1).contiguous()


def _words(q: Tensor, bits: int) -> Tensor:
    """(T, N, group, 16) uint8 → (T, N, group · bits / 32, 16) int32"""
    run = run_of(bits)
    runs = q.view(*q.shape[:2], -1, run, LANES)
    words = q.new_zeros(*runs.shape[:3], run * bits // WORD, LANES, dtype=torch.int32)
    for one in fields_of(bits):
        piece = runs[..., one.column, :]
        if one.width < bits:
            piece = piece >> one.base & one.mask
        words[..., one.word, :] |= piece.int() << one.shift  # the highest bit becomes the sign
    return words.flatten(2, 3)


def _four(small: Tensor) -> Tensor:
    """(T, B, S, 16) → (T, B, S / 4, 16) int32: the lowest byte is the first of four.

    Vectors of words are loaded as they lie; half-filled vectors of bytes, number by number.
    """
    bytes = small.to(torch.int8).view(*small.shape[:2], -1, BYTES, LANES).movedim(3, -1)
    return bytes.contiguous().view(torch.int32).squeeze(-1)


# ── multiplying ───────────────────────────────────────────────────────────────────────────────


def times(x: Tensor, made: Sequence[Tensor], kind: str) -> Tensor:
    """Tokens by a matrix that is `laid`; each code is unpacked once for all M that go together.

    (G, M, in) float32 → (G, M, out)
    """
    code = CODE[kind]
    words, *small = made
    (G, M), (T, B) = x.shape[:2], small[0].shape[:2]
    run, places = run_of(code.bits), fields_of(code.bits)
    steps = BYTES if code.s else 1  # that lie in a word
    inner = B, BLOCKS[TYPE_ID[kind]].values // code.group // steps, steps, code.group // run
    size = T, G, *inner, LANES  # sixteen rows are read for all tokens, then the next sixteen
    each = words.view(T, 1, *inner, run * code.bits // WORD, LANES).unbind(-2)
    q = [_cut(each[one.word], one).expand(size) for one in places]
    step, low = _steps(code, small)
    step = step[:, None, ..., None, :]
    numbers = _for_fields(x, code).view(1, G, M, *inner, len(places), 1)
    # Σ (q − middle) · x begins at −middle · Σ x, so that q need not be moved.
    starts = (x.view(1, G, M, *inner, run, 1) * -code.middle).sum(-2)
    found = []
    for its, start in zip(numbers.unbind(2), starts.unbind(2), strict=True):
        start = start.expand(size)
        sums = [start, torch.zeros_like(start)]
        columns = its.expand(*size[:-1], len(places), LANES).unbind(-2)
        for k, (number, one) in enumerate(zip(columns, q, strict=True)):
            sums[k % CHAINS] = fma(number, one, sums[k % CHAINS])
        found.append((step * (sums[0] + sums[1])).sum((2, 3, 4, 5)))  # (T, G, 16)
    y = torch.stack(found)
    if low is not None:
        groups = x.view(1, G, M, *inner[:3], code.group, 1).sum(-2).unbind(2)
        y = y - torch.stack([(low[:, None] * one).sum((2, 3, 4)) for one in groups])
    return y.permute(2, 0, 1, 3).flatten(2)


def _steps(code: Code, small: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """What a group's codes are multiplied by, and what is taken away, if anything:
    (T, B, words, groups of a word, 16)"""
    d, *others = small
    step = d[:, :, None, None].float()
    if code.s is not None:
        step = step * _each_byte(others.pop(0))
    if code.m is None:
        return step, None
    low = others[0][:, :, None, None].float()
    return step, low if code.least is None else low * _each_byte(others[1])


def _each_byte(words: Tensor) -> Tensor:
    """(T, B, W, 16) int32 → (T, B, W, 4, 16) float32"""
    above = torch.arange(WORD - 8, -1, -8, dtype=torch.int32)[:, None]  # bits above each
    return (words.unsqueeze(-2) << above >> WORD - 8).float()


def _cut(word: Tensor, one: Field) -> Tensor:
    """Its bits as a number, where they lie: times 2 ^ shift. (That with the sign is moved down.)"""
    if one.has_sign:
        return (word >> one.shift & one.mask).float()
    return (word & one.mask << one.shift).float()


def _for_fields(x: Tensor, code: Code) -> Tensor:
    """What each field is multiplied by: its number of the token, times 2 ^ −shift. Powers of two
    round nothing that is larger than 1e-30.  (G, M, in) → (G · M, runs · fields)
    """
    run, places = run_of(code.bits), fields_of(code.bits)
    powers = [one.base - (0 if one.has_sign else one.shift) for one in places]
    runs = code.group // run  # compilers read a long table from memory, a short one case by case
    columns = [at * run + one.column for at in range(runs) for one in places]
    x = x.view(x.shape[0] * x.shape[1], -1, code.group)
    if len(columns) > code.group:
        x = x[..., torch.tensor(columns)]
    return once((x * torch.tensor([2.0**power for power in powers] * runs)).flatten(1))


def once(x: Tensor) -> Tensor:
    """x (M, n), which a compiler would else compute anew for each number that is made of it."""
    return x.contiguous().as_strided(x.shape, (x.shape[1], 1))


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a · b + c; compiled, with one rounding."""
    from torch._inductor import inductor_prims  # takes a second, and only compilers come here

    found: Tensor = inductor_prims.fma(a, b, c)
    return found
