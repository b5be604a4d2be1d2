"""How are numbers cut out of the bytes of a block?  What all block layouts share.

Everything here works on whatever device the bytes are, on all blocks at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def numbers(block: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """The numbers in the bytes start … stop − 1 of each block.  (n, nbytes) uint8 → (n, k) dtype

    Copied out first: these bytes of every block are no contiguous numbers, nor need they stand
    at an address that is a multiple of a number's width.
    """
    return block[:, start:stop].clone(memory_format=torch.contiguous_format).view(dtype)


def half(block: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of each block, as float32.  (n, nbytes) → (n, 1)"""
    return numbers(block, start, start + 2, torch.float16).float()


def nibbles(q: Tensor) -> Tensor:
    """Low halves, then high halves, along a new axis before the last.  (…, k) → (…, 2, k)"""
    q = q.contiguous()  # between other fields bytes are cut one by one, in twice the time
    return torch.stack((q & 15, q >> 4), dim=-2)


def shifted(q: Tensor, step: int, mask: int) -> Tensor:
    """The 8 / step fields of every byte, lowest first.  (…, k) → (…, 8 / step, k)"""
    shifts = torch.arange(0, 8, step, dtype=torch.uint8, device=q.device)
    return (q.unsqueeze(-2) >> shifts.unsqueeze(-1)) & mask


def fields(word: Tensor, shifts: Sequence[int], mask: int) -> Tensor:
    """The fields of every number that start at these bits.  (n, k) → (n, k · len(shifts)) int32"""
    starts = torch.tensor(shifts, dtype=torch.int32, device=word.device)
    return ((word.int().unsqueeze(-1) >> starts) & mask).flatten(1)


def scaled(q: Tensor, step: Tensor, low: Tensor | None = None) -> Tensor:
    """q · step − low, for every sub-block.  (n, j, k), (n, j), (n, j) → (n, j·k) float32

    Two roundings, never one: a fused multiply-add would differ from ggml in the last bit.
    """
    values = q.float().mul_(step.unsqueeze(-1))
    if low is not None:
        values.sub_(low.unsqueeze(-1))
    return values.flatten(1)
