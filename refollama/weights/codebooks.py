"""Blocks whose bits are no numbers but places in a table: IQ1 … IQ4, MXFP4, NVFP4.

4 bits may choose one of 16 levels; 8 to 11 bits may choose a pattern of 4 or 8 values at once, an
entry of a grid (`grids.py`). Signs of grid entries come from elsewhere. The byte maps are drawn as
in `quants.py`, and rounding follows the same order.

Source: ggml.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refollama.weights import grids
from refollama.weights.fields import fields, half, numbers, scaled


def _pairs(levels: list[int]) -> Tensor:
    """The two levels that a byte chooses, low half first.  → (256, 2) int8"""
    table = torch.tensor(levels, dtype=torch.int8)
    return torch.cartesian_prod(table, table).flip(1)


# Closer together around zero, where most weights lie.
IQ4_LEVELS = _pairs([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])

# Twice the values of a float of 4 bits (1 sign, 2 exponent, 1 mantissa): so all are whole.
FP4_LEVELS = _pairs([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])

# The signs of 8 values that a byte tells: bit i set, value i is negative.  (256, 8)
SIGNS = torch.tensor([[-1 if n >> i & 1 else 1 for i in range(8)] for n in range(256)]).char()

# The same where 7 bits tell them: an even number of them is negative.  (128, 8)
EVEN_SIGNS = SIGNS[[n | n.bit_count() % 2 << 7 for n in range(128)]]

_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _entries(table: Tensor, index: Tensor) -> Tensor:
    """Entries of a table of 2, 4 or 8 values, one after another.  (…, k) → (…, k · width) int8

    An entry is fetched as one number of as many bytes: one step instead of up to eight.
    """
    width = table.shape[1]
    words = table.to(index.device).view(_WORDS[width]).flatten()
    found = words.index_select(0, index.int().flatten()).view(torch.int8)
    return found.view(*index.shape[:-1], index.shape[-1] * width)


def _levels(table: Tensor, q: Tensor) -> Tensor:
    """The levels of low halves, then of high halves.  (…, k) → (…, 2 · k) int8"""
    return _entries(table, q).view(*q.shape, 2).transpose(-1, -2).flatten(-2)


# ── 16 levels ────────────────────────────────────────────────────────────────────────────────────


def iq4_nl(block: Tensor) -> Tensor:
    """byte 0..1   d      float16, step size
    byte 2..17  q[32]  4 bits: low halves are q[0..15], high halves q[16..31]
    value[i] = d · level[q[i]], IQ4                 (n, 18) uint8 → (n, 32) float32.
    """
    q = _levels(IQ4_LEVELS, block[:, 2:])
    return q.float().mul_(half(block, 0))


def iq4_xs(block: Tensor) -> Tensor:
    """byte 0..1    d     float16, step size of the scales
    byte 2..3    h     uint16: bits 2·j and 2·j + 1 are bits 4, 5 of s[j]
    byte 4..7    s[8]  bits 0..3, two to a byte, low half first
    byte 8..135  q     4 bits: 8 groups of 16 bytes, low halves are 16 values, high the next
    value[32·j + k] = d · (s[j] − 32) · level[q], IQ4         (n, 136) uint8 → (n, 256) float32.
    """
    high = fields(numbers(block, 2, 4, torch.int16), range(0, 16, 2), 3)
    s = fields(block[:, 4:8], (0, 4), 15) | high << 4
    q = _levels(IQ4_LEVELS, block[:, 8:].view(-1, 8, 16))  # (n, 8, 32)
    return scaled(q, half(block, 0) * (s - 32))


def mxfp4(block: Tensor) -> Tensor:
    """byte 0      e      exponent: the step size is 2 ** (e − 128)
    byte 1..16  q[32]  4 bits: low halves are q[0..15], high halves q[16..31]
    value[i] = 2 ** (e − 128) · level[q[i]], FP4    (n, 17) uint8 → (n, 32) float32.

    Source: Open Compute Project, "Microscaling Formats (MX)"; here without its NaN, e = 255.
    """
    e = block[:, :1].int()
    # A float32 of exponent field e − 1; for e = 0 and 1 a subnormal one.
    bits = torch.where(e < 2, 0x00200000 << e.clamp(max=1), (e - 1) << 23)
    q = _levels(FP4_LEVELS, block[:, 1:])
    return q.float().mul_(bits.view(torch.float32))


def nvfp4(block: Tensor) -> Tensor:
    """byte 0..3   s[4]  floats of 7 bits (4 exponent, 3 mantissa); 127 counts as 0
    byte 4..35  q     4 bits: 4 groups of 8 bytes, low halves are 8 values, high the next
    value[16·j + k] = s[j] / 2 · level[q], FP4      (n, 36) uint8 → (n, 64) float32.
    """
    s = block[:, :4]
    # The same fields in a float32 are less by the difference of the biases, 127 − 7; ½ is in too.
    step = ((s & 127).int() << 20).view(torch.float32) * 2.0**119
    q = _levels(FP4_LEVELS, block[:, 4:].view(-1, 4, 8))  # (n, 4, 16)
    return scaled(q, step.masked_fill(s == 127, 0))


# ── grids of about 2 bits ────────────────────────────────────────────────────────────────────────


def iq2_xxs(block: Tensor) -> Tensor:
    """byte 0..1   d  float16, step size of the scales
    byte 2..65  8 groups of 32 values, each two uint32:
                first: 4 × 8 bits, numbers of entries
                second: bits 0..27 are 4 × 7 bits of signs, bits 28..31 are s[j]
    value[32·j + k] = d · (½ + s[j]) / 4 · entry · sign       (n, 66) uint8 → (n, 256) float32.
    """
    first, second = numbers(block, 2, 66, torch.int32).view(-1, 8, 2).unbind(-1)  # (n, 8) each
    signs = _entries(EVEN_SIGNS, fields(second, (0, 7, 14, 21), 127))  # (n, 256)
    q = _entries(grids.IQ2_XXS, fields(first, (0, 8, 16, 24), 255)) * signs
    step = half(block, 0) * (0.5 + fields(second, (28,), 15)) * 0.25
    return scaled(q.view(-1, 8, 32), step)


def iq2_xs(block: Tensor) -> Tensor:
    """byte 0..1    d      float16, step size of the scales
    byte 2..65   q[32]  uint16: bits 0..8 number of an entry, bits 9..15 its signs
    byte 66..73  s[16]  4 bits, two to a byte, low half first
    value[16·j + k] = d · (½ + s[j]) / 4 · entry · sign       (n, 74) uint8 → (n, 256) float32.
    """
    word = numbers(block, 2, 66, torch.int16)
    signs = _entries(EVEN_SIGNS, fields(word, (9,), 127))
    q = _entries(grids.IQ2_XS, fields(word, (0,), 511)) * signs
    step = half(block, 0) * (0.5 + fields(block[:, 66:74], (0, 4), 15)) * 0.25
    return scaled(q.view(-1, 16, 16), step)


def iq2_s(block: Tensor) -> Tensor:
    """byte 0..1    d      float16, step size of the scales
    byte 2..33   q[32]  number of an entry, bits 0..7
    byte 34..65  signs of 32 entries
    byte 66..73  bits 8, 9 of q, four to a byte, lowest first
    byte 74..81  s[16]  4 bits, two to a byte, low half first
    value[16·j + k] = d · (½ + s[j]) / 4 · entry · sign       (n, 82) uint8 → (n, 256) float32.
    """
    index = block[:, 2:34] | fields(block[:, 66:74], (0, 2, 4, 6), 3) << 8
    q = _entries(grids.IQ2_S, index) * _entries(SIGNS, block[:, 34:66])
    step = half(block, 0) * (0.5 + fields(block[:, 74:82], (0, 4), 15)) * 0.25
    return scaled(q.view(-1, 16, 16), step)


# ── grids of about 3 bits ────────────────────────────────────────────────────────────────────────


def iq3_xxs(block: Tensor) -> Tensor:
    """byte 0..1    d      float16, step size of the scales
    byte 2..65   q[64]  number of an entry of 4 values
    byte 66..97  8 × uint32: bits 0..27 are 4 × 7 bits of signs, bits 28..31 are s[j]
    value[32·j + k] = d · (½ + s[j]) / 2 · entry · sign       (n, 98) uint8 → (n, 256) float32.
    """
    word = numbers(block, 66, 98, torch.int32)
    signs = _entries(EVEN_SIGNS, fields(word, (0, 7, 14, 21), 127))  # (n, 256)
    q = _entries(grids.IQ3_XXS, block[:, 2:66]) * signs
    step = half(block, 0) * (0.5 + fields(word, (28,), 15)) * 0.5
    return scaled(q.view(-1, 8, 32), step)


def iq3_s(block: Tensor) -> Tensor:
    """byte 0..1      d      float16, step size of the scales
    byte 2..65     q[64]  number of an entry of 4 values, bits 0..7
    byte 66..73    bit 8 of q, eight to a byte, lowest first
    byte 74..105   signs of 8 values each
    byte 106..109  s[8]   4 bits, two to a byte, low half first
    value[32·j + k] = d · (1 + 2 · s[j]) · entry · sign       (n, 110) uint8 → (n, 256) float32.
    """
    index = block[:, 2:66] | fields(block[:, 66:74], range(8), 1) << 8
    q = _entries(grids.IQ3_S, index) * _entries(SIGNS, block[:, 74:106])
    step = half(block, 0) * (1 + 2 * fields(block[:, 106:110], (0, 4), 15))
    return scaled(q.view(-1, 8, 32), step)


# ── grids of about 1 bit: −1, 0, 1, all a little up or all a little down ─────────────────────────


def iq1_s(block: Tensor) -> Tensor:
    """byte 0..1    d      float16, step size of the scales
    byte 2..33   q[32]  number of an entry, bits 0..7
    byte 34..49  h[8]   uint16: bits 0..11 are bits 8..10 of q[4·j … 4·j + 3], bits 12..14 are s[j],
                        bit 15 set: shift[j] is −⅛, else ⅛
    value[32·j + k] = d · (2 · s[j] + 1) · (entry + shift[j])     (n, 50) uint8 → (n, 256) float32.
    """
    h = numbers(block, 34, 50, torch.int16)
    index = block[:, 2:34] | fields(h, (0, 3, 6, 9), 7) << 8
    shift = 0.125 - 0.25 * fields(h, (15,), 1)  # (n, 8)
    q = _entries(grids.IQ1, index).view(-1, 8, 32) + shift.unsqueeze(-1)
    return scaled(q, half(block, 0) * (2 * fields(h, (12,), 7) + 1))


def iq1_m(block: Tensor) -> Tensor:
    """byte 0..31   q[32]  number of an entry, bits 0..7
    byte 32..47  4 bits for each entry, low half first: bits 8..10 of q; bit 3 set: shift is −⅛
    byte 48..55  4 × uint16: bits 0..11 are 4 × 3 bits of s[16]; bits 12..15 are a quarter of
                 d, float16, lowest first
    value[16·j + k] = d · (2 · s[j] + 1) · (entry + shift)    (n, 56) uint8 → (n, 256) float32.
    """
    h = fields(block[:, 32:48], (0, 4), 15)  # (n, 32)
    shift = 0.125 - 0.25 * (h >> 3)
    q = _entries(grids.IQ1, block[:, :32] | (h & 7) << 8).view(-1, 32, 8) + shift.unsqueeze(-1)
    quarters = block[:, 49:56:2] >> 4  # (n, 4)
    d = (quarters[:, ::2] | quarters[:, 1::2] << 4).view(torch.float16).float()
    s = fields(numbers(block, 48, 56, torch.int16), (0, 3, 6, 9), 7)
    return scaled(q.view(-1, 16, 16), d * (2 * s + 1))
