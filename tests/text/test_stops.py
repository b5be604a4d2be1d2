"""Laws of the cut: the joined output is the text before the leftmost stop string."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refollama.text.stops import StopStrings

# Few letters, so that overlaps, nested stops and false starts happen all the time.
WORDS = st.text(alphabet="abc", max_size=6)
STOPS = st.lists(WORDS, max_size=4)
PIECES = st.lists(st.text(alphabet="abc", max_size=5), max_size=12)


def judge(text: str, stops: list[str]) -> str:
    """The law, computed on the whole text at once."""
    places = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(places, default=len(text))]


def shown(pieces, stops):
    """What comes out, piece by piece, none empty."""
    cut = StopStrings(stops)
    return [text for text in (*map(cut.feed, pieces), cut.finish()) if text]


@given(PIECES, STOPS)
def test_output_is_the_text_before_the_leftmost_stop(measured, pieces, stops):
    assert "".join(shown(pieces, stops)) == judge("".join(pieces), stops)
    measured("options", "stop", "definition", "equal")


@given(PIECES, STOPS)
def test_hit_means_that_a_stop_string_occurred(pieces, stops):
    cut = StopStrings(stops)
    out = "".join(map(cut.feed, pieces)) + cut.finish()
    text = "".join(pieces)
    assert cut.hit == (out != text) == any(stop and stop in text for stop in stops)


@given(PIECES, STOPS)
def test_only_a_tail_that_may_become_a_stop_is_held(pieces, stops):
    """What is shown at any moment is the text less its longest tail that begins a stop string."""
    cut = StopStrings(stops)
    text = out = ""
    for piece in pieces:
        text += piece
        out += cut.feed(piece)
        if cut.hit:
            break
        tails = (text[i:] for i in range(len(text) + 1))
        held = next(tail for tail in tails if any(stop.startswith(tail) for stop in [*stops, ""]))
        assert out + held == text


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["one #", "# two ##", "# three"], ["###"], ["one ", "## two "]),
        (["wait", ".\n", "never seen"], ["\n"], ["wait", "."]),  # text before the match is released
        (["a", "bc", "x"], ["abcd", "bc"], ["a"]),  # "abcd" died, so "bc" is the leftmost
        (["a", "bc", "d"], ["abcd", "bc"], []),  # "abcd" starts first, though "bc" ends first
        (["abc"], ["abcd", "bc"], ["a"]),  # the text ended before "abcd" could
        (["User", ":"], ["User:"], []),
        (["User"], ["User:"], ["User"]),  # held, then released
        (["a", "", "b"], [""], ["a", "b"]),  # an empty stop string is none
        (["né", "e"], ["ée"], ["n"]),
    ],
)
def test_examples(pieces, stops, expected):
    assert list(shown(pieces, stops)) == expected


def test_feeding_after_a_hit_shows_nothing():
    cut = StopStrings(["x"])
    assert (cut.feed("axb"), cut.hit, cut.feed("c"), cut.finish()) == ("a", True, "", "")


def test_time_is_linear_even_for_stops_that_almost_match_everywhere():
    """Quadratic time would be minutes here: 20 000 × 200 000 comparisons."""
    stop, text = "a" * 20_000 + "b", "a" * 200_000
    started = time.perf_counter()
    assert "".join(shown(text, [stop])) == text
    assert time.perf_counter() - started < 10
