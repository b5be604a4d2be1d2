"""Numbers as people read them, progress as it comes, one message after another."""

from __future__ import annotations

import re
import stat
from datetime import datetime, timedelta, timezone
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from refollama import terminal
from tests.fake_server import COUNTS

NOW = datetime(2023, 12, 15, tzinfo=timezone.utc)
CTRL_C, CTRL_D = "\x03", "\x04"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (1500, "1.5 KB"),
        (9_999, "10.0 KB"),
        (10_999, "10 KB"),
        (999_999, "999 KB"),
        (3_825_819_519, "3.8 GB"),
        (4_000_000_000, "4 GB"),
        (39_900_000_000, "39 GB"),
        (2_000_000_000_000, "2 TB"),
    ],
)
def test_sizes(size, text):
    assert terminal.human_size(size) == text


HOUR, DAY = 3600, 86400


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.9, "Less than a second"),
        (1.9, "1 second"),
        (59.9, "59 seconds"),
        (60, "About a minute"),
        (119, "About a minute"),
        (120, "2 minutes"),
        (HOUR - 1, "59 minutes"),
        (HOUR, "About an hour"),
        (1.49 * HOUR, "About an hour"),
        (1.5 * HOUR, "2 hours"),
        (2.5 * HOUR, "3 hours"),
        (47 * HOUR, "47 hours"),
        (2 * DAY, "2 days"),
        (13 * DAY, "13 days"),
        (14 * DAY, "2 weeks"),
        (59 * DAY, "8 weeks"),
        (60 * DAY, "2 months"),
        (729 * DAY, "24 months"),
        (730 * DAY, "2 years"),
    ],
)
def test_ages(seconds, text):
    moment = NOW - timedelta(seconds=seconds)
    assert terminal.human_age(moment, NOW) == f"{text} ago"


def test_ages_of_the_future_and_of_nothing():
    assert terminal.human_age(NOW + timedelta(hours=5), NOW) == "5 hours from now"
    assert terminal.human_age(None) == "Never"
    assert terminal.human_age(terminal.read_time("0001-01-01T00:00:00Z")) == "Never"


@pytest.mark.parametrize(
    ("text", "microsecond", "hours"),
    [
        ("2023-12-15T10:00:00Z", 0, 0),
        ("2023-12-15T10:00:00.5Z", 500_000, 0),
        ("2023-12-15T10:00:00.123456789+01:00", 123_456, 1),
        ("2023-12-15T10:00:00.1234567-08:00", 123_456, -8),
    ],
)
def test_times(text, microsecond, hours):
    zone = timezone(timedelta(hours=hours))
    assert terminal.read_time(text) == datetime(2023, 12, 15, 10, 0, 0, microsecond, zone)


@pytest.mark.parametrize("text", ["", "yesterday", "2023-12-15T10:00:00.x", "2023-99-15T10:00:00Z"])
def test_what_is_no_time(text):
    assert terminal.read_time(text) is None


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0s"),
        (1, "1ns"),
        (1_500, "1.5µs"),
        (130_079_000, "130.079ms"),
        (5_025_959, "5.025959ms"),
        (1_000_000_000, "1s"),
        (5_043_500_000, "5.0435s"),
        (60_000_000_000, "1m0s"),
        (3_723_500_000_000, "1h2m3.5s"),
        (36_000_000_000_001, "10h0m0.000000001s"),
        (-1_500_000_000, "-1.5s"),
    ],
)
def test_durations(nanoseconds, text):
    assert terminal.go_duration(nanoseconds) == text


UNITS = {"h": 3600 * 10**9, "m": 60 * 10**9, "s": 10**9, "ms": 10**6, "µs": 10**3, "ns": 1}


@given(st.integers(0, 10**15))
def test_no_nanosecond_is_lost(nanoseconds):
    """Read back with exact fractions."""
    parts = re.findall(r"([\d.]+)(h|ms|m|s|µs|ns)", terminal.go_duration(nanoseconds))
    assert sum(Fraction(number) * UNITS[unit] for number, unit in parts) == nanoseconds


def test_statistics_are_those_of_ollama():
    assert terminal.statistics(COUNTS).splitlines() == [
        "total duration:       5.0435s",
        "load duration:        5.025959ms",
        "prompt eval count:    26 token(s)",
        "prompt eval duration: 130.079ms",
        "prompt eval rate:     199.88 tokens/s",
        "eval count:           259 token(s)",
        "eval duration:        4.23271s",
        "eval rate:            61.19 tokens/s",
    ]
    assert terminal.statistics({"done": True, "eval_count": 0}) == ""


def test_a_table_without_rows_is_its_header():
    assert terminal.table(("A", "B"), []) == "A\tB"
    assert terminal.table(("A", "B"), [("long", "x")]) == "A   \tB\nlong\tx"


# --- progress --------------------------------------------------------------------------------

STEPS: list[dict[str, Any]] = [
    {"status": "parsing"},
    {"status": "writing [bold]", "digest": "sha256:ab", "total": 10},
    {"status": "writing [bold]", "digest": "sha256:ab", "total": 10, "completed": 10},
    {"status": "success"},
]


def test_a_log_has_each_status_once(capsys):
    terminal.show_progress(STEPS)
    assert capsys.readouterr().err == "parsing\nwriting [bold]\nsuccess\n"


def test_a_terminal_has_bars(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    terminal.show_progress(STEPS)
    shown = capsys.readouterr().err
    for text in ("parsing", "writing [bold]", "10/10 bytes", "success"):
        assert text in shown


def test_until_first_changes_nothing():
    assert list(terminal.until_first(STEPS, "wait")) == STEPS
    assert list(terminal.until_first([], "wait")) == []


# --- the prompt line -------------------------------------------------------------------------


def typed(text, history=None):
    """The messages that come of these keys."""
    with create_pipe_input() as keys, create_app_session(keys, DummyOutput()):
        keys.send_text(text)
        return list(terminal.PromptLine(history).messages())


@pytest.mark.parametrize(
    ("keys", "messages"),
    [
        ("hello\r" + CTRL_D, ["hello"]),
        ("one\rtwo\r" + CTRL_D, ["one", "two"]),
        ("\r" + CTRL_D, [""]),
        ('"""one line"""\r' + CTRL_D, ["one line"]),
        ('"""a\rb\r"""\r' + CTRL_D, ["a\nb\n"]),
        ('"""\ra"""\r' + CTRL_D, ["\na"]),
        ('"""a\r' + CTRL_D, []),
    ],
)
def test_messages(keys, messages):
    assert typed(keys) == messages


def test_ctrl_c_drops_the_line_and_says_how_to_leave(capsys):
    assert typed("wrong" + CTRL_C + "right\r" + CTRL_D) == ["right"]
    assert "/bye" not in capsys.readouterr().out
    assert typed(CTRL_C + CTRL_D) == []
    assert "Use Ctrl-D or /bye to exit." in capsys.readouterr().out


def test_history_is_kept_for_its_owner_alone(tmp_path):
    path = tmp_path / "new" / "history"
    typed("remember me\r" + CTRL_D, path)
    assert "remember me" in path.read_text("utf-8")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    up = "\x1b[A"
    assert typed(up + "\r" + CTRL_D, path) == ["remember me"]


def test_without_a_place_for_history_one_can_talk_all_the_same(tmp_path):
    (tmp_path / "file").touch()
    assert typed("hello\r" + CTRL_D, tmp_path / "file" / "history") == ["hello"]
