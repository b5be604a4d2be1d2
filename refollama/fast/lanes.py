"""Sixteen rows side by side: matrices that are multiplied as they lie packed, and round nothing.

    a file's rows      row 0: a block, a block, …   row 1: a block, a block, …
    laid in lanes      the same code of rows 0 … 15, the next code of rows 0 … 15, …

What stands side by side goes through a processor's vectors side by side: one number of a token
times sixteen weights, added to sixteen outputs. No sum crosses a vector, and every bit of a block
is kept: codes, the steps of blocks and those of their groups.

    y = Σ over blocks, groups   d · s · Σ (q − middle) · x   −   m · least · Σ x

It is written as torch does it, and worth something only compiled (`routines.py`): code by code,
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

from refollama.weights.blocks import BLOCKS, TYPE_ID
from refollama.weights.fields import fields, numbers
from refollama.weights.quants import LAYOUTS, scales_and_minima, six_bits

LANES = 16  # rows: one vector of float32 where vectors have 512 bits, two of 256
CODES = 8  # columns that are unpacked and multiplied at a time; of 1 bit they fill a byte
CHAINS = 2  # sums that are added to in turn: a processor need not wait for the one before

Inner = Callable[[Tensor], Tensor]  # (n, nbytes) uint8 → (n, groups) of 8 bits


@dataclass(frozen=True)
class Code:
    """How a block stores its values: d · s · (q − middle) − m · least.

    What its bytes mean stands in `weights/quants.py` and `codebooks.py`.
    """

    bits: tuple[int, ...]  # of q, in each plane, lowest first; 8: int8
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
    "Q4_0": Code((4,), 32, 8, d=0),
    "Q4_1": Code((4,), 32, 0, d=0, m=2),
    "Q5_0": Code((4, 1), 32, 16, d=0),
    "Q5_1": Code((4, 1), 32, 0, d=0, m=2),
    "Q8_0": Code((8,), 32, 0, d=0),
    "Q2_K": Code(
        (2,), 16, 0, 80, lambda block: block[:, :16] & 15, 82, lambda block: block[:, :16] >> 4
    ),
    "Q3_K": Code((2, 1), 16, 4, 108, _six_bits_signed),
    "Q4_K": Code((4,), 32, 0, 0, _k_scales, 2, _k_minima),
    "Q5_K": Code((4, 1), 32, 0, 0, _k_scales, 2, _k_minima),
    "Q6_K": Code((4, 2), 16, 32, 208, lambda block: block[:, 192:208].view(torch.int8)),
    "TQ1_0": Code((2,), 32, 1, d=52),
    "TQ2_0": Code((2,), 32, 1, d=64),
    "IQ4_NL": Code((8,), 32, 0, d=0),
    "IQ4_XS": Code((8,), 32, 0, 0, _iq4_scales),
}


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
    planes of codes, as many as the type has: (T, N, group / 8, bits, 16) uint8 or int8;
    d (T, B, 1, 16) float16; s (T, B, N / B, 16) of 8 bits, if it has one; m and least alike.
    T: rows / 16, N: groups of a row, B: blocks of a row.
    """
    code, r = CODE[kind], len(weight)
    blocks = weight.reshape(-1, LAYOUTS[TYPE_ID[kind]].block.nbytes)
    d, s = numbers(blocks, code.d, code.d + 2, torch.float16), code.s and code.s(blocks)
    m, least = None, code.least and code.least(blocks)
    if code.m is not None:
        m = numbers(blocks, code.m, code.m + 2, torch.float16)
        m = m if code.least else -m  # what Q4_1 and Q5_1 add, others take away
    planes = _planes(
        _in_lanes(_codes_of(blocks, kind, s).view(r, -1, code.group // CODES, CODES)), code.bits
    )
    small = [one for one in (d, s, m, least) if one is not None]
    return planes + [_in_lanes(one.reshape(r, -1, one.shape[1])) for one in small]


def _codes_of(blocks: Tensor, kind: str, s: Tensor | None) -> Tensor:
    """Their q: (n, groups, group) uint8 or int8; where s is 0, any will do.

    If d is 1 and m is 0, a block unpacks to s · (q − middle), in whole numbers.
    """
    code, blocks = CODE[kind], blocks.clone()
    blocks[:, code.d : code.d + 2] = torch.tensor([1.0], dtype=torch.float16).view(torch.uint8)
    if code.m is not None:
        blocks[:, code.m : code.m + 2] = 0
    values = LAYOUTS[TYPE_ID[kind]].unpack(blocks).view(len(blocks), -1, code.group)
    if s is not None:
        values = values / s.unsqueeze(-1).float().masked_fill(s.unsqueeze(-1) == 0, 1)
    return values.add_(code.middle).to(torch.int8 if code.bits == (8,) else torch.uint8)


def _in_lanes(rows: Tensor) -> Tensor:
    """(r, …) → (r / 16, …, 16)"""
    return rows.view(-1, LANES, *rows.shape[1:]).movedim(1, -1).contiguous()


def _planes(q: Tensor, bits: Sequence[int]) -> list[Tensor]:
    """Eight codes of w bits are w bytes: code c is in byte c mod w, above those before it.

    (T, N, C, 8 codes, 16) → (T, N, C, w, 16) each
    """
    if tuple(bits) == (8,):
        return [q]
    planes, base = [], 0
    for w in bits:
        some = (q >> base & (1 << w) - 1).view(*q.shape[:3], -1, w, LANES).unbind(3)
        planes.append(reduce(or_, (one << w * place for place, one in enumerate(some))))
        base += w
    return planes


# ── multiplying ───────────────────────────────────────────────────────────────────────────────


def times(x: Tensor, made: Sequence[Tensor], kind: str) -> Tensor:
    """Tokens by a matrix that is `laid`; each code is unpacked once for all of them.

    (M, in) float32 → (M, out)
    """
    code = CODE[kind]
    planes, small = made[: len(code.bits)], made[len(code.bits) :]
    T, B = small[0].shape[:2]
    size = T, B, BLOCKS[TYPE_ID[kind]].values // code.group, code.group // CODES, LANES
    q = [one.view(size) for one in _codes(planes, code.bits)]
    outer = small[0].float()
    step = (outer if code.s is None else outer * small[1]).unsqueeze(3)
    found = []
    for token in x.view(-1, 1, *size[1:4], CODES, 1).unbind(0):
        # Σ (q − middle) · x begins at −middle · Σ x, so that q need not be moved.
        start = (token * -code.middle).sum(-2).expand(size)
        columns = token.expand(*size[:4], CODES, LANES).unbind(-2)
        sums = [start, torch.zeros_like(start)]
        for k, (number, one) in enumerate(zip(columns, q, strict=True)):
            sums[k % CHAINS] = _fma(number, one, sums[k % CHAINS])
        found.append((step * (sums[0] + sums[1])).sum((1, 2, 3)).flatten())
    y = torch.stack(found)
    if code.m is not None:
        low = small[-1].float() if code.least is None else small[-2].float() * small[-1]
        groups = x.view(-1, 1, *size[1:3], code.group, 1).sum(-2)
        y = y - (low * groups).sum((2, 3)).flatten(1)
    return y


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a · b + c, with one rounding."""
    from torch._inductor.inductor_prims import fma  # takes a second, and only compilers come here

    found: Tensor = fma(a, b, c)
    return found


def _codes(planes: Sequence[Tensor], bits: Sequence[int]) -> list[Tensor]:
    """The reverse of `_planes`, for each of eight columns: (T, N, C, 16) float32"""
    if tuple(bits) == (8,):
        return [q.float() for q in planes[0].unbind(3)]
    found: list[Tensor] = []
    base = 0
    for plane, w in zip(planes, bits, strict=True):
        whole = [byte.int() for byte in plane.unbind(3)]
        some = [_cut(one, at, w, base) for at in range(0, 8, w) for one in whole]
        found = [one | other for one, other in zip(found, some, strict=True)] if found else some
        base += w
    return [q.float() for q in found]


def _cut(byte: Tensor, at: int, w: int, base: int) -> Tensor:
    """Bits `at` … `at + w − 1`, moved to `base`: in as few steps as can be."""
    moved = byte << base - at if base > at else byte >> at - base if at > base else byte
    alone = base == 0 and at + w == 8
    return moved if alone else moved & ((1 << w) - 1 << base)
