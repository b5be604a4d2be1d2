"""16 bits: matrices that torch multiplies as they are, float16 and bfloat16.

A file's F16 and BF16 are taken as they lie in it. Whatever is packed and no matter for `nibbles`
(IQ*; before `refollama warm` TQ*, and Q2_K, Q3_K and Q6_K as well, whose groups of 16 are too short
for them) is copied: its values rounded to float16, by one in 2048 at most where they are larger
than 6e-5, and by 3e-8 below. Floats of 4 bits lie too far apart for float16; bfloat16 holds them
exactly.

After `warm` few tokens are not rounded any more: routines of their own (`rows.py`) multiply by rows
as they lie, in floats. Prompts have numbers of 14 bits (`fixed.py`), and the first of them finds
the largest of each 32 values, which stays: half a bit for each weight.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional

from refollama.fast import fixed
from refollama.fast.prepared import (
    FLOAT,
    Form,
    Made,
    OfWeight,
    PreparedLinear,
    bits_for,
    bytes_for,
    in_parts,
    may_round,
    room,
)
from refollama.fast.rows import PAIR, compiled_rows_times, name_of, rows_are_there
from refollama.fast.slabs import SLAB, by_slabs, columns
from refollama.models.layers import Linear
from refollama.weights.blocks import BLOCKS

NATIVE = {"F16": torch.float16, "BF16": torch.bfloat16}
COPIED = {block.name: torch.float16 for block in BLOCKS.values() if block.values > 1}
COPIED |= dict.fromkeys(("MXFP4", "NVFP4"), torch.bfloat16)


class HalfLinear(PreparedLinear):
    """`Linear` with a matrix of 16 bits, and few tokens rounded to as many."""

    def __init__(self, part: Linear, kind: str) -> None:
        super().__init__(part)
        self.kind = kind  # as which it is packed
        self.dtype = (NATIVE | COPIED)[kind]
        self._largest: OfWeight | None
        self.join()

    def join(self) -> None:
        """Use the routines for such rows from now on, if they are there."""
        number = name_of(self.dtype)
        self._largest = None
        self.has_routines = self.in_pairs() and rows_are_there(number)
        self.in_fixed_point = self.goes_in_fixed_point() and fixed.is_there(number)

    def in_pairs(self) -> bool:
        """Do rows fill pairs of vectors, as those routines want it?"""
        return columns(self) % PAIR == 0

    def goes_in_fixed_point(self) -> bool:
        """Could prompts go by it so?"""
        return fixed.fits(len(self.weight), columns(self))

    def prepare(self) -> Made:
        """The matrix: (out, in)"""
        if self.kind in NATIVE:
            return (self.weight.view(self.dtype),)
        width = columns(self)
        (matrix,) = room(self.form())
        rows = max(1, SLAB // width)
        slabs = (torch.split(one, rows) for one in (self.weight, matrix))
        for some, place in zip(*slabs, strict=True):
            place.copy_(self.unpack(some))
        return (matrix,)

    def form(self) -> Form:
        return [(self.dtype, (len(self.weight), columns(self)))]

    def forward(self, x: Tensor) -> Tensor:
        y = self._by_routines(x) if x.numel() else None
        if y is not None:
            return y if self.bias is None else y + self.bias
        if not may_round(x):
            return by_slabs(self if bits_for(x) == FLOAT else self._copy(), x)
        (matrix,) = self.prepared()
        times = functional.linear if are_alike(self.dtype) else _one_by_one
        y = in_parts(x.to(self.dtype), len(matrix), partial(times, weight=matrix))
        if not y.isfinite().all():  # what float16 cannot hold, float32 can
            return by_slabs(self, x)
        return y.float() if self.bias is None else y.float() + self.bias

    def _by_routines(self, x: Tensor) -> Tensor | None:
        """None: they are not for these tokens, or are gone."""
        if bytes_for(x) < 2:
            return None
        if may_round(x):
            return compiled_rows_times(x, *self.prepared()) if self.has_routines else None
        return self._fixed_times(x) if self.in_fixed_point else None

    def _fixed_times(self, x: Tensor) -> Tensor | None:
        self._largest = found = self.made_once(self._largest, self._find_largest)
        return fixed.fixed_times(x, *self.prepared(), *found.made) if found.made else None

    def _find_largest(self) -> Made:
        found = fixed.largest_found(*self.prepared())
        return () if found is None else (found,)

    def release(self) -> None:
        super().release()
        self._largest = None

    @property
    def more_bytes(self) -> int:
        found = () if self._largest is None else self._largest.made
        return super().more_bytes + sum(one.nbytes for one in found)

    def _copy(self) -> Linear:
        """What need not be unpacked."""
        (matrix,) = self.prepared()
        return Linear(matrix, _as_it_is, self.bias)


def _as_it_is(matrix: Tensor) -> Tensor:
    return matrix


@cache
def are_alike(dtype: torch.dtype) -> bool:
    """Are tokens multiplied alike beside others?  Not where torch hands them to oneDNN, which adds
    in another order then: in bfloat16, and in float16 on processors that have units for it."""
    has_units = torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype is torch.float16 and not has_units


def _one_by_one(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([functional.linear(row, weight) for row in torch.split(x, 1)])
