"""Which place of the cache does a sequence get, and what of its prompt is there already?

    slot 0   You are a helpful … | Why is the sky … | Because …      ← the next turn goes here:
    slot 1   Once upon a time                                          only its end must be read

A slot remembers the tokens whose keys and values it holds, also after their sequence has ended.
What a new prompt shares with them, from the beginning on, need not be read again; from a slot that
is in use it is copied. That is no approximation: a token's keys depend on the tokens before it
alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

NOBODY: Mapping[int, Sequence[int]] = {}


class Place(NamedTuple):
    """A slot for a prompt, how many of its tokens need not be read, and the slot that has them."""

    slot: int
    cached: int
    source: int


class Slots:
    """The free slots of a cache and what each still holds; no model, no thread."""

    def __init__(self, count: int) -> None:
        self._free: dict[int, list[int]] = {slot: [] for slot in range(count)}  # oldest first
        self._taken: dict[int, int] = {}  # slot → the epoch in which it was taken
        self._epoch = 0  # what was read in one epoch is of no use in another
        self._net: object = None  # what the net is in this epoch

    def __bool__(self) -> bool:
        return bool(self._free)

    def take(self, prompt: Sequence[int], others: Mapping[int, Sequence[int]] = NOBODY) -> Place:
        """The free slot that holds most of this prompt, or one to copy it into.

        others: what slots that are in use hold; one that holds more of the prompt is copied from.
        At least one token is left to read: it is what the first draw needs. Of equals, the slot
        that was left longest ago is given away.
        """
        known = prompt[:-1]
        best = source = max(self._free, key=lambda slot: common(self._free[slot], known))
        cached = common(self._free[best], known)
        for slot, tokens in others.items():
            shared = common(tokens, known)
            if shared > cached and self._taken[slot] == self._epoch:
                best, cached, source = next(iter(self._free)), shared, slot
        del self._free[best]
        self._taken[best] = self._epoch
        return Place(best, cached, source)

    def give_back(self, slot: int, tokens: Sequence[int] = ()) -> None:
        """The slot is free again, and holds these tokens, unless an epoch has ended meanwhile."""
        self._free[slot] = list(tokens) if self._taken.pop(slot) == self._epoch else []

    def forget(self) -> None:
        """Nothing that has been read, or is being read now, may be used any more."""
        self._epoch += 1
        for tokens in self._free.values():
            tokens.clear()

    def trust(self, net: object) -> None:
        """Forget everything if the net is not what it was (see `net.state`)."""
        if net is None or net != self._net:
            self.forget()
        self._net = net


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences share from their beginning on."""
    for at, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return at
    return min(len(a), len(b))
