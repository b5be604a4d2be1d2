"""Attention over a prompt, for some of its tokens at a time.

    tokens 0 …  31   see places 0 … 255      scores of a part stay in the cache; places that come
    tokens 32 … 63   see places 0 … 255      later than all of its tokens are left out
        …
    tokens 480 … 511 see places 0 … 511

For all tokens at once scores go to memory and come back several times: of 512 tokens and 32 heads
they take 32 MiB, of 2048 half a gigabyte. What comes out is the same to the last bit: a token's
row is computed alike beside any others, and places that it may not see add nothing, in pieces of
their own.

Where oneDNN multiplies sooner than torch's own choice, each key head is attended to by itself, by
all heads that share it: a part of as many scores is then some more tokens. Both add in the same
order, if sums are as short as they are here; whether they do is tried once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial, reduce

import torch
from torch import Tensor

from refollama.fast.prepared import is_free
from refollama.fast.products import by_onednn, onednn
from refollama.kvcache import PIECE
from refollama.models.exact import linear, times
from refollama.models.layers import attend, weighted

Product = Callable[[Tensor, Tensor], Tensor]
SCORES = 1 << 19  # of a part: two megabytes of float32
ROWS = 512  # of a key head, from which on it is worth a product of its own
HALF = PIECE // 2  # as MKL adds up a piece


def attend_in_parts(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """What `attend` computes, of the same shapes: q (B, T, H, D) → (B, T, H, Dv)"""
    B, T, H, D = q.shape
    Hk, S, Dv = *k.shape[1:3], v.shape[-1]
    if not all(map(is_free, (q, k, v))):
        return attend(q, k, v, visible)
    by_heads = T * H // Hk >= ROWS and heads_are_alike(D, Dv)
    at_once = _of_a_head(H // Hk, S) if by_heads else max(1, SCORES // max(1, B * H * S))
    if at_once >= T and not by_heads:
        return attend(q, k, v, visible)
    mixed = q.new_empty(B, T, H, Dv)
    for some, seen, its in zip(
        *(torch.split(one, at_once, 1) for one in (q, visible, mixed)), strict=True
    ):
        S = _last_seen(seen)
        _attend(some, k[:, :, :S], v[:, :, :S], seen[..., :S], its, by_heads)
    return mixed


def _attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, mixed: Tensor, by_heads: bool
) -> None:
    """`attend`, into mixed."""
    B, T, H, D = q.shape
    Hk = k.shape[1]
    shared = (B, T, Hk, H // Hk)
    q = (q / math.sqrt(D)).view(*shared, D).transpose(1, 2)  # (B, Hk, T, G, D)
    mixed = mixed.view(*shared, -1).transpose(1, 2)
    late = visible[..., None, _seen_by_all(visible) :]
    unseen = torch.zeros(late.shape).masked_fill_(~late, -math.inf)  # (B, T, 1, places)
    if not by_heads:
        mixed.copy_(_mixed(q, k, v, unseen[:, None], _all_scores, weighted))
        return
    for b in range(B):
        for its, keys, values, place in zip(q[b], k[b], v[b], mixed[b], strict=True):
            place.copy_(_mixed(its, keys, values, unseen[b], _scores, _weighted))


def _mixed(
    q: Tensor, k: Tensor, v: Tensor, unseen: Tensor, scores_of: Product, weigh: Product
) -> Tensor:
    """q (…, T, G, D), k (…, S, D), v (…, S, Dv) → (…, T, G, Dv)

    Scores of the last places are hidden by adding: filling takes as long as a product.
    """
    scores = scores_of(q.flatten(-3, -2), k)
    scores.view(*q.shape[:-1], -1)[..., k.shape[-2] - unseen.shape[-1] :].add_(unseen)
    return weigh(scores.softmax(-1), v).view(*q.shape[:-1], -1)


def _all_scores(q: Tensor, k: Tensor) -> Tensor:
    return times(q, k.mT)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Those of one head, by oneDNN."""
    return linear(q, k, by=onednn)


def _weighted(shares: Tensor, v: Tensor) -> Tensor:
    """`weighted` of one head, by oneDNN: (rows, S), (S, Dv) → (rows, Dv)"""
    both = zip(torch.split(shares, HALF, -1), torch.split(v.T, HALF, -1), strict=True)
    halves = [linear(share, values, by=onednn) for share, values in both]
    pieces = [reduce(Tensor.add_, halves[at : at + 2]) for at in range(0, len(halves), 2)]
    return reduce(Tensor.add_, pieces)


@cache
def heads_are_alike(D: int, Dv: int) -> bool:
    """Is oneDNN the sooner one, and does it find what `attend` finds, of heads so wide?"""
    if not by_onednn():
        return False
    drawn, S = partial(torch.randn, generator=torch.Generator().manual_seed(0)), 2 * PIECE
    q, k, shares, v = drawn(ROWS, D), drawn(S, D), drawn(ROWS, S), drawn(S, Dv)
    scores_are = torch.equal(_scores(q, k), _all_scores(q, k))
    return scores_are and torch.equal(_weighted(shares, v), weighted(shares, v))


def _of_a_head(G: int, S: int) -> int:
    """So many tokens, if G heads share a key head: no more than what is left out goes by."""
    return max(1, min(PIECE, max(ROWS, SCORES // max(1, S)) // G))


def _seen_by_all(visible: Tensor) -> int:
    """So many places, from the first on: (B, T, S) bool → 0 … S"""
    return int(visible.all(1).all(0).cumprod(0).sum())


def _last_seen(visible: Tensor) -> int:
    """So many places must be looked at, in whole pieces: (B, T, S) bool → 1 … S"""
    seen = visible.any(1).any(0).nonzero()
    last = int(seen[-1]) if len(seen) else 0
    return min((last // PIECE + 1) * PIECE, visible.shape[-1])
