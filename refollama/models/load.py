"""Files → models: the one page that knows both tensor names and modules.

Modules are named after the file's tensors, so nothing is renamed: a module at `blk.3.attn_q` takes
the tensor `blk.3.attn_q.weight`. What remains is to check that every tensor has the shape that the
model asks for, and that the model asks for every tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from refollama.errors import BadOption, FormatError, UnsupportedModel
from refollama.models.clip import Clip, ClipConfig
from refollama.models.config import ModelConfig, RopeConfig
from refollama.models.layers import (
    Convolution,
    Embedding,
    Experts,
    LayerNorm,
    Linear,
    RMSNorm,
    Rope,
)
from refollama.models.llama import Block, Llama
from refollama.models.llava import Eyes, Llava
from refollama.models.lora import Branch, adapt
from refollama.models.meter import Count, unheard
from refollama.models.mixtral import MixtralBlock
from refollama.models.projectors import projector
from refollama.weights import open_weights
from refollama.weights.gguf import GGUF, open_gguf
from refollama.weights.lora import Adapter, open_adapter
from refollama.weights.quants import QuantTensor

IGNORED = ("attn_rot_embd.weight",)  # endings of tensors that old converters wrote and nobody reads
SHOWN = 5  # names in an error message


def load_net(
    source: str | Path | GGUF,
    count: Count = unheard,
    eyes: Eyes | None = None,
    adapters: Sequence[Path] = (),
) -> Llama:
    """A GGUF file as a model; the weights stay where they are, packed, and are read when used
    (experts that lie apart, as in files of 2023, are put together: copied).

    count: is told the bytes of each tensor that has found its module.
    eyes: of `load_eyes`; a model with eyes is a `Llava`.
    adapters: files, or folders of PEFT, whose changes stand beside the weights: see `lora`.
    Raises: FormatError, UnsupportedModel (what was found, what was expected), and all that
    `open_gguf` raises.
    """
    file = source if isinstance(source, GGUF) else open_gguf(source)
    parts = FileParts(open_weights(file), file.path.name, count)
    config = ModelConfig.from_metadata(file.metadata)
    block = MixtralBlock if config.n_experts else Block
    if eyes is None:
        net = Llama(config, parts, block)
    else:
        _check_together(eyes, config)
        net = Llava(config, parts, block, eyes)
    parts.check_all_used("a llama model")
    adapt(net, _branches([open_adapter(path, file) for path in adapters]))
    return net.eval()


def _branches(adapters: Sequence[Adapter]) -> dict[str, list[Branch]]:
    """What stands beside each part, by the part's name."""
    found: dict[str, list[Branch]] = {}
    for number, adapter in enumerate(adapters):
        for name, (a, b, gain) in adapter.pairs.items():
            found.setdefault(name, []).append(Branch(a, b, gain, number))
    return found


def load_eyes(
    source: str | Path | GGUF, count: Count = unheard, n_blocks: int | None = None
) -> Eyes:
    """A projector's file ("mmproj"), of 2023 or later: a vision tower, and what is behind it.

    n_blocks: how many of the tower's blocks are run; see `ClipConfig.from_metadata`.
    Raises: as `load_net` does, and BadOption; the file is named.
    """
    file = source if isinstance(source, GGUF) else open_gguf(source)
    try:
        return _eyes(file, count, n_blocks)
    except (FormatError, UnsupportedModel, BadOption) as error:
        if str(error).startswith(file.path.name):
            raise
        raise type(error)(f"{file.path.name}: {error}") from None


def _eyes(file: GGUF, count: Count, n_blocks: int | None) -> Eyes:
    parts = FileParts(open_weights(file), file.path.name, count)
    config = ClipConfig.from_metadata(file.metadata, n_blocks)
    kind = file.metadata.get("clip.projector_type", "mlp")  # files of 2023 do not say
    kind = file.metadata.get("clip.vision.projector_type", kind)
    eyes = Eyes(Clip(config, parts), projector(config, parts, str(kind)))
    if not eyes.mm.rows(config.grid):
        raise FormatError(f"a picture of {config.grid} × {config.grid} patches would have no rows")
    unused = [f"v.blk.{layer}." for layer in range(config.n_blocks, config.n_stored)]
    parts.check_all_used("a projector", beginnings=(*unused, "v.post_ln.") if unused else ())
    for part in eyes:
        part.eval()
    return eyes


def _check_together(eyes: Eyes, config: ModelConfig) -> None:
    if eyes.mm.width != config.d_model:
        raise UnsupportedModel(
            f"the projector makes rows of {eyes.mm.width} numbers, but the language model reads "
            f"{config.d_model}: they do not belong together"
        )


class FileParts:
    """The tensors of one file, handed out by module name, each checked for its shape."""

    def __init__(self, weights: Mapping[str, QuantTensor], source: str, count: Count) -> None:
        self.weights = weights
        self.source = source
        self.count = count
        self.used: set[str] = set()

    def linear(self, name: str, n_out: int, n_in: int) -> Linear:
        """A matrix of shape (n_out, n_in), packed."""
        tensor = self._take(f"{name}.weight", (n_out, n_in))
        bias = self._take(f"{name}.bias", (n_out,)).unpack() if self._has_bias(name) else None
        return Linear(tensor.data, tensor.layout.unpack_rows, bias)

    def norm(self, name: str, width: int, eps: float) -> RMSNorm:
        """A norm with `width` weights."""
        return RMSNorm(self._take(f"{name}.weight", (width,)).unpack(), eps)

    def layer_norm(self, name: str, width: int, eps: float) -> LayerNorm:
        """A norm with `width` weights and as many biases."""
        weight, bias = (self._take(f"{name}.{part}", (width,)) for part in ("weight", "bias"))
        return LayerNorm(weight.unpack(), bias.unpack(), eps)

    def convolution(self, name: str, shape: tuple[int, ...]) -> Convolution:
        """Windows of this shape; sides of 1, which some files leave out and others add, fall away.

        (out, in, k, k), or (out, k, k) for channels by themselves.
        """
        tensor = self._squeezed(f"{name}.weight", shape)
        n_out = shape[:1]
        bias = self._take(f"{name}.bias", n_out).unpack() if self._has_bias(name) else None
        return Convolution(tensor, self.weights[f"{name}.weight"].layout.unpack_rows, bias)

    def table(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Plain numbers."""
        return self._take(name, shape).unpack()

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

    def rows(self, name: str) -> int:
        """How many rows has this matrix?"""
        return self._found(f"{name}.weight", (None, None)).shape[0]

    def check_all_used(self, kind: str, *, beginnings: tuple[str, ...] = ()) -> None:
        """A tensor that nobody asked for means a model that we do not know.

        beginnings: of the names of those that are rightly left out.
        """
        unused = (n for n in self.weights if n not in self.used)
        left = [n for n in unused if not n.endswith(IGNORED) and not n.startswith(beginnings)]
        if left:
            more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
            raise UnsupportedModel(
                f"{self.source}: tensors that {kind} of this shape does not have: "
                f"{', '.join(left[:SHOWN])}{more}"
            )

    def _has_bias(self, name: str) -> bool:
        return f"{name}.bias" in self.weights

    def _squeezed(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The packed rows of a tensor, in this shape but for the last side."""
        given = self.weights[name].shape if name in self.weights else shape
        plain = tuple(side for side in given if side > 1) == tuple(s for s in shape if s > 1)
        tensor = self._take(name, given if plain else shape)
        return tensor.data.reshape(*shape[:-1], -1)

    def _take(self, name: str, shape: tuple[int | None, ...]) -> QuantTensor:
        tensor = self._found(name, shape)
        self.used.add(name)
        self.count(tensor.data.nbytes)
        return tensor

    def _found(self, name: str, shape: tuple[int | None, ...]) -> QuantTensor:
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
        return tensor


def _text(shape: tuple[int | None, ...]) -> str:
    return " × ".join("any" if n is None else str(n) for n in shape)
