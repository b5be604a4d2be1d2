"""Files → models: the one page that knows both tensor names and modules.

Modules are named after the file's tensors, so nothing is renamed: a module at `blk.3.attn_q` takes
the tensor `blk.3.attn_q.weight`. What remains is to check that every tensor has the shape that the
model asks for, and that the model asks for every tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from refollama.errors import FormatError, UnsupportedModel
from refollama.models.config import ModelConfig, RopeConfig
from refollama.models.layers import Embedding, Experts, Linear, RMSNorm, Rope
from refollama.models.llama import Block, Llama
from refollama.models.mixtral import MixtralBlock
from refollama.weights import open_weights
from refollama.weights.gguf import GGUF, open_gguf
from refollama.weights.quants import QuantTensor

IGNORED = ("attn_rot_embd.weight",)  # endings of tensors that old converters wrote and nobody reads
SHOWN = 5  # names in an error message


def load_net(source: str | Path | GGUF) -> Llama:
    """A GGUF file as a model; the weights stay where they are, packed, and are read when used
    (experts that lie apart, as in files of 2023, are put together: copied).

    Raises: FormatError, UnsupportedModel (what was found, what was expected), and all that
    `open_gguf` raises.
    """
    file = source if isinstance(source, GGUF) else open_gguf(source)
    parts = FileParts(open_weights(file), file.path.name)
    config = ModelConfig.from_metadata(file.metadata)
    net = Llama(config, parts, MixtralBlock if config.n_experts else Block)
    parts.check_all_used()
    return net.eval()


class FileParts:
    """The tensors of one file, handed out by module name, each checked for its shape."""

    def __init__(self, weights: Mapping[str, QuantTensor], source: str) -> None:
        self.weights = weights
        self.source = source
        self.used: set[str] = set()

    def linear(self, name: str, n_out: int, n_in: int) -> Linear:
        """A matrix of shape (n_out, n_in), packed."""
        tensor = self._take(f"{name}.weight", (n_out, n_in))
        bias = self._take(f"{name}.bias", (n_out,)).unpack() if self._has_bias(name) else None
        return Linear(tensor.data, tensor.layout.unpack_rows, bias)

    def norm(self, name: str, width: int, eps: float) -> RMSNorm:
        """A norm with `width` weights."""
        return RMSNorm(self._take(f"{name}.weight", (width,)).unpack(), eps)

    def embedding(self, name: str, width: int) -> Embedding:
        """Any number of rows: this tensor is what decides the size of the vocabulary."""
        tensor = self._take(f"{name}.weight", (None, width))
        return Embedding(tensor.data, tensor.layout.unpack_rows)

    def rope(self, name: str, config: RopeConfig, width: int) -> Rope:
        """Angles for heads of which this width is rotated, with the file's divisors if any."""
        if not self.has(name) and not config.longrope:
            return Rope(config, width)
        divisors = self._take(f"{name}.weight", (width // 2,)).unpack()
        if not (divisors.isfinite() & (divisors > 0)).all():
            raise FormatError(f"{self.source}: {name}.weight must hold positive numbers")
        return Rope(config, width, divisors)

    def experts(self, name: str, n_experts: int, n_out: int, n_in: int) -> Experts:
        """The experts' matrices: one stacked tensor, or one for each (files of 2023; copied)."""
        if self.has(f"{name}_exps"):
            stacked = self._take(f"{name}_exps.weight", (n_experts, n_out, n_in))
            return Experts(stacked.data, stacked.layout.unpack_rows)
        each = [self._take(f"{name}.{e}.weight", (n_out, n_in)) for e in range(n_experts)]
        if len({tensor.type for tensor in each}) > 1:
            raise UnsupportedModel(f"{self.source}: experts of {name} are packed differently")
        return Experts(torch.stack([t.data for t in each]), each[0].layout.unpack_rows)

    def has(self, name: str) -> bool:
        """Is there such a tensor at all?"""
        return f"{name}.weight" in self.weights

    def check_all_used(self) -> None:
        """A tensor that nobody asked for means a model that we do not know."""
        left = [n for n in self.weights if n not in self.used and not n.endswith(IGNORED)]
        if left:
            more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
            raise UnsupportedModel(
                f"{self.source}: tensors that a llama model of this shape does not have: "
                f"{', '.join(left[:SHOWN])}{more}"
            )

    def _has_bias(self, name: str) -> bool:
        return f"{name}.bias" in self.weights

    def _take(self, name: str, shape: tuple[int | None, ...]) -> QuantTensor:
        if name not in self.weights:
            raise FormatError(
                f"{self.source}: tensor {name} is missing; expected, of shape {_text(shape)}"
            )
        tensor = self.weights[name]
        fits = len(tensor.shape) == len(shape) and all(
            want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            raise FormatError(
                f"{self.source}: tensor {name} has shape {_text(tensor.shape)}; "
                f"expected {_text(shape)}"
            )
        self.used.add(name)
        return tensor


def _text(shape: tuple[int | None, ...]) -> str:
    return " × ".join("any" if n is None else str(n) for n in shape)
