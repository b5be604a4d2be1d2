"""A conversation: what is sent for each line that a user types, and what is shown."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from refollama import overview, talk
from refollama.client import Client
from refollama.errors import NotFound, RefollamaError
from tests.fake_server import SHOW, FakeServer, many, one

STORY = "You said: "


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


class Lines:
    """A user who types these lines, or does something in between, and leaves."""

    def __init__(self, *lines) -> None:
        self.lines = lines
        self.remembered: list[bool] = []

    def messages(self) -> Iterator[str]:
        for line in self.lines:
            if isinstance(line, str):
                yield line
            else:
                line()

    def remember(self, wanted: bool) -> None:
        self.remembered.append(wanted)


def talked(server: FakeServer, *lines: Any, **asked: Any) -> Lines:
    typed = Lines(*lines)
    ask = talk.Ask("tale", **{"wordwrap": False, **asked})
    with Client(server.host) as client:
        talk.Talk(client, ask, typed, lambda name: f"named {name}").run()  # type: ignore[arg-type]
    return typed


def sent(server: FakeServer, route: str) -> list[dict[str, Any]]:
    """What the server was asked on this route, but for loading."""
    return [
        body
        for asked, body in server.requests
        if asked == route and (body.get("messages") or body.get("prompt") or route != "chat")
    ]


def last(server: FakeServer) -> dict[str, Any]:
    return server.requests[-1][1]


# --- messages --------------------------------------------------------------------------------


def test_what_was_said_goes_along(server, capsys):
    talked(server, "one", "  ", "two")
    assert [m["content"] for m in last(server)["messages"]] == ["one", STORY + "one", "two"]
    assert [m["role"] for m in last(server)["messages"]] == ["user", "assistant", "user"]
    assert capsys.readouterr().out == f"{STORY}one\n\n{STORY}two\n\n"


def test_the_model_is_loaded_before_the_first_line(server):
    talked(server, options={"num_ctx": 9}, keep_alive="1h")
    load = {"model": "tale", "messages": [], "stream": True}
    assert server.requests == [("chat", {**load, "options": {"num_ctx": 9}, "keep_alive": "1h"})]


def test_thoughts_are_remembered(server):
    told: list[dict[str, Any]] = [
        {"message": {"thinking": "hm"}},
        {"message": {"content": "42"}},
        {"done": True},
    ]
    talked(server, lambda: server.script.update(chat=many(told)), "one", server.script.clear, "two")
    answer = {"role": "assistant", "content": "42", "thinking": "hm"}
    assert last(server)["messages"][1] == answer


@pytest.mark.parametrize("status", [400, 404])
def test_a_model_that_does_not_chat_goes_on_from_its_context(server, status):
    server.script["chat"] = one({"error": "no chat here"}, status)
    talked(server, "four", "again", "/clear", "fresh", system="Be.")
    asked = [(body["prompt"], body.get("context")) for body in sent(server, "generate")]
    assert asked == [("", None), ("four", None), ("again", [4]), ("fresh", None)]
    assert last(server)["system"] == "Be."
    assert sent(server, "chat") == []


def test_a_raw_prompt_is_no_chat(server):
    talked(server, "hi", raw=True)
    assert {route for route, _ in server.requests} == {"generate"}
    assert last(server)["raw"] is True


def test_a_model_that_is_not_there(server):
    for route in ("chat", "generate"):
        server.script[route] = one({"error": f"no model to {route}"}, 404)
    with pytest.raises(NotFound, match="no model to generate"):
        talked(server, "hi")


def test_what_failed_leaves_no_trace(server, capsys):
    refuse = one({"error": "too long"}, 400)
    talked(
        server, "one", lambda: server.script.update(chat=refuse), "bad", server.script.clear, "2"
    )
    assert "Error: too long\n" in capsys.readouterr().err
    assert [m["content"] for m in last(server)["messages"]] == ["one", STORY + "one", "2"]


def test_statistics_if_wanted(server, capsys):
    talked(server, "one", "/set verbose", "two", "/set quiet", "three")
    assert capsys.readouterr().err.count("eval rate:            61.19 tokens/s\n") == 1


# --- commands --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "is_command"),
    [
        ("/bye", True),
        ("  /set x", True),
        ("/", True),
        ("/?", True),
        ("/etc/hosts is a file", False),
        ("/home/me/my\\ cat.png", False),
        ("no /bye", False),
        ("", False),
    ],
)
def test_commands_and_paths(text, is_command):
    assert talk.is_command(text) == is_command


@pytest.mark.parametrize("leaving", ["/bye", "/exit", " /bye "])
def test_leaving(server, leaving):
    talked(server, leaving, "hi")
    assert sent(server, "chat") == []


@pytest.mark.parametrize(
    ("line", "topic"),
    [
        ("/?", ""),
        ("/help", ""),
        ("/? set", "set"),
        ("/set", "set"),
        ("/help /show", "show"),
        ("/show", "show"),
        ("/? shortcuts", "shortcuts"),
        ("/? nonsense", ""),
    ],
)
def test_help(server, capsys, line, topic):
    talked(server, line)
    assert capsys.readouterr().out == talk.HELPS[topic] + "\n"


def test_help_names_every_command():
    everything = "".join(talk.HELPS.values())
    for command in talk._COMMANDS:
        assert command in everything
    for setting in (*talk._SETTINGS, *talk._SWITCHES):
        assert setting in talk.HELP_SET
    for part in overview.PARTS:
        assert f"/show {part}" in talk.HELP_SHOW


@pytest.mark.parametrize("line", ["/nonsense", "/set nonsense", "/show nonsense", "/set quiet now"])
def test_unknown_commands(server, capsys, line):
    talked(server, line)
    unknown = line if " " in line else "/nonsense"
    assert capsys.readouterr().out == f"Unknown command '{unknown}'. Type /? for help\n"


def test_set_parameter(server, capsys):
    talked(server, "/set parameter seed 7", "/set parameter stop a b", "hi", options={"top_k": 1})
    assert last(server)["options"] == {"top_k": 1, "seed": 7, "stop": ["a", "b"]}
    said = capsys.readouterr().out
    assert "Set parameter 'seed' to '7'\nSet parameter 'stop' to 'a, b'\n" in said


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/set parameter", "Error: usage: /set parameter NAME VALUE\n"),
        ("/set parameter seed", "Error: Couldn't set parameter: "),
        ("/set parameter seed x", "'seed' must be an integer, not 'x'"),
        ("/set parameter top_p 2", "'top_p' must be between 0 and 1"),
        ("/set parameter nonsense 1", "unknown parameter 'nonsense'"),
        ("/set system", "Error: usage: /set system TEXT\n"),
        ("/set format xml", "Error: Invalid or missing format. For 'json' mode use '/set format"),
        ("/load", "Error: usage: /load MODEL\n"),
        ("/save", "Error: usage: /save MODEL\n"),
    ],
)
def test_a_wrong_setting_is_told_and_not_sent(server, capsys, line, sentence):
    talked(server, line, "hi")
    assert sentence in capsys.readouterr().err
    assert last(server).keys() == {"model", "messages", "stream"}


def test_set_system(server, capsys):
    talked(server, "/set system Be\nbrief.", "one", "/set system Other.", "two")
    first, second = ([m["content"] for m in body["messages"]] for body in sent(server, "chat"))
    assert first == ["Be\nbrief.", "one"]
    assert second == ["Other.", "one", STORY + "one", "two"]
    assert last(server)["messages"][0]["role"] == "system"
    assert capsys.readouterr().out.count("Set system message.\n") == 2


def test_set_format_and_think(server):
    talked(server, "/set format json", "/set think", "a", "/set noformat", "/set nothink", "b")
    a, b = sent(server, "chat")
    assert (a["format"], a["think"]) == ("json", True)
    assert ("format" in b, b["think"]) == (False, False)


def test_set_history_is_silent(server, capsys):
    assert talked(server, "/set nohistory", "/set history").remembered == [False, True]
    assert capsys.readouterr().out == ""


def test_set_wordwrap(server, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "20")
    talked(server, "/set wordwrap", "12345 12345", "/set nowordwrap", "12345 12345")
    said = capsys.readouterr().out
    assert "You said: 12345\n12345\n" in said
    assert "You said: 12345 12345\n" in said


@pytest.mark.parametrize("part", sorted(overview.PARTS))
def test_show_parts(server, capsys, part):
    server.script["show"] = one(SHOW)
    talked(server, f"/show {part}")
    assert capsys.readouterr().out == f"{SHOW[part]}\n"
    server.script["show"] = one({"details": {}})
    talked(server, f"/show {part}")
    assert capsys.readouterr().out == f"{overview.PARTS[part]}\n"


def test_show_what_is_set_here(server, capsys):
    talked(server, "/set system Mine.", "/show system", "/show parameters", options={"seed": 1})
    said = capsys.readouterr().out
    assert said.split("\n", 1)[1] == (
        f"Mine.\nUser defined parameters:\nseed{' ' * 26} 1\n\n"
        f"Model defined parameters:\n{SHOW['parameters']}\n"
    )


def test_show_info(server, capsys):
    talked(server, "/show info")
    assert "context length      32768\n" in capsys.readouterr().out


def test_list(server, capsys):
    talked(server, "/list ta", "/list x")
    assert capsys.readouterr().out.count("tale:latest") == 1


def test_load_begins_anew_with_the_same_settings(server):
    talked(server, "one", "/load other", "two", options={"seed": 1})
    assert last(server)["model"] == "named other"
    assert [m["content"] for m in last(server)["messages"]] == ["two"]
    assert last(server)["options"] == {"seed": 1}


def test_a_model_that_does_not_load_changes_nothing(server, capsys):
    refuse = {route: one({"error": "no such model"}, 404) for route in ("chat", "generate")}
    deny = lambda: server.script.update(refuse)  # noqa: E731
    talked(server, "one", deny, "/load other", server.script.clear, "two")
    assert "Error: no such model" in capsys.readouterr().err
    assert last(server)["model"] == "tale"
    assert len(last(server)["messages"]) == 3


def test_save(server, capsys):
    talked(server, "one", "/save mine", system="Be.", options={"seed": 1})
    assert server.requests[-1] == (
        "create",
        {
            "model": "mine",
            "from": "tale",
            "system": "Be.",
            "parameters": {"seed": 1},
            "messages": [
                {"role": "user", "content": "one"},
                {"role": "assistant", "content": STORY + "one"},
            ],
            "stream": True,
        },
    )
    assert capsys.readouterr().out.endswith("Created new model 'mine'\n")


def test_save_keeps_what_was_said_before(server):
    """The server puts a model's own messages first; a list of new ones would replace them."""
    old = {"role": "user", "content": "long ago"}
    server.script["show"] = one({"messages": [old]})
    talked(server, "one", "/save mine")
    assert [m["content"] for m in last(server)["messages"]] == ["long ago", "one", STORY + "one"]


def test_save_without_anything_set(server):
    server.script["chat"] = one({"error": "no chat here"}, 400)
    talked(server, "/save mine")
    assert last(server) == {"model": "mine", "from": "tale", "stream": True}


# --- images ----------------------------------------------------------------------------------

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def cat(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my cat.PNG").write_bytes(PNG)
    return tmp_path / "my cat.PNG"


@pytest.mark.parametrize("form", ["./my cat.PNG", "./my\\ cat.PNG", "{cat}"])
def test_a_model_without_vision_gets_the_path_as_text(server, capsys, cat, form):
    text = f"What is on {form.format(cat=cat)} here?"
    talked(server, text)
    note = f"Note: 'tale' has no vision: it reads {form.format(cat=cat)} as text\n"
    assert capsys.readouterr().err == note
    assert last(server)["messages"] == [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    "known", [{"capabilities": ["vision"]}, {"details": {"families": ["clip"]}}]
)
def test_a_model_with_vision_gets_the_image(server, capsys, cat, known):
    server.script["show"] = one(known)
    talked(server, "./my cat.PNG What is this?")
    assert "added image './my cat.PNG'" in capsys.readouterr().err
    message = {"role": "user", "content": "What is this?"}
    assert last(server)["messages"] == [{**message, "images": [base64.b64encode(PNG).decode()]}]


@pytest.mark.parametrize("text", ["./gone.png", "cat.png", "a/b", "https://x.org/cat.png"])
def test_what_is_no_image_of_this_machine_is_not_asked_about(server, cat, text):
    talked(server, text)
    assert [route for route, _ in server.requests] == ["chat", "chat"]


def test_a_file_that_is_run_where_it_lies_sees_nothing(server, cat, capsys):
    """Only names can be looked up; the message goes its way all the same."""
    with Client(server.host) as client:
        talk.complete(client, talk.Ask("/x.gguf"), "What is ./my cat.PNG ?")
    assert [route for route, _ in server.requests] == ["generate"]
    assert "has no vision" in capsys.readouterr().err


def test_one_prompt_can_hold_an_image_too(server, cat, capsys):
    server.script["show"] = one({"capabilities": ["vision"]})
    with Client(server.host) as client:
        talk.complete(client, talk.Ask("tale"), "What is ./my cat.PNG ?")
    assert last(server)["images"] == [base64.b64encode(PNG).decode()]
    assert last(server)["prompt"] == "What is  ?"


def test_a_picture_goes_along_with_what_is_said_later(server, cat):
    server.script["show"] = one({"capabilities": ["vision"]})
    talked(server, "./my cat.PNG What is this?", "and now?")
    first, _, second = last(server)["messages"]
    assert first["images"] == [base64.b64encode(PNG).decode()] and "images" not in second
    talked(server, "./my cat.PNG What is this?", "/clear", "and now?")
    assert last(server)["messages"] == [{"role": "user", "content": "and now?"}]


def test_where_ids_are_remembered_the_last_pictures_go_along(server, cat):
    server.script["show"] = one({"capabilities": ["vision"]})
    talked(server, "./my cat.PNG What is this?", "and now?", "/clear", "a", raw=True)
    shown = [body.get("images") for body in sent(server, "generate")[1:]]  # the first one loads
    assert [bool(images) for images in shown] == [True, True, False]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("red and/or blue in ./my cat.PNG", "red and/or blue in"),
        ("is './my cat.PNG' red?", "is  red?"),
        ('is "{cat}" red?', "is  red?"),
        ("./gone.png or ./my\\ cat.PNG", "./gone.png or"),
        ("it is ~/" + "long" * 99 + ".png or ./my cat.PNG", "it is ~/" + "long" * 99 + ".png or"),
    ],
)
def test_the_path_that_is_a_file_is_found(server, cat, text, left):
    server.script["show"] = one({"capabilities": ["vision"]})
    talked(server, text.format(cat=cat))
    (message,) = last(server)["messages"]
    assert message["content"] == left and len(message["images"]) == 1


def test_a_broken_answer_is_told(server):
    server.script["generate"] = many([{"response": "half"}])
    with Client(server.host) as client, pytest.raises(RefollamaError, match="before it was compl"):
        talk.complete(client, talk.Ask("tale"), "hi")
