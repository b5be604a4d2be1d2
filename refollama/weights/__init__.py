"""Bytes → tensors: weight files opened by memory map, their tensors packed until asked for.

The format is also read where torch is not wanted, by tokenizers and by `show`; so nothing here
imports torch before a tensor is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from refollama.weights.gguf import GGUF, open_gguf, write_gguf

if TYPE_CHECKING:
    from refollama.weights.quants import QuantTensor

__all__ = ["GGUF", "QuantTensor", "open_gguf", "open_weights", "write_gguf"]


def open_weights(source: str | os.PathLike[str] | GGUF) -> Mapping[str, QuantTensor]:
    """The tensors of a file, or of one that is open already, by name; read-only and lazy.

    Raises: NotFound, StoreError, FormatError, as `open_gguf` does.
    """
    from refollama.weights.quants import Weights

    return Weights(source if isinstance(source, GGUF) else open_gguf(source))


def __getattr__(name: str) -> Any:
    """`QuantTensor`, on first use."""
    if name != "QuantTensor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from refollama.weights.quants import QuantTensor

    return QuantTensor
