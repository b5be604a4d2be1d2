"""How do values become blocks?  The inverse of `quants.py`, as far as packing is built.

Each function takes blocks of float32 and gives their bytes as drawn there. The simple layouts are
packed by rule and byte for byte as ggml does it. The layouts with sub-scales leave a choice, and
here it is made for the least squared error: first a scale for each sub-block by trying several,
then the scales are packed themselves, then every value is rounded once more by what is stored.

Where `weights` are given, one for each value, an error counts as much as its weight: the search is
for the least Σ w · error², and the simple layouts of 4 and 5 bits are searched for, too.

Source: ggml.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

CUT = (
    1.0,
    1.1,
    1.2,
    1.35,
    1.5,
    1.7,
    2.0,
)  # how far great values may be cut off if they hardly count
ROUNDING = 3e-6  # of a sum of 32 products in float32, relative

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


def q4_0(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """The value farthest from zero becomes −8 · d exactly.  (n, 32) float32 → (n, 18) uint8"""
    if weights is not None:
        d, q = _weighed(values, weights, 8)
        return torch.cat((_bytes(d), _joined(q)), dim=1)
    farthest = values.gather(1, values.abs().argmax(1, keepdim=True))
    d = farthest / -8
    q = (values * _inverse(d) + 8.5).trunc().clamp(0, 15).to(torch.uint8)
    return torch.cat((_bytes(d.half()), _joined(q)), dim=1)


def q4_1(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """15 steps from the least value to the greatest.  (n, 32) float32 → (n, 20) uint8"""
    d, m, q = _ranged(values, 15) if weights is None else _fitted(values, weights, 15)
    return torch.cat((_bytes(d), _bytes(m), _joined(q)), dim=1)


def q5_0(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """The value farthest from zero becomes −16 · d exactly.  (n, 32) float32 → (n, 22) uint8"""
    if weights is not None:
        d, q = _weighed(values, weights, 16)
        return torch.cat((_bytes(d), _packed_fifths(q), _joined(q)), dim=1)
    farthest = values.gather(1, values.abs().argmax(1, keepdim=True))
    d = farthest / -16
    q = (values * _inverse(d) + 16.5).trunc().clamp(0, 31).to(torch.uint8)
    return torch.cat((_bytes(d.half()), _packed_fifths(q), _joined(q)), dim=1)


def q5_1(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """31 steps from the least value to the greatest.  (n, 32) float32 → (n, 24) uint8"""
    d, m, q = _ranged(values, 31) if weights is None else _fitted(values, weights, 31)
    return torch.cat((_bytes(d), _bytes(m), _packed_fifths(q), _joined(q)), dim=1)


def _ranged(values: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Step size and least value as float16 (n, 1), quants uint8 (n, 32)."""
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    d = (high - low) / steps
    q = ((values - low) * _inverse(d) + 0.5).trunc().clamp(0, steps).to(torch.uint8)
    return d.half(), low.half(), q


def _weighed(values: Tensor, weights: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Step size: float16 (n, 1); quants 0 … 2 · limit − 1: uint8 (n, 32); least Σ w · error²."""
    x, w = _both(values, weights, 32)
    d = _scales(x, w, limit).half()
    q, _ = _nearest(x, d.float(), (-limit, limit - 1))
    return d, _laid(q) + limit


def _fitted(values: Tensor, weights: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `_ranged` gives, for the least Σ w · error²."""
    x, w = _both(values, weights, 32)
    d, m = (part.half() for part in _lines(x, w, steps, anywhere=True))
    q, _ = _nearest(x + m.float(), d.float(), (0, steps))
    return d, -m, _laid(q)


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


def q3_k(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """16 sub-blocks, scales of 6 bits, quants −4 … 3.  (n, 256) float32 → (n, 110) uint8"""
    d, s, q = _scaled(*_both(values, weights, 16), 32, 4)
    s, q = (s + 32).byte(), q + 4
    high = _stacked((q >> 2).view(-1, 8, 32), 1)  # (n, 32)
    low = _stacked((q & 3).view(-1, 2, 4, 32), 2)  # (n, 2, 32)
    s_high = _stacked((s >> 4).view(-1, 4, 4), 2)
    return torch.cat((high, low.flatten(1), _joined(s), s_high, _bytes(d)), dim=1)


def q6_k(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """16 sub-blocks, scales of 8 bits, quants −32 … 31.  (n, 256) float32 → (n, 210) uint8"""
    d, s, q = _scaled(*_both(values, weights, 16), 128, 32)
    q = (q + 32).view(-1, 2, 128)
    low = _joined(q)  # (n, 2, 64)
    high = _stacked((q >> 4).view(-1, 2, 4, 32), 2)  # (n, 2, 32)
    return torch.cat((low.flatten(1), high.flatten(1), _bytes(s.char()), _bytes(d)), dim=1)


def _scaled(x: Tensor, w: Tensor | None, top: int, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """d: float16 (n, 1); scales −top … top − 1: (n, j); quants −limit … limit − 1: (n, 256) uint8

    Quants below zero stand as 256 more.  x, w: (k, n, j)
    A scale that had to be rounded may be better rounded the other way.
    """
    scales = _scales(x, w, limit)
    d = (_farthest(scales, 1).unsqueeze(1) / -top).half()
    rounded = (scales * _inverse(d.float())).round()
    near = torch.stack([(rounded + by).clamp(-top, top - 1) for by in (0, -1, 1)])
    errors = [_nearest(x, d * s, (-limit, limit - 1), w)[1] for s in near]
    (s,) = _best(torch.stack(errors), near)
    return d, s, _laid(_nearest(x, d * s, (-limit, limit - 1))[0])


def _scales(x: Tensor, w: Tensor | None, limit: int) -> Tensor:
    """The scale of each sub-block for quants −limit … limit − 1, not rounded.  (k, n, j) → (n, j)

    For given quants q the best scale is Σxq / Σq², and it takes (Σxq)² / Σq² off the error Σx²;
    where errors are weighed, each of these terms is.
    """
    unit = _inverse(_farthest(x, 0))
    tries = [-(limit + step / 10) for step in range(-9, 10)]
    tries += [] if w is None else [way * limit for far in CUT for way in (-far, far)]
    sums = []
    for step in tries:
        q = (x * (unit * step)).round_().clamp_(-limit, limit - 1)
        sums.append(torch.stack((_sum(x * q, w), _sum(q.square_(), w))))
    sxq, sqq = torch.stack(sums, dim=1)  # (tries, n, j) each
    scales = sxq * _inverse(sqq)
    return _best(-sxq * scales, scales)[0]


def _farthest(x: Tensor, dim: int) -> Tensor:
    """The value farthest from zero, with its sign."""
    high, low = x.amax(dim), x.amin(dim)
    return torch.where(high < -low, low, high)


# ── blocks of 256 with minima: value = d · scale[j] · q − m · minimum[j] ─────────────────────────


def q2_k(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """16 sub-blocks, scales and minima of 4 bits, quants 0 … 3.  (n, 256) → (n, 84) uint8"""
    d, m, scale, minimum, q = _lined(*_both(values, weights, 16), 15, 3)
    low = _stacked(q.view(-1, 2, 4, 32), 2)  # (n, 2, 32)
    return torch.cat((scale | minimum << 4, low.flatten(1), _bytes(d), _bytes(m)), dim=1)


def q4_k(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """8 sub-blocks, scales and minima of 6 bits, quants 0 … 15.  (n, 256) → (n, 144) uint8"""
    d, m, scale, minimum, q = _lined(*_both(values, weights, 32), 63, 15)
    low = _joined(q.view(-1, 4, 64))  # (n, 4, 32)
    s = _joined_scales(scale, minimum)
    return torch.cat((_bytes(d), _bytes(m), s, low.flatten(1)), dim=1)


def q5_k(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """8 sub-blocks, scales and minima of 6 bits, quants 0 … 31.  (n, 256) → (n, 176) uint8"""
    d, m, scale, minimum, q = _lined(*_both(values, weights, 32), 63, 31)
    low, high = _joined(q.view(-1, 4, 64)), _stacked(q.view(-1, 8, 32) >> 4, 1)
    s = _joined_scales(scale, minimum)  # (n, 12); low: (n, 4, 32), high: (n, 32)
    return torch.cat((_bytes(d), _bytes(m), s, high, low.flatten(1)), dim=1)


def _joined_scales(scale: Tensor, minimum: Tensor) -> Tensor:
    """8 scales and 8 minima of 6 bits: the inverse of `quants.scales_and_minima`.  → (n, 12)"""
    first = (part[:, :4] | part[:, 4:] >> 4 << 6 for part in (scale, minimum))
    return torch.cat((*first, scale[:, 4:] & 15 | minimum[:, 4:] << 4), dim=1)


def _lined(
    x: Tensor, w: Tensor | None, top: int, limit: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """d, m: float16 (n, 1); scales, minima 0 … top: uint8 (n, j); quants 0 … limit: (n, 256) uint8

    Scales and minima that had to be rounded may be better rounded the other way.  x, w: (k, n, j)
    """
    pair = _lines(x, w, limit)
    d, m = ((part.amax(1, keepdim=True) / top).half() for part in pair)
    rounded = [
        (part * _inverse(unit.float())).round() for part, unit in zip(pair, (d, m), strict=True)
    ]
    near = [[(part + by).clamp(0, top) for by in (0, -1, 1)] for part in rounded]
    both = list(itertools.product(*near))
    errors = [_nearest(x + m * minimum, d * scale, (0, limit), w)[1] for scale, minimum in both]
    tried = (torch.stack(each) for each in zip(*both, strict=True))
    scale, minimum = _best(torch.stack(errors), *tried)
    q, _ = _nearest(x + m * minimum, d * scale, (0, limit))
    return d, m, scale.byte(), minimum.byte(), _laid(q)


def _lines(
    x: Tensor, w: Tensor | None, limit: int, *, anywhere: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale and minimum of each sub-block for quants 0 … limit, not rounded.  (k, n, j) → 2 (n, j)

    For given quants the best line through the values is that of least squares; one that would
    start above zero cannot be stored (unless it may start `anywhere`), and is drawn through zero
    instead. Both it and its error follow from a few sums; they are taken over the heights above the
    least value, as great sums would swallow small differences.
    """
    k = len(x) if w is None else _sum(w, None)
    least = x.amin(0) if anywhere else x.amin(0).clamp(max=0)
    y = x - least
    sy, unit = _sum(y, w), _inverse(y.amax(0))
    sums = []
    for step in range(-10, 11):
        q = (y * (unit * (limit + step / 10))).round_().clamp_(max=limit)
        sums.append(torch.stack((_sum(q, w), _sum(y * q, w), _sum(q.square_(), w))))
    sq, syq, sqq = torch.stack(sums, dim=1)  # (tries, n, j) each
    spread = k * sqq - sq.square()
    if w is not None:  # where all quants are alike, what is left of weighed sums is their rounding
        spread *= spread > ROUNDING * k * sqq
    slope = (k * syq - sy * sq) * _inverse(spread)
    low = (sy - slope * sq) / k  # where the line starts, above the least value
    low = low if anywhere else low.clamp(max=-least)
    scale = ((syq - low * sq) * _inverse(sqq)).clamp(min=0)  # the best one for this start
    # Σ(scale · q + low − y)² without Σy², which all tries have in common
    errors = scale * (scale * sqq + 2 * (low * sq - syq)) + low * (k * low - 2 * sy)
    scale, low = _best(errors, scale, low)
    return scale, -least - low


# ── what both searches share ─────────────────────────────────────────────────────────────────────


def _upright(values: Tensor, k: int) -> Tensor:
    """Sub-blocks of k as columns, so that sums run along rows of memory.  (n, 256) → (k, n, j)"""
    return values.view(len(values), -1, k).movedim(-1, 0).contiguous()


def _both(values: Tensor, weights: Tensor | None, k: int) -> tuple[Tensor, Tensor | None]:
    """The same of values and weights.  → x, w: (k, n, j)"""
    return _upright(values, k), None if weights is None else _upright(weights, k)


def _laid(q: Tensor) -> Tensor:
    """The inverse, as bytes.  (k, n, j) → (n, 256) uint8"""
    return q.char().movedim(0, -1).flatten(1).view(torch.uint8)


def _nearest(
    x: Tensor, step: Tensor, reach: tuple[int, int], w: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The nearest quants in reach, and each sub-block's squared error.  → (k, n, j), (n, j)"""
    q = (x * _inverse(step)).round_().clamp_(*reach)
    return q, _sum((q * step).sub_(x).square_(), w)


def _sum(terms: Tensor, w: Tensor | None) -> Tensor:
    """Σ terms, or Σ w · terms, k being a power of two.  (k, n, j) → (n, j)

    Halves are added to halves: `sum` has an order for each shape and each number of threads, and
    the last bit of an error may decide what is packed.
    """
    terms = terms if w is None else terms * w
    while len(terms) > 1:
        first, second = terms.chunk(2)
        terms = first + second
    return terms[0]


def _best(errors: Tensor, *choices: Tensor) -> list[Tensor]:
    """Of each kind of choice the one with the least error, the first among equals.

    Shapes: (tries, n, j) each → (n, j) each
    """
    index = errors.min(0, keepdim=True).indices
    return [choice.gather(0, index)[0] for choice in choices]


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
    return d.reciprocal().nan_to_num_(nan=math.nan, posinf=0, neginf=0)


WEIGHING = frozenset((q4_0, q4_1, q5_0, q5_1, q2_k, q3_k, q4_k, q5_k, q6_k))  # by importance
