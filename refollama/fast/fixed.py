"""Fixed point: prompts by matrices of 16 bits, tokens and rows in whole numbers.

    32 values of a token, or of a row    x ≈ unit · n,    n from −8191 to 8191
    a word of 32 bits                    two such numbers, sixteen apart
    y                                    Σ over 32s    unit of the token · unit of the row · Σ n · n

A processor multiplies twice as many numbers of 16 bits at a time as floats, and adds them up in
pairs (`dots.pairs`). Of 14 bits each, 32 products fill a sum of 32 bits: it is exact. So a product
is off by 0.00012; llama.cpp, which rounds tokens to float16 for such matrices, by 0.0002.

    rows as they lie ── laid ──► words of sixteen rows, side by side ── times ──► some outputs

Rows are laid anew for each prompt, some thousand at a time: that takes as long as multiplying eight
tokens does, and a copy would take as much memory as the file. A token is the same beside others.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from refollama.fast.dots import GROUP, by_largest, largest_of, once, pairs, whole_numbers
from refollama.fast.laned import TOGETHER, filled
from refollama.fast.lanes import LANES
from refollama.fast.routines import compile_to, loaded, path_for
from refollama.fast.rows import name_of

MOST = (1 << 13) - 1  # 32 · MOST · MOST is below 2 ^ 31
SIXTEEN = GROUP // 2
AT_ONCE = 1 << 20  # weights that are laid at a time: two megabytes of words


def fits(rows: int, width: int) -> bool:
    """Can a matrix of this size be laid so?"""
    return rows % LANES == 0 and width % GROUP == 0


def laid(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Rows, a multiple of 16, of any type, in groups of 32: (T, 16, N, 32) →
    words (T, N, 16, 16), a column of them for each row, as float32; units (T, N, 16)

    Words are called floats for as long as they are moved: compilers know how to transpose those.
    """
    matrix = matrix.float()
    largest = once(once(largest_of(matrix)).transpose(1, 2))  # row after row, as memory is read
    whole, units = by_largest(matrix.transpose(1, 2), largest, MOST)  # (T, N, 16, 32)
    words = _in_pairs(whole).view(torch.float32).transpose(2, 3)
    return words.contiguous(), units.contiguous()


def times(x: Tensor, words: Tensor, units: Tensor) -> list[Tensor]:
    """Tokens by rows that are `laid`, each word loaded once for all M tokens that go together.

    (G, M, in), words as int32 → M times (T, G, 16): sixteen rows are read for all tokens, then the
    next sixteen
    """
    (G, M, _), (T, N, _) = x.shape, units.shape
    whole, its_units = whole_numbers(x.view(G, M, N, GROUP).transpose(1, 2), MOST)
    numbers = once(_in_pairs(whole)).view(1, G, N, M, SIXTEEN).unbind(3)
    codes = words.view(T, 1, N, SIXTEEN, LANES).unbind(-2)
    units = units.view(T, 1, N, LANES)
    return [
        (pairs(codes, one).float() * (units * unit)).sum(2)
        for one, unit in zip(numbers, once(its_units).view(1, G, N, M, 1).unbind(3), strict=True)
    ]


def _in_pairs(whole: Tensor) -> Tensor:
    """(…, 32) int32 → (…, 16) int32: neighbours stay neighbours, as in `dots.in_bytes`"""
    low, high = torch.split(whole, SIXTEEN, -1)
    return low & (1 << SIXTEEN) - 1 | high << SIXTEEN


# ── compiled ──────────────────────────────────────────────────────────────────────────────────


class Laying(nn.Module):
    """`laid`, of any size, into words that are there: this is compiled.  → units"""

    def forward(self, matrix: Tensor, place: Tensor) -> Tensor:
        words, units = laid(matrix)
        # By `copy_` they would be laid beside it first.
        place.index_put_((torch.arange(place.shape[0]),), words)
        return units


class FixedProduct(nn.Module):
    """`times`, of any size, into outputs that are there: this is compiled.

    place (G, M, all T, 16); start (1,): its T that is the first of these rows → that of the next
    """

    def forward(
        self, x: Tensor, words: Tensor, units: Tensor, place: Tensor, start: Tensor
    ) -> Tensor:
        G, T = x.shape[0], units.shape[0]
        which = torch.arange(G), start + torch.arange(T)[:, None]
        for at, found in enumerate(times(x, words, units)):
            place.index_put_((which[0], torch.full((1, 1), at), which[1]), found)
        return start + T


def laying_of(number: str) -> Path:
    """Where the routine is kept that lays rows of these numbers, such as "float16"."""
    return path_for(["fixed", number])


def product() -> Path:
    """Where the routine that multiplies is kept: one for all."""
    return path_for(["fixed product", TOGETHER])


def is_there(number: str) -> bool:
    """Have rows of such numbers their routines?"""
    return all(map(loaded, (laying_of(number), product())))


def fixed_times(x: Tensor, matrix: Tensor) -> Tensor | None:
    """x · matrixᵀ; None if a routine is gone: (…, in), (out, in) → (…, out) float32"""
    lay, multiply = loaded(laying_of(name_of(matrix.dtype))), loaded(product())
    if lay is None or multiply is None:
        return None
    width = x.shape[-1]
    rows = x.reshape(-1, width).float()
    given = filled(rows, TOGETHER).view(-1, TOGETHER, width)
    high = min(len(matrix), max(1, AT_ONCE // width // LANES) * LANES)
    # All slabs are laid in one place: fresh memory comes page by page, which takes as long.
    place = torch.empty(high // LANES, width // GROUP, SIXTEEN, LANES, dtype=torch.int32)
    y = torch.empty(*given.shape[:2], len(matrix) // LANES, LANES)
    start = torch.zeros(1, dtype=torch.int64)
    for some in torch.split(matrix, high):
        words = place[: len(some) // LANES]
        [units] = lay([some.view(-1, LANES, width // GROUP, GROUP), words.view(torch.float32)])
        [start] = multiply([given, words, units, y, start])
    return y.view(-1, len(matrix))[: len(rows)].view(*x.shape[:-1], -1)


def compile_laying(number: str) -> None:
    """The routine that lays rows of these numbers.

    Raises: RefollamaError without a compiler, or if it fails.
    """
    any_size = torch.export.Dim.AUTO
    matrix = torch.randn(5, LANES, 7, GROUP).to(getattr(torch, number))
    given = matrix, torch.empty(5, 7, SIXTEEN, LANES)
    sizes = {0: any_size, 2: any_size}, {0: any_size, 1: any_size}
    compile_to(laying_of(number), Laying(), given, sizes)


def compile_product() -> None:
    """The routine that multiplies, unless it is there.  Raises: as `compile_laying`."""
    if loaded(product()):
        return
    any_size = torch.export.Dim.AUTO
    words, units = laid(torch.randn(5, LANES, 7, GROUP))
    x, place = torch.randn(3, TOGETHER, 7 * GROUP), torch.empty(3, TOGETHER, 9, LANES)
    given = x, words.view(torch.int32), units, place, torch.ones(1, dtype=torch.int64)
    both, outer = {0: any_size, 1: any_size}, {0: any_size, 2: any_size}
    compile_to(product(), FixedProduct(), given, (outer, both, both, outer, None))
