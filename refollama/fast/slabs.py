"""Any type: some rows of a matrix are unpacked and multiplied, then the next take their place.

    packed rows ── unpack ──► a slab of float32, which stays in the cache ── · x ──► some outputs

Unpacked whole, a matrix is written to memory and read again: eight bytes for each weight, where it
lies packed in one. Nothing is rounded: the outputs are those of the plain path.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from refollama.models.layers import Linear

SLAB = 1 << 20  # weights: four megabytes of float32


def by_slabs(part: Linear, x: Tensor) -> Tensor:
    """What the plain path computes: (…, in) → (…, out)"""
    x = x.contiguous()
    rows = max(1, SLAB // x.shape[-1])
    slabs = [functional.linear(x, part.unpack(some)) for some in torch.split(part.weight, rows)]
    y = slabs[0] if len(slabs) == 1 else torch.cat(slabs, dim=-1)
    return y if part.bias is None else y + part.bias


class SlabLinear(Linear):
    """`Linear`, slab by slab, in place of another."""

    def __init__(self, part: Linear) -> None:
        super().__init__(part.weight, part.unpack, part.bias)

    def forward(self, x: Tensor) -> Tensor:
        return by_slabs(self, x)
