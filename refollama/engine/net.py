"""What the engine needs to know of a model, and nothing more: a test's net has twenty lines."""

from __future__ import annotations

import logging
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from refollama.kvcache import KVCache, Rows

log = logging.getLogger(__name__)


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

    def shift(self, cache: KVCache, slot: int, start: int, stop: int, end: int) -> None:
        """Drop positions start … stop − 1 of a slot; those up to end − 1 move down."""
        ...


class State:
    """What must be the same for two steps of a net to compute the same: its parts and weights.

    It holds on to them, so that nothing new can take the place of something old unnoticed.
    """

    def __init__(self, net: nn.Module) -> None:
        tensors = [*net.buffers(), *net.parameters()]
        self.parts: list[object] = [*net.modules(), *tensors]
        self.versions = [_version(tensor) for tensor in tensors]
        self.hooks = RemovableHandle.next_id  # grows whenever anything is hooked, anywhere

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, State) or len(self.parts) != len(other.parts):
            return False
        same = all(a is b for a, b in zip(self.parts, other.parts, strict=True))
        return same and (self.versions, self.hooks) == (other.versions, other.hooks)

    __hash__ = None  # type: ignore[assignment]


def state(net: Net | nn.Module) -> object:
    """Something that is equal as long as the net computes the same; None if nobody can know.

    A notebook that hooks a layer, swaps it, or lets torch write into a weight must not get an
    answer that was begun by the net as it was before. A hook may do anything, so while there is one
    nothing is known. What is written behind torch's back (`weight.data`, numpy) does not show.
    """
    if not isinstance(net, nn.Module):
        return id(net)
    try:
        if any(part._forward_hooks or part._forward_pre_hooks for part in net.modules()):
            return None
        return State(net)
    except Exception as error:  # parts of a kind that cannot be looked at
        log.debug("the net's state is unknown: %s", error)
        return None


def _version(tensor: Tensor) -> int:
    """How often torch wrote into it; tensors of inference mode do not count that."""
    return 0 if tensor.is_inference() else tensor._version
