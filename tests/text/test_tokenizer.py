"""Laws that every tokenizer shares: streams, half characters, special tokens, end markers."""

from __future__ import annotations

import codecs

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from refollama.errors import BadRequest
from refollama.text import tokenizer_from
from refollama.text.spm import SpmTokenizer
from refollama.text.tokenizer import END_MARKERS, SpecialTokens, StreamDecoder, hang_up
from tests.text.vocabularies import columns, extended, trained

TOKENIZER = SpmTokenizer.from_metadata(
    extended(("<|im_end|>", 4), ("<|im_start|>", 3), ("user", 4), ("<|", 3), ("<|x", 3))
)
SIZE = TOKENIZER.vocab_size
LLAMA = list("🦙".encode())  # four bytes; the token of byte b has id b + 3

# Any ids at all, with bytes far more often than a model would draw them.
IDS = st.lists(st.integers(0, SIZE - 1) | st.integers(3 + 0x80, 3 + 0xFF), max_size=20)


def printed(ids: list[int]) -> bytes:
    """All bytes at once, less the one space of the first token that prints."""
    pieces = [(TOKENIZER.piece(id), TOKENIZER.vocabulary.types[id]) for id in ids]
    printing = [(piece, kind) for piece, kind in pieces if piece]
    data = b"".join(piece for piece, _ in printing)
    return data.removeprefix(b" ") if printing and printing[0][1] == 1 else data


def judge(ids: list[int]) -> str:
    """decode by its definition."""
    return printed(ids).decode(errors="replace")


def complete_characters(ids: list[int]) -> int:
    """How many characters are certain, whatever follows."""
    return len(codecs.utf_8_decode(printed(ids), "replace", False)[0])


@settings(deadline=None, max_examples=500)
@given(IDS)
def test_streamed_equals_whole(ids):
    assert "".join(TOKENIZER.stream(ids)) == TOKENIZER.decode(ids) == judge(ids)


@settings(deadline=None, max_examples=500)
@given(IDS, IDS)
@example([1], TOKENIZER.encode("hello"))  # BOS prints nothing: the first space is not text
@example(TOKENIZER.encode("hello"), TOKENIZER.encode("hello"))
@example([3 + LLAMA[0], 3 + LLAMA[1]], [3 + LLAMA[2], 3 + LLAMA[3]])
@example([3 + 0xED, 3 + 0xA0], [])  # half a surrogate: two bytes, two U+FFFD
def test_an_answer_is_what_it_adds_to_its_prompt(prompt, answer):
    """A prompt that ends in half a character leaves that half to the answer."""
    shown = complete_characters(prompt)
    assert "".join(TOKENIZER.stream(answer, after=prompt)) == judge(prompt + answer)[shown:]


def test_the_first_space_of_an_answer_is_kept():
    hello = TOKENIZER.encode("hello")
    assert "".join(TOKENIZER.stream(hello, after=[1])) == "hello"
    assert "".join(TOKENIZER.stream(hello, after=[1, *hello])) == " hello"
    assert "".join(TOKENIZER.stream(hello, after=[1, *TOKENIZER.encode("")])) == "hello"


def test_half_a_character_is_never_shown():
    decoder = StreamDecoder(TOKENIZER)
    assert [decoder.push(byte + 3) for byte in LLAMA] == ["", "", "", "🦙"]
    assert decoder.finish() == ""
    assert [decoder.push(byte + 3) for byte in LLAMA[:2]] == ["", ""]
    assert decoder.finish() == "\ufffd"


def test_a_prompt_that_ends_in_half_a_character_is_completed_by_the_answer():
    prompt, answer = ([byte + 3 for byte in half] for half in (LLAMA[:2], LLAMA[2:]))
    assert list(TOKENIZER.stream(answer, after=prompt)) == ["🦙"]
    assert "".join(TOKENIZER.stream([ord("x") + 3], after=prompt)) == "\ufffdx"


def test_closing_a_stream_closes_where_its_ids_come_from():
    closed = []

    def source():
        try:
            while True:
                yield ord("x") + 3
        finally:
            closed.append(True)

    ids = source()
    stream = TOKENIZER.stream(ids)
    assert next(stream) == "x"
    hang_up(stream)
    assert closed


@pytest.mark.parametrize("id", [-1, SIZE, 10**9])
def test_an_id_outside_the_vocabulary_is_a_bad_request(id):
    with pytest.raises(BadRequest, match=f"token id {id} is not in the vocabulary of {SIZE}"):
        TOKENIZER.decode([id])


# ----------------------------------------------------------------------- ends, special tokens


def test_end_markers_are_found_by_key_and_by_name_and_are_control_tokens():
    end = SIZE - 5
    assert TOKENIZER.eos_ids == {2, end}
    assert TOKENIZER.piece(end) == b""
    assert end not in TOKENIZER.encode("<|im_end|>")
    assert TOKENIZER.encode("<|im_end|>", special=True) == [end]
    keys = {"tokenizer.ggml.eot_token_id": 300, "tokenizer.ggml.eom_token_id": 301}
    assert SpmTokenizer.from_metadata(columns(trained()) | keys).eos_ids == {2, 300, 301}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("marker", sorted(END_MARKERS))
def test_each_usual_end_marker_ends_an_answer_whatever_its_type(kind, marker):
    tokens = ["<unk>", "<s>", "</end>", *(f"<0x{byte:02X}>" for byte in range(256)), marker]
    metadata = {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.eos_token_id": 2,
    }
    tokenizer = tokenizer_from(metadata)
    assert tokenizer.eos_ids == {2, 259}
    assert tokenizer.piece(259) == b""
    assert tokenizer.encode(marker, special=True) == [259]


@pytest.mark.parametrize("key", ["eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep"])
def test_each_key_of_an_end_is_heard_and_the_others_are_not(key):
    """The other fim_* tokens stand in prompts; an answer goes on after them."""
    others = ("fim_pre", "fim_suf", "fim_mid", "prefix", "suffix", "middle", "padding")
    keys = {f"tokenizer.ggml.{name}_token_id": 301 for name in others}
    keys[f"tokenizer.ggml.{key}_token_id"] = 300
    ends = SpmTokenizer.from_metadata(columns(trained()) | keys).eos_ids
    assert ends - {2} == {300}


def split_slowly(text: str, specials: dict[str, int]) -> list[str | int]:
    """At each place the longest special token, else one character more of plain text."""
    parts: list[str | int] = []
    while text:
        fits = [special for special in specials if text.startswith(special)]
        longest = max(fits, key=len, default="")
        if longest:
            parts.append(specials[longest])
        elif parts and isinstance(parts[-1], str):
            parts[-1] += text[0]
        else:
            parts.append(text[0])
        text = text[len(longest) or 1 :]
    return parts


SHARDS = st.lists(
    st.sampled_from(
        ["<|im_end|>", "<|im_start|>", "<|", "<|x", "user", "<s>", "us", "er", "<", "x"]
    )
)


@settings(deadline=None)
@given(SHARDS, st.booleans())
def test_special_tokens_are_split_off_longest_first(shards, special):
    text = "".join(shards)
    vocabulary = TOKENIZER.vocabulary
    kinds = (2, 3, 4) if special else (4,)
    wanted = {
        token: id
        for id, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in kinds
    }
    parts = list(SpecialTokens.of(vocabulary).split(text, special))
    assert parts == split_slowly(text, wanted)


def test_special_characters_of_patterns_are_plain_characters():
    tokenizer = SpmTokenizer.from_metadata(extended((".*", 3), ("[INST]", 3), ("a|b", 3)))
    last = tokenizer.vocab_size
    assert tokenizer.encode(".*[INST]a|b", special=True) == [last - 3, last - 2, last - 1]
    assert not {last - 3, last - 2, last - 1} & set(tokenizer.encode("xxINSTa", special=True))
