"""One message after another: keys, messages of several lines, the history."""

from __future__ import annotations

import os
import stat

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from refollama import promptline

CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"


def typed(text, history=None):
    """The messages that come of these keys."""
    with create_pipe_input() as keys, create_app_session(keys, DummyOutput()):
        keys.send_text(text)
        return list(promptline.PromptLine(history).messages())


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
        ('/set system """a\rb"""\r' + CTRL_D, ["/set system a\nb"]),
        ('/set system "a"\r' + CTRL_D, ['/set system "a"']),
        ('say """\r' + CTRL_D, ['say """']),
        ("\x1b[200~two\rlines\x1b[201~\r" + CTRL_D, ["two\nlines"]),
        ("world\x01hello \x05!\r" + CTRL_D, ["hello world!"]),
        ("one two\x17\x17\x19\r" + CTRL_D, ["one two"]),
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
    assert path.read_text("utf-8") == "remember me\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert typed(UP + "\r" + CTRL_D, path) == ["remember me"]


def test_history_is_a_hundred_lines(tmp_path):
    """As Ollama keeps them: one line for each line, also of a message of several."""
    path = tmp_path / "history"
    path.write_text("".join(f"{n}\n" for n in range(100)), "utf-8")
    typed("\x1b[200~two\r\rlines\x1b[201~\r\r" + CTRL_D, path)
    expected = [*map(str, range(2, 100)), "two", "lines"]
    assert path.read_text("utf-8").splitlines() == expected
    assert os.listdir(tmp_path) == ["history"]


def test_two_conversations_at_once_lose_nothing(tmp_path):
    path = tmp_path / "history"
    one, two = promptline.LineHistory(path), promptline.LineHistory(path)
    one.store_string("one")
    two.store_string("two")
    one.store_string("three")
    assert path.read_text("utf-8") == "one\ntwo\nthree\n"


def test_what_is_not_to_be_remembered(tmp_path):
    history = promptline.LineHistory(tmp_path / "history")
    history.remembers = False
    history.append_string("secret")
    assert history.get_strings() == []
    history.remembers = True
    history.append_string("known")
    assert history.get_strings() == ["known"]
    assert (tmp_path / "history").read_text("utf-8") == "known\n"


def test_a_history_that_is_no_text_is_read_all_the_same(tmp_path):
    path = tmp_path / "history"
    path.write_bytes(b"\xff\xfe\nfine\n")
    assert typed(UP + "\r" + CTRL_D, path) == ["fine"]


def test_without_a_place_for_history_one_can_talk_all_the_same(tmp_path):
    (tmp_path / "file").touch()
    assert typed("hello\r" + CTRL_D, tmp_path / "file" / "history") == ["hello"]
