"""Any type: some rows of a matrix are unpacked and multiplied, then the next take their place.

    packed rows ── unpack ──► a slab of float32, which stays in the cache ── · x ──► some outputs

Unpacked whole, a matrix is written to memory and read again: eight bytes for each weight, where it
lies packed in one. Nothing is rounded, unless whoever reads asks for fewer bits (`products.py`):
the outputs are those of the plain path, but for the order in which torch adds where it multiplies
by fewer rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refollama.fast.prepared import PreparedLinear
from refollama.fast.products import product
from refollama.models.layers import Linear
from refollama.weights.quants import Layout

SLAB = 1 << 20  # weights: four megabytes of float32


def columns(part: Linear) -> int:
    """How wide its matrix is."""
    layout = _layout_of(part)
    return layout.columns(part.weight) if layout else part.unpack(part.weight[:1]).shape[-1]


def type_of(part: Linear) -> str:
    """How its matrix is packed, such as "Q4_0"; empty if nobody knows."""
    layout = _layout_of(part)
    return layout.name if layout else ""


def _layout_of(part: Linear) -> Layout | None:
    layout = getattr(part.unpack, "__self__", None)
    return layout if isinstance(layout, Layout) else None


def by_slabs(part: Linear, x: Tensor) -> Tensor:
    """What the plain path computes: (…, in) → (…, out)

    Slabs are about as high as each other: a last one of a row or two would go to another routine.
    """
    x = x.contiguous()
    times = product(x)
    count = -(-len(part.weight) * x.shape[-1] // SLAB) or 1
    biases = [None] * count if part.bias is None else torch.tensor_split(part.bias, count)
    slabs = zip(torch.tensor_split(part.weight, count), biases, strict=True)
    found = [times(part.unpack(some), bias) for some, bias in slabs]
    if isinstance(part, PreparedLinear):
        part.let_go()
    return found[0] if count == 1 else torch.cat(found, dim=-1)


class SlabLinear(Linear):
    """`Linear`, slab by slab, in place of another."""

    def __init__(self, part: Linear) -> None:
        super().__init__(part.weight, part.unpack, part.bias)

    def forward(self, x: Tensor) -> Tensor:
        return by_slabs(self, x)
