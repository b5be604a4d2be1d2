"""Prompts in fewer bits: many tokens by a matrix, as exactly as whoever asks wants it.

    bits   tokens and weights                                   a product is off by
    32     float32                                              nothing
    16     bfloat16                                             0.3 %
    8      int8, a step for each token and each row of weights  1 %

A processor with units for one of the small kinds (int8: AVX-512 VNNI, AVX-VNNI, AMX; bfloat16:
AVX-512 BF16, AMX) multiplies by it several times as fast; others gain nothing, or lose. So this is
an option, `prompt_bits`. (Matrices in lanes have 8 bits with a step for each 32 values: `dots.py`.)
Source of the last: Dettmers et al. 2022, "LLM.int8()", arXiv 2208.07339, equation 4, there called
vector-wise.  llama.cpp does the like for each 32 values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional

from refollama.fast.dots import MOST
from refollama.fast.prepared import bits_for, has_avx2, is_free
from refollama.models.exact import NONE, fewest, linear

Product = Callable[[Tensor, Tensor | None], Tensor]


def product(x: Tensor) -> Product:
    """What multiplies these tokens by a matrix: (…, in) → ((out, in), (out,) or None → (…, out))"""
    bits = bits_for(x)
    if bits == 16:
        return partial(_in_16_bits, x.bfloat16())
    if bits == 8 and x.numel():
        return partial(_in_8_bits, *as_int8(x.reshape(-1, x.shape[-1])), x.shape[:-1])
    by_other = is_free(x) and by_onednn()
    return partial(linear, x, by=onednn if by_other else functional.linear)


def onednn(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + b by oneDNN, in float32."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, matrix, bias, "none", [], "")
    return y


@cache
def by_onednn() -> bool:
    """Does oneDNN multiply float32 sooner than torch's own choice, which is Intel's MKL?

    On AMD's processors it takes less than half the time: on one core of Zen 5, 512 tokens by
    2048 × 2048, 230 against 100 G operations/s. On Intel's MKL does well; there its strict mode
    needs no company for a row.
    """
    return has_avx2() and torch._C._has_mkldnn and fewest() != 1 and fewest(onednn) != NONE


def _in_16_bits(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    y = functional.linear(x, matrix.bfloat16()).float()
    return y if bias is None else y + bias


def _in_8_bits(
    x: Tensor, steps: Tensor, shape: tuple[int, ...], matrix: Tensor, bias: Tensor | None
) -> Tensor:
    """Sums are whole numbers: exact, in any order."""
    q, sizes = as_int8(matrix)
    y = torch._int_mm(x, q.T) * steps * sizes.T
    y = y.view(*shape, -1)
    return y if bias is None else y + bias


def as_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as whole numbers and their steps: (n, in) → (n, in) int8, (n, 1) float32"""
    rows = rows.float()
    steps = rows.abs().amax(-1, keepdim=True) / MOST
    return (rows / steps).nan_to_num_(0, 0, 0).round_().to(torch.int8), steps
