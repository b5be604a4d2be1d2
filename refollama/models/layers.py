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

from refollama.models.config import RopeConfig

Unpack = Callable[[Tensor], Tensor]  # (…, bytes of a row) uint8 → (…, values of a row) float32


class Linear(nn.Module):
    """y = W x + b, with W as packed rows; most have no b.

    Shapes: (…, in) → (…, out). `weight` is (out, bytes of a row) uint8, `dense()` is (out, in).
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, unpack: Unpack, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.unpack = unpack

    def dense(self) -> Tensor:
        """The matrix itself, (out, in) float32: a new tensor each time, unless stored as F32."""
        return self.unpack(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.dense(), self.bias)


class Experts(nn.Module):
    """E matrices of one shape, as one stacked tensor; only those that are asked for are unpacked.

    Shapes: (n, in), expert → (n, out). `weight` is (E, out, bytes of a row) uint8.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, unpack: Unpack) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.unpack = unpack

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return functional.linear(x, self.unpack(self.weight[expert]))


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


class Rope(nn.Module):
    """Positions → the cosine and sine of each pair's angle: position · ω.

    Shapes: (B, T) → two of (B, T, 1, D/2), ready to meet (B, T, H, D/2). `weight`, where the file
    has it, is (D/2,): each frequency is divided by it (Llama 3.1 stretches its slow pairs so).
    Source: Su et al. 2021, arXiv 2104.09864, equation 15.
    """

    weight: Tensor | None

    def __init__(self, config: RopeConfig, width: int, weight: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        omega = frequencies(config, width)
        # In float64: at position 100,000 a float32 angle is wrong in its third decimal.
        self.omega = omega if weight is None else omega / weight.double()  # (D/2,)
        self.gain = yarn_gain(config)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None, None] * self.omega.to(positions.device)
        return (angles.cos() * self.gain).float(), (angles.sin() * self.gain).float()


def frequencies(config: RopeConfig, width: int) -> Tensor:
    """ω of each pair of a head: scale · base^(−2i/D), or YaRN's blend.  → (D/2,) float64

    Source: scale, Chen et al. 2023, arXiv 2306.15595; YaRN, Peng et al. 2023, arXiv 2309.00071,
    section 3.2 ("NTK-by-parts").
    """
    pairs = torch.arange(0, width, 2, dtype=torch.float64)
    omega = config.base ** (-pairs / width)
    if not config.yarn:
        return omega * config.scale
    alone = 1 - _ramp(config, width)
    return omega * (alone + config.scale * (1 - alone))


def _ramp(config: RopeConfig, width: int) -> Tensor:
    """0 for pairs that turn often within the trained context, 1 for slow ones.  → (D/2,)"""

    def pair_that_turns(times: float) -> float:
        turns = config.trained_on / (2 * math.pi * times)
        return width * math.log(turns) / (2 * math.log(config.base))

    low = max(0, math.floor(pair_that_turns(config.beta_fast)))
    high = min(width - 1, math.ceil(pair_that_turns(config.beta_slow)))
    pairs = torch.arange(width // 2, dtype=torch.float64)
    return ((pairs - low) / max(0.001, high - low)).clamp(0, 1)


def yarn_gain(config: RopeConfig) -> float:
    """By how much YaRN enlarges queries and keys, so that attention stays as sharp.

    Source: Peng et al. 2023, section 3.4: √(1/t) = 0.1 · ln(stretch) + 1.
    """
    return config.attn_factor * (1 - 0.1 * math.log(config.scale)) if config.yarn else 1.0


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
