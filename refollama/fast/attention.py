"""Attention over a prompt, for some of its tokens at a time.

    tokens 0 …  31   see places 0 … 255      scores of a part stay in the cache; places that come
    tokens 32 … 63   see places 0 … 255      later than all of its tokens are left out
        …
    tokens 480 … 511 see places 0 … 511

For all tokens at once scores go to memory and come back several times: of 512 tokens and 32 heads
they take 32 MiB, of 2048 half a gigabyte. What comes out is the same to the last bit: a token's
row is computed alike beside any others, and places that it may not see add nothing, in pieces of
their own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from refollama.fast.prepared import is_free
from refollama.kvcache import PIECE
from refollama.models.exact import times
from refollama.models.layers import attend, weighted

SCORES = 1 << 19  # of a part: two megabytes of float32


def attend_in_parts(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """What `attend` computes, of the same shapes: q (B, T, H, D) → (B, T, H, Dv)"""
    B, T, H, _ = q.shape
    at_once = max(1, SCORES // max(1, B * H * k.shape[2]))
    if at_once >= T or not all(map(is_free, (q, k, v))):
        return attend(q, k, v, visible)
    mixed = q.new_empty(B, T, H, v.shape[-1])
    for some, seen, its in zip(
        *(torch.split(one, at_once, 1) for one in (q, visible, mixed)), strict=True
    ):
        S = _last_seen(seen)
        _attend(some, k[:, :, :S], v[:, :, :S], seen[..., :S], its)
    return mixed


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, mixed: Tensor) -> None:
    """`attend`, into mixed; scores are hidden by adding: filling takes as long as a product."""
    B, T, H, D = q.shape
    Hk, S = k.shape[1:3]
    shared = (B, T, Hk, H // Hk)
    q = (q / math.sqrt(D)).view(*shared, D).transpose(1, 2).flatten(2, 3)
    scores = times(q, k.mT)
    first = _seen_by_all(visible)
    unseen = torch.zeros(visible[..., first:].shape).masked_fill_(~visible[..., first:], -math.inf)
    scores.view(B, Hk, T, -1, S)[..., first:].add_(unseen[:, None, :, None])
    found = weighted(scores.softmax(-1), v).view(B, Hk, T, H // Hk, -1)
    mixed.view(*shared, -1).copy_(found.transpose(1, 2))


def _seen_by_all(visible: Tensor) -> int:
    """So many places, from the first on: (B, T, S) bool → 0 … S"""
    return int(visible.all(1).all(0).cumprod(0).sum())


def _last_seen(visible: Tensor) -> int:
    """So many places must be looked at, in whole pieces: (B, T, S) bool → 1 … S"""
    seen = visible.any(1).any(0).nonzero()
    last = int(seen[-1]) if len(seen) else 0
    return min((last // PIECE + 1) * PIECE, visible.shape[-1])
