"""Fixed point: prompts by matrices of 16 bits, tokens and rows in whole numbers.

    32 values of a token, or of a row    x ≈ unit · n,    n from −8191 to 8191
    a word of 32 bits                    two such numbers, sixteen apart
    y                                    Σ over 32s    unit of the token · unit of the row · Σ n · n

A processor multiplies twice as many numbers of 16 bits at a time as floats, and adds them up in
pairs (`dots.pairs`). Of 14 bits each, 32 products fill a sum of 32 bits: it is exact. So a product
is off by 0.00012; llama.cpp, which rounds tokens to float16 for such matrices, by 0.0002.

    rows as they lie ── laid ──► words of sixteen rows, side by side ── times ──► some outputs

Rows are laid anew for each prompt, two million weights at a time: that takes as long as multiplying
some thirty tokens, and a copy would take as much memory as the file. What stays is the largest of
each 32 values: to find it takes longer than to lay them, and it is half a bit for each weight. A
token is the same beside others.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from refollama.fast.dots import GROUP, HALF, TINY, largest_of, once, pairs, whole_numbers
from refollama.fast.laned import TOGETHER, filled
from refollama.fast.lanes import LANES
from refollama.fast.prepared import has_avx2
from refollama.fast.routines import compile_to, loaded, path_for
from refollama.fast.rows import name_of

MOST = (1 << 13) - 1  # 32 · MOST · MOST is below 2 ^ 31
WORDS = GROUP // 2
AT_ONCE = 1 << 21  # weights that are laid at a time: four megabytes of words


def fits(rows: int, width: int) -> bool:
    """Can a matrix of this size be laid so, by this processor?"""
    return rows > 0 and rows % LANES == 0 and width % GROUP == 0 and has_avx2()


def largest_in(matrix: Tensor) -> Tensor:
    """Rows, a multiple of 16, of any type, in groups of 32: (T, 16, N, 32) → (T, N, 16), of the
    same type: the largest of each 32, without its sign."""
    found = once(largest_of(matrix.float()))  # row after row, as memory is read
    return once(found.transpose(1, 2)).to(matrix.dtype)


def laid(matrix: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Such rows, and what is `largest_in` them → words (T, N, 16, 16), a column of them for each
    row, as float32; units (T, N, 16)

    Words are called floats for as long as they are moved: compilers know how to transpose those.
    """
    largest = largest.float().clamp(min=TINY)
    each = once(MOST / largest)[..., None]
    whole = torch.round(matrix.float().transpose(1, 2) * each).int()  # (T, N, 16, 32)
    words = _in_pairs(whole).view(torch.float32).transpose(2, 3)
    return words.contiguous(), largest / MOST


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


class Largest(nn.Module):
    """`largest_in`, of any size: this is compiled."""

    def forward(self, matrix: Tensor) -> Tensor:
        return largest_in(matrix)


class Laying(nn.Module):
    """`laid`, of any size, into words that are there: this is compiled.  → units"""

    def forward(self, matrix: Tensor, largest: Tensor, place: Tensor) -> Tensor:
        words, units = laid(matrix, largest)
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


def largest_of_rows(number: str) -> Path:
    """Where the routine is kept that finds the largest in rows of these numbers, as "float16"."""
    return path_for(["fixed largest", number])


def laying_of(number: str) -> Path:
    """Where the routine is kept that lays rows of these numbers."""
    return path_for(["fixed", number])


def rounding() -> Path:
    """Where the routine is kept that rounds tokens: one for all."""
    return path_for(["fixed tokens", TOGETHER])


def product() -> Path:
    """Where the routine that multiplies is kept: one for all."""
    return path_for(["fixed product", TOGETHER])


def is_there(number: str) -> bool:
    """Have rows of such numbers their routines?"""
    paths = largest_of_rows(number), laying_of(number), rounding(), product()
    return all(map(loaded, paths))


def largest_found(matrix: Tensor) -> Tensor | None:
    """What is `largest_in` it; None if its routine is gone: (out, in) → (out / 16, in / 32, 16)"""
    find = loaded(largest_of_rows(name_of(matrix.dtype)))
    return None if find is None else find([_in_groups(matrix)])[0]


def fixed_times(x: Tensor, matrix: Tensor, largest: Tensor) -> Tensor | None:
    """x · matrixᵀ; None if a routine is gone: (…, in), (out, in) → (…, out) float32

    largest: what was `largest_found` in the matrix.
    """
    paths = laying_of(name_of(matrix.dtype)), rounding(), product()
    lay, make_numbers, multiply = map(loaded, paths)
    if lay is None or make_numbers is None or multiply is None:
        return None
    out, width = matrix.shape
    rows, N = x.reshape(-1, width).float(), width // GROUP
    numbers = make_numbers([filled(rows, TOGETHER).view(-1, TOGETHER, N, GROUP)])
    high = min(out, max(1, AT_ONCE // width // LANES) * LANES) // LANES
    # All slabs are laid in one place: fresh memory comes page by page, which takes as long.
    place = torch.empty(high, N, WORDS, LANES, dtype=torch.int32)
    y = torch.empty(len(numbers[0]), TOGETHER, out // LANES, LANES)
    start = torch.zeros(1, dtype=torch.int64)
    slabs = (torch.split(one, high) for one in (_in_groups(matrix), largest))
    for some, its_largest in zip(*slabs, strict=True):
        words = place[: len(some)]
        [units] = lay([some, its_largest, words.view(torch.float32)])
        [start] = multiply([*numbers, words, units, y, start])
    return y.view(-1, out)[: len(rows)].view(*x.shape[:-1], out)


def _in_groups(matrix: Tensor) -> Tensor:
    """(out, in) → (out / 16, 16, in / 32, 32)"""
    return matrix.view(-1, LANES, matrix.shape[1] // GROUP, GROUP)


def compile_largest(number: str) -> None:
    """The routine that finds the largest in rows of these numbers.

    Raises: RefollamaError without a compiler, or if it fails.
    """
    any_size = torch.export.Dim.AUTO
    given = (torch.randn(5, LANES, 7, GROUP).to(getattr(torch, number)),)
    compile_to(largest_of_rows(number), Largest(), given, ({0: any_size, 2: any_size},))


def compile_laying(number: str) -> None:
    """The routine that lays rows of these numbers.  Raises: as `compile_largest`."""
    any_size = torch.export.Dim.AUTO
    matrix = torch.randn(5, LANES, 7, GROUP).to(getattr(torch, number))
    given = matrix, largest_in(matrix), torch.empty(5, 7, WORDS, LANES)
    both = {0: any_size, 1: any_size}
    compile_to(laying_of(number), Laying(), given, ({0: any_size, 2: any_size}, both, both))


def compile_rounding() -> None:
    """The routine that rounds tokens, unless it is there.  Raises: as `compile_largest`."""
    if not loaded(rounding()):
        any_size = torch.export.Dim.AUTO
        given = (torch.randn(3, TOGETHER, 7, GROUP),)
        compile_to(rounding(), Rounding(), given, ({0: any_size, 2: any_size},))


def compile_product() -> None:
    """The routine that multiplies, unless it is there.  Raises: as `compile_largest`."""
    if loaded(product()):
        return
    any_size = torch.export.Dim.AUTO
    matrix = torch.randn(5, LANES, 7, GROUP)
    words, units = laid(matrix, largest_in(matrix))
    numbers = rounded(torch.randn(3, TOGETHER, 7, GROUP))
    place, start = torch.empty(3, TOGETHER, 9, LANES), torch.ones(1, dtype=torch.int64)
    given = *numbers, words.view(torch.int32), units, place, start
    both, outer = {0: any_size, 1: any_size}, {0: any_size, 2: any_size}
    compile_to(product(), FixedProduct(), given, (both, both, both, both, outer, None))
