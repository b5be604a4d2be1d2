"""Sixteen rows side by side: matrices that are multiplied as they lie packed.

    a file's rows      row 0: a block, a block, …   row 1: a block, a block, …
    laid in lanes      four codes of rows 0 … 15, the next four of rows 0 … 15, …

What stands side by side goes through a processor's vectors side by side: four numbers of a token
times four codes of sixteen rows, added to sixteen outputs (`dots.py`). No sum crosses a vector, and
every bit of a block is kept: codes, the steps of blocks and those of their groups.

    y = Σ over blocks, groups   (d · s · Σ (q − middle) · n   −   m · least · Σ n) · unit

Codes fill words of 32 bits so that four of them are taken out together, one for each byte.

It is written as torch does it, and worth something only compiled (`routines.py`): word by word,
torch's own passes would take a hundred times as long. Each sum is added in the same order beside
however many other tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from operator import or_

import torch
from torch import Tensor

from refollama.fast.dots import BYTES, WORD, Rounded, dots, in_bytes, most_of, once, whole_numbers
from refollama.fast.prepared import Form
from refollama.weights.blocks import BLOCKS, TYPE_ID
from refollama.weights.fields import fields, numbers
from refollama.weights.quants import LAYOUTS, scales_and_minima, six_bits

LANES = 16  # rows: one vector of words where vectors have 512 bits, two of 256
LEAST = 6  # bits that every least fits

Inner = Callable[[Tensor], Tensor]  # (n, nbytes) uint8 → (n, groups), −128 to 127


@dataclass(frozen=True)
class Code:
    """How a block stores its values: d · s · (q − middle) − m · least.

    What its bytes mean stands in `weights/quants.py` and `codebooks.py`.
    """

    bits: int  # of q, which is never negative
    group: int  # values that share s and least
    middle: int
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
    # Sixteen third bits would fill half a word; a fourth costs no time.
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
class Piece:
    """Some bits of four codes, those from `base` on, and where they are: from `shift` on in each
    byte of a word."""

    base: int
    width: int
    word: int  # of the group
    shift: int

    @property
    def mask(self) -> int:
        """Of its bits, where they begin at 0."""
        return (1 << self.width) - 1


@cache
def pieces_of(bits: int, group: int) -> list[list[Piece]]:
    """Of each four codes of a group, that follow each other, in order: a byte of a word has room
    for a code of 8 bits, for 4 bits of two, 2 of four, 1 of eight. What has 6 bits, or 5, lies in
    two words: its lower 4 bits and the others.

        4 bits   │ 7 · 3 │ 6 · 2 │ 5 · 1 │ 4 · 0 │   codes 0 to 3 in the lower half of each byte
    """
    found: list[list[Piece]] = [[] for _ in range(0, group, BYTES)]
    base, first = 0, 0
    for width in (8, 4, 2, 1):
        if bits - base < width:
            continue
        room = 8 // width  # of a byte
        for at, pieces in enumerate(found):
            pieces.append(Piece(base, width, first + at // room, at % room * width))
        base, first = base + width, first + group * width // WORD
    return found


# ── laying ────────────────────────────────────────────────────────────────────────────────────


def fits(kind: str, rows: int) -> bool:
    """Can a matrix of this type, with so many rows, be laid in lanes?"""
    return kind in CODE and rows % LANES == 0


def form(kind: str, rows: int, width: int) -> Form:
    """Types and shapes of what `laid` makes."""
    return [(dtype, (rows // LANES, *shape)) for dtype, shape in _form_of_a_tile(kind, width)]


@cache
def _form_of_a_tile(kind: str, width: int) -> Form:
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
    q = _in_lanes(_codes_of(blocks, kind, s).view(r, -1, code.group))
    steps = d[:, 0], s, None if m is None else m[:, 0], least
    small = [_in_lanes(one.reshape(r, -1, *one.shape[1:])) for one in steps if one is not None]
    return [_words(q, code), *(one if one.dim() == 3 else _four(one) for one in small)]


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


def _words(q: Tensor, code: Code) -> Tensor:
    """(T, N, group, 16) uint8 → (T, N, group · bits / 32, 16) int32"""
    words = q.new_zeros(*q.shape[:2], code.group * code.bits // WORD, LANES, dtype=torch.int32)
    for at, pieces in enumerate(pieces_of(code.bits, code.group)):
        for byte in range(BYTES):
            one = q[:, :, at + code.group // BYTES * byte]
            for piece in pieces:
                bits = one if piece.width == code.bits else one >> piece.base & piece.mask
                words[:, :, piece.word] |= bits.int() << 8 * byte + piece.shift
    return words


def _four(small: Tensor) -> Tensor:
    """(T, B, S, 16) → (T, B, S / 4, 16) int32, of bytes that are a quarter of a block apart.

    Vectors of words are loaded as they lie; half-filled vectors of bytes, number by number.
    """
    quarters = small.to(torch.int8).view(*small.shape[:2], BYTES, -1, LANES)
    return quarters.movedim(2, -1).contiguous().view(torch.int32).squeeze(-1)


# ── multiplying ───────────────────────────────────────────────────────────────────────────────


def times(x: Rounded, made: Sequence[Tensor], kind: str) -> Tensor:
    """Tokens by a matrix that is `laid`; each code is unpacked once for all M that go together.

    → (G, M, T, 16) float32
    """
    code, (words, *small) = CODE[kind], made
    its = x.by(code.group)
    (G, _, M), (T, B) = its.sums.shape, small[0].shape[:2]
    groups = BLOCKS[TYPE_ID[kind]].values // code.group
    inner = (B, BYTES, groups // BYTES) if code.s else (B, 1, groups)  # as steps lie in words
    each = words.view(T, 1, *inner, code.group * code.bits // WORD, LANES).unbind(-2)
    codes = [_four_codes(each, one) for one in pieces_of(code.bits, code.group)]
    step = small.pop(0)[:, None, :, None, None].float()
    if code.s:
        step = step * _each_byte(small.pop(0))[:, None]
    # Σ (q − middle) · n begins at −middle · Σ n, so that q need not be moved.
    starts: Sequence[Tensor] = M * [torch.zeros(1, dtype=torch.int32)]
    if code.middle:
        moved = once((its.sums.int() * -code.middle).flatten(1))
        starts = moved.view(1, G, *inner, M, 1).unbind(-2)
    units = its.units.view(1, G, *inner, M, 1).unbind(-2)
    numbers = its.words.view(1, G, *inner, M, x.nbytes, len(codes)).unbind(-3)
    found = [
        (dots(start, codes, one, code.bits).float() * (step * unit)).sum((2, 3, 4))
        for start, unit, one in zip(starts, units, numbers, strict=True)
    ]  # (T, G, 16) each: sixteen rows are read for all tokens, then the next sixteen
    y = torch.stack(found)
    if code.m is not None:
        y = y - torch.stack(_lows(its.sums * its.units, small, groups))
    return y.permute(2, 0, 1, 3)


def _lows(sums: Tensor, small: Sequence[Tensor], groups: int) -> list[Tensor]:
    """What is taken away from each of M tokens, Σ m · least · Σ x: the sums of a block's groups are
    made into whole numbers of two bytes as well, and least are bytes that are multiplied by them.

    sums (G, N, M) → M times (T, G, 16)
    """
    B, (G, _, M) = small[0].shape[1], sums.shape
    m = small[0][:, None].float()  # (T, 1, B, 16)
    if len(small) == 1:
        each = once(sums.flatten(1)).view(1, G, B, groups, M, 1).unbind(-2)
        return [-(m[:, :, :, None] * one).sum((2, 3)) for one in each]
    whole, unit = whole_numbers(sums.view(G, B, groups, M).transpose(2, 3), most_of(2))
    numbers = once(in_bytes(whole, 2).flatten(1)).view(1, G, B, M, 2, groups // BYTES).unbind(3)
    units = once(unit.flatten(1)).view(1, G, B, M, 1).unbind(-2)
    least = small[1][:, None].unbind(-2)
    nothing = torch.zeros(1, dtype=torch.int32)
    return [
        (dots(nothing, least, one, LEAST).float() * (m * its)).sum(2)
        for one, its in zip(numbers, units, strict=True)
    ]


def _each_byte(words: Tensor) -> Tensor:
    """(T, B, W, 16) int32 → (T, B, 4, W, 16) float32"""
    above = torch.arange(WORD - 8, -1, -8, dtype=torch.int32)[:, None, None]  # bits above each
    return (words[:, :, None] << above >> WORD - 8).float()


def _four_codes(words: Sequence[Tensor], pieces: Sequence[Piece]) -> Tensor:
    """Four codes, each in its byte."""
    found = []
    for one in pieces:
        word, down = words[one.word], one.shift - one.base
        if down:
            word = word >> down if down > 0 else word << -down
        found.append(word if one.width == 8 else word & _in_each_byte(one.mask << one.base))
    return reduce(or_, found)


def _in_each_byte(bits: int) -> int:
    """As a word with a sign."""
    return int.from_bytes(BYTES * bytes([bits]), "little", signed=True)
