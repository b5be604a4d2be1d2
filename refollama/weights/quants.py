"""What do the bytes of a tensor mean?  One function per block layout, and one table of them.

A tensor stays packed: (rows, row_bytes) uint8, a view on the mapped file. `Layout.unpack_rows`
turns packed rows into float32, on whatever device the bytes are; `pack` goes the other way.

Formats that look values up in tables have a page of their own, `codebooks.py`; so has packing.

In the byte maps below, `byte 0..1  d` means that d stands in the bytes 0 and 1 of each block, i
counts its values, and scalars of several bytes are little-endian, as is every machine that torch
is released for. All arithmetic is float32 in the order written: scale · sub-scale first, then ·
quant, then − minimum. So the values equal those of ggml bit for bit.

Source: ggml.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from refollama.weights import codebooks, packing
from refollama.weights.blocks import BLOCKS, TYPE_ID, Block
from refollama.weights.fields import half, nibbles, numbers, scaled, shifted
from refollama.weights.gguf import GGUF, TensorInfo


@dataclass(frozen=True, slots=True)
class Layout:
    """A block type, and what its bytes mean."""

    block: Block
    unpack: Callable[[Tensor], Tensor]  # (n, nbytes) uint8 → (n, values) float32
    words: tuple[tuple[int, int], ...]  # (first byte, width) of each scalar of several bytes
    # (n, values) float32 and, where it can use them, as many weights → (n, nbytes) uint8
    pack: Callable[..., Tensor] | None = None

    @property
    def name(self) -> str:
        return self.block.name

    def unpack_rows(self, data: Tensor) -> Tensor:
        """Packed rows → values.  (…, row_bytes) uint8 → (…, cols) float32

        F32 comes back as a view of `data`, all others as new memory.
        """
        n, cols = data.numel() // self.block.nbytes, self.columns(data)
        return self.unpack(data.reshape(n, self.block.nbytes)).view(*data.shape[:-1], cols)

    def columns(self, data: Tensor) -> int:
        """How many values a packed row has.  (…, row_bytes) uint8"""
        return data.shape[-1] // self.block.nbytes * self.block.values

    def pack_rows(self, values: Tensor, importance: Tensor | None = None) -> Tensor:
        """Values → packed rows.  (…, cols) float32 → (…, row_bytes) uint8

        importance: how much an error in each column matters, (cols,), or (E, cols) for values of
        (E, rows, cols). Layouts without a choice make no use of it.
        """
        assert self.pack is not None, f"{self.name} cannot be packed"
        n = values.numel() // self.block.values
        row_bytes = values.shape[-1] // self.block.values * self.block.nbytes
        given = [values.float()]
        if importance is not None and self.pack in packing.WEIGHING:
            given.append(_weights(importance).unsqueeze(-2).expand(values.shape))
        blocks = self.pack(*(each.reshape(n, self.block.values) for each in given))
        return blocks.reshape(*values.shape[:-1], row_bytes)

    def swapped(self, data: Tensor) -> Tensor:
        """A copy in the other byte order.  (…, row_bytes) uint8 → the same shape"""
        blocks = data.reshape(data.numel() // self.block.nbytes, self.block.nbytes).clone()
        for start, width in self.words:
            blocks[:, start : start + width] = blocks[:, start : start + width].flip(1)
        return blocks.view(data.shape)


FAINTEST = 1e-4  # the least weight of a column; all have 1 on average


# ── plain numbers ────────────────────────────────────────────────────────────────────────────────


def f32(block: Tensor) -> Tensor:
    """byte 0..3  value, float32                    (n, 4) uint8 → (n, 1) float32, a view."""
    return block.view(torch.float32)


def f16(block: Tensor) -> Tensor:
    """byte 0..1  value, float16                    (n, 2) uint8 → (n, 1) float32."""
    return block.view(torch.float16).float()


def bf16(block: Tensor) -> Tensor:
    """byte 0..1  value, the upper half of a float32          (n, 2) uint8 → (n, 1) float32."""
    return block.view(torch.bfloat16).float()


def f64(block: Tensor) -> Tensor:
    """byte 0..7  value, float64, rounded here                (n, 8) uint8 → (n, 1) float32."""
    return block.view(torch.float64).float()


def i8(block: Tensor) -> Tensor:
    """byte 0     value, int8                       (n, 1) uint8 → (n, 1) float32."""
    return block.view(torch.int8).float()


def i16(block: Tensor) -> Tensor:
    """byte 0..1  value, int16                      (n, 2) uint8 → (n, 1) float32."""
    return block.view(torch.int16).float()


def i32(block: Tensor) -> Tensor:
    """byte 0..3  value, int32, rounded beyond 2 ** 24        (n, 4) uint8 → (n, 1) float32."""
    return block.view(torch.int32).float()


def i64(block: Tensor) -> Tensor:
    """byte 0..7  value, int64, rounded beyond 2 ** 24        (n, 8) uint8 → (n, 1) float32."""
    return block.view(torch.int64).float()


# ── blocks of 32: one scale, perhaps one minimum ─────────────────────────────────────────────────


def q4_0(block: Tensor) -> Tensor:
    """byte 0..1   d      float16, step size
    byte 2..17  q[32]  4 bits: low halves are q[0..15], high halves q[16..31]
    value[i] = d · (q[i] − 8)                       (n, 18) uint8 → (n, 32) float32.
    """
    q = nibbles(block[:, 2:]).flatten(1).float()
    return q.sub_(8).mul_(half(block, 0))


def q4_1(block: Tensor) -> Tensor:
    """byte 0..1   d      float16, step size
    byte 2..3   m      float16, minimum
    byte 4..19  q[32]  4 bits: low halves are q[0..15], high halves q[16..31]
    value[i] = d · q[i] + m                         (n, 20) uint8 → (n, 32) float32.
    """
    q = nibbles(block[:, 4:]).flatten(1).float()
    return q.mul_(half(block, 0)).add_(half(block, 2))


def _fifth_bits(h: Tensor) -> Tensor:
    """Bit i of 32 bits, worth 16, for each value i.  (n, 4) uint8 → (n, 32)"""
    bits = torch.arange(8, dtype=torch.uint8, device=h.device)
    return (((h.unsqueeze(-1) >> bits) & 1) << 4).flatten(1)


def q5_0(block: Tensor) -> Tensor:
    """byte 0..1   d      float16, step size
    byte 2..5   h      uint32, bit i is bit 4 of q[i]
    byte 6..21  q[32]  bits 0..3: low halves are q[0..15], high halves q[16..31]
    value[i] = d · (q[i] − 16)                      (n, 22) uint8 → (n, 32) float32.
    """
    q = nibbles(block[:, 6:]).flatten(1) | _fifth_bits(block[:, 2:6])
    return q.float().sub_(16).mul_(half(block, 0))


def q5_1(block: Tensor) -> Tensor:
    """byte 0..1   d      float16, step size
    byte 2..3   m      float16, minimum
    byte 4..7   h      uint32, bit i is bit 4 of q[i]
    byte 8..23  q[32]  bits 0..3: low halves are q[0..15], high halves q[16..31]
    value[i] = d · q[i] + m                         (n, 24) uint8 → (n, 32) float32.
    """
    q = nibbles(block[:, 8:]).flatten(1) | _fifth_bits(block[:, 4:8])
    return q.float().mul_(half(block, 0)).add_(half(block, 2))


def q8_0(block: Tensor) -> Tensor:
    """byte 0..1   d      float16, step size
    byte 2..33  q[32]  int8
    value[i] = d · q[i]                             (n, 34) uint8 → (n, 32) float32.
    """
    return block[:, 2:].view(torch.int8).float().mul_(half(block, 0))


def q8_1(block: Tensor) -> Tensor:
    """byte 0..1   d      float16, step size
    byte 2..3          float16, d · sum of q: for products, no value needs it
    byte 4..35  q[32]  int8
    value[i] = d · q[i]                             (n, 36) uint8 → (n, 32) float32.
    """
    return block[:, 4:].view(torch.int8).float().mul_(half(block, 0))


# ── one or two bits: signs, and the three values −d, 0, d ────────────────────────────────────────


def q1_0(block: Tensor) -> Tensor:
    """byte 0..1   d       float16
    byte 2..17  q[128]  1 bit, lowest first
    value[i] = d if q[i] else −d                    (n, 18) uint8 → (n, 128) float32.
    """
    bits = torch.arange(8, dtype=torch.uint8, device=block.device)
    q = (block[:, 2:].unsqueeze(-1) >> bits) & 1  # (n, 16, 8)
    return q.flatten(1).float().mul_(2).sub_(1).mul_(half(block, 0))


def tq1_0(block: Tensor) -> Tensor:
    """byte 0..47   5 ternary digits each: 5 runs of 32 values from 32 bytes, 5 of 16 from 16
    byte 48..51  4 ternary digits each: 4 runs of 4 values
    byte 52..53  d  float16
    value[i] = d · (digit − 1)                      (n, 54) uint8 → (n, 256) float32.
    """
    parts = ((0, 32, 5), (32, 48, 5), (48, 52, 4))
    q = torch.cat([_digits(block[:, start:stop], count) for start, stop, count in parts], dim=1)
    return q.float().sub_(1).mul_(half(block, 52))


def _digits(b: Tensor, count: int) -> Tensor:
    """The first ternary digits after the point of b / 256.  (n, k) uint8 → (n, count · k) int16

    Digit i is the whole part of 3 · fraction(b · 3 ** i / 256); a byte keeps just the fraction.
    """
    powers = torch.tensor([3**i for i in range(count)], dtype=torch.uint8, device=b.device)
    return ((b.unsqueeze(1) * powers.unsqueeze(-1)).short() * 3 >> 8).flatten(1)


def tq2_0(block: Tensor) -> Tensor:
    """byte 0..63   q  2 bits: two groups of 32 bytes, in each 4 runs of 32 values, lowest first
    byte 64..65  d  float16
    value[i] = d · (q[i] − 1)                       (n, 66) uint8 → (n, 256) float32.
    """
    q = shifted(block[:, :64].view(-1, 2, 32), 2, 3)  # (n, 2, 4, 32)
    return q.flatten(1).float().sub_(1).mul_(half(block, 64))


# ── blocks of 256: sub-blocks of 16 or 32 with small scales of their own ─────────────────────────


def q2_k(block: Tensor) -> Tensor:
    """byte 0..15   s[16]  low half: scale, high half: minimum, of sub-blocks of 16
    byte 16..79  q      2 bits: two groups of 32 bytes, in each 4 runs of 32 values, lowest first
    byte 80..81  d      float16, step size of the scales
    byte 82..83  m      float16, step size of the minima
    value[16·j + k] = d · scale[j] · q − m · minimum[j]       (n, 84) uint8 → (n, 256) float32.
    """
    scale, minimum = block[:, :16] & 15, block[:, :16] >> 4  # (n, 16)
    q = shifted(block[:, 16:80].view(-1, 2, 32), 2, 3)  # (n, 2, 4, 32)
    step, low = half(block, 80) * scale, half(block, 82) * minimum
    return scaled(q.view(-1, 16, 16), step, low)


def q3_k(block: Tensor) -> Tensor:
    """byte 0..31     h   1 bit: bit j of byte k is bit 2 of value[32·j + k]
    byte 32..95    q   bits 0, 1: two groups of 32 bytes, in each 4 runs of 32 values
    byte 96..107   s   16 scales of 6 bits: `six_bits`
    byte 108..109  d   float16, step size of the scales
    value[16·j + k] = d · (s[j] − 32) · (q − 4)     (n, 110) uint8 → (n, 256) float32.
    """
    high = shifted(block[:, :32], 1, 1)  # (n, 8, 32)
    q = shifted(block[:, 32:96].view(-1, 2, 32), 2, 3).view(-1, 8, 32) | high << 2
    step = half(block, 108) * six_bits(block[:, 96:108]).float().sub_(32)
    return scaled(q.view(-1, 16, 16).view(torch.int8) - 4, step)


def six_bits(s: Tensor) -> Tensor:
    """byte 0..7   bits 0..3: low halves are s[0..7], high halves s[8..15]
    byte 8..11  bits 4, 5: byte k holds those of s[k], s[4 + k], s[8 + k], s[12 + k], lowest first
    (n, 12) uint8 → (n, 16)
    """
    low, high = nibbles(s[:, :8]), shifted(s[:, 8:], 2, 3)  # (n, 2, 8), (n, 4, 4)
    return low.flatten(1) | high.flatten(1) << 4


def q4_k(block: Tensor) -> Tensor:
    """byte 0..1     d   float16, step size of the scales
    byte 2..3     m   float16, step size of the minima
    byte 4..15        8 scales and 8 minima of 6 bits: `scales_and_minima`
    byte 16..143  q   4 bits: 4 groups of 32 bytes, low halves are 32 values, high halves the next
    value[32·j + k] = d · scale[j] · q − m · minimum[j]       (n, 144) uint8 → (n, 256) float32.
    """
    scale, minimum = scales_and_minima(block[:, 4:16])
    q = nibbles(block[:, 16:].view(-1, 4, 32))  # (n, 4, 2, 32)
    return scaled(q.view(-1, 8, 32), half(block, 0) * scale, half(block, 2) * minimum)


def q5_k(block: Tensor) -> Tensor:
    """byte 0..1     d   float16, step size of the scales
    byte 2..3     m   float16, step size of the minima
    byte 4..15        8 scales and 8 minima of 6 bits: `scales_and_minima`
    byte 16..47   h   1 bit: bit j of byte k is bit 4 of value[32·j + k]
    byte 48..175  q   bits 0..3: 4 groups of 32 bytes, low halves are 32 values, high the next
    value[32·j + k] = d · scale[j] · q − m · minimum[j]       (n, 176) uint8 → (n, 256) float32.
    """
    scale, minimum = scales_and_minima(block[:, 4:16])
    high = shifted(block[:, 16:48], 1, 1)  # (n, 8, 32)
    q = nibbles(block[:, 48:].view(-1, 4, 32)).view(-1, 8, 32) | high << 4
    return scaled(q, half(block, 0) * scale, half(block, 2) * minimum)


def scales_and_minima(s: Tensor) -> tuple[Tensor, Tensor]:
    """byte 0..3   bits 0..5: scale[0..3],   bits 6, 7: bits 4, 5 of scale[4..7]
    byte 4..7   bits 0..5: minimum[0..3], bits 6, 7: bits 4, 5 of minimum[4..7]
    byte 8..11  low half: bits 0..3 of scale[4..7], high half: of minimum[4..7]
    (n, 12) uint8 → (n, 8), (n, 8)
    """
    a, b, c = s[:, :4], s[:, 4:8], s[:, 8:]
    scale = torch.cat((a & 63, c & 15 | a >> 6 << 4), dim=1)
    minimum = torch.cat((b & 63, c >> 4 | b >> 6 << 4), dim=1)
    return scale, minimum


def q6_k(block: Tensor) -> Tensor:
    """byte 0..127    q       bits 0..3: two groups of 64 bytes; low halves 64 values, high the next
    byte 128..191  h       bits 4, 5: two groups of 32 bytes, in each 4 runs of 32, lowest first
    byte 192..207  s[16]   int8, scales of sub-blocks of 16
    byte 208..209  d       float16, step size of the scales
    value[16·j + k] = d · s[j] · (q − 32)           (n, 210) uint8 → (n, 256) float32.
    """
    high = shifted(block[:, 128:192].view(-1, 2, 32), 2, 3)  # (n, 2, 4, 32)
    low = nibbles(block[:, :128].view(-1, 2, 64))  # (n, 2, 2, 64)
    q = low.view(-1, 16, 16) | (high << 4).view(-1, 16, 16)
    step = half(block, 208) * block[:, 192:208].view(torch.int8)
    return scaled(q.view(torch.int8) - 32, step)


def q8_k(block: Tensor) -> Tensor:
    """byte 0..3      d       float32, step size
    byte 4..259    q[256]  int8
    byte 260..291          16 × int16, sums of 16 q each: for products, no value needs them
    value[i] = d · q[i]                             (n, 292) uint8 → (n, 256) float32.
    """
    return block[:, 4:260].view(torch.int8).float().mul_(numbers(block, 0, 4, torch.float32))


# ── the table ────────────────────────────────────────────────────────────────────────────────────


def _words(start: int, count: int, width: int) -> tuple[tuple[int, int], ...]:
    """Some numbers of several bytes in a row."""
    return tuple((start + i * width, width) for i in range(count))


_HALF = _words(0, 1, 2)
_TWO_HALVES = _words(0, 2, 2)

LAYOUTS: Mapping[int, Layout] = {
    TYPE_ID[name]: Layout(BLOCKS[TYPE_ID[name]], unpack, words, pack_blocks)
    for name, unpack, words, pack_blocks in (
        ("F32", f32, _words(0, 1, 4), packing.f32),
        ("F16", f16, _HALF, packing.f16),
        ("BF16", bf16, _HALF, packing.bf16),
        ("F64", f64, _words(0, 1, 8), None),
        ("I8", i8, (), None),
        ("I16", i16, _words(0, 1, 2), None),
        ("I32", i32, _words(0, 1, 4), None),
        ("I64", i64, _words(0, 1, 8), None),
        ("Q4_0", q4_0, _HALF, packing.q4_0),
        ("Q4_1", q4_1, _TWO_HALVES, packing.q4_1),
        ("Q5_0", q5_0, (*_HALF, (2, 4)), packing.q5_0),
        ("Q5_1", q5_1, (*_TWO_HALVES, (4, 4)), packing.q5_1),
        ("Q8_0", q8_0, _HALF, packing.q8_0),
        ("Q8_1", q8_1, _TWO_HALVES, None),
        ("Q1_0", q1_0, _HALF, None),
        ("TQ1_0", tq1_0, _words(52, 1, 2), None),
        ("TQ2_0", tq2_0, _words(64, 1, 2), None),
        ("Q2_K", q2_k, _words(80, 2, 2), packing.q2_k),
        ("Q3_K", q3_k, _words(108, 1, 2), packing.q3_k),
        ("Q4_K", q4_k, _TWO_HALVES, packing.q4_k),
        ("Q5_K", q5_k, _TWO_HALVES, packing.q5_k),
        ("Q6_K", q6_k, _words(208, 1, 2), packing.q6_k),
        ("Q8_K", q8_k, (*_words(0, 1, 4), *_words(260, 16, 2)), None),
        ("IQ4_NL", codebooks.iq4_nl, _HALF, None),
        ("IQ4_XS", codebooks.iq4_xs, _words(0, 2, 2), None),
        ("MXFP4", codebooks.mxfp4, (), None),
        ("NVFP4", codebooks.nvfp4, (), None),
        ("IQ2_XXS", codebooks.iq2_xxs, (*_HALF, *_words(2, 16, 4)), None),
        ("IQ2_XS", codebooks.iq2_xs, _words(0, 33, 2), None),
        ("IQ2_S", codebooks.iq2_s, _HALF, None),
        ("IQ3_XXS", codebooks.iq3_xxs, (*_HALF, *_words(66, 8, 4)), None),
        ("IQ3_S", codebooks.iq3_s, _HALF, None),
        ("IQ1_S", codebooks.iq1_s, (*_HALF, *_words(34, 8, 2)), None),
        ("IQ1_M", codebooks.iq1_m, _words(48, 4, 2), None),
    )
}


def pack(values: Tensor, type: str, importance: Tensor | None = None) -> Tensor:
    """Values → packed rows of a type such as "Q8_0".  (…, cols) → (…, row_bytes) uint8

    importance: see `Layout.pack_rows`.
    """
    return LAYOUTS[TYPE_ID[type]].pack_rows(values, importance)


def _weights(importance: Tensor) -> Tensor:
    """Around 1, and nowhere 0: a column that never mattered in a sample may matter elsewhere."""
    mean = importance.float().mean(-1, keepdim=True)
    return torch.where(mean > 0, importance / mean, 1.0).clamp(min=FAINTEST)


# ── tensors ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, eq=False)  # eq=False: tensors do not compare to one truth value
class QuantTensor:
    """A tensor as it lies in the file: its bytes, and what they mean."""

    name: str
    shape: tuple[int, ...]
    type: str  # such as "Q4_0"
    data: Tensor  # (*shape[:-1], row_bytes) uint8, a view on the mapped file

    @property
    def layout(self) -> Layout:
        """How to unpack it."""
        return LAYOUTS[TYPE_ID[self.type]]

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, of `shape`.  F32 in float32 is a view of `data`; writing to it changes it."""
        return self.layout.unpack_rows(self.data).view(self.shape).to(dtype)


class Weights(Mapping[str, QuantTensor]):
    """The tensors of an open file by name, each made when asked for.  Nothing is read before."""

    def __init__(self, gguf: GGUF) -> None:
        self.gguf = gguf

    def __getitem__(self, name: str) -> QuantTensor:
        info = self.gguf.tensors[name]
        return QuantTensor(name, info.shape, BLOCKS[info.type].name, self._rows(info))

    def __iter__(self) -> Iterator[str]:
        return iter(self.gguf.tensors)

    def __len__(self) -> int:
        return len(self.gguf.tensors)

    def _rows(self, info: TensorInfo) -> Tensor:
        """(*shape[:-1], row_bytes) uint8; a view wherever the bytes can be used as they stand."""
        rows, block = info.shape[:-1], BLOCKS[info.type]
        data = torch.from_numpy(self.gguf.bytes_of(info.name))
        data = data.view(*rows, info.nbytes // math.prod(rows))
        if self.gguf.byteorder == ">":
            return LAYOUTS[info.type].swapped(data)
        # Plain numbers are computed with where they lie, and not every processor can do that at
        # an address that is no multiple of their width. A file may have an alignment of 1.
        misplaced = block.values == 1 and data.data_ptr() % block.nbytes
        return data.clone() if misplaced else data
