"""What the engine needs to know of a model, and nothing more: a test's net has twenty lines."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

import torch
from torch import Tensor, nn

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

    def new_cache(
        self,
        slots: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> KVCache:
        """An empty memory for so many sequences; on a device of its own choice if none is given."""
        ...

    def forget(self, cache: KVCache, slot: int, start: int, stop: int, end: int) -> None:
        """Drop positions start … stop − 1 of a slot; those up to end − 1 move down."""
        ...


def state(net: Net) -> Hashable:
    """What must be equal for two steps of a net to compute the same: its parts and its weights.

    None if that cannot be known: a hook may do anything. A notebook that hooks a layer, or writes
    into a weight, must not get answers that were begun by the net as it was before.
    """
    if not isinstance(net, nn.Module):
        return id(net)
    modules = list(net.modules())
    if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
        return None
    tensors = [*net.buffers(), *net.parameters()]
    return (*modules, *((tensor.data_ptr(), _version(tensor)) for tensor in tensors))


def _version(tensor: Tensor) -> int:
    """How often it was written into; tensors of inference mode do not count that."""
    return 0 if tensor.is_inference() else tensor._version
