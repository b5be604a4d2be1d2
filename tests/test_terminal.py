"""Numbers as people read them, progress as it comes, answers in lines of whole words."""

from __future__ import annotations

import itertools
import re
from datetime import datetime, timedelta, timezone
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.cells import cell_len

from refollama import terminal
from tests.fake_server import COUNTS

NOW = datetime(2023, 12, 15, tzinfo=timezone.utc)


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


def test_a_log_has_each_status_once_and_of_a_layer_begin_and_end(capsys):
    terminal.show_progress(STEPS)
    told = "parsing\nwriting [bold]\nwriting [bold]: 10 B\nsuccess\n"
    assert capsys.readouterr().err == told


def test_a_terminal_has_bars_and_keeps_lines(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    terminal.show_progress(STEPS)
    shown = capsys.readouterr().err
    for text in ("parsing\n", "writing [bold]: 10 B\n", "success\n"):
        assert text in shown


def test_a_hundred_percent_are_all_of_it(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    terminal.show_progress(moves("a", 999, total=1000))
    shown = capsys.readouterr().err
    assert " 99%" in shown and "100%" not in shown


def moves(name: str, *completed: int, total: int = 100, **more: Any) -> list[dict[str, Any]]:
    layer = {"status": f"pulling {name}", "digest": name, "total": total, **more}
    return [{**layer, "completed": done} for done in completed]


@pytest.mark.parametrize(
    ("records", "lines"),
    [
        (moves("a", 0, 50, 100), ["pulling a", "pulling a: 100 B"]),
        (moves("a", 100), ["pulling a: 100 B"]),
        (moves("a", 0, 100, 100, 100), ["pulling a", "pulling a: 100 B"]),
        (moves("a", 0, 60, 20, 100), ["pulling a", "pulling a: 100 B"]),
        (moves("a", 0, 900), ["pulling a", "pulling a: 100 B"]),
        (
            moves("a", 40, 100, resumed=40),
            ["pulling a: resumed at 40 B of 100 B", "pulling a: 100 B"],
        ),
        (
            [*moves("a", 0), *moves("b", 0), *moves("a", 100), *moves("b", 100)],
            ["pulling a", "pulling b", "pulling a: 100 B", "pulling b: 100 B"],
        ),
        (moves("a", 0, 50), ["pulling a"]),
        ([{"status": "pulling a", "total": 9}], ["pulling a"]),
        ([{"status": "x"}, {"status": "x"}, {"status": "y"}, {"status": "x"}], ["x", "y", "x"]),
    ],
)
def test_lines_of_layers(capsys, records, lines):
    """None for a move, however many there are, and in whatever order they come."""
    terminal.show_progress(records)
    assert capsys.readouterr().err.splitlines() == lines


def test_what_a_server_says_moves_no_cursor(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    terminal.show_progress([{"status": "\x1b[7mgot\x07cha"}, *moves("\x1b[7mb", 0, 100)])
    shown = capsys.readouterr().err
    assert "[7mgotcha\n" in shown
    assert "\x1b[7m" not in shown and "\x07" not in shown


def test_a_bar_for_one_piece_of_work(capsys, monkeypatch):
    def work() -> str:
        with terminal.bar("sending [x]", 2_000_000) as moved:
            moved(1_000_000)
            moved(1_000_000)
        return capsys.readouterr().err

    assert work() == "sending [x]\n"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert re.search(r"sending \[x\] .*2\.0/2\.0 MB", work())


def test_a_counter_tells_how_many_and_how_fast(capsys, monkeypatch):
    def work() -> str:
        with terminal.counter("reading [x]", "windows") as moved:
            for done in range(1, 4):
                moved(done, 3)
        return capsys.readouterr().err

    assert work() == "reading [x]\n"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert re.search(r"reading \[x\] .*3/3 windows [0-9.,]+/s", work())


def reached(stage, completed, total=2000):
    return {"response": "", "progress": {"stage": stage, "completed": completed, "total": total}}


def test_until_first_leaves_out_only_what_comes_before(capsys):
    assert list(terminal.until_first(STEPS, "wait")) == STEPS
    assert list(terminal.until_first([], "wait")) == []
    told = [reached("load", 0), reached("load", 2000), reached("prompt", 7)]
    assert list(terminal.until_first([*told, *STEPS], "wait")) == STEPS
    assert list(terminal.until_first(told, "wait")) == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("told", "bars"),
    [
        ([reached("load", 0), reached("load", 900)], {"loading": "0.9/2.0 kB"}),
        ([reached("prompt", 0), reached("prompt", 512)], {"reading the prompt": "512/2000 tokens"}),
        (
            [reached("images", 0, 3), reached("images", 1, 3)],
            {"looking at the pictures": "1/3 pictures"},
        ),
        ([reached("prompt", 0), reached("prompt", 2000)], {}),  # at its end there is no need
        ([reached("load", 0, 0)], {}),
        (
            [reached("load", 1), reached("load", 2), reached("prompt", 3), reached("prompt", 4)],
            {"loading": "0.0/2.0 kB", "reading the prompt": "4/2000 tokens"},
        ),
    ],
)
@pytest.mark.parametrize("slow", [True, False])
def test_a_bar_for_a_stage_that_takes_long(capsys, monkeypatch, told, bars, slow):
    """The clock of this test strikes once a second, or it stands still."""
    clock = itertools.count() if slow else itertools.repeat(0)
    monkeypatch.setattr("refollama.terminal.time", SimpleNamespace(monotonic=clock.__next__))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert list(terminal.until_first([*told, *STEPS], "wait")) == STEPS
    shown = capsys.readouterr().err
    for name in ("loading", "looking at the pictures", "reading the prompt"):
        assert (name in shown) == (slow and name in bars), shown
    for amount in bars.values() if slow else ():
        assert amount in shown


# --- answers ---------------------------------------------------------------------------------


class Screen:
    """A terminal without end: what stands there after text, line feeds, and CSI nD and K."""

    def __init__(self) -> None:
        self.lines: list[list[str]] = [[]]
        self._at = 0  # cells: a wide character takes two, the second of which is empty

    def write(self, text: str) -> None:
        for sequence, character in re.findall(r"\x1b\[(\d*[DK])|(.|\n)", text):
            self._control(sequence) if sequence else self._put(character)

    def _control(self, sequence: str) -> None:
        if sequence == "K":
            del self.lines[-1][self._at :]
        else:
            self._at -= int(sequence[:-1])
            assert self._at >= 0

    def _put(self, character: str) -> None:
        if character == "\n":
            self.lines.append([])
            self._at = 0
            return
        cells = 8 - self._at % 8 if character == "\t" else cell_len(character)
        assert self._at == len(self.lines[-1])
        self.lines[-1] += [character, *[""] * (cells - 1)][:cells]
        self._at += cells

    def text(self) -> str:
        return "\n".join(map("".join, self.lines))


def wrapped(pieces, limit):
    screen, wrap = Screen(), terminal.Wrap(limit)
    for piece in pieces:
        screen.write(wrap.add(piece))
    return screen


texts = st.lists(st.text("ab \u4e2d\n\t", max_size=6))


@example([" ", "a", "a", "\u4e2d"], 3)
@given(texts, st.integers(3, 30))
def test_no_line_is_too_long_and_no_character_is_lost(pieces, limit):
    screen = wrapped(pieces, limit)
    assert all(len(line) <= limit for line in screen.lines)
    shown = "".join(screen.text().split())
    assert shown == "".join("".join(pieces).split())


@given(texts, st.integers(13, 30))
def test_words_that_fit_a_line_stay_whole(pieces, limit):
    words = [word for word in "".join(pieces).split() if cell_len(word) <= 12]
    text = " ".join(words)
    assert wrapped([text], limit).text().split() == words


@given(texts)
def test_what_fits_is_not_touched(pieces):
    wrap = terminal.Wrap(10_000)
    assert "".join(map(wrap.add, pieces)) == "".join(pieces)


@given(texts, st.integers(3, 30))
def test_pieces_make_no_difference(pieces, limit):
    assert wrapped(pieces, limit).text() == wrapped(["".join(pieces)], limit).text()


def test_a_word_is_moved():
    assert wrapped(["one two th", "ree"], 11).text() == "one two \nthree"
    assert wrapped(["one two three"], 7).text() == "one two\nthree"
    assert wrapped(["abcdefgh"], 4).text() == "abcd\nefgh"


def test_a_terminal_gets_no_control_characters(capsys, monkeypatch):
    said = ["a\x1b[2J\x07b\r\n", "\x9b\u00e9\tc"]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    for wordwrap in (False, True):
        assert terminal.show_answer(said, wordwrap) == "".join(said)
        assert capsys.readouterr().out == "a[2Jb\n\u00e9\tc"


def test_a_pipe_gets_everything(capsys):
    assert terminal.show_answer(["\x1b[", "2J " * 99], True) == "\x1b[" + "2J " * 99
    assert capsys.readouterr().out == "\x1b[" + "2J " * 99


def test_thinking_begins_and_ends_once(capsys):
    thinking = terminal.Thinking(hidden=False)
    for text in ("", "a", "b"):
        thinking.show(text)
    thinking.end()
    thinking.end()
    assert capsys.readouterr().err == "Thinking...\nab\n...done thinking.\n\n"
