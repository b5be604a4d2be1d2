"""Products of which each row is the same, to the last bit, whatever rows stand beside it.

That is what makes an answer the same whether its prompt was read at once, in parts, or found in the
cache. Libraries take other routines for few rows, which add in another order. Intel's MKL has a
strict mode without them, which `refollama/__init__.py` asks for; but MKL reads that wish before its
first product, so whoever multiplies first and imports later has it no more. On AMD's processors it
does not help: fewer rows than four are computed in another way, and narrow matrices in another way
by each number of rows. So few rows go with copies of themselves, and so do narrow matrices; how
many rows it takes on this machine is tried once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional

log = logging.getLogger(__name__)

Multiply = Callable[[Tensor, Tensor, Tensor | None], Tensor]
TRIED = (1, 2, 4, 8)  # rows, at least
# Outputs for each thread: of fewer MKL makes parts by how many rows there are, on AMD's processors.
PER_THREAD = 12
NONE = 0
SHAPES = ((64, 96), (100, 37), (16, 2), (512, 256))  # (in, out) of the products that are tried
ROWS = 300
# Of these rows some are computed once more, by themselves.
PARTS = ((0, 1), (3, 5), (8, 11), (20, 25), (7, 40), (250, 300))


def linear(
    x: Tensor, w: Tensor, b: Tensor | None = None, by: Multiply = functional.linear
) -> Tensor:
    """x·wᵀ + b.  Shapes: x (…, in), w (out, in), b (out,) → (…, out)

    by: what multiplies.
    """
    return _wide_enough(_fewest_for(x, by), x, w, b, by)


def times(a: Tensor, b: Tensor) -> Tensor:
    """a·b.  Shapes: (…, rows, n), (…, n, m) → (…, rows, m)

    A row alone would be a vector by a matrix, even where matrices are multiplied strictly.
    """
    rows, width = a.shape[-2], b.shape[-1]
    few = _fewest_for(a)
    high, wide = max(2, few), _outputs(few)
    if 0 < width < wide:
        b = _repeated(b.mT, wide).mT
    if 0 < rows < high:
        a = _repeated(a, high)
    y = a @ b
    return y if y.shape[-2:] == (rows, width) else y[..., :rows, :width].contiguous()


def rows_are_exact() -> bool:
    """Does this machine multiply so, by torch's own choice of a library?"""
    return fewest() != NONE


def fewest(by: Multiply = functional.linear) -> int:
    """So many rows are each computed as they are among more; NONE: it takes more than were tried.

    1 with MKL's strict mode on Intel's processors, 4 with it on AMD's.
    """
    return _tried(by)


def _fewest_for(x: Tensor, by: Multiply = functional.linear) -> int:
    """None is needed on a GPU, and none by a compiler, which adds in an order of its own."""
    exact = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return fewest(by) if exact else NONE


@cache
def _tried(by: Multiply) -> int:
    """Once for whatever multiplies, whether it was named or not, with a few small products."""
    rng = torch.Generator().manual_seed(0)
    drawn = partial(torch.randn, generator=rng, device="cpu", dtype=torch.float32)
    products = [(drawn(ROWS, n), drawn(m, n)) for n, m in SHAPES]
    for few in TRIED:
        if all(_alike(few, x, w, by) for x, w in products):
            return few
    return NONE


def _alike(few: int, x: Tensor, w: Tensor, by: Multiply) -> bool:
    together = _wide_enough(few, x, w, None, by)
    return all(
        torch.equal(_wide_enough(few, x[first:last], w, None, by), together[first:last])
        for first, last in PARTS
    )


def _outputs(few: int) -> int:
    """So many outputs are each computed as they are among more, beside that many rows or more.

    By a matrix of one output, which is a vector, all libraries take another routine.
    """
    return 2 if few in (NONE, 1) else PER_THREAD * torch.get_num_threads()


def _wide_enough(few: int, x: Tensor, w: Tensor, b: Tensor | None, by: Multiply) -> Tensor:
    """The product; of a narrower matrix, with copies beside it."""
    width, least = len(w), _outputs(few)
    if not 0 < width < least:
        return _at_least(few, x, w, b, by)
    more = b if b is None else _repeated(b[:, None], least)[:, 0]
    return _at_least(few, x, _repeated(w, least), more, by)[..., :width].contiguous()


def _at_least(few: int, x: Tensor, w: Tensor, b: Tensor | None, by: Multiply) -> Tensor:
    """The product; of fewer rows than that, with copies beside them."""
    x = x.contiguous()  # rows that do not lie in one line would take another routine, too
    rows = x.shape[:-1].numel()
    if not 0 < rows < few:
        return by(x, w, b)
    y = by(_repeated(x.view(rows, -1), few), w, b)
    return y[:rows].view(*x.shape[:-1], -1)


def _repeated(x: Tensor, few: int) -> Tensor:
    """(…, rows, n) → (…, at least few, n): these, and copies of them."""
    return torch.cat([x] * -(-few // x.shape[-2]), dim=-2)


@cache
def warn_if_not_exact() -> None:
    """Say it once."""
    if not rows_are_exact():
        log.warning(
            "answers may differ in the last bit of their logits, depending on how a prompt was "
            "read: torch's products are not exact by rows (import refollama before anything else "
            "multiplies; Intel's MKL can do it)"
        )
