"""Which bytes of a text each token stands for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refollama.text.spans import ends_of
from refollama.text.tokenizer import decode_spelled
from tests.text.test_bpe import ours as bpe
from tests.text.test_tokenizer import TOKENIZER as SPM

PARTS = st.characters(exclude_categories=["Cs"]) | st.sampled_from(
    ["▁", " ", "é", "🙂", "<s>", "</s>", "<|im_end|>", "the", "\n"]
)
TEXTS = st.lists(PARTS, max_size=30).map("".join)


@pytest.fixture(scope="module", params=["spm", "bpe"])
def words(request):
    return SPM if request.param == "spm" else bpe()


@settings(deadline=None)
@given(text=TEXTS, special=st.booleans())
def test_ids_are_those_of_encode_and_their_parts_make_up_the_text(words, text, special):
    found = words.spans(text, special=special)
    assert [one.id for one in found] == words.encode(text, special=special)
    ends = [0, *(one.end for one in found)]
    assert [one.start for one in found] == ends[:-1] and ends[-1] == len(text.encode())


@settings(deadline=None)
@given(text=TEXTS)
def test_each_part_is_what_the_token_prints(words, text):
    """But for spaces: one that the tokenizer put in front, and U+2581, which prints as one."""
    raw = text.encode()
    for one in words.spans(text, special=True):
        part = raw[one.start : one.end].replace("▁".encode(), b" ")
        spelled = words.spelling(one.id).replace("▁".encode(), b" ")
        assert part in (spelled, spelled.removeprefix(b" ")), one


def test_half_a_surrogate_is_the_replacement_character(words):
    assert words.spans("a\ud800b") == words.spans("a\ufffdb")


def test_by_hand():
    raw = "héy </s> you"
    parts = [raw.encode()[one.start : one.end] for one in SPM.spans(raw, special=True)]
    assert b"".join(parts) == raw.encode() and b"</s>" in parts


@pytest.mark.parametrize(
    ("pieces", "text", "ends"),
    [
        ([b"a", b"bc"], "abc", [1, 3]),
        ([b"a", b"", b"c"], "abbc", [1, 3, 4]),  # unknown: up to the next that is known
        ([b"a", b""], "abb", [1, 3]),  # or to the end
        ([b"", b"", b"c"], "xyc", [2, 2, 3]),
        ([b"a", b"c"], "abc", [1, 3]),  # a byte that got lost
        ([b"a", b"zzzz", b"c"], "abc", [1, 1, 3]),  # a token that prints what is not there
        ([], "", []),
    ],
)
def test_what_is_not_spelled(pieces, text, ends):
    assert ends_of(pieces, text, text) == ends


@pytest.mark.parametrize("text", ["<s>Hi</s> you", "Hi", "<s><s>", "</s>", ""])
def test_control_tokens_are_spelled_out(words, text):
    assert decode_spelled(words, words.encode(text, special=True)) == text
