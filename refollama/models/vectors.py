"""The vectors of a text's tokens → one vector that stands for the text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from refollama.errors import RefollamaError

LEAST_NORM = 1e-12  # a vector of zeros stays one
BEYOND_NUMBERS = "embedding contains NaN or Inf values"


def pool(states: Tensor, kind: str) -> Tensor:
    """(T, d_model), T ≥ 1 → (d_model,), by `ModelConfig.pooling`.

    Raises: RefollamaError if the weights led out of the numbers.
    """
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "last": lambda rows: rows[-1],
        "cls": lambda rows: rows[0],
        "mean": lambda rows: rows.double().mean(0).float(),
    }
    pooled = ways[kind](states)
    if not torch.isfinite(pooled).all():
        raise RefollamaError(BEYOND_NUMBERS)
    return pooled


def unit(vector: Tensor, dimensions: int = 0) -> Tensor:
    """The same direction with length 1; of the first `dimensions` numbers alone, if so many are.

    (D,) → (D,) or (dimensions,). Only a model that was trained so (Kusupati et al. 2022, arXiv
    2205.13147) has the most of its meaning in its first dimensions.
    """
    some = vector[:dimensions] if dimensions else vector
    return some / some.norm().clamp_min(LEAST_NORM)
