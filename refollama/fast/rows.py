"""Rows of a matrix as they lie, by one token or by eight: sums that are compiled.

    y[m, n] = Σ x[m, i] · w[n, i]

A row is read once for all tokens, and its numbers become floats where they are multiplied: nothing
is rounded. Each sum is added in the same order beside however many other tokens.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from refollama.fast.laned import TOGETHER, filled, together_for
from refollama.fast.routines import compile_to, loaded, path_for

VECTOR = 16  # numbers
PAIR = 2 * VECTOR  # two vectors of a row are added up, and that to the sum
WIDE = 4096  # numbers: such a token, and rows that pass by, do not fit a cache of 32 kB
TILES = (1, 1), (1, 4), (TOGETHER, 2)  # tokens together, and rows: what is compiled


def rows_times(x: Tensor, matrix: Tensor) -> Tensor:
    """(M, in), (out, in) of any type → (M, out) float32"""
    n, width = matrix.shape
    if width % PAIR:
        matrix = matrix.float()
        return torch.stack([(token * matrix).sum(-1) for token in x.unbind()])
    return _by_vectors(in_vectors(x), in_vectors(matrix, at_once(len(x), n, width)))


def at_once(count: int, n: int, width: int) -> int:
    """How many of n rows go together: of several tokens more is read than of a row, and two rows
    share them. One token stays in the cache, and several rows would halve what memory gives; but a
    wide one does not stay, and four rows share it."""
    some = 2 if count > 1 else 4 if width >= WIDE else 1
    return some if n % some == 0 else 1


def in_vectors(rows: Tensor, together: int = 1) -> Tensor:
    """(n, in) → (n / together, together, in / 32, 2, 16)"""
    n, width = rows.shape
    return rows.view(n // together, together, width // PAIR, 2, VECTOR)


def _by_vectors(x: Tensor, matrix: Tensor) -> Tensor:
    """Both as `in_vectors` has them → (M, out)"""
    rows = matrix.float().unbind(1)
    found = [torch.stack([_inner(token, row) for row in rows], -1) for token in x[:, 0].unbind()]
    return torch.stack(found).flatten(1)


def _inner(token: Tensor, rows: Tensor) -> Tensor:
    """(in / 32, 2, 16), (n, in / 32, 2, 16) → (n,)"""
    one, other = token.expand(rows.shape).unbind(2)
    its, others = rows.unbind(2)
    return fma(one, its, other * others).sum((1, 2))


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a · b + c; compiled, with one rounding."""
    from torch._inductor import inductor_prims  # takes a second, and only compilers come here

    found: Tensor = inductor_prims.fma(a, b, c)
    return found


# ── compiled ──────────────────────────────────────────────────────────────────────────────────


class RowsProduct(nn.Module):
    """Tokens by a matrix of any size, both as `in_vectors` has them: this is compiled."""

    def forward(self, x: Tensor, matrix: Tensor) -> Tensor:
        return _by_vectors(x, matrix)


def path_of(number: str, together: int, rows: int) -> Path:
    """Where the routine for rows of these numbers is kept, for so many tokens together, and rows.

    number: a type of torch's, such as "float16".
    """
    return path_for(["rows", number, together, rows])


def name_of(dtype: torch.dtype) -> str:
    """Such as "float16"."""
    return str(dtype).removeprefix("torch.")


def rows_are_there(number: str) -> bool:
    """Have such rows their routines?"""
    return all(loaded(path_of(number, *tile)) for tile in TILES)


def compiled_rows_times(x: Tensor, matrix: Tensor) -> Tensor | None:
    """`rows_times`; None if its routine is gone: (…, in), (out, in) → (…, out) float32"""
    rows = x.reshape(-1, x.shape[-1]).float()
    # The routine for eight has two rows go together, and does not look whether it is given two.
    together = 1 if len(matrix) % 2 else together_for(len(rows))
    some = at_once(together, *matrix.shape)
    routine = loaded(path_of(name_of(matrix.dtype), together, some))
    if routine is None:
        return None
    given = in_vectors(matrix, some)
    tokens = torch.split(filled(rows, together), together)
    found = [routine([in_vectors(one), given])[0] for one in tokens]
    y = found[0] if len(found) == 1 else torch.cat(found)
    return y[: len(rows)].view(*x.shape[:-1], -1)


def compile_rows(number: str, together: int, rows: int) -> None:
    """The routine for rows of these numbers, for so many tokens together, and rows.

    Raises: RefollamaError without a compiler, or if it fails.
    """
    n, width = 96, 40 * PAIR
    given = (
        in_vectors(torch.randn(together, width)),
        in_vectors(torch.randn(n, width).to(getattr(torch, number)), rows),
    )
    any_size = torch.export.Dim.AUTO
    sizes = {2: any_size}, {0: any_size, 2: any_size}
    compile_to(path_of(number, together, rows), RowsProduct(), given, sizes)
