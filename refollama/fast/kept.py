"""Small models: to unpack a matrix takes longer than to multiply by it, so it is done once.

What is multiplied by is the same as on the plain path, and so is every bit of the answer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refollama.fast.prepared import Form, Made, PreparedLinear
from refollama.fast.slabs import columns
from refollama.models.exact import linear


class KeptLinear(PreparedLinear):
    """`Linear`, whose matrix is unpacked when it is first used, and kept: (out, in) float32."""

    def prepare(self) -> Made:
        return (self.dense(),)

    def form(self) -> Form:
        return [(torch.float32, (len(self.weight), columns(self)))]

    def forward(self, x: Tensor) -> Tensor:
        (matrix,) = self.prepared()
        return linear(x, matrix, self.bias)
