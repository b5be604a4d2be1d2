"""Vocabularies for tests: one trained here, in memory, and one of a real model if it is at hand."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

ORACLES = Path(os.environ.get("REFOLLAMA_ORACLES", "/nonexistent"))
needs_oracles = pytest.mark.skipif(not ORACLES.is_dir(), reason="REFOLLAMA_ORACLES is not set")

CORPUS = """
Once upon a time, in a small house by the sea, there lived a cat who could count to 100.
"Hello, world!" said the cat.  "Hello, sea!" And the sea said: hello, hello, hello.
Once upon another time there was naught, nothing at all; then there was something, über-small.
the cat the sea the house the time   the world\tthe 1234567890 (count) [count] {count} né été
"""


def train_pieces(lines: Iterable[str], size: int) -> bytes:
    """A BPE model with byte fallback, by the library's own trainer."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


@cache
def trained() -> sentencepiece.SentencePieceProcessor:
    """A small one."""
    data = train_pieces(CORPUS.splitlines(), 380)
    return sentencepiece.SentencePieceProcessor(model_proto=data)


def columns(model: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    """The metadata that a GGUF file of this model has."""
    ids = range(model.get_piece_size())
    kinds = [(model.is_unknown, 2), (model.is_control, 3), (model.is_unused, 5), (model.is_byte, 6)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(id) for id in ids],
        "tokenizer.ggml.scores": [model.get_score(id) for id in ids],
        "tokenizer.ggml.token_type": [
            next((kind for is_kind, kind in kinds if is_kind(id)), 1) for id in ids
        ],
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
    }


def extended(*tokens: tuple[str, int]) -> dict[str, Any]:
    """The trained vocabulary with more tokens behind it, each (text, type)."""
    metadata = columns(trained())
    for key, values in (
        ("tokens", [text for text, _ in tokens]),
        ("scores", [-1000.0] * len(tokens)),
        ("token_type", [kind for _, kind in tokens]),
    ):
        metadata["tokenizer.ggml." + key] += values
    return metadata


@cache
def oracle_metadata(name: str) -> dict[str, Any]:
    """The vocabulary of a real model, as another program's reader finds it in a GGUF file."""
    from gguf import GGUFReader

    reader = GGUFReader(ORACLES / "vocab" / f"{name}.gguf")
    return {key: field.contents() for key, field in reader.fields.items()}


def recorded(name: str) -> list[tuple[str, list[int]]]:
    """llama.cpp's test texts and the ids that it recorded for a vocabulary."""
    separator = "\n__ggml_vocab_test__\n"
    texts = (ORACLES / f"vocab/{name}.gguf.inp").read_bytes().decode().split(separator)[:-1]
    lines = (ORACLES / f"vocab/{name}.gguf.out").read_text().split("\n")[:-1]
    return [(t, [int(id) for id in line.split()]) for t, line in zip(texts, lines, strict=True)]
