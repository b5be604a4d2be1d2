"""A matrix in lanes, in place of another: tokens go through a compiled product.

One routine of a type serves matrices of all sizes; a second one multiplies eight tokens by what it
unpacks once, and prompts are many times eight. A third is for prompts in numbers of 8 bits.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from refollama.fast.dots import GROUP, rounded
from refollama.fast.lanes import CODE, LANES, form, laid, times
from refollama.fast.prepared import Form, Made, PreparedLinear, bytes_for, room
from refollama.fast.routines import compile_to, loaded, path_for
from refollama.fast.slabs import SLAB, by_slabs, columns
from refollama.models.layers import Linear
from refollama.weights.blocks import TYPE_ID
from refollama.weights.quants import LAYOUTS

TOGETHER = 8  # tokens
MANY = 128  # tokens that are handed over at a time: so what is made of them stays in the cache
WORTH_IT = 4  # tokens from which on eight together are sooner than one by one
ROUTINES = (1, 2), (TOGETHER, 2), (TOGETHER, 1)  # of a type: tokens together, and bytes of numbers


class LaneLinear(PreparedLinear):
    """`Linear` with a matrix in lanes beside the packed one."""

    def __init__(self, part: Linear, kind: str) -> None:
        super().__init__(part)
        self.kind = kind  # as which it is packed
        self._paths = {which: path_of(kind, *which) for which in ROUTINES}

    def prepare(self) -> Made:
        """As in `lanes.laid`."""
        rows = max(1, SLAB // columns(self) // LANES) * LANES
        slabs = [laid(some, self.kind) for some in torch.split(self.weight, rows)]
        places = zip(zip(*slabs, strict=True), room(self.form()), strict=True)
        return [torch.cat(parts, out=place) for parts, place in places]

    def form(self) -> Form:
        return form(self.kind, len(self.weight), columns(self))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        nbytes = bytes_for(x)
        together = TOGETHER if nbytes == 1 else together_for(len(rows))
        routine = loaded(self._paths[together, nbytes]) if nbytes and len(rows) else None
        if routine is None:
            return by_slabs(self, x)
        made, given = self.prepared(), filled(rows, together).view(-1, together, x.shape[-1])
        y = torch.empty(*given.shape[:2], len(made[0]), LANES)
        at_once = MANY // together if together > 1 else 1
        for some, place in zip(*(torch.split(one, at_once) for one in (given, y)), strict=True):
            routine([some, place, *made])
        y = y.flatten(0, 1)[: len(rows)].view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def together_for(count: int) -> int:
    """How many of so many tokens are best multiplied together."""
    return TOGETHER if count >= WORTH_IT else 1


def filled(rows: Tensor, together: int) -> Tensor:
    """Rows in one piece, the first of them again until they are a multiple of so many."""
    missing = -len(rows) % together
    if missing:
        rows = torch.cat((rows, rows[:1].expand(missing, *rows.shape[1:])))
    return rows.contiguous()


# ── compiled ──────────────────────────────────────────────────────────────────────────────────


class Product(nn.Module):
    """Tokens by a matrix of one type, of any size, into outputs that are there: this is compiled.

    x (G, M, in), place (G, M, T, 16)
    """

    def __init__(self, kind: str, nbytes: int) -> None:
        """nbytes: of each number that tokens are made of."""
        super().__init__()
        self.kind, self.nbytes = kind, nbytes

    def forward(self, x: Tensor, place: Tensor, *made: Tensor) -> None:
        blocks = made[1].shape[1]
        groups = blocks * (LAYOUTS[TYPE_ID[self.kind]].block.values // GROUP)
        y = times(rounded(x, groups, self.nbytes), made, self.kind)
        # By `copy_` they would be laid beside it first.
        place.index_put_((torch.arange(place.shape[0]),), y)


def path_of(kind: str, together: int, nbytes: int) -> Path:
    """Where the routine of this type is kept, for so many tokens together in such numbers."""
    return path_for(["product", kind, together, nbytes])


def is_there(kind: str) -> bool:
    """Can a matrix of this type be multiplied in lanes?"""
    return kind in CODE and all(loaded(path_of(kind, *which)) for which in ROUTINES)


def compile_product(kind: str, together: int, nbytes: int) -> None:
    """The routine of a type.  Raises: RefollamaError without a compiler, or if it fails."""
    layout = LAYOUTS[TYPE_ID[kind]]
    width = 3 * layout.block.values
    rows = torch.zeros(5 * LANES, 3 * layout.block.nbytes, dtype=torch.uint8)
    any_size = torch.export.Dim.AUTO
    made, many = laid(rows, kind), {0: any_size} if together > 1 else {}
    x = torch.randn(3 if together > 1 else 1, together, width)
    given = x, torch.empty(*x.shape[:2], 5, LANES), *made
    sizes = tuple({0: any_size, 1: any_size} for _ in made)
    dynamic = {**many, 2: any_size}, {**many, 2: any_size}, sizes
    compile_to(path_of(kind, together, nbytes), Product(kind, nbytes), given, dynamic)
