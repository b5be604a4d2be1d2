"""What goes in comes out: decode is the inverse of encode, for any text, streamed or not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from refollama.text.bpe import BpeTokenizer
from refollama.text.spm import SpmTokenizer
from refollama.text.tokenizer import SpecialTokens, Tokenizer
from tests.text.test_bpe import altered, trained
from tests.text.vocabularies import columns, extended
from tests.text.vocabularies import trained as trained_spm

# All of Unicode, with more of what is cut, merged and spelled in bytes.
TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.text(
    " \n\t.,!'ehlotacsnuip0123é\u2581\0\r世🦙\u0301\ufffd\u3000Ġ<|>", max_size=80
)


def same(text: str) -> str:
    return text


def without_marks_of_spaces(text: str) -> str:
    """To a SentencePiece vocabulary, U+2581 is how a space is written."""
    return text.replace("\u2581", " ")


KINDS = [
    pytest.param(BpeTokenizer.from_metadata(trained()), same, id="byte-level"),
    pytest.param(
        SpmTokenizer.from_metadata(columns(trained_spm())), without_marks_of_spaces, id="spm"
    ),
    pytest.param(
        SpmTokenizer.from_metadata(
            columns(trained_spm()) | {"tokenizer.ggml.add_space_prefix": False}
        ),
        without_marks_of_spaces,
        id="spm, no space in front",
    ),
]


@pytest.mark.parametrize(("tokenizer", "expected"), KINDS)
def test_any_text_comes_back(tokenizer: Tokenizer, expected, measured):
    @settings(deadline=None, max_examples=300)
    @given(TEXT)
    @example("  two  spaces  \r\n\0")
    @example("\u2581")
    @example("👩‍👩‍👧 e\u0301 \U0010ffff")
    def law(text):
        ids = tokenizer.encode(text)
        pieces = list(tokenizer.stream(iter(ids)))
        assert tokenizer.decode(ids) == "".join(pieces) == expected(text)
        assert all(pieces)
        assert tokenizer.decode(tokenizer.encode(text, bos=True)) == expected(text)
        kind = "gpt2" if isinstance(tokenizer, BpeTokenizer) else "llama"
        measured("tokenizers", f"kind {kind}", "round trip", "equal")

    law()


@pytest.mark.parametrize(("tokenizer", "expected"), KINDS)
def test_any_text_comes_back_as_an_answer_to_any_other(tokenizer: Tokenizer, expected):
    @settings(deadline=None, max_examples=200)
    @given(TEXT, TEXT)
    @example("a", " b")
    def law(prompt, answer):
        before = tokenizer.encode("x" + prompt, bos=True)
        ids = tokenizer.encode(answer, continues=True)
        assert "".join(tokenizer.stream(iter(ids), after=before)) == expected(answer)

    law()


# --------------------------------------------------------- special tokens in the middle of a text

WORDS = (("user", 4), ("<|a|>", 4), ("  ", 4), ("<|end|>", 3))
PIECES = st.lists(st.sampled_from([word for word, _ in WORDS] + ["a", " ", "hello", "é", "\n"]))


def spaced(parts: Iterator[str | int], words: dict[int, str]) -> str:
    """A space in front of each text that follows a special token."""
    out, follows = "", False
    for part in parts:
        out += words[part] if isinstance(part, int) else " " * follows + part
        follows = isinstance(part, int)
    return out


@settings(deadline=None)
@given(PIECES)
@example(["<|a|>", "hello"])
def test_sentencepiece_puts_a_space_behind_a_user_defined_token(pieces):
    """The one exception; llama.cpp's ids are the same."""
    text = "".join(pieces)
    tokenizer = SpmTokenizer.from_metadata(extended(*WORDS))
    words = dict(enumerate(tokenizer.vocabulary.tokens))
    parts = SpecialTokens.of(tokenizer.vocabulary).split(text, special=False)
    assert tokenizer.decode(tokenizer.encode(text)) == spaced(parts, words)


@settings(deadline=None)
@given(PIECES)
def test_byte_level_does_not(pieces):
    tokens, types = (trained()["tokenizer.ggml." + key] for key in ("tokens", "token_type"))
    tokenizer = BpeTokenizer.from_metadata(
        altered(
            tokens=[*tokens, *(word for word, _ in WORDS)],
            token_type=[*types, *(kind for _, kind in WORDS)],
        )
    )
    text = "".join(pieces)
    assert tokenizer.decode(tokenizer.encode(text)) == text
