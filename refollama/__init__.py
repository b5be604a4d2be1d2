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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refollama.options import Options
from refollama.version import __version__

if TYPE_CHECKING:
    from refollama import weights
    from refollama.client import Client
    from refollama.loaded import LoadedModel
    from refollama.text.tokenizer import Tokenizer

__all__ = ["Client", "Options", "__version__", "load", "load_tokenizer", "weights"]


def load(model: str | Path, *, slots: int = 1) -> LoadedModel:
    """A model from a GGUF file, or by its name in the store, ready to answer.

    `slots`: how many answers are written side by side; more wait for their turn.
    Raises: ModelNotFound, FormatError, UnsupportedModel.
    """
    from refollama import loaded  # brings torch

    return loaded.load(model, slots=slots)


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
