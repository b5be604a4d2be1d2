"""Laws of SentencePiece.  Judges: the library's own model, a slow merge, recorded ids."""

from __future__ import annotations

import logging
import time
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from refollama.errors import FormatError, UnsupportedModel
from refollama.text import tokenizer_from
from refollama.text.spm import SpmTokenizer
from tests.text.vocabularies import (
    ORACLES,
    columns,
    extended,
    needs_oracles,
    oracle_metadata,
    recorded,
    trained,
)

LETTERS = st.characters(exclude_categories=["Cs"])  # all but surrogates
SPOKEN = st.text(alphabet=" \n\t.,!ehlotacsnuip0123é\u2581\0\r世🦙", max_size=60)
TEXT = SPOKEN | st.text(alphabet=LETTERS, max_size=60)


@cache
def ours() -> SpmTokenizer:
    return SpmTokenizer.from_metadata(columns(trained()))


@cache
def llama2() -> SpmTokenizer:
    return SpmTokenizer.from_metadata(oracle_metadata("llama-spm"))


# ------------------------------------------------------------------------------- the same ids


@settings(deadline=None, max_examples=500)
@given(TEXT)
@example("")
@example(" ")
@example("\u2581")
def test_rebuilt_equals_the_model_it_was_taken_from(measured, text):
    assert ours().encode(text) == trained().encode(text)
    measured("tokenizers", "kind llama", "sentencepiece", "equal")


def merged_slowly(text: str, scores: dict[str, float]) -> list[str]:
    """BPE by its definition: as long as any pair can merge, merge the best, leftmost of equals."""
    symbols = list(text)
    while True:
        pairs = [a + b for a, b in pairwise(symbols)]
        known = [(scores[pair], -at) for at, pair in enumerate(pairs) if pair in scores]
        if not known:
            return symbols
        at = -max(known)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


def encoded_slowly(text: str, metadata: dict[str, Any]) -> list[int]:
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {token: id for id, token in enumerate(tokens)}
    scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))
    out = []
    for symbol in merged_slowly((" " + text if text else "").replace(" ", "\u2581"), scores):
        spelled = [f"<0x{byte:02X}>" for byte in symbol.encode()]
        out += [ids[symbol]] if symbol in ids else [ids[byte] for byte in spelled]
    return out


@settings(deadline=None, max_examples=300)
@given(TEXT)
def test_encode_equals_the_slow_merge(measured, text):
    assert ours().encode(text) == encoded_slowly(text, columns(trained()))
    measured("tokenizers", "kind llama", "slow merge", "equal")


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "ab", "ba", "aa", "▁a", "abab"]), max_size=7), st.data())
def test_any_scores_merge_by_score_and_then_from_the_left(measured, words, data):
    metadata = columns(trained())
    kept = metadata["tokenizer.ggml.tokens"][:259]  # the specials and the bytes
    few = ["a", "b", "▁", "ab", "ba", "aa", "▁a", "abab", "aab", "bb"]
    metadata["tokenizer.ggml.tokens"] = [*kept, *few]
    size = len(metadata["tokenizer.ggml.tokens"])
    score = st.sampled_from([-1.0, 0.0, 2.0])  # so few that many are equal
    drawn = data.draw(st.lists(score, min_size=len(few), max_size=len(few)))
    metadata["tokenizer.ggml.scores"] = [0.0] * len(kept) + drawn
    metadata["tokenizer.ggml.token_type"] = metadata["tokenizer.ggml.token_type"][:size]
    text = "".join(words)
    assert SpmTokenizer.from_metadata(metadata).encode(text) == encoded_slowly(text, metadata)
    measured("tokenizers", "kind llama", "slow merge", "equal")


@needs_oracles
def test_recorded_ids_of_llama_2(measured):
    texts = recorded("llama-spm")
    assert len(texts) == 46
    for text, ids in texts:
        assert llama2().encode(text) == ids, repr(text)
        assert llama2().decode(llama2().encode(text)) == text
        measured("tokenizers", "vocabulary llama-spm", "llama.cpp's ids", "equal")


@needs_oracles
def test_llama_2_rebuilt_from_gguf_equals_the_original(measured):
    original = sentencepiece.SentencePieceProcessor(
        model_file=str(ORACLES / "vocab/llama2-tokenizer.model")
    )

    @settings(deadline=None, max_examples=500)
    @given(TEXT | st.text(alphabet="The quick brown fox, überall 世界 \n", max_size=200))
    def law(text):
        assert llama2().encode(text) == original.encode(text)
        assert llama2().decode(llama2().encode(text)) == text.replace("\u2581", " ")
        measured("tokenizers", "vocabulary llama-spm", "Llama 2's model", "equal")

    law()


# --------------------------------------------------------------------------------- round trip


@settings(deadline=None, max_examples=500)
@given(TEXT)
@example("  two  spaces  ")
@example("\r\n")
@example("\0")
def test_decode_is_the_inverse_of_encode(measured, text):
    expected = text.replace("\u2581", " ")  # to a vocabulary, U+2581 is how a space is written
    assert ours().decode(ours().encode(text)) == expected
    assert ours().decode(ours().encode(text, bos=True)) == expected
    measured("tokenizers", "kind llama", "round trip", "equal")


@settings(deadline=None)
@given(TEXT, TEXT)
def test_a_text_that_continues_another_gets_no_space_in_front(text, more):
    tokenizer = ours()
    ids = tokenizer.encode(text or "a") + tokenizer.encode(more, continues=True)
    assert tokenizer.decode(ids) == ((text or "a") + more).replace("\u2581", " ")


def test_lone_surrogates_become_the_replacement_character():
    assert ours().decode(ours().encode("a\ud800b")) == "a\ufffdb"


def test_long_text_without_spaces_takes_no_quadratic_time():
    for text in ("a" * 300_000, "🦙" * 100_000, " " * 300_000):
        started = time.perf_counter()
        assert ours().decode(ours().encode(text)) == text
        assert time.perf_counter() - started < 10


# --------------------------------------------------------------------- BOS, EOS, special tokens


def test_bos_and_eos_as_the_metadata_asks():
    metadata = columns(trained())
    hello = ours().encode("hello")
    assert ours().encode("hello", bos=True) == [1, *hello]  # the defaults: BOS yes, EOS no
    assert ours().encode("", bos=True) == [1]
    metadata |= {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}
    assert SpmTokenizer.from_metadata(metadata).encode("hello", bos=True) == [*hello, 2]


def test_control_tokens_are_parsed_only_when_asked_for():
    tokenizer = ours()
    hello = tokenizer.encode("hello")
    assert tokenizer.encode("<s>hello</s>hello", special=True) == [1, *hello, 2, *hello]
    assert tokenizer.encode("<s>", special=True, bos=True) == [1, 1]  # none is dropped
    assert not {1, 2} & set(tokenizer.encode("<s>hello</s>"))
    assert tokenizer.decode(tokenizer.encode("<s>hello</s>")) == "<s>hello</s>"
    assert tokenizer.encode("<unk><0x0A>", special=True)[0] == 0
    assert 13 not in tokenizer.encode("<0x0A>", special=True)  # a byte's name is no special token


def test_each_fragment_behind_a_special_token_gets_a_space():
    tokenizer = ours()
    spaced = [tokenizer.piece(id) for id in tokenizer.encode("</s>hello</s> hello", special=True)]
    assert b"".join(spaced) == b" hello  hello"
    metadata = columns(trained()) | {"tokenizer.ggml.add_space_prefix": False}
    bare = SpmTokenizer.from_metadata(metadata)
    assert (
        b"".join(map(bare.piece, bare.encode("</s>hello</s> hello", special=True)))
        == b"hello hello"
    )
    assert bare.decode(bare.encode(" hello")) == " hello"


def test_user_defined_tokens_are_always_parsed_and_print_their_text():
    tokenizer = SpmTokenizer.from_metadata(extended(("hello!", 4), ("hello!!", 4), ("▁▁", 4)))
    size = tokenizer.vocab_size
    assert tokenizer.encode("hello!!hello!") == [size - 2, size - 3]  # the longest wins
    assert tokenizer.decode([size - 2]) == "hello!!"
    assert size - 1 not in tokenizer.encode("a  b")  # found by its spelling, not by merging
    assert tokenizer.decode(tokenizer.encode("a  b")) == "a  b"


def test_a_token_that_is_no_utf8_prints_its_bytes():
    """A reader of GGUF keeps such bytes as surrogates; text never turns into them."""
    tokenizer = SpmTokenizer.from_metadata(
        extended(("\udce4\udcb8", 1), ("\udcff", 5), ("\udcff", 4))
    )
    assert tokenizer.piece(tokenizer.vocab_size - 3) == b"\xe4\xb8"
    assert tokenizer.decode([tokenizer.vocab_size - 3, 3 + 0x96]) == "世"
    assert tokenizer.decode(tokenizer.encode("a\udcffb")) == "a\ufffdb"


def test_what_tokens_print():
    tokenizer = SpmTokenizer.from_metadata(extended(("<|x|>", 3), ("unused", 5), (" user▁", 4)))
    size = tokenizer.vocab_size
    prints = [tokenizer.piece(id) for id in (0, 1, 2, 3, 13, 258, size - 3, size - 2, size - 1)]
    assert prints == [b"", b"", b"", b"\x00", b"\n", b"\xff", b"", b"", " user▁".encode()]
    assert tokenizer.newline_id == 13
    assert tokenizer.decode([size - 1]) == " user▁"  # nobody put this space in front


def test_unused_tokens_are_split_into_parts_that_are_used():
    metadata = columns(trained())
    (id,) = trained().encode("hello")[-1:]
    metadata["tokenizer.ggml.token_type"][id] = 5
    tokenizer = SpmTokenizer.from_metadata(metadata)
    assert id not in tokenizer.encode("hello")
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"


def test_of_two_tokens_with_one_text_the_later_counts():
    metadata = extended(("▁hello", 1))
    metadata["tokenizer.ggml.scores"][-1] = 0.0
    tokenizer = SpmTokenizer.from_metadata(metadata)
    assert tokenizer.decode(tokenizer.encode("hello hello")) == "hello hello"
    assert trained().encode("hello")[0] != tokenizer.encode("hello")[0] == tokenizer.vocab_size - 1


# ----------------------------------------------------------------------------- odd vocabularies


def test_scores_types_and_arrays_of_any_make():
    plain = columns(trained())
    arrays = dict(plain)
    for key, dtype in (("scores", np.float32), ("token_type", np.int32), ("tokens", object)):
        arrays["tokenizer.ggml." + key] = np.array(plain["tokenizer.ggml." + key], dtype)
    arrays["tokenizer.ggml.add_bos_token"] = np.bool_(True)
    arrays["tokenizer.ggml.bos_token_id"] = np.uint32(1)
    text = "hello, world é世"
    assert SpmTokenizer.from_metadata(arrays).encode(text, bos=True) == ours().encode(
        text, bos=True
    )


def test_without_types_bytes_are_known_by_name_and_specials_by_id():
    metadata = columns(trained())
    del metadata["tokenizer.ggml.token_type"]
    tokenizer = SpmTokenizer.from_metadata(metadata)
    assert tokenizer.encode("hello 世<s>", special=True) == ours().encode(
        "hello 世<s>", special=True
    )
    assert tokenizer.decode([1, 13, 2, 0]) == "\n"


def test_without_scores_text_is_still_text():
    metadata = columns(trained())
    del metadata["tokenizer.ggml.scores"]
    tokenizer = SpmTokenizer.from_metadata(metadata)
    assert tokenizer.decode(tokenizer.encode("hello, 世 world")) == "hello, 世 world"


def test_without_byte_tokens_what_cannot_be_spelled_is_unknown(caplog):
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a"],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1],
    }
    with caplog.at_level(logging.WARNING):
        tokenizer = SpmTokenizer.from_metadata(metadata)
    assert tokenizer.encode("ab世b") == [6, 5, 0, 5]
    assert "0 of 256 byte tokens" in caplog.text
    assert tokenizer.newline_id is None


def test_ids_outside_the_vocabulary_are_ignored_with_a_warning(caplog):
    metadata = columns(trained()) | {"tokenizer.ggml.bos_token_id": 2**32 - 1}
    with caplog.at_level(logging.WARNING):
        tokenizer = SpmTokenizer.from_metadata(metadata)
    assert tokenizer.bos_id is None
    assert tokenizer.encode("", bos=True) == []
    assert "bos_token_id is 4294967295, outside the vocabulary of 380 tokens" in caplog.text


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("tokens", [], "missing or empty"),
        ("tokens", "abc", "must be a list"),
        ("tokens", [1, 2], "entry 0 is no text"),
        ("tokens", ["a", "b", "c", "\ud800"], "entry 3 is no valid text"),
        ("scores", [1.0], "has 1 entries for 380 tokens"),
        ("scores", ["x"] * 380, "numbers only"),
        ("scores", [float("nan")] * 380, "numbers only"),
        ("scores", [1e300] * 380, "no SentencePiece model"),
        ("token_type", [1] * 379, "has 379 entries for 380 tokens"),
        ("token_type", [6] * 380, "is a byte, but its name is"),
        ("bos_token_id", "one", "must be an integer"),
        ("add_bos_token", "yes", "must be true or false"),
        ("add_bos_token", np.array([1, 0]), "must be true or false"),
    ],
)
def test_a_vocabulary_that_is_not_sound_is_a_format_error(key, value, problem):
    metadata = columns(trained()) | {"tokenizer.ggml." + key: value}
    if key == "tokens" and isinstance(value, list):
        metadata = {k: v for k, v in metadata.items() if "scores" not in k and "type" not in k}
    with pytest.raises(FormatError, match=problem):
        SpmTokenizer.from_metadata(metadata)


@pytest.mark.parametrize("found", ["bert", None, 3, "Llama"])
def test_another_kind_of_tokenizer_is_unsupported(found):
    metadata = columns(trained()) | {"tokenizer.ggml.model": found}
    with pytest.raises(UnsupportedModel, match="supported: 'llama', 'gpt2'"):
        tokenizer_from(metadata)
    with pytest.raises(UnsupportedModel, match="not 'llama'"):
        SpmTokenizer.from_metadata(metadata)
    assert isinstance(tokenizer_from(columns(trained())), SpmTokenizer)


def test_several_unknown_tokens_duplicates_empty_ones_and_late_additions_change_no_other_id():
    """The library refuses each of these; llama.cpp runs them all."""
    odd = ("<unk2>", 2), ("<unk>", 2), ("", 1), ("", 1), ("", 3), ("▁hello", 1), ("▁hello", 1)
    late = ("<|late|>", 4), ("<|later|>", 3), ("<0x41>", 1)
    metadata = extended(*odd, *late)
    tokenizer, size = SpmTokenizer.from_metadata(metadata), ours().vocab_size
    for text in ("once upon a time", "世 \0é", "<0x41>"):
        assert tokenizer.encode(text) == ours().encode(text)
    assert tokenizer.encode("a<|late|>", special=True)[-1] == size + len(odd)
    assert tokenizer.encode("<unk2><|later|>", special=True) == [size, size + len(odd) + 1]
    assert [tokenizer.piece(id) for id in (size, size + 2, size + 4)] == [b"", b"", b""]
    assert tokenizer.decode([size + 6]) == "hello"


@settings(deadline=None)
@given(TEXT, st.lists(st.integers(259, 379), max_size=40))
def test_duplicates_are_merged_as_the_slow_merge_does(measured, text, copied):
    metadata = columns(trained())
    tokens, scores = (metadata["tokenizer.ggml." + key] for key in ("tokens", "scores"))
    more = extended(*((tokens[id], 1) for id in copied))
    more["tokenizer.ggml.scores"][len(tokens) :] = [scores[id] for id in copied]
    assert SpmTokenizer.from_metadata(more).encode(text) == encoded_slowly(text, more)
    measured("tokenizers", "kind llama", "slow merge", "equal")


def test_bytes_without_a_token_are_unknown_and_the_others_are_spelled(caplog):
    metadata = columns(trained())
    metadata["tokenizer.ggml.tokens"][3 + 0xA6] = "<no byte>"
    metadata["tokenizer.ggml.token_type"][3 + 0xA6] = 1
    with caplog.at_level(logging.WARNING):
        tokenizer = SpmTokenizer.from_metadata(metadata)
    spelled = [3 + byte for byte in "🦙".encode()]  # F0 9F A6 99
    assert tokenizer.encode("🦙", continues=True) == [*spelled[:2], 0, spelled[3]]
    assert "255 of 256 byte tokens" in caplog.text


@settings(deadline=None)
@given(TEXT)
def test_without_scores_pairs_are_merged_from_the_left(text):
    metadata = columns(trained()) | {"tokenizer.ggml.scores": [0.0] * 380}
    expected = encoded_slowly(text, metadata)
    del metadata["tokenizer.ggml.scores"]
    assert SpmTokenizer.from_metadata(metadata).encode(text) == expected


ODD_TOKENS = st.lists(
    st.text(max_size=4) | st.sampled_from(["<unk>", "<s>", "<0x41>", "▁", ""]), max_size=12
)


@settings(deadline=None, max_examples=300)
@given(ODD_TOKENS, st.data())
def test_any_vocabulary_works_or_is_a_format_error(tokens, data):
    """Nothing that a stranger's file says makes the library fall over."""
    types = data.draw(
        st.none() | st.lists(st.integers(0, 7), min_size=len(tokens), max_size=len(tokens))
    )
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens}
    if types is not None:
        metadata["tokenizer.ggml.token_type"] = types
    try:
        tokenizer = SpmTokenizer.from_metadata(metadata)
    except FormatError:
        return
    ids = tokenizer.encode("aA<s> é" + "".join(tokens), bos=True, special=True)
    assert isinstance(tokenizer.decode(ids), str)
