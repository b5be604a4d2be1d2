"""Adapters as GGUF files: what llama.cpp and Ollama use today.

    general.type "adapter" · general.architecture as the model's · adapter.type "lora"
    adapter.lora.alpha     scale = alpha / rank; 0: the scale is 1

    blk.0.attn_q.weight.lora_a   (r, n_in)          token_embd.weight.lora_a   (V, r)
    blk.0.attn_q.weight.lora_b   (n_out, r)         token_embd.weight.lora_b   (d_model, r)

Rows are looked up in an embedding, so its roles are turned: A has a row for each token.
Source: llama.cpp, `llama-adapter`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from refollama.errors import FormatError, UnsupportedModel
from refollama.weights import open_weights
from refollama.weights.blocks import TYPE_ID
from refollama.weights.gguf import GGUF, open_gguf, write_gguf
from refollama.weights.lora.record import Adapter, Base, Pair, paired
from refollama.weights.mixes import word

log = logging.getLogger(__name__)

HALVES = (".weight.lora_a", ".weight.lora_b")
EMBEDDING = "token_embd"


def read(path: Path, base: Base) -> Adapter:
    """The adapter in such a file.  Raises: FormatError, UnsupportedModel, as `open_gguf` does."""
    with open_gguf(path) as file:
        try:
            return Adapter(path.name, _pairs(_tensors(file), _alpha(file, base)))
        except (FormatError, UnsupportedModel) as error:
            told = str(error)
            named = told if told.startswith(path.name) else f"{path.name}: {told}"
            raise type(error)(named) from None


def _alpha(file: GGUF, base: Base) -> float:
    """What the scale comes from, after the checks of what the file says of itself."""
    says = file.metadata
    for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora")):
        if word(says, key) != wanted:
            raise UnsupportedModel(f"{key} is {word(says, key)!r}; expected {wanted!r}")
    if "adapter.alora.invocation_tokens" in says:
        raise UnsupportedModel("an adapter that waits for certain tokens (aLoRA) is not built")
    family = word(says, "general.architecture")
    if family != base.architecture:
        raise UnsupportedModel(
            f"it is for a model of architecture {family!r}, but this one is "
            f"{base.architecture!r}: they do not belong together"
        )
    alpha = says.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise FormatError(f"adapter.lora.alpha is {alpha!r}; expected a number")
    return float(alpha)


def _tensors(file: GGUF) -> dict[str, Tensor]:
    weights, found = open_weights(file), {}
    for name in weights:
        if name.endswith("_norm.weight"):
            log.warning("%s: %s is ignored, as llama.cpp does", file.path.name, name)
        elif not name.endswith(HALVES):
            raise FormatError(f"{name} is no half of a change: expected …{' or …'.join(HALVES)}")
        elif len(weights[name].shape) < 2:
            raise FormatError(f"{name} has one dimension; expected two, or three of experts")
        else:
            found[name] = weights[name].unpack().clone()  # the file is closed: none of it is needed
    return found


def _pairs(tensors: Mapping[str, Tensor], alpha: float) -> dict[str, Pair]:
    pairs = {}
    for name, a, b in paired(tensors, HALVES):
        a, b = (b.mT.contiguous(), a) if name == EMBEDDING else (a, b)
        rank = b.shape[-1]
        pairs[name] = Pair(a, b, alpha / rank if alpha and rank else 1.0)
    return pairs


def write(path: Path, adapter: Adapter, base: Base) -> None:
    """The adapter as such a file, float32.  What no common alpha can say goes into B.

    Raises: StoreError.
    """
    alphas = (pair.scale * pair.b.shape[-1] for pair in adapter.pairs.values())
    alpha = next((alpha for alpha in alphas if alpha), 1.0)
    metadata = {
        "general.type": "adapter",
        "general.architecture": base.architecture,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    tensors = {}
    for name, pair in adapter.pairs.items():
        for half, values in zip(HALVES, _halves(name, pair, alpha), strict=True):
            tensors[name + half] = (TYPE_ID["F32"], tuple(values.shape), values.numpy())
    write_gguf(path, metadata, tensors)


def _halves(name: str, pair: Pair, alpha: float) -> tuple[Tensor, Tensor]:
    more = pair.scale * pair.b.shape[-1] / alpha
    b = pair.b if more == 1 else pair.b * more
    return (b, pair.a.mT.contiguous()) if name == EMBEDDING else (pair.a, b)
