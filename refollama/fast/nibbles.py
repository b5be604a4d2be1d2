"""4 bits: matrices as nibbles, by which torch multiplies without unpacking them.

    value = step · q + low, in groups of 32        q of 4 bits ── one product
                                                   q of 8 bits ── two: 16 · step · high + step · low

torch's routine takes (q − 8) · scale + zero, with scale, zero and the tokens in bfloat16. So a
product of values that lie around zero is off by some 0.3 %, about half of what llama.cpp's is,
which rounds tokens to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from refollama.fast.prepared import Form, Made, PreparedLinear, in_parts, may_round, room
from refollama.fast.slabs import SLAB, by_slabs, columns
from refollama.models.layers import Linear
from refollama.weights.blocks import TYPE_ID
from refollama.weights.fields import half
from refollama.weights.quants import LAYOUTS, scales_and_minima

GROUP = 32  # columns that share a scale
ROWS = 64  # of a matrix: torch lays so many side by side
Line = Callable[[Tensor], tuple[Tensor, Tensor]]


def _even(levels: int) -> Line:
    """One step a block, and as many levels below zero as above: (n, nbytes) → 2 (n, 1)"""

    def line(block: Tensor) -> tuple[Tensor, Tensor]:
        step = half(block, 0)
        return step, step * (-levels // 2)

    return line


def _from_least(block: Tensor) -> tuple[Tensor, Tensor]:
    """Step and least value: (n, nbytes) → 2 (n, 1)"""
    return half(block, 0), half(block, 2)


def _sub_blocks(block: Tensor) -> tuple[Tensor, Tensor]:
    """Eight of each: (n, nbytes) → 2 (n, 8)"""
    scale, minimum = scales_and_minima(block[:, 4:16])
    return half(block, 0) * scale, -half(block, 2) * minimum


# Of each type: the step and the least value of each 32 values, and the bits of q.
LINES: Mapping[str, tuple[Line, int]] = {
    "Q4_0": (_even(16), 4),
    "Q4_1": (_from_least, 4),
    "Q4_K": (_sub_blocks, 4),
    "Q5_0": (_even(32), 5),
    "Q5_1": (_from_least, 5),
    "Q5_K": (_sub_blocks, 5),
    "Q8_0": (_even(256), 8),
}


class Int4Linear(PreparedLinear):
    """`Linear` with a matrix of nibbles beside the packed one, for few tokens."""

    def __init__(self, part: Linear, kind: str) -> None:
        super().__init__(part)
        self.kind = kind  # as which it is packed

    def prepare(self) -> Made:
        """q and scales of the matrix, or of two whose products add up; shapes as in `_laid`."""
        width = columns(self)
        rows = max(1, SLAB // width // ROWS) * ROWS
        slabs = [_nibbles(some, self.kind) for some in torch.split(self.weight, rows)]
        places = enumerate(zip(zip(*slabs, strict=True), room(self.form()), strict=True))
        return [torch.cat(parts, dim % 2, out=place) for dim, (parts, place) in places]

    def form(self) -> Form:
        rows, width = len(self.weight), columns(self)
        laid = (torch.uint8, (rows, width // 2))
        scales = (torch.bfloat16, (width // GROUP, rows, 2))
        return [laid, scales] * (1 if LINES[self.kind][1] == 4 else 2)

    def forward(self, x: Tensor) -> Tensor:
        if not may_round(x):
            return by_slabs(self, x)
        made = self.prepared()
        few = x.bfloat16()
        y = in_parts(few, len(self.weight), partial(_times, q=made[0], scales=made[1]))
        if len(made) > 2:
            y = y + in_parts(few, len(self.weight), partial(_times, q=made[2], scales=made[3]))
        return y if self.bias is None else y + self.bias


def _times(x: Tensor, q: Tensor, scales: Tensor) -> Tensor:
    """(n, in) bfloat16 → (n, out) float32"""
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, q, GROUP, scales)
    return y.float()


def _nibbles(weight: Tensor, kind: str) -> list[Tensor]:
    """Some rows of a packed matrix, a multiple of ROWS: (r, row_bytes) uint8"""
    layout, (line, bits) = LAYOUTS[TYPE_ID[kind]], LINES[kind]
    blocks = weight.reshape(-1, layout.block.nbytes)
    step, low = (part.reshape(len(weight), -1, 1) for part in line(blocks))  # (r, in / 32, 1)
    values = layout.unpack_rows(weight).view(len(weight), -1, GROUP)
    each = (1 / step).nan_to_num_(0, 0, 0)  # there are groups of zeros
    q = values.sub_(low).mul_(each).nan_to_num_(0, 0, 0).round_().int()
    if bits == 4:
        return _laid(q, step, low)
    # The middle of what high nibbles there are comes to 8, where their scale is multiplied by 0:
    # it is rounded, and what stands far from there would be off by as much.
    raised = 8 - (1 << bits - 5)
    high = _laid((q >> 4) + raised, 16 * step, low - 16 * raised * step)
    return high + _laid(q & 15, step, torch.zeros_like(low))


def _laid(q: Tensor, step: Tensor, low: Tensor) -> list[Tensor]:
    """Nibbles and scales as torch takes them, for values step · q + low.

    q: (r, in / 32, 32) int32; step, low: (r, in / 32, 1)
    → (r, in / 2) uint8, in an order of torch's own; (in / 32, r, 2) bfloat16: scale and zero
    """
    laid = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.flatten(1), 1)
    scales = torch.cat((step, low + 8 * step), dim=2).transpose(0, 1)
    return [laid, scales.bfloat16().contiguous()]
