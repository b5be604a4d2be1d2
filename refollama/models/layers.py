"""The parts that every model of the family is made of.

Shapes: B rows, T new tokens, S remembered tokens, H query heads, Hk key heads, D head width (Dv of
values, where it differs).
A weight stays as it lies in the file, packed; a layer unpacks it for the moment of its use. That
is the plain path: exact, readable, slow. What replaces it for speed lives in `fast/`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional

from refollama.kvcache import PIECE
from refollama.models.config import RopeConfig
from refollama.models.exact import linear, times

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
        return linear(x, self.dense(), self.bias)


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
        return linear(x, self.unpack(self.weight[expert]))


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


class LayerNorm(nn.Module):
    """(x − mean(x)) / √(var(x) + ε) · w + b.

    Shapes: (…, d_model) → the same. Source: Ba et al. 2016, arXiv 1607.06450, equation 4.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Convolution(nn.Module):
    """A window that slides over a picture, with packed rows as `Linear` has them.

    Shapes: (B, in, h, w) → (B, out, h', w'). `weight` is (out, in, k, bytes of k values) uint8, or
    (out, k, …): each channel by itself.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, unpack: Unpack, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.unpack = unpack

    def forward(self, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        windows, groups = self.unpack(self.weight), 1
        if windows.ndim == 3:
            windows, groups = windows[:, None], len(windows)
        return functional.conv2d(x, windows, self.bias, stride, padding, groups=groups)


class Rope(nn.Module):
    """Positions → the cosine and sine of each pair's angle: position · ω, times the gain.

    Shapes: (…) → two of (…, 1, R/2), ready to meet (…, H, R/2), where R of a head's D dimensions
    are rotated. `weight`, where the file has it, is (R/2,): each frequency is divided by it (Llama
    3.1 stretches its slow pairs so). Source: Su et al. 2021, arXiv 2104.09864, equation 15.
    """

    weight: Tensor | None

    def __init__(self, config: RopeConfig, width: int, weight: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        omega = frequencies(config, width)
        # In float64: at position 100,000 a float32 angle is wrong in its third decimal.
        self.omega = omega if weight is None else omega / weight.double().cpu()  # (R/2,)
        self.gain = yarn_gain(config)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.turn(positions)
        return (cos * self.gain).float(), (sin * self.gain).float()

    def turn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The same without the gain: a turn by so many positions.  In float64."""
        angles = positions[..., None, None] * self.omega.to(positions.device)
        return angles.cos(), angles.sin()


def frequencies(config: RopeConfig, width: int) -> Tensor:
    """ω of each pair of a head: base^(−2i/R), of which some part is scaled.  → (R/2,) float64

    Source: scale, Chen et al. 2023, arXiv 2306.15595; YaRN, Peng et al. 2023, arXiv 2309.00071,
    section 3.2 ("NTK-by-parts").
    """
    pairs = torch.arange(0, width, 2, dtype=torch.float64)
    omega = config.base ** (-pairs / width)
    alone = config.ext_factor * (1 - _ramp(config, width))
    return omega * (alone + config.scale * (1 - alone))


def _ramp(config: RopeConfig, width: int) -> Tensor:
    """0 for pairs that turn often within the trained context, 1 for slow ones.  → (R/2,)"""

    def pair_that_turns(times: float) -> float:
        turns = config.trained_on / (2 * math.pi * times)
        return width * math.log(turns) / (2 * math.log(config.base))

    low = max(0, math.floor(pair_that_turns(config.beta_fast)))
    high = min(width - 1, math.ceil(pair_that_turns(config.beta_slow)))
    pairs = torch.arange(width // 2, dtype=torch.float64)
    return ((pairs - low) / max(0.001, high - low)).clamp(0, 1)


def yarn_gain(config: RopeConfig) -> float:
    """By how much queries and keys are enlarged, so that YaRN's attention stays as sharp.

    Source: Peng et al. 2023, section 3.4: √(1/t) = 0.1 · ln(stretch) + 1. A model that was trained
    without it says so by its log_multiplier, as DeepSeek's do (`mscale_all_dim`).
    """
    stretch = 1 / config.scale
    if config.ext_factor == 0 or stretch <= 1:
        return config.attn_factor
    more = 0.1 * math.log(stretch)
    return config.attn_factor * (1 + more) / (1 + config.log_multiplier * more)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x₂ᵢ, x₂ᵢ₊₁) by its angle; what is behind the last pair stays.  → the same.

    Shapes: x (…, H, D), cos and sin (…, 1, R/2). Neighbours form a pair: GGUF files of this family
    store the rows of Q and K in that order.
    """
    R, D = 2 * cos.shape[-1], x.shape[-1]
    if R < D:
        return torch.cat((rotate(x[..., :R], cos, sin), x[..., R:]), dim=-1)
    swapped = x.view(*x.shape[:-1], -1, 2).flip(-1).flatten(-2)
    return x * _paired(cos, cos) + swapped * _paired(-sin, sin)


def _paired(even: Tensor, odd: Tensor) -> Tensor:
    """(…, n), (…, n) → (…, 2·n)"""
    return torch.stack((even, odd), dim=-1).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """softmax(q·kᵀ / √D)·v over the keys that each token may see.

    Shapes: q (B, T, H, D); k (B, Hk, S, D); v (B, Hk, S, Dv); visible (B, T, S) bool
    → (B, T, H, Dv).
    Source: Vaswani et al. 2017, arXiv 1706.03762, equation 1; G = H / Hk query heads share a key
    head: Ainslie et al. 2023, arXiv 2305.13245.
    """
    B, T, H, D = q.shape
    Hk, S = k.shape[1:3]
    G = H // Hk
    q = q.view(B, T, Hk, G, D).transpose(1, 2).flatten(2, 3)  # (B, Hk, T·G, D)
    scores = times(q / math.sqrt(D), k.mT).view(B, Hk, T, G, S)
    shares = scores.masked_fill(~visible[:, None, :, None], -math.inf).softmax(-1)
    mixed = weighted(shares.flatten(2, 3), v)  # (B, Hk, T·G, Dv)
    return mixed.view(B, Hk, T, G, -1).transpose(1, 2).reshape(B, T, H, -1)


def weighted(shares: Tensor, v: Tensor) -> Tensor:
    """shares · v, one piece of the keys after another, so that their number changes no bit.

    Shapes: shares (…, rows, S), v (…, S, Dv) → (…, rows, Dv).
    """
    pieces = zip(torch.split(shares, PIECE, -1), torch.split(v, PIECE, -2), strict=True)
    return reduce(torch.add, (times(share, values) for share, values in pieces))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up.  Source: Shazeer 2020, arXiv 2002.05202, equation 6 (Swish with β = 1).

    Written out: torch's own silu rounds differently at the end of a row, where no full vector is
    left, and a token's place among others would show; its exp does not.
    """
    return gate / (1 + torch.exp(-gate)) * up
