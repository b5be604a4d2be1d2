"""The tokenizers of GGUF files, for those who need no net: read from the metadata alone."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from refollama.errors import FormatError, UnsupportedModel
from refollama.paths import file_state
from refollama.text import tokenizer_from
from refollama.text.tokenizer import Tokenizer
from refollama.weights.gguf import open_gguf

MOST = 4  # that are kept; one of a large vocabulary takes some 100 MB


def tokenizer_of(path: Path) -> Tokenizer:
    """The tokenizer that a file asks for; those used last are kept.

    Raises: NotFound, FormatError, UnsupportedModel.
    """
    return _read(path, file_state(path))


@lru_cache(maxsize=MOST)
def _read(path: Path, state: tuple[int, ...]) -> Tokenizer:
    try:
        return tokenizer_from(open_gguf(path).metadata)
    except (FormatError, UnsupportedModel) as error:
        if str(error).startswith(path.name):
            raise
        raise type(error)(f"{path.name}: {error}") from None  # whose metadata it was
