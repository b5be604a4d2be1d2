"""refollama: Ollama, rebuilt in readable Python and PyTorch.

    import refollama

    llm = refollama.load("model.gguf")  # a file, or a name in the store
    for piece in llm.stream("Once upon a time", options={"temperature": 0}):
        print(piece, end="")

Importing the package imports neither torch nor anything else that is slow: that happens when a
model is loaded.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refollama.options import Options
from refollama.version import __version__

if TYPE_CHECKING:
    from refollama import weights
    from refollama.client import Client
    from refollama.loaded import LoadedModel
    from refollama.text.tokenizer import Tokenizer

# A row of a matrix product must not depend, in its last bit, on how many rows there are: only so is
# an answer the same whether its prompt was read at once, in parts, or found in the cache. Intel's
# MKL promises that in its strict mode, which it looks up before its first product; for others see
# models/exact.py.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

__all__ = ["Client", "Options", "__version__", "load", "load_tokenizer", "weights"]


def load(  # noqa: PLR0913  all that a model can be made of
    model: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    slots: int = 1,
    projector: str | Path | None = None,
    adapter: str | Path | Sequence[str | Path] = (),
    vision_blocks: int | None = None,
    told: Callable[[int, int], object] = lambda done, total: None,
) -> LoadedModel:
    """A model from a GGUF file, or by its name in the store, ready to answer.

    `options` become its defaults; `slots` is how many answers are written side by side;
    `adapter` is a LoRA's file or folder, or several (the option `adapters` says how much of each);
    `projector` is the file with a vision model's eyes, and `vision_blocks` how many blocks of its
    tower are run (none given: all; −1: as llama.cpp does, all but the last); `told` is called with
    the bytes that have found their place, and those that there are.
    Raises: ModelNotFound, BadOption, FormatError, UnsupportedModel.
    """
    from refollama import loaded  # brings torch

    return loaded.load(
        model,
        options,
        slots=slots,
        projector=projector,
        adapter=adapter,
        vision_blocks=vision_blocks,
        told=told,
    )


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer alone, from a GGUF file that may hold no tensors; without torch."""
    from refollama.text import tokenizer_from
    from refollama.weights.gguf import open_gguf

    return tokenizer_from(open_gguf(path).metadata)


def __getattr__(name: str) -> Any:
    """`refollama.weights` and `refollama.Client` are imported when they are first asked for."""
    if name == "weights":
        return importlib.import_module("refollama.weights")
    if name == "Client":
        return importlib.import_module("refollama.client").Client
    raise AttributeError(f"module 'refollama' has no attribute {name!r}")
