"""Small models: to unpack a matrix takes longer than to multiply by it, so it is done once.

What is multiplied by is the same as on the plain path, and so is every bit of the answer.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from refollama.fast.prepared import Made, PreparedLinear


class KeptLinear(PreparedLinear):
    """`Linear`, whose matrix is unpacked when it is first used, and kept: (out, in) float32."""

    def prepare(self) -> Made:
        return (self.dense(),)

    def forward(self, x: Tensor) -> Tensor:
        (matrix,) = self.prepared()
        return functional.linear(x.contiguous(), matrix, self.bias)
