"""Does this machine multiply so that a row never depends on the rows beside it?

That is what makes an answer the same whether its prompt was read at once, in parts, or found in the
cache. Intel's MKL does so in its strict mode, which `refollama/__init__.py` asks for; but MKL reads
that wish before its first product, so whoever multiplies first and imports later has it no more.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch.nn import functional

log = logging.getLogger(__name__)

SHAPES = ((64, 96), (512, 256))  # (in, out) of the products that are tried
PARTS = ((0, 1), (3, 5), (7, 40), (250, 300))  # rows that are computed once more, by themselves


@cache
def rows_are_exact() -> bool:
    """Tried once, with a few small products."""
    rng = torch.Generator().manual_seed(0)
    for inner, width in SHAPES:
        x, w = torch.randn(300, inner, generator=rng), torch.randn(width, inner, generator=rng)
        together = functional.linear(x, w)
        for first, last in PARTS:
            if not torch.equal(functional.linear(x[first:last], w), together[first:last]):
                return False
    return True


@cache
def warn_if_not_exact() -> None:
    """Say it once."""
    if not rows_are_exact():
        log.warning(
            "answers may differ in the last bit of their logits, depending on how a prompt was "
            "read: torch's products are not exact by rows (import refollama before anything else "
            "multiplies; only Intel's MKL can do it)"
        )
