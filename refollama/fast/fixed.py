"""Fixed point: prompts by matrices of 16 bits, tokens and rows in whole numbers.

    32 values of a token, or of a row    x ≈ unit · n,    n from −8191 to 8191
    a word of 32 bits                    two such numbers, sixteen apart
    y                                    Σ over 32s    unit of the token · unit of the row · Σ n · n

A processor multiplies twice as many numbers of 16 bits at a time as floats, and adds them up in
pairs (`dots.pairs`). Of 14 bits each, 32 products fill a sum of 32 bits: it is exact. So a product
is off by 0.00012; llama.cpp, which rounds tokens to float16 for such matrices, by 0.0002.

    rows as they lie ── laid ──► words of sixteen rows, side by side ── times ──► some outputs

Rows are laid anew for each prompt, a million weights at a time: that takes as long as multiplying
some fifty tokens, and a copy would take as much memory as the file. A token is the same beside
others.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from refollama.fast.dots import GROUP, HALF, by_largest, largest_of, once, pairs, whole_numbers
from refollama.fast.laned import TOGETHER, filled
from refollama.fast.lanes import LANES
from refollama.fast.prepared import has_avx2
from refollama.fast.routines import compile_to, loaded, path_for
from refollama.fast.rows import name_of

MOST = (1 << 13) - 1  # 32 · MOST · MOST is below 2 ^ 31
WORDS = GROUP // 2
AT_ONCE = 1 << 20  # weights that are laid at a time: two megabytes of words


def fits(rows: int, width: int) -> bool:
    """Can a matrix of this size be laid so, by this processor?"""
    return rows > 0 and rows % LANES == 0 and width % GROUP == 0 and has_avx2()


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


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens in groups of 32: (G, M, N, 32) → words (G, N, M, 16), units (G, N, M)"""
    whole, units = whole_numbers(x.transpose(1, 2), MOST)
    return _in_pairs(whole).contiguous(), units.contiguous()


def times(numbers: Tensor, scales: Tensor, words: Tensor, units: Tensor) -> list[Tensor]:
    """Tokens that are `rounded` by rows that are `laid`, whose words come as int32: each is loaded
    once for all M tokens that go together.

    → M times (T, G, 16): sixteen rows are read for all tokens, then the next sixteen
    """
    (G, N, M), T = scales.shape, units.shape[0]
    codes = words.view(T, 1, N, WORDS, LANES).unbind(-2)
    units = units.view(T, 1, N, LANES)
    each = numbers.view(1, G, N, M, WORDS).unbind(3), scales.view(1, G, N, M, 1).unbind(3)
    return [
        (pairs(codes, one).float() * units * scale).sum(2) for one, scale in zip(*each, strict=True)
    ]


def _in_pairs(whole: Tensor) -> Tensor:
    """(…, 32) int32 → (…, 16) int32: neighbours stay neighbours, as in `dots.in_bytes`"""
    low, high = torch.split(whole, WORDS, -1)
    return low & (1 << HALF) - 1 | high << HALF


# ── compiled ──────────────────────────────────────────────────────────────────────────────────


class Laying(nn.Module):
    """`laid`, of any size, into words that are there: this is compiled.  → units"""

    def forward(self, matrix: Tensor, place: Tensor) -> Tensor:
        words, units = laid(matrix)
        # By `copy_` they would be laid beside it first.
        place.index_put_((torch.arange(place.shape[0]),), words)
        return units


class Rounding(nn.Module):
    """`rounded`, any number of tokens: this is compiled."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return rounded(x)


class FixedProduct(nn.Module):
    """`times`, of any size, into outputs that are there: this is compiled.

    place (G, M, all T, 16); start (1,): its T that is the first of these rows → that of the next
    """

    def forward(
        self,
        numbers: Tensor,
        scales: Tensor,
        words: Tensor,
        units: Tensor,
        place: Tensor,
        start: Tensor,
    ) -> Tensor:
        G, T = scales.shape[0], units.shape[0]
        tokens, tiles = torch.arange(G), start + torch.arange(T)[:, None]
        for at, found in enumerate(times(numbers, scales, words, units)):
            place.index_put_((tokens, torch.full((1, 1), at), tiles), found)
        return start + T


def laying_of(number: str) -> Path:
    """Where the routine is kept that lays rows of these numbers, such as "float16"."""
    return path_for(["fixed", number])


def rounding() -> Path:
    """Where the routine is kept that rounds tokens: one for all."""
    return path_for(["fixed tokens", TOGETHER])


def product() -> Path:
    """Where the routine that multiplies is kept: one for all."""
    return path_for(["fixed product", TOGETHER])


def is_there(number: str) -> bool:
    """Have rows of such numbers their routines?"""
    return all(map(loaded, (laying_of(number), rounding(), product())))


def fixed_times(x: Tensor, matrix: Tensor) -> Tensor | None:
    """x · matrixᵀ; None if a routine is gone: (…, in), (out, in) → (…, out) float32"""
    paths = laying_of(name_of(matrix.dtype)), rounding(), product()
    lay, make_numbers, multiply = map(loaded, paths)
    if lay is None or make_numbers is None or multiply is None:
        return None
    out, width = matrix.shape
    rows, N = x.reshape(-1, width).float(), width // GROUP
    numbers = make_numbers([filled(rows, TOGETHER).view(-1, TOGETHER, N, GROUP)])
    high = min(out, max(1, AT_ONCE // width // LANES) * LANES)
    # All slabs are laid in one place: fresh memory comes page by page, which takes as long.
    place = torch.empty(high // LANES, N, WORDS, LANES, dtype=torch.int32)
    y = torch.empty(len(numbers[0]), TOGETHER, out // LANES, LANES)
    start = torch.zeros(1, dtype=torch.int64)
    for some in torch.split(matrix, high):
        words = place[: len(some) // LANES]
        [units] = lay([some.view(-1, LANES, N, GROUP), words.view(torch.float32)])
        [start] = multiply([*numbers, words, units, y, start])
    return y.view(-1, out)[: len(rows)].view(*x.shape[:-1], out)


def compile_laying(number: str) -> None:
    """The routine that lays rows of these numbers.

    Raises: RefollamaError without a compiler, or if it fails.
    """
    any_size = torch.export.Dim.AUTO
    matrix = torch.randn(5, LANES, 7, GROUP).to(getattr(torch, number))
    given = matrix, torch.empty(5, 7, WORDS, LANES)
    sizes = {0: any_size, 2: any_size}, {0: any_size, 1: any_size}
    compile_to(laying_of(number), Laying(), given, sizes)


def compile_rounding() -> None:
    """The routine that rounds tokens, unless it is there.  Raises: as `compile_laying`."""
    if not loaded(rounding()):
        any_size = torch.export.Dim.AUTO
        given = (torch.randn(3, TOGETHER, 7, GROUP),)
        compile_to(rounding(), Rounding(), given, ({0: any_size, 2: any_size},))


def compile_product() -> None:
    """The routine that multiplies, unless it is there.  Raises: as `compile_laying`."""
    if loaded(product()):
        return
    any_size = torch.export.Dim.AUTO
    words, units = laid(torch.randn(5, LANES, 7, GROUP))
    numbers = rounded(torch.randn(3, TOGETHER, 7, GROUP))
    place, start = torch.empty(3, TOGETHER, 9, LANES), torch.ones(1, dtype=torch.int64)
    given = *numbers, words.view(torch.int32), units, place, start
    both, outer = {0: any_size, 1: any_size}, {0: any_size, 2: any_size}
    compile_to(product(), FixedProduct(), given, (both, both, both, both, outer, None))
