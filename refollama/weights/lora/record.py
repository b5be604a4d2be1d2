"""What an adapter is: pairs of thin matrices, and the model that they must fit.

    W (n_out, n_in)   +   scale ·  B (n_out, r)  ·  A (r, n_in)        r: the rank, a small number

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from refollama.errors import FormatError, UnsupportedModel
from refollama.weights.gguf import GGUF

Shape = tuple[int, ...]


class Pair(NamedTuple):
    """A change of one matrix: ΔW = scale · B·A.

    Shapes: a (r, n_in), b (n_out, r); of E experts (E, r, n_in), (E, n_out, r). Both float32.
    """

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class Adapter:
    """One adapter, whatever file it came from: pairs by the name of the matrix, without `.weight`.

    `norms` are not matrices: their pair has n_out 1.
    """

    file: str  # for messages
    pairs: Mapping[str, Pair]

    def checked(self, base: Base) -> Adapter:
        """Itself, if it fits.  Raises: FormatError, UnsupportedModel: which tensor, what shapes."""
        if not self.pairs:
            raise FormatError(f"{self.file}: this adapter changes nothing")
        for name, pair in self.pairs.items():
            try:
                _check(name, pair, base.shape(name))
            except (FormatError, UnsupportedModel) as error:
                raise type(error)(f"{self.file}: {error}") from None
        return self


class Base:
    """What an adapter must know of its model: the shapes of its matrices, the number of its heads.

    It is taken from an open file, which may be closed afterwards.
    """

    def __init__(self, file: GGUF) -> None:
        self.architecture = str(file.metadata.get("general.architecture"))
        self._shapes = {name: info.shape for name, info in file.tensors.items()}
        queries = file.metadata.get(f"{self.architecture}.attention.head_count", 0)
        keys = file.metadata.get(f"{self.architecture}.attention.head_count_kv", queries)
        self._heads = {"attn_q": queries, "attn_k": keys}

    def shape(self, name: str) -> Shape | None:
        """Of a matrix or a norm, that as one row; None if the model has no such thing.

        Experts are known as a stack only, however they lie in the file.
        """
        if name.rpartition(".")[2].isdecimal():
            return None
        found = self._shapes.get(f"{name}.weight")
        if found is None and name == "output":
            return self.shape("token_embd")  # tied: one table, two uses
        if found is None and name.endswith("_exps"):
            return self._apart(name.removesuffix("_exps"))
        if found is not None and len(found) == 1:
            return (1, *found) if name.endswith("_norm") else None
        return found

    def _apart(self, name: str) -> Shape | None:
        """Experts that lie one by one, as in files of 2023."""
        first = self._shapes.get(f"{name}.0.weight")
        count = sum(one.startswith(f"{name}.") for one in self._shapes)
        return None if first is None else (count, *first)

    def heads(self, name: str) -> int:
        """How many heads the rows of Q or K belong to; 0 for all else."""
        blk, _, part = name.rpartition(".")
        found = self._heads.get(part, 0)
        if isinstance(found, np.ndarray):  # one number for each layer
            layer = int(blk.removeprefix("blk."))
            return int(found[layer]) if layer < len(found) else 0
        return found if isinstance(found, int) else 0


def paired(
    tensors: Mapping[str, Tensor], halves: tuple[str, str]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The name of each matrix, and its two tensors, as they lie; `halves` is how their names end.

    Raises: FormatError if one is there without the other.
    """
    for name in dict.fromkeys(name[: -len(halves[0])] for name in tensors):
        missing = [name + half for half in halves if name + half not in tensors]
        if missing:
            raise FormatError(f"{missing[0]} is missing")
        a, b = (tensors[name + half] for half in halves)
        yield name, a, b


def turned(name: str, pair: Pair, base: Base) -> Pair:
    """A pair that was trained on a Hugging Face model, with the rows of Q and K as GGUF has them.

    There a head's pairs are (x₀, x_D/2), (x₁, x_D/2+1), …; here they are neighbours.
    """
    heads, n_out = base.heads(name), pair.b.shape[-2]
    if not heads or n_out % (2 * heads):
        return pair  # what does not fit is refused by its shape
    halves = pair.b.reshape(heads, 2, -1, pair.b.shape[-1])  # (H, 2, D/2, r)
    return pair._replace(b=halves.transpose(1, 2).reshape(pair.b.shape).contiguous())


def _check(name: str, pair: Pair, shape: Shape | None) -> None:
    a, b = pair.a.shape, pair.b.shape
    if shape is None:
        raise UnsupportedModel(
            f"it changes {name}.weight, which the model does not have: they do not belong together"
        )
    if len(a) != len(b) or a[-2] != b[-1] or not a[-2]:
        raise FormatError(
            f"the two halves for {name}.weight have the shapes {text(a)} and {text(b)}: "
            "they do not have one rank"
        )
    made = (*a[:-2], b[-2], a[-1])
    if made != shape or a[:-2] != b[:-2]:
        raise UnsupportedModel(
            f"the change of {name}.weight has shape {text(made)}, but the model's {name}.weight "
            f"has {text(shape)}: they do not belong together"
        )
    if not (torch.isfinite(pair.a).all() and torch.isfinite(pair.b).all()):
        raise FormatError(f"the change of {name}.weight has numbers that are not finite")


def text(shape: Shape) -> str:
    """A shape for people.  Example: (64, 8) → "64 × 8"."""
    return " × ".join(map(str, shape))
