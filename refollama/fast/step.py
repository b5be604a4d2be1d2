"""One token of each sequence through a block, as one function of tensors: this is compiled.

    x ── norm ── q k v ── rotate ── cache ── attend ──(+)── norm ── gate, up ── down ──(+)──►

It computes what `Block.forward` does, where that is some fifty operations for so little work that
most of the time passes between them. Weights come as they were prepared for products (`Made`), so
all blocks of a shape share one routine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from refollama.fast.dots import GROUP, Rounded, once, rounded
from refollama.fast.lanes import form, times
from refollama.fast.pieces import apart
from refollama.fast.prepared import Form, Made
from refollama.fast.rows import rows_times
from refollama.weights.blocks import TYPE_ID
from refollama.weights.quants import LAYOUTS

PRODUCTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
# Kinds of products; the others are the types of numbers of matrices that are not packed.
IN_LANES, PACKED = "lanes ", "packed "  # and the type of the rows
PIECES = 64  # that a token is squared and summed in
PART = 32  # numbers of a value: two vectors of 512 bits
SUMS = 8  # of so many numbers, that registers hold while positions pass by


@dataclass(frozen=True)
class Shape:
    """All that decides the routine of a block, but for the processor and torch."""

    sizes: tuple[tuple[int, ...], ...]  # (out, in) of each product
    kinds: tuple[str, ...]  # of each product: "float32", "float16", "lanes Q4_0", "packed Q4_0", …
    tensors: tuple[int, ...]  # that each product is made with
    n_kv_heads: int
    d_head: int
    d_value: int
    d_rotated: int
    eps: float
    cache: str  # the type of keys and values: "float16", "float32"
    device: str = "cpu"  # or "cuda"
    together: int = 1  # tokens; on a GPU: as many, or fewer


class BlockStep(nn.Module):
    """The block of a shape.  A token is computed in the same order beside however many others.

    Shapes: x (B, 1, d_model), B as many as go together; cos, sin (B, R/2); positions, slots (B,);
    visible (B, S) bool; keys (slots, Hk, room, D) and values (slots, Hk, room, Dv), which are
    written into; norms (d_model,) → (B, 1, d_model).
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape

    def forward(  # noqa: PLR0913
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        slots: Tensor,
        visible: Tensor,
        keys: Tensor,
        values: Tensor,
        attn_norm: Tensor,
        ffn_norm: Tensor,
        products: Sequence[Made],
    ) -> Tensor:
        x = x[:, 0]
        B, Hk, D = x.shape[0], self.shape.n_kv_heads, self.shape.d_head
        cos, sin = cos[:, None], sin[:, None]  # (B, 1, R/2)
        q, k, v = self._times(self._norm(x, attn_norm), products, 0, 1, 2)
        q = _rotate(q.view(B, -1, D), cos, sin)  # (B, H, D)
        k, v = _rotate(k.view(B, Hk, D), cos, sin), v.view(B, Hk, -1)
        places = slots[:, None], torch.arange(Hk, device=x.device), positions[:, None]
        keys.index_put_(places, k.to(keys.dtype))
        values.index_put_(places, v.to(values.dtype))
        S = visible.shape[1]
        mixed = attend_one(q, keys[slots, :, :S], values[slots, :, :S], visible)
        [mixed] = self._times(mixed.flatten(1), products, 3)
        x = x + mixed
        gate, up = self._times(self._norm(x, ffn_norm), products, 4, 5)
        [y] = self._times(functional.silu(gate) * up, products, 6)
        return (x + y)[:, None]

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        # One long sum alone would be shared out among threads, and be added up in another order
        # than beside others. So it goes in pieces, a power of two, and these by halves.
        pieces = x.square().view(len(x), math.gcd(x.shape[-1], PIECES), -1).sum(-1)
        while pieces.shape[1] > 1:
            low, high = pieces.chunk(2, 1)
            pieces = low + high
        mean = once(pieces) / x.shape[-1]
        return x * torch.rsqrt(mean + self.shape.eps) * weight

    def _times(self, x: Tensor, products: Sequence[Made], *which: int) -> list[Tensor]:
        """By some matrices: (B, in) → (B, out) of each"""
        x = once(x)
        kinds = [self.shape.kinds[one] for one in which]
        laned = any(kind.startswith(IN_LANES) for kind in kinds)
        tokens = rounded(x[None], x.shape[1] // GROUP) if laned else None
        return [
            self._product(x, tokens, products[one], kind)
            for one, kind in zip(which, kinds, strict=True)
        ]

    def _product(self, x: Tensor, tokens: Rounded | None, made: Made, kind: str) -> Tensor:
        if kind.startswith(PACKED):
            # Written as a sum, so that a compiler unpacks each weight where it multiplies by it.
            matrix = LAYOUTS[TYPE_ID[kind.removeprefix(PACKED)]].unpack_rows(made[0])
            return (x[:, None] * matrix).sum(-1)
        if kind.startswith(IN_LANES):
            assert tokens is not None
            return times(tokens, made, kind.removeprefix(IN_LANES))[0].flatten(1)
        return rows_times(x, made[0])


class BlockInto(nn.Module):
    """The same, with few tensors: what passes between its loops, seventy of them, takes 40 µs to
    make where no cache knows the way, and what it is given takes as long to hand over.

    So the result is written into a place that is there, and all matrices in lanes come in their
    `pieces`; among the products each of them is empty.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.step = BlockStep(shape)

    def forward(
        self,
        place: Tensor,
        given: Sequence[Tensor],
        pieces: Sequence[Tensor],
        products: Sequence[Made],
    ) -> None:
        laned = iter(apart(pieces, forms(self.step.shape)))
        place.copy_(self.step(*given, [made or next(laned) for made in products]))


def forms(shape: Shape) -> list[Form]:
    """Of its matrices in lanes."""
    return [
        form(kind.removeprefix(IN_LANES), *size)
        for kind, size in zip(shape.kinds, shape.sizes, strict=True)
        if kind.startswith(IN_LANES)
    ]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate`, the halves of pairs apart: compiled, swapped numbers are fetched one by one."""
    R = 2 * cos.shape[-1]
    u, v = x[..., 0:R:2], x[..., 1:R:2]
    turned = torch.stack((u * cos - v * sin, u * sin + v * cos), -1).flatten(-2)
    return torch.cat((turned, x[..., R:]), -1)


def attend_one(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """One token of each row: q (B, H, D), keys (B, Hk, S, D), values (B, Hk, S, Dv), visible (B, S)
    → (B, H, Dv)

    Written as sums, not as products of matrices: so a compiler reads keys and values where they
    lie, as they lie, once for all heads that share them.
    """
    B, Hk, _, D = keys.shape
    keys, q = keys.float(), once(q / math.sqrt(D)).view(B, Hk, -1, 1, D)
    scores = torch.stack([(one * keys).sum(-1) for one in q.unbind(2)], 2)  # (B, Hk, G, S)
    # Bools are read one by one, where a vector is wanted of them; so that is done once.
    hidden = once(torch.where(visible, 0.0, -math.inf))
    return _mixed(once((scores + hidden[:, None, None]).softmax(-1)), values.float()).flatten(1, 2)


def _mixed(shares: Tensor, values: Tensor) -> Tensor:
    """Σ share · value: (B, Hk, G, S), (B, Hk, S, Dv) → (B, Hk, G, Dv)

    A row of values is read whole, as it lies, by as many heads as there are sums for: part by part,
    it would be waited for again, and every other line of memory is not asked for ahead.
    """
    B, Hk, G, S = shares.shape
    parts = torch.split(values[:, :, None], PART, -1)
    together = math.gcd(G, max(1, SUMS // len(parts)))
    heads = shares.view(B, Hk, G // together, together, S).unbind(3)
    found = [torch.cat([(one[..., None] * part).sum(-2) for part in parts], -1) for one in heads]
    return torch.stack(found, 3).flatten(2, 3)
