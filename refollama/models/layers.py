"""The parts that every model of the family is made of.

Shapes: B rows, T new tokens, S remembered tokens, H query heads, Hk key heads, D head width.
A weight stays as it lies in the file, packed; a layer unpacks it for the moment of its use. That
is the plain path: exact, readable, slow. What replaces it for speed lives in `fast/`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

Unpack = Callable[[Tensor], Tensor]  # (…, bytes of a row) uint8 → (…, values of a row) float32


class Linear(nn.Module):
    """y = W x, with W as packed rows.

    Shapes: (…, in) → (…, out). `weight` is (out, bytes of a row) uint8, `dense()` is (out, in).
    """

    weight: Tensor

    def __init__(self, weight: Tensor, unpack: Unpack) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.unpack = unpack

    def dense(self) -> Tensor:
        """The matrix itself, (out, in) float32: a new tensor each time, unless stored as F32."""
        return self.unpack(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.dense())


class Embedding(nn.Module):
    """Token id → row of the table; only the rows that are asked for are unpacked.

    Shapes: (…) int → (…, d_model). `weight` is (V, bytes of a row) uint8.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, unpack: Unpack) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.unpack = unpack

    def forward(self, tokens: Tensor) -> Tensor:
        return self.unpack(self.weight[tokens])


class RMSNorm(nn.Module):
    """x / rms(x) · w, where rms(x) = √(mean(x²) + ε).

    Shapes: (…, d_model) → the same. Source: Zhang and Sennrich 2019, arXiv 1910.07467, equation 4.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def rope(positions: Tensor, width: int, base: float, scale: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles: position · scale · base^(−2i/D).

    Shapes: (B, T) → two of (B, T, 1, D/2), ready to meet (B, T, H, D/2).
    Source: Su et al. 2021, arXiv 2104.09864, equation 15; scale: linear position interpolation,
    Chen et al. 2023, arXiv 2306.15595.
    """
    # In float64: at position 100,000 a float32 angle is wrong in its third decimal.
    pairs = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device)
    angles = positions[..., None, None] * scale * base ** (-pairs / width)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x₂ᵢ, x₂ᵢ₊₁) by its angle.  (B, T, H, D) → the same.

    Neighbours form a pair: GGUF files of this family store the rows of Q and K in that order.
    """
    u, v = x[..., 0::2], x[..., 1::2]
    return torch.stack((u * cos - v * sin, u * sin + v * cos), dim=-1).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """softmax(q·kᵀ / √D)·v over the keys that each token may see.

    Shapes: q (B, T, H, D); k, v (B, Hk, S, D); visible (B, T, S) bool → (B, T, H, D).
    Source: Vaswani et al. 2017, arXiv 1706.03762, equation 1; H / Hk query heads share a key head:
    Ainslie et al. 2023, arXiv 2305.13245.
    """
    B, T, H, D = q.shape
    Hk = k.shape[1]
    q = q.view(B, T, Hk, H // Hk, D).permute(0, 2, 3, 1, 4)  # (B, Hk, H/Hk, T, D)
    scores = q @ k[:, :, None].transpose(-1, -2) / math.sqrt(D)  # (B, Hk, H/Hk, T, S)
    scores = scores.masked_fill(~visible[:, None, None], -math.inf)
    mixed = scores.softmax(-1) @ v[:, :, None]  # (B, Hk, H/Hk, T, D)
    return mixed.permute(0, 3, 1, 2, 4).reshape(B, T, H, D)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up.  Source: Shazeer 2020, arXiv 2002.05202, equation 6 (Swish with β = 1)."""
    return functional.silu(gate) * up
