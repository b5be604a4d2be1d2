"""keep_alive is read as Go reads numbers and durations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refollama import keep_alive
from refollama.errors import BadRequest
from refollama.keep_alive import FOR_EVER, seconds


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        # Ollama's own test (TestKeepAliveParsingFromJSON), and what Go's documentation allows
        *((42, 42), (42.5, 42.5), ("42m", 2520), (-1, FOR_EVER), (-3.14, FOR_EVER)),
        *(("-1m", FOR_EVER), (0, 0), ("0", 0), ("-0", 0), ("0s", 0), (None, None)),
        *(("1h30m", 5400), ("1.5h", 5400), ("300ms", 0.3), ("2us", 2e-6), ("2µs", 2e-6)),
        *(("2μs", 2e-6), ("10ns", 1e-8), (".5m", 30), ("1.m", 60), ("+5m", 300), ("1m1m", 120)),
        *((int("9" * 400), FOR_EVER), (1e300, 1e300)),
    ],
)
def test_what_is_understood(value, expected):
    assert seconds(value) == (expected if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    "value",
    [
        *("", "5", "-1", "m", "5 m", " 5m", "5min", "5M", "1h-5m", "--5m", "5m ", "1e3s", "٣m"),
        *(".s", "1m" * 101, "9" * 31 + "m", True, False, [], {}, [5]),
    ],
)
def test_what_is_not(value):
    with pytest.raises(BadRequest, match=r"keep_alive must be a number of seconds or a duration"):
        seconds(value)


@given(st.text("0123456789.hmsnuµ+- ", max_size=12))
def test_any_text_is_a_number_or_refused(text):
    try:
        found = seconds(text)
    except BadRequest:
        return
    assert found is not None and found >= 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((None, 300), ("", 300), ("  ", 300), ("120", 120), ("-1", FOR_EVER), ("0", 0)),
        *(("10m", 600), ("-5m", FOR_EVER), ('"10m"', 600), ("+7", 7)),
    ],
)
def test_the_environment(text, expected):
    given_ = {} if text is None else {"OLLAMA_KEEP_ALIVE": text}
    assert keep_alive.from_environment(given_) == expected


@pytest.mark.parametrize("text", ["soon", "1.5", "5 minutes"])
def test_an_environment_that_makes_no_sense_is_told(text):
    with pytest.raises(BadRequest, match="OLLAMA_KEEP_ALIVE must be"):
        keep_alive.from_environment({"OLLAMA_KEEP_ALIVE": text})
