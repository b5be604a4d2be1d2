"""What a model remembers: the keys and values of every token that it has read.

One slot holds one sequence; the place of a token in its slot is its position.

    layer 0   keys   (slots, Hk, S, D)      slot 0   k₀ k₁ k₂ k₃ ·  ·  ·  ·
              values (slots, Hk, S, Dv)     slot 1   k₀ k₁ ·  ·  ·  ·  ·  ·
    layer 1   …                                      position →

The cache holds no model and no policy: who gets a slot is the engine's business, what may be seen
is the model's (`key_position <= position`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Positions are reserved and read in pieces of so many. A sum's order decides its last bit, and a
# routine that adds S numbers chooses its order by S: over pieces of one size it cannot. So a token
# gets the same bits however many places lie behind it.
PIECE = 256
CPU = torch.device("cpu")


class KVCache:
    """Keys and values of several sequences, for every layer.

    `shapes`: of each layer, Hk, the width of a key, D, and of a value, Dv. `devices`: its place.
    Units: a layer takes slots · Hk · S · (D + Dv) · itemsize bytes, where S grows with the longest
    sequence so far, so a long `num_ctx` costs nothing until somebody writes that much.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        *,
        slots: int = 1,
        dtype: torch.dtype = torch.float32,
        devices: Sequence[torch.device] | None = None,
    ) -> None:
        self.slots = slots
        self._used = [0] * slots  # of each slot, places that may hold something
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for (heads, *widths), device in zip(shapes, devices or [CPU] * len(shapes), strict=True):
            for tensors, width in zip((self.keys, self.values), widths, strict=True):
                empty = torch.zeros(slots, heads, 0, width, dtype=dtype, device=device)
                tensors.append(empty)

    @property
    def length(self) -> int:
        """Positions that a slot has room for now: S."""
        return self.keys[0].shape[2]

    def rows(self, slots: Sequence[int], length: int) -> Rows:
        """The slots that one step works on; after it, positions 0 … length − 1 may be in use.

        They see whole pieces: places behind `length` are zero, or left by what was there before.
        """
        self._reserve(length)
        for slot in slots:
            self._used[slot] = max(self._used[slot], length)
        whole = -(-length // PIECE) * PIECE
        return Rows(self, torch.tensor(slots), whole)

    def clear(self, slot: int, start: int = 0) -> None:
        """Forget a sequence from `start` on: zeros, so no stale infinity meets a weight of zero."""
        for tensor in (*self.keys, *self.values):
            tensor[slot, :, start : self._used[slot]].zero_()
        self._used[slot] = min(start, self._used[slot])

    def copy(self, source: int, slot: int, end: int) -> None:
        """Positions 0 … end − 1 of another slot, as this one's beginning."""
        for tensor in (*self.keys, *self.values):
            tensor[slot, :, :end] = tensor[source, :, :end]
        self._used[slot] = max(self._used[slot], end)

    def shift(
        self, slot: int, start: int, stop: int, end: int, turn: Callable[[Tensor], Tensor]
    ) -> None:
        """Drop positions start … stop − 1 of a slot; those up to end − 1 move down to follow on.

        A key depends on its place: `turn` makes keys of the new places from keys of the old ones,
        (Hk, n, D) float32 → the same.
        """
        moved = start + end - stop  # where what moves down will end
        for keys in self.keys:
            keys[slot, :, start:moved] = turn(keys[slot, :, stop:end].float()).to(keys.dtype)
        for values in self.values:
            values[slot, :, start:moved] = values[slot, :, stop:end].clone()
        self.clear(slot, moved)

    def _reserve(self, length: int) -> None:
        if length <= self.length:
            return
        target = max(PIECE, self.length)
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
    length: int  # S, a multiple of PIECE

    def append(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values, and return all of them, old and new.

        Shapes: positions (B, T); k (B, T, Hk, D), v (B, T, Hk, Dv)
        → keys (B, Hk, S, D), values (B, Hk, S, Dv) in k's dtype, where k lies.
        """
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        slots, positions = self.slots[:, None].to(keys.device), positions.to(keys.device)
        keys[slots, :, positions] = k.to(keys)
        values[slots, :, positions] = v.to(values)
        return self._read(keys).to(k), self._read(values).to(v)

    def _read(self, tensor: Tensor) -> Tensor:
        """(slots, Hk, room, D) → (B, Hk, S, D); one row is a view, several are gathered."""
        if len(self.slots) == self.cache.slots == 1:
            return tensor[:, :, : self.length]
        return tensor[self.slots.to(tensor.device), :, : self.length]
