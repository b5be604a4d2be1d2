"""How do values become blocks?  The inverse of `quants.py`, as far as packing is built.

Each function takes blocks of float32 and gives their bytes as drawn there. The simple layouts are
packed by rule and byte for byte as ggml does it. The layouts with sub-scales leave a choice, and
here it is made for the least squared error: first a scale for each sub-block by trying several,
then the scales are packed themselves, then every value is rounded once more by what is stored.

Source: ggml.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

# ── plain numbers ────────────────────────────────────────────────────────────────────────────────


def f32(values: Tensor) -> Tensor:
    """(n, 1) float32 → (n, 4) uint8"""
    return _bytes(values)


def f16(values: Tensor) -> Tensor:
    """(n, 1) float32 → (n, 2) uint8"""
    return _bytes(values.half())


def bf16(values: Tensor) -> Tensor:
    """(n, 1) float32 → (n, 2) uint8"""
    return _bytes(values.bfloat16())


# ── blocks of 32: one scale, perhaps one minimum ─────────────────────────────────────────────────


def q4_0(values: Tensor) -> Tensor:
    """The value farthest from zero becomes −8 · d exactly.  (n, 32) float32 → (n, 18) uint8"""
    farthest = values.gather(1, values.abs().argmax(1, keepdim=True))
    d = farthest / -8
    q = (values * _inverse(d) + 8.5).trunc().clamp(0, 15).to(torch.uint8)
    return torch.cat((_bytes(d.half()), _joined(q)), dim=1)


def q4_1(values: Tensor) -> Tensor:
    """15 steps from the least value to the greatest.  (n, 32) float32 → (n, 20) uint8"""
    d, m, q = _ranged(values, 15)
    return torch.cat((_bytes(d), _bytes(m), _joined(q)), dim=1)


def q5_0(values: Tensor) -> Tensor:
    """The value farthest from zero becomes −16 · d exactly.  (n, 32) float32 → (n, 22) uint8"""
    farthest = values.gather(1, values.abs().argmax(1, keepdim=True))
    d = farthest / -16
    q = (values * _inverse(d) + 16.5).trunc().clamp(0, 31).to(torch.uint8)
    return torch.cat((_bytes(d.half()), _packed_fifths(q), _joined(q)), dim=1)


def q5_1(values: Tensor) -> Tensor:
    """31 steps from the least value to the greatest.  (n, 32) float32 → (n, 24) uint8"""
    d, m, q = _ranged(values, 31)
    return torch.cat((_bytes(d), _bytes(m), _packed_fifths(q), _joined(q)), dim=1)


def _ranged(values: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Step size and least value as float16 (n, 1), quants uint8 (n, 32)."""
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    d = (high - low) / steps
    q = ((values - low) * _inverse(d) + 0.5).trunc().clamp(0, steps).to(torch.uint8)
    return d.half(), low.half(), q


def _packed_fifths(q: Tensor) -> Tensor:
    """Bit 4 of 32 values: the inverse of `_fifth_bits`.  (n, 32) uint8 → (n, 4)"""
    bits = torch.arange(8, dtype=torch.uint8, device=q.device)
    return ((q >> 4).view(-1, 4, 8) << bits).sum(-1, dtype=torch.uint8)


def q8_0(values: Tensor) -> Tensor:
    """The value farthest from zero becomes ±127.  (n, 32) float32 → (n, 34) uint8"""
    d = values.abs().amax(1, keepdim=True) / 127
    q = values * _inverse(d)
    q = (q.abs() + 0.5).floor().copysign(q)  # halves away from zero, as C rounds; torch: to even
    return torch.cat((_bytes(d.half()), _bytes(q.to(torch.int8))), dim=1)


# ── blocks of 256 without minima: value = d · s[j] · q ───────────────────────────────────────────


def q3_k(values: Tensor) -> Tensor:
    """16 sub-blocks, scales of 6 bits, quants −4 … 3.  (n, 256) float32 → (n, 110) uint8"""
    d, s, q = _scaled(values.view(-1, 16, 16), 32, 4)
    s, q = (s + 32).byte(), (q + 4).byte().flatten(1)
    high = _stacked((q >> 2).view(-1, 8, 32), 1)  # (n, 32)
    low = _stacked((q & 3).view(-1, 2, 4, 32), 2)  # (n, 2, 32)
    s_high = _stacked((s >> 4).view(-1, 4, 4), 2)
    return torch.cat((high, low.flatten(1), _joined(s), s_high, _bytes(d)), dim=1)


def q6_k(values: Tensor) -> Tensor:
    """16 sub-blocks, scales of 8 bits, quants −32 … 31.  (n, 256) float32 → (n, 210) uint8"""
    d, s, q = _scaled(values.view(-1, 16, 16), 128, 32)
    q = (q + 32).byte().view(-1, 2, 128)
    low = _joined(q)  # (n, 2, 64)
    high = _stacked((q >> 4).view(-1, 2, 4, 32), 2)  # (n, 2, 32)
    return torch.cat((low.flatten(1), high.flatten(1), _bytes(s.char()), _bytes(d)), dim=1)


def _scaled(x: Tensor, top: int, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """d: float16 (n, 1); scales −top … top − 1: (n, j); quants −limit … limit − 1: as x, (n, j, k)

    A scale that had to be rounded may be better rounded the other way.
    """
    scales = _scales(x, limit)
    d = (_farthest(scales) / -top).half()
    rounded = (scales * _inverse(d.float())).round()
    near = [(rounded + by).clamp(-top, top - 1) for by in (0, -1, 1)]
    errors = [_nearest(x, d * s, None, (-limit, limit - 1))[1] for s in near]
    (s,) = _best(errors, near)
    return d, s, _nearest(x, d * s, None, (-limit, limit - 1))[0]


def _scales(x: Tensor, limit: int) -> Tensor:
    """The scale of each sub-block for quants −limit … limit − 1, not rounded.  (n, j, k) → (n, j)

    For given quants q the best scale is Σxq / Σq², and it takes (Σxq)² / Σq² off the error Σx².
    """
    unit = _inverse(_farthest(x))
    errors, scales = [], []
    for step in range(-9, 10):
        q = (x * (unit * -(limit + step / 10))).round().clamp(-limit, limit - 1)
        xq = (x * q).sum(-1)
        scales.append(xq * _inverse(q.square().sum(-1)))
        errors.append(-xq * scales[-1])
    return _best(errors, scales)[0]


def _farthest(x: Tensor) -> Tensor:
    """The value farthest from zero, with its sign.  (…, k) → (…, 1)"""
    return x.gather(-1, x.abs().argmax(-1, keepdim=True))


# ── blocks of 256 with minima: value = d · scale[j] · q − m · minimum[j] ─────────────────────────


def q2_k(values: Tensor) -> Tensor:
    """16 sub-blocks, scales and minima of 4 bits, quants 0 … 3.  (n, 256) → (n, 84) uint8"""
    d, m, scale, minimum, q = _lined(values.view(-1, 16, 16), 15, 3)
    low = _stacked(q.view(-1, 2, 4, 32), 2)  # (n, 2, 32)
    return torch.cat((scale | minimum << 4, low.flatten(1), _bytes(d), _bytes(m)), dim=1)


def q4_k(values: Tensor) -> Tensor:
    """8 sub-blocks, scales and minima of 6 bits, quants 0 … 15.  (n, 256) → (n, 144) uint8"""
    d, m, scale, minimum, q = _lined(values.view(-1, 8, 32), 63, 15)
    low = _joined(q.view(-1, 4, 64))  # (n, 4, 32)
    s = _joined_scales(scale, minimum)
    return torch.cat((_bytes(d), _bytes(m), s, low.flatten(1)), dim=1)


def q5_k(values: Tensor) -> Tensor:
    """8 sub-blocks, scales and minima of 6 bits, quants 0 … 31.  (n, 256) → (n, 176) uint8"""
    d, m, scale, minimum, q = _lined(values.view(-1, 8, 32), 63, 31)
    low, high = _joined(q.view(-1, 4, 64)), _stacked(q >> 4, 1)  # (n, 4, 32), (n, 32)
    s = _joined_scales(scale, minimum)
    return torch.cat((_bytes(d), _bytes(m), s, high, low.flatten(1)), dim=1)


def _joined_scales(scale: Tensor, minimum: Tensor) -> Tensor:
    """8 scales and 8 minima of 6 bits: the inverse of `quants._scales_and_minima`.  → (n, 12)"""
    first = (part[:, :4] | part[:, 4:] >> 4 << 6 for part in (scale, minimum))
    return torch.cat((*first, scale[:, 4:] & 15 | minimum[:, 4:] << 4), dim=1)


def _lined(x: Tensor, top: int, limit: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """d, m: float16 (n, 1); scales, minima 0 … top: uint8 (n, j); quants 0 … limit: as x (n, j, k)

    Scales and minima that had to be rounded may be better rounded the other way.
    """
    pair = _lines(x, limit)
    d, m = ((part.amax(1, keepdim=True) / top).half() for part in pair)
    rounded = [
        (part * _inverse(unit.float())).round() for part, unit in zip(pair, (d, m), strict=True)
    ]
    near = [[(part + by).clamp(0, top) for by in (0, -1, 1)] for part in rounded]
    both = list(itertools.product(*near))
    errors = [_nearest(x, d * scale, m * minimum, (0, limit))[1] for scale, minimum in both]
    scale, minimum = _best(errors, *zip(*both, strict=True))
    q, _ = _nearest(x, d * scale, m * minimum, (0, limit))
    return d, m, scale.byte(), minimum.byte(), q.byte()


def _lines(x: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Scale and minimum of each sub-block for quants 0 … limit, not rounded.  (n, j, k) → 2 (n, j)

    For given quants the best line through the values is that of least squares; one that would
    start above zero cannot be stored, and is drawn through zero instead.
    """
    k, sx = x.shape[-1], x.sum(-1)
    least = x.amin(-1, keepdim=True).clamp(max=0)
    unit = _inverse(x.amax(-1, keepdim=True) - least)
    errors, scales, minima = [], [], []
    for step in range(-10, 11):
        q = ((x - least) * (unit * (limit + step / 10))).round().clamp(0, limit)
        sq, sqq, sxq = q.sum(-1), q.square().sum(-1), (x * q).sum(-1)
        scale = (k * sxq - sx * sq) * _inverse(k * sqq - sq.square())
        minimum = (scale * sq - sx) / k
        scale = torch.where(minimum < 0, sxq * _inverse(sqq), scale).clamp(min=0)
        scales.append(scale)
        minima.append(minimum.clamp(min=0))
        errors.append(_error(x, q, scale, minima[-1]))
    scale, minimum = _best(errors, scales, minima)
    return scale, minimum


# ── what both searches share ─────────────────────────────────────────────────────────────────────


def _nearest(
    x: Tensor, step: Tensor, low: Tensor | None, reach: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The nearest quants in reach, and each sub-block's squared error.  → (n, j, k), (n, j)"""
    lifted = x if low is None else x + low.unsqueeze(-1)
    q = (lifted * _inverse(step).unsqueeze(-1)).round().clamp(*reach)
    return q, _error(x, q, step, low)


def _error(x: Tensor, q: Tensor, step: Tensor, low: Tensor | None) -> Tensor:
    """The squared error of each sub-block.  (n, j, k), (n, j, k), (n, j), (n, j) → (n, j)"""
    values = q * step.unsqueeze(-1)
    return (values - x if low is None else values - low.unsqueeze(-1) - x).square().sum(-1)


def _best(errors: Sequence[Tensor], *choices: Sequence[Tensor]) -> list[Tensor]:
    """Of each kind of choice the one with the least error, the first among equals.  (n, j) each"""
    index = torch.stack(tuple(errors)).argmin(0, keepdim=True)
    return [torch.stack(tuple(choice)).gather(0, index)[0] for choice in choices]


# ── bytes ────────────────────────────────────────────────────────────────────────────────────────


def _bytes(values: Tensor) -> Tensor:
    """Numbers as their bytes.  (n, k) → (n, k · width) uint8"""
    return values.contiguous().view(torch.uint8)


def _joined(q: Tensor) -> Tensor:
    """Two halves as low and high 4 bits: the inverse of `nibbles`.  (…, 2 · k) uint8 → (…, k)"""
    low, high = q.chunk(2, dim=-1)
    return low & 15 | high << 4


def _stacked(q: Tensor, step: int) -> Tensor:
    """8 / step fields as one byte, lowest first: the inverse of `shifted`.  (…, i, k) → (…, k)"""
    shifts = torch.arange(0, 8, step, dtype=torch.uint8, device=q.device)
    return (q << shifts.unsqueeze(-1)).sum(-2, dtype=torch.uint8)


def _inverse(d: Tensor) -> Tensor:
    """1 / d, and 0 where that is infinite: a block of zeros stays one."""
    inverse = 1 / d
    return inverse.masked_fill(inverse.isinf(), 0)
