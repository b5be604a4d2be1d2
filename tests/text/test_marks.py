"""Pictures stand where their message says, and nobody else can say where."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refollama.errors import BadRequest
from refollama.text.marks import around, parted, placed, shown

WISHES = st.lists(
    st.sampled_from(["[img]", "[img-0]", "[img-1]", "[img-2]", "a", " ", "[", "]", "é", "\udbfd"])
).map("".join)


def numbers(text):
    return [part for part in parted(text) if isinstance(part, int)]


@pytest.mark.parametrize(
    ("text", "count", "first", "expected"),
    [
        ("hi", 0, 5, "hi"),
        ("[img-9]", 0, 5, "[img-9]"),
        ("hi", 2, 5, "[img-5][img-6]hi"),
        ("a [img-1] b", 2, 5, "[img-5]a [img-6] b"),
        ("a [img] b [img] c [img]", 2, 0, "a [img-0] b [img-1] c [img]"),
        ("[img-0] [img] [img-0]", 3, 1, "[img-3][img-1] [img-2] [img-1]"),
        ("[img-01]", 2, 0, "[img-0][img-1]"),
    ],
)
def test_pictures_stand_where_they_should(text, count, first, expected):
    assert shown(placed(text, count, first)) == expected


@pytest.mark.parametrize("number", [2, 3, 999999999])
def test_a_number_without_a_picture_is_refused(number):
    with pytest.raises(BadRequest, match=rf"\[img-{number}\] stands for no picture: there are 2"):
        placed(f"a [img-{number}]", 2, 7)


@given(WISHES, st.integers(3, 5), st.integers(0, 9))
def test_every_picture_stands_somewhere_and_the_text_stays(text, count, first):
    marked = placed(text, count, first)
    assert set(numbers(marked)) == set(range(first, first + count))
    kept = "".join(part for part in parted(marked) if isinstance(part, str))
    assert kept == _without(text, count)


def _without(text, count):
    """The text after its wishes are granted, one at a time."""
    named = {n for n in range(count) if f"[img-{n}]" in text}
    for n in named:
        text = text.replace(f"[img-{n}]", "\0")
    for _ in range(count - len(named)):
        text = text.replace("[img]", "\0", 1)
    return text.replace("\0", "")


@given(WISHES)
def test_what_is_written_is_no_mark(text):
    """Not even what is shown of a mark, sent back."""
    assert numbers(text) == numbers(shown(placed(text, 3, 0))) == []


@given(WISHES)
def test_a_guard_sees_the_text_and_not_the_marks(text):
    marked = placed(text, 3, 0)
    seen: list[str] = []

    def guard(part):
        seen.append(part)
        return part.upper()

    guarded = around(guard, marked)
    assert numbers(guarded) == numbers(marked)
    assert "".join(seen) == "".join(part for part in parted(marked) if isinstance(part, str))
