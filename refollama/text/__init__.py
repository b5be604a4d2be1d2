"""TEXT ↔ TOKEN IDS: tokenizers, templates, prompts, stop strings. No torch in this room."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refollama.errors import UnsupportedModel
from refollama.text.tokenizer import Tokenizer


def tokenizer_from(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that the metadata of a GGUF file asks for.

    Raises: UnsupportedModel for a kind that we cannot run, FormatError for an unsound vocabulary.
    """
    # Here, not above: the library is loaded when a model is, not by `refollama --help`.
    from refollama.text.spm import SpmTokenizer

    supported = {"llama": SpmTokenizer.from_metadata}
    found = metadata.get("tokenizer.ggml.model")
    if not isinstance(found, str) or found not in supported:
        known = ", ".join(map(repr, supported))
        raise UnsupportedModel(f"tokenizer.ggml.model is {found!r}; supported: {known}")
    return supported[found](metadata)
