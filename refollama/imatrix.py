"""What comes into each matrix while a model reads a text?  It becomes an importance matrix.

    text ── windows ── net ──┬── what comes into blk.0.attn_q ── Σ x² of each column, and a count
                             ├── what comes into blk.0.attn_k ── …
                             └── …                                (`weights/importance.py`)

The net is not changed: hooks listen at its linear parts and are taken away again. Windows are those
of llama.cpp's tool: side by side, each read by itself, BOS first, all tokens counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from refollama.errors import RefollamaError
from refollama.loaded import LoadedModel
from refollama.models.layers import Experts, Linear
from refollama.models.meter import Told, unheard
from refollama.perplexity import Cut, windows
from refollama.weights.importance import Importance, Sums

BLOCKS = "blk."  # the language model's; a vision tower's parts have other names
OUTPUT = "output"


def collect(
    llm: LoadedModel,
    text: str | Sequence[int],
    num_ctx: int | None = None,
    *,
    chunks: int | None = None,
    output: bool = False,
    told: Told = unheard,
) -> Importance:
    """Read a text, and note what the matrices of all blocks multiply.

    text, num_ctx, chunks: as for `perplexity`, but one window is enough.
    output: note it for the output matrix, too, which is better packed without knowing.
    told: is called with the windows that are read, and those that there are.
    Raises: BadRequest, RefollamaError if the weights led out of the numbers.
    """
    cut = Cut.checked(num_ctx, 0, llm.net.n_ctx)
    parts = windows(llm.tokenizer, text, cut, fewest=cut.length)[:chunks]
    with listening(llm.net) as ears:
        for number, part in enumerate(parts, 1):
            states = llm.hidden(part)
            if output:
                ears.setdefault(OUTPUT, Ear(1)).hear(states)
            told(number, len(parts))
    sums = {f"{name}.weight": ear.sums(name) for name, ear in ears.items() if ear.any}
    return Importance(sums, chunks=len(parts), chunk_size=cut.length)


class Ear:
    """What it has heard of what comes into m matrices; in float64, which loses no small numbers."""

    def __init__(self, m: int) -> None:
        self._squares: list[Tensor | None] = [None] * m
        self._counts = [0] * m

    def hear(self, x: Tensor, matrix: int = 0) -> None:
        """(…, in) came into this matrix."""
        rows = x.detach().flatten(0, -2).double()
        more, before = rows.square().sum(0).cpu(), self._squares[matrix]
        self._squares[matrix] = more if before is None else before + more
        self._counts[matrix] += len(rows)

    @property
    def any(self) -> bool:
        """Has it heard anything?"""
        return any(self._counts)

    def sums(self, name: str) -> Sums:
        """(m, in) and (m,); zeros for a matrix that met nothing."""
        width = next(len(one) for one in self._squares if one is not None)
        rows = [torch.zeros(width) if one is None else one for one in self._squares]
        squares = torch.stack([row.float() for row in rows])
        if not squares.isfinite().all():
            raise RefollamaError(f"what comes into {name} is not finite: NaN or Inf")
        return Sums(squares.numpy(), np.array(self._counts, np.float32))


@contextmanager
def listening(net: nn.Module) -> Iterator[dict[str, Ear]]:
    """An ear at each linear part of the blocks, by the part's name, as long as this is open."""
    parts = {
        name: part
        for name, part in net.named_modules()
        if name.startswith(BLOCKS) and isinstance(part, Linear | Experts)
    }
    ears = {
        name: Ear(len(part.weight) if isinstance(part, Experts) else 1)
        for name, part in parts.items()
    }
    hooks = [
        part.register_forward_pre_hook(_teller(ears[name].hear)) for name, part in parts.items()
    ]
    try:
        yield ears
    finally:
        for hook in hooks:
            hook.remove()


def _teller(hear: Callable[..., None]) -> Callable[[nn.Module, tuple[object, ...]], None]:
    """A hook: what a part is called with, x and for experts the number of one, is what is heard."""
    return lambda part, given: hear(*given)
