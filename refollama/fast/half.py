"""16 bits: matrices that torch multiplies as they are, float16 and bfloat16.

A file's F16 and BF16 are taken as they lie in it. Q6_K, whose groups of 16 are too short for
`nibbles`, is copied: its values rounded to float16, one in 2048 off at most.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from refollama.fast.prepared import Made, PreparedLinear, may_round
from refollama.fast.slabs import SLAB, by_slabs
from refollama.models.layers import Linear

NATIVE = {"F16": torch.float16, "BF16": torch.bfloat16}
COPIED = {"Q6_K": torch.float16}
# Tokens; a longer prompt is read exactly. In bfloat16 torch rounds a token that stands beside
# others in another way than one that stands alone.
FEW = {torch.float16: 16, torch.bfloat16: 1}


class HalfLinear(PreparedLinear):
    """`Linear` with a matrix of 16 bits, and few tokens rounded to as many."""

    def __init__(self, part: Linear, kind: str) -> None:
        super().__init__(part)
        self.kind = kind  # as which it is packed
        self.dtype = (NATIVE | COPIED)[kind]

    def prepare(self) -> Made:
        """The matrix: (out, in)"""
        if self.kind in NATIVE:
            return (self.weight.view(self.dtype),)
        width = self.unpack(self.weight[:1]).shape[-1]
        matrix = torch.empty(len(self.weight), width, dtype=self.dtype)
        rows = max(1, SLAB // width)
        for some, place in zip(
            torch.split(self.weight, rows), torch.split(matrix, rows), strict=True
        ):
            place.copy_(self.unpack(some))
        return (matrix,)

    def forward(self, x: Tensor) -> Tensor:
        if not may_round(x, FEW[self.dtype]):
            return by_slabs(self, x)
        (matrix,) = self.prepared()
        few = x.to(self.dtype).contiguous()
        if not few.isfinite().all():  # what float16 cannot hold, float32 can
            return by_slabs(self, x)
        y = functional.linear(few, matrix).float()
        return y if self.bias is None else y + self.bias
