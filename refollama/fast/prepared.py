"""What fast parts share: something made of a weight once, and made anew when the weight changes."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from refollama.models.layers import Linear
from refollama.weights.pages import LARGE, fresh, let_go

Made = Sequence[Tensor]
Form = Sequence[tuple[torch.dtype, tuple[int, ...]]]  # their types and shapes
LINE = 64  # bytes that a processor reads at a time
FEW = 16  # tokens; of more, unpacking is a small part of the work, and nothing need be rounded
WRITTEN, FLOAT, EXACT = 0, 32, 64  # what is written; a prompt in float32; what is exact
_bits: ContextVar[int] = ContextVar("bits", default=WRITTEN)


@contextmanager
def reading(bits: int) -> Iterator[None]:
    """What is computed in here, by this thread, is a prompt: however few tokens it is, it is
    multiplied in numbers of 32 bits, 16 or 8 (`products.py`; after `warm` `dots.py` and
    `fixed.py`)."""
    before = _bits.set(bits)
    try:
        yield
    finally:
        _bits.reset(before)


def exactly() -> AbstractContextManager[None]:
    """What is computed in here, by this thread, is not rounded, however few tokens it is."""
    return reading(EXACT)


def bits_for(x: Tensor) -> int:
    """In numbers of how many bits these tokens are multiplied, when they are not `may_differ`."""
    return min(_bits.get() or FLOAT, FLOAT) if is_free(x) else FLOAT


def bytes_for(x: Tensor) -> int:
    """Of how many bytes numbers of these tokens may be made (`dots.py`): of what is written, and of
    prompts in 32 bits, two; 0: they stay floats."""
    return {8: 1, 16: 0, EXACT: 0}.get(_bits.get(), 2) if is_free(x) else 0


def is_free(x: Tensor) -> bool:
    """May it be multiplied by what was made for the CPU, and nobody goes backwards through?"""
    return x.device.type == "cpu" and not x.requires_grad


def may_differ(x: Tensor) -> bool:
    """Are these few tokens of each row, in a place where rounding as others do will do?

    (B, T, in), or (B, in) where T is 1. Nobody can go backwards through what takes another way.
    """
    few = x.dim() < 3 or x.shape[-2] <= FEW
    return few and _bits.get() == WRITTEN and not x.requires_grad


def may_round(x: Tensor) -> bool:
    """The same, of what was made for the CPU."""
    return may_differ(x) and x.device.type == "cpu"


def has_avx2() -> bool:
    """Has this processor vectors of 256 bits, or more?  torch's fast routines are for these, and
    `dots` has its instructions there; elsewhere both would go number by number."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX")


def in_parts(x: Tensor, width: int, times: Callable[[Tensor], Tensor]) -> Tensor:
    """times(x), some rows at a time, so that each is computed alike beside however many others.

    (…, in) → (…, width)
    """
    flat = x.reshape(-1, x.shape[-1])
    parts = [times(some) for some in torch.split(flat, FEW)]
    return torch.cat(parts).view(*x.shape[:-1], width)


def room(form: Form) -> list[Tensor]:
    """Tensors of these types and shapes, side by side in large pages if they fill one."""
    sizes = [dtype.itemsize * math.prod(shape) for dtype, shape in form]
    ends = [*accumulate(-(-size // LINE) * LINE for size in sizes)]
    if ends[-1] < LARGE:
        whole = torch.empty(ends[-1], dtype=torch.uint8)
    else:
        whole = torch.frombuffer(fresh(ends[-1]), dtype=torch.uint8)
    return [
        whole[end - size - -size % LINE :][:size].view(dtype).view(shape)
        for end, size, (dtype, shape) in zip(ends, sizes, form, strict=True)
    ]


class OfWeight(NamedTuple):
    """What was made of a weight, and how old that was; of a weight that nobody wrote into."""

    weight: Tensor
    age: int
    made: Made


class PreparedLinear(Linear):
    """`Linear` in place of another, with tensors beside its weight that products are made with."""

    def __init__(self, part: Linear) -> None:
        super().__init__(part.weight, part.unpack, part.bias)
        self._prepared: OfWeight | None = None

    @abstractmethod
    def prepare(self) -> Made:
        """Those tensors, from the weight as it is now."""

    @abstractmethod
    def form(self) -> Form:
        """The types and shapes of those tensors."""

    def fits(self, made: Made) -> bool:
        """Have these tensors the types and shapes of those?"""
        return [(one.dtype, tuple(one.shape)) for one in made] == self.form()

    def prepare_now(self, kept: Made | None = None) -> None:
        """Not before somebody's first token.  kept: what was made of the same weight before; it is
        taken, if it has the right form."""
        if kept is None or not self.fits(kept):
            self.prepared()
            return
        self._prepared = OfWeight(self.weight, self._age(), kept)

    def prepared(self) -> Made:
        """Those tensors, for as long as the weight is the same and nobody writes into it.

        What is written behind torch's back (`weight.data`, numpy) does not show.
        """
        before = self._prepared
        found = self.made_once(before, self.prepare)
        if found is not before:
            self._prepared = found
            self.let_go()
        return found.made

    def made_once(self, before: OfWeight | None, make: Callable[[], Made]) -> OfWeight:
        """What was made before, if it is of the weight as it is now; else what is made anew."""
        age = self._age()
        if before is not None and before.weight is self.weight and before.age == age:
            return before
        # A tensor of inference mode would stop whoever wants to go backwards later.
        with torch.inference_mode(mode=False), torch.no_grad():
            return OfWeight(self.weight, age, make())

    def let_go(self) -> None:
        """Of the file's pages that the weight lies in, where there is a copy to answer with."""
        if self.copied_bytes:
            let_go(self.weight.data_ptr(), self.weight.nbytes)

    def release(self) -> None:
        """Let go of them; whoever wants them next makes them anew."""
        self._prepared = None

    def _age(self) -> int:
        return 0 if self.weight.is_inference() else self.weight._version

    @property
    def more_bytes(self) -> int:
        """What is kept beside the weight."""
        return self.copied_bytes

    @property
    def copied_bytes(self) -> int:
        """What those tensors take, as far as they are there and not the weight itself."""
        made = () if self._prepared is None else self._prepared.made
        start = self.weight.untyped_storage().data_ptr()
        return sum(one.nbytes for one in made if one.untyped_storage().data_ptr() != start)
