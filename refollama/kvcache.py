"""What a model remembers: the keys and values of every token that it has read.

One slot holds one sequence; the place of a token in its slot is its position.

    layer 0   keys   (slots, Hk, S, D)      slot 0   k₀ k₁ k₂ k₃ ·  ·  ·  ·
              values (slots, Hk, S, D)      slot 1   k₀ k₁ ·  ·  ·  ·  ·  ·
    layer 1   …                                      position →

The cache holds no model and no policy: who gets a slot is the engine's business, what may be seen
is the model's (`key_position <= position`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FIRST_LENGTH = 64  # positions per slot at the start; doubled whenever a sequence outgrows them


class KVCache:
    """Keys and values of several sequences, for every layer.

    Units: it takes 2 · layers · slots · Hk · S · D · itemsize bytes, where S grows with the longest
    sequence so far, so a long `num_ctx` costs nothing until somebody writes that much.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        width: int,
        *,
        slots: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.slots = slots
        self.shape = (slots, heads, 0, width)
        new = [torch.zeros(self.shape, dtype=dtype, device=device) for _ in range(2 * layers)]
        self.keys = new[:layers]
        self.values = new[layers:]

    @property
    def length(self) -> int:
        """Positions that a slot has room for now: S."""
        return self.keys[0].shape[2]

    def rows(self, slots: Sequence[int], length: int) -> Rows:
        """The slots that one step works on; after it, positions 0 … length − 1 may be in use."""
        self._reserve(length)
        return Rows(self, torch.tensor(slots, device=self.keys[0].device), length)

    def clear(self, slot: int) -> None:
        """Forget a sequence: zeros, so that no stale infinity can meet a weight of zero."""
        for tensor in (*self.keys, *self.values):
            tensor[slot].zero_()

    def _reserve(self, length: int) -> None:
        if length <= self.length:
            return
        target = max(FIRST_LENGTH, self.length)
        while target < length:
            target *= 2
        # Both or none: if the memory runs out on the way, the old cache is whole.
        self.keys, self.values = _grown(self.keys, target), _grown(self.values, target)


def _grown(tensors: list[Tensor], length: int) -> list[Tensor]:
    """(slots, Hk, S, D) each → (slots, Hk, length, D), the new places zero."""
    grown = []
    for old in tensors:
        slots, heads, kept, width = old.shape
        new = old.new_zeros(slots, heads, length, width)
        new[:, :, :kept] = old
        grown.append(new)
    return grown


@dataclass(frozen=True)
class Rows:
    """B of the cache's slots, as the model sees them during one step."""

    cache: KVCache
    slots: Tensor  # (B,)
    length: int

    def append(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values, and return all of them, old and new.

        Shapes: positions (B, T); k, v (B, T, Hk, D) → keys, values (B, Hk, length, D) in k's dtype.
        """
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        slots = self.slots[:, None]
        keys[slots, :, positions] = k.to(keys.dtype)
        values[slots, :, positions] = v.to(values.dtype)
        return self._read(keys).to(k.dtype), self._read(values).to(v.dtype)

    def _read(self, tensor: Tensor) -> Tensor:
        """(slots, Hk, S, D) → (B, Hk, length, D); one row is a view, several are gathered."""
        if len(self.slots) == self.cache.slots == 1:
            return tensor[:, :, : self.length]
        return tensor[self.slots, :, : self.length]
