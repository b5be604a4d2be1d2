"""A megabyte of English in two seconds, with vocabularies of the size that models have.

The clock counts this process's own work: other programs run on the machine, too.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pydoc_data.topics import topics
from typing import Any

import pytest

from refollama.text import tokenizer_from
from refollama.text.bpe import LETTERS
from refollama.text.tokenizer import Tokenizer
from tests.text.vocabularies import needs_oracles, oracle_metadata

MEGABYTE = 1_000_000
LIMIT = 2.0  # seconds
SYLLABLES = [a + b + c for a in "bcdfghlmnprstvw" for b in "aeiou" for c in ("", "n", "r", "s")]


@cache
def words() -> list[str]:
    """Sixty thousand words of one to four syllables, the most frequent first."""
    rng = random.Random(1)
    drawn = (
        "".join(rng.choices(SYLLABLES, k=rng.choice((1, 2, 2, 3, 3, 4)))) for _ in range(99999)
    )
    return sorted(dict.fromkeys(drawn), key=len)[:60_000]


@cache
def english() -> str:
    """Sentences with capitals, commas, numbers and new lines; words as frequent as Zipf says."""
    rng = random.Random(2)
    frequency = [1 / rank for rank in range(1, len(words()) + 1)]
    drawn = rng.choices(words(), frequency, k=MEGABYTE // 4)
    ends = rng.choices(
        [" ", ", ", ". ", ".\n\n", " (1987) ", "'s "], [80, 8, 8, 1, 1, 2], k=len(drawn)
    )
    text = "".join(word + end for word, end in zip(drawn, ends, strict=True))
    return re.sub(r"\.\s+[a-z]", lambda match: match.group().upper(), text)[:MEGABYTE]


def beginnings(space: str, letters: Iterable[str]) -> Iterator[tuple[str, str]]:
    """What merges with what: each word grows from its first letter, the frequent ones first."""
    seen = set(letters)
    for word in words():
        for end in range(1, len(word) + 1):
            left, right = space + word[: end - 1], word[end - 1]
            if left + right not in seen:
                seen.add(left + right)
                yield left, right


def merges(space: str, letters: Iterable[str], size: int) -> list[tuple[str, str]]:
    return [pair for pair, _ in zip(beginnings(space, letters), range(size), strict=False)]


def sentencepiece() -> dict[str, Any]:
    """32,000 pieces, as Llama 2 has."""
    singles = ["\u2581", *map(chr, range(33, 127))]
    whole = [a + b for a, b in merges("\u2581", singles, 32_000 - 259 - len(singles))]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *whole, *singles]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(tokens) - 259)],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
    }


def byte_level(pre: str) -> dict[str, Any]:
    """128,000 tokens and 256 special ones, as Llama 3 has."""
    pairs = merges("Ġ", LETTERS, 128_000 - 256)
    special = [f"<|reserved_special_token_{at}|>" for at in range(256)]
    tokens = [*LETTERS, *(a + b for a, b in pairs), *special]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in pairs],
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 256) + [3] * 256,
    }


def fast_enough(tokenizer: Tokenizer, text: str) -> bool:
    """With special tokens looked for, as in a prompt; the best of three tries counts."""
    return any(seconds(tokenizer, text) < LIMIT for _ in range(3))


def seconds(tokenizer: Tokenizer, text: str) -> float:
    started = time.process_time()
    tokenizer.encode(text, special=True)
    return time.process_time() - started


@pytest.mark.parametrize(
    "metadata",
    [
        pytest.param(sentencepiece, id="sentencepiece"),
        pytest.param(partial(byte_level, "gpt-2"), id="gpt-2"),
        pytest.param(partial(byte_level, "llama-bpe"), id="llama-bpe"),
    ],
)
def test_a_megabyte_of_english_takes_two_seconds_at_most(metadata: Callable[[], dict[str, Any]]):
    tokenizer = tokenizer_from(metadata())
    text = english()
    assert 2.5 < len(text) / len(tokenizer.encode(text)) < 6  # characters a token, as in English
    assert fast_enough(tokenizer, text)


@needs_oracles
@pytest.mark.parametrize("name", ["llama-spm", "gpt-2"])
def test_so_it_does_with_real_vocabularies_and_real_english(name):
    text = "\n".join(topics.values())
    text = (text * (MEGABYTE // len(text) + 1))[:MEGABYTE]
    assert fast_enough(tokenizer_from(oracle_metadata(name)), text)
