"""Llama 3 and Qwen 2: llama.cpp's recorded ids, with vocabularies that Python packages bring along.

They come as ranks, "text in base64, rank" on each line, without merges: the last merge of a token
is what lower ranks leave of it.
"""

from __future__ import annotations

import base64
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

from refollama.text import tokenizer_from
from refollama.text.bpe import LETTERS
from tests.text.vocabularies import needs_oracles, recorded

FILES = {
    "llama-bpe": ("llama_models", "llama3/tokenizer.model"),
    "qwen2": ("dashscope", "resources/qwen.tiktoken"),
}


def published(name: str) -> dict[bytes, int]:
    package, file = FILES[name]
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the package {package} is not installed")
    lines = (Path(spec.submodule_search_locations[0]) / file).read_bytes().splitlines()
    return {base64.b64decode(text): int(rank) for text, rank in map(bytes.split, lines)}


def last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes] | None:
    """The two parts, or None for a token that no merge makes: only the whole word is that token."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, ranks[token]) for a, b in pairwise(parts)]
        if min(pairs) == ranks[token]:
            return None
        at = pairs.index(min(pairs))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def letters(data: bytes) -> str:
    return "".join(LETTERS[byte] for byte in data)


@needs_oracles
@pytest.mark.real_model
@pytest.mark.parametrize("name", FILES)
def test_recorded_ids(name, measured):
    ranks = published(name)
    tokens = sorted(ranks, key=ranks.__getitem__)
    merges = [last_merge(token, ranks) for token in tokens if len(token) > 1]
    tokenizer = tokenizer_from(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": name,
            "tokenizer.ggml.tokens": list(map(letters, tokens)),
            "tokenizer.ggml.merges": [" ".join(map(letters, pair)) for pair in merges if pair],
        }
    )
    texts = recorded(name)
    assert len(texts) == 46
    for text, ids in texts:
        assert tokenizer.encode(text) == ids, repr(text)
        assert tokenizer.decode(ids) == text
        measured("tokenizers", f"vocabulary {name}", "llama.cpp's ids", "equal")
