"""What the engine needs to know of a model, and nothing more: a test's net has twenty lines."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from refollama.kvcache import KVCache, Rows


class Net(Protocol):
    """Token ids → logits."""

    @property
    def n_ctx(self) -> int: ...  # tokens that it was trained to look back on

    @property
    def device(self) -> torch.device: ...

    def __call__(self, tokens: Tensor, positions: Tensor, cache: Rows) -> Tensor:
        """tokens (B, T), positions (B, T) → logits (B, V) after each row's last token."""
        ...

    def new_cache(self, slots: int = 1, dtype: torch.dtype = torch.float32) -> KVCache:
        """An empty memory for so many sequences."""
        ...
