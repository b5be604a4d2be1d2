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
    supported = {"llama": _sentencepiece, "gpt2": _byte_level}
    found = metadata.get("tokenizer.ggml.model")
    if not isinstance(found, str) or found not in supported:
        known = ", ".join(map(repr, supported))
        raise UnsupportedModel(f"tokenizer.ggml.model is {found!r}; supported: {known}")
    return supported[found](metadata)


# Each imports its library when a model needs it: not for `refollama --help`, nor for the other.


def _sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    from refollama.text.spm import SpmTokenizer

    return SpmTokenizer.from_metadata(metadata)


def _byte_level(metadata: Mapping[str, Any]) -> Tokenizer:
    from refollama.text.bpe import BpeTokenizer

    return BpeTokenizer.from_metadata(metadata)
