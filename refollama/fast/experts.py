"""Experts: each of the stacked matrices is a part of its own, by its type.

Only those that a router chose are touched, so what a token costs is as in a net without experts.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from refollama.fast.prepared import PreparedLinear
from refollama.models.layers import Experts, Linear

Make = Callable[[Linear], Linear]


class FastExperts(Experts):
    """`Experts` in place of others; `make` gives what stands for one matrix.

    Tokens come without their rows, so that nobody knows here whether they are of a prompt: outside
    of `exactly` they are rounded, however many they are, by a matrix that rounds tokens.
    """

    def __init__(self, part: Experts, make: Make) -> None:
        super().__init__(part.weight, part.unpack)
        self._make = make
        self._of, self.each = part.weight, [make(one) for one in matrices(part)]

    def forward(self, x: Tensor, expert: int) -> Tensor:
        if self._of is not self.weight:
            self._of, self.each = self.weight, [self._make(one) for one in matrices(self)]
        found: Tensor = self.each[expert](x)
        return found

    @property
    def more_bytes(self) -> int:
        """What is kept beside the weight."""
        return sum(one.more_bytes for one in self.each if isinstance(one, PreparedLinear))


def matrices(part: Linear | Experts) -> list[Linear]:
    """A matrix, or each of those that are stacked."""
    if isinstance(part, Linear):
        return [part]
    return [Linear(weight, part.unpack) for weight in part.weight]
