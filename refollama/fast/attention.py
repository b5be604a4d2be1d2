"""Attention over a prompt, for some of its tokens at a time.

    tokens 0 …  63   see places 0 … 255      scores of a part stay in the cache; places that come
    tokens 64 … 127  see places 0 … 255      later than all of its tokens are left out
        …
    tokens 448 … 511 see places 0 … 511

For all tokens at once scores go to memory and come back several times: of 512 tokens and 32 heads
they take 32 MiB, of 2048 half a gigabyte. What comes out is the same to the last bit: a token's
row is computed alike beside any others, and places that it may not see add nothing, in pieces of
their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refollama.kvcache import PIECE
from refollama.models.layers import attend

SCORES = 1 << 20  # of a part: four megabytes of float32


def attend_in_parts(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """What `attend` computes, of the same shapes: q (B, T, H, D) → (B, T, H, Dv)"""
    B, T, H, _ = q.shape
    at_once = max(1, SCORES // max(1, B * H * k.shape[2]))
    if at_once >= T or q.device.type != "cpu":
        return attend(q, k, v, visible)
    found = []
    for some, seen in zip(
        torch.split(q, at_once, 1), torch.split(visible, at_once, 1), strict=True
    ):
        S = _last_seen(seen)
        found.append(attend(some, k[:, :, :S], v[:, :, :S], seen[..., :S]))
    return torch.cat(found, dim=1)


def _last_seen(visible: Tensor) -> int:
    """So many places must be looked at, in whole pieces: (B, T, S) bool → 1 … S"""
    seen = visible.any(1).any(0).nonzero()
    last = int(seen[-1]) if len(seen) else 0
    return min((last // PIECE + 1) * PIECE, visible.shape[-1])
