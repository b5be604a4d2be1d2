"""The client repeats what the server says, in records and in exceptions."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from flask import Response
from hypothesis import given
from hypothesis import strategies as st

from refollama.client import Client, lines
from refollama.errors import (
    BadRequest,
    NotFound,
    RefollamaError,
    ServerBusy,
    ServerUnreachable,
)
from tests.fake_server import COUNTS, TAG, FakeServer, many, one


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.host) as client:
        yield client


@contextmanager
def refused_port() -> Iterator[str]:
    """An address that is taken, and where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@contextmanager
def speaking(answer: bytes) -> Iterator[str]:
    """Something that is no HTTP server: it sends these bytes to the first caller and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def speak() -> None:
            caller, _ = listener.accept()
            with caller:
                caller.recv(65536)
                caller.sendall(answer)

        thread = threading.Thread(target=speak, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join(5)


def test_simple_routes(client):
    assert client.is_running()
    assert client.version() == "0.0.7"
    assert client.tags() == [TAG]


def test_the_host_comes_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", server.host)
    with Client() as client:
        assert client.url == f"http://{server.host}"
        assert client.is_running()


def test_generate_streams_and_sends_only_what_was_given(server, client):
    records = list(client.generate("tale", "hi", options={"seed": 1}, system=None))
    assert [record["response"] for record in records] == ["You said: ", "hi", ""]
    assert records[-1] == {"response": "", "done": True, "context": [2], **COUNTS}
    sent = {"model": "tale", "prompt": "hi", "stream": True, "options": {"seed": 1}}
    assert server.requests == [("generate", sent)]


def test_an_empty_prompt_is_answered_by_one_object_without_a_line_end(client):
    assert [record["done_reason"] for record in client.generate("tale")] == ["load"]


def test_create_sends_text_and_directory(server, client):
    statuses = [record["status"] for record in client.create("tale", "FROM ./x", "/here")]
    assert statuses[-1] == "success"
    sent = {"model": "tale", "modelfile": "FROM ./x", "directory": "/here", "stream": True}
    assert server.requests == [("create", sent)]


@pytest.mark.parametrize("insecure", [True, False])
def test_models_come_and_go(server, client, insecure):
    for route, transfer in (("pull", client.pull), ("push", client.push)):
        *_, last = transfer("me/tale", insecure)
        assert last == {"status": "success"}
        sent = {"model": "me/tale", "insecure": insecure, "stream": True}
        assert server.requests[-1] == (route, sent)


def test_nothing_is_sent_before_the_first_record_is_wanted(server, client):
    client.generate("tale", "hi").close()
    assert server.requests == []


def test_closing_the_iterator_cancels_on_the_server(server, client):
    records = client.generate("tale", "forever")
    assert next(records)["response"] == "tick "
    assert not server.hung_up.is_set()
    records.close()
    assert server.hung_up.wait(5)
    assert client.version() == "0.0.7"  # and the client is as good as new


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, BadRequest), (404, NotFound), (503, ServerBusy), (500, RefollamaError)],
)
def test_a_refusal_is_an_exception_in_the_servers_words(server, client, status, kind):
    for route in ("tags", "generate"):
        server.script[route] = one({"error": "a sentence"}, status)
    for call in (client.tags, lambda: list(client.generate("tale", "hi"))):
        with pytest.raises(kind, match=r"^a sentence$") as caught:
            call()
        assert type(caught.value) is kind


def test_a_refusal_that_is_no_json_is_told_by_its_status(server, client):
    server.script["tags"] = Response("<h1>proxy</h1>", 502)
    with pytest.raises(RefollamaError, match="/api/tags answered 502 BAD GATEWAY"):
        client.tags()


def test_an_error_line_ends_the_stream_with_its_sentence(server, client):
    server.script["generate"] = many([{"response": "a"}, {"error": "out of memory"}])
    records = client.generate("tale", "hi")
    assert next(records) == {"response": "a"}
    with pytest.raises(RefollamaError, match=r"^out of memory$"):
        next(records)


@pytest.mark.parametrize("records", [[], [{"response": "half an"}]])
def test_half_an_answer_is_an_error(server, client, records):
    server.script["generate"] = many(records)
    with pytest.raises(RefollamaError, match="before it was complete"):
        list(client.generate("tale", "hi"))


@pytest.mark.parametrize("body", ["no json", "[1]", "\xff"])
def test_what_is_no_record_is_an_error(server, client, body):
    server.script["tags"] = Response(body.encode("latin-1"))
    with pytest.raises(RefollamaError, match="no JSON object"):
        client.tags()


def test_nobody_listens():
    with refused_port() as host, Client(host) as client:
        assert not client.is_running()
        for call in (client.tags, lambda: next(client.generate("tale", "hi"))):
            with pytest.raises(ServerUnreachable, match=f"{host}; start it with 'refollama serve'"):
                call()


def test_a_stranger_listens():
    with speaking(b"220 mail.example.com ESMTP\r\n") as host, Client(host) as client:
        assert not client.is_running()


def test_a_silent_one_is_not_taken_for_nobody(monkeypatch):
    monkeypatch.setattr("refollama.client.PROBE_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host = f"127.0.0.1:{silent.getsockname()[1]}"
        with Client(host) as client, pytest.raises(ServerUnreachable, match="does not answer"):
            client.is_running()


def test_a_connection_that_breaks():
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    line = b'{"response": "a"}\n'
    with speaking(head + b"%x\r\n%b\r\n" % (len(line), line)) as host, Client(host) as client:
        records = client.generate("tale", "hi")
        assert next(records) == {"response": "a"}
        with pytest.raises(ServerUnreachable, match="broke"):
            next(records)


def test_no_proxy_stands_before_this_machine(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with Client(server.host) as client:
        assert client.is_running()


def test_only_a_line_feed_ends_a_line():
    text = json.dumps({"response": "a\u0085b\u2028c\x1cd"}, ensure_ascii=False)
    assert [json.loads(line) for line in lines([text.encode() + b"\r\n"])] == [json.loads(text)]


@given(st.lists(st.binary(min_size=1, max_size=9)), st.integers(1, 5))
def test_lines_do_not_depend_on_where_the_stream_is_cut(parts, size):
    whole = b"\n".join(parts)
    chunks = [whole[i : i + size] for i in range(0, len(whole), size)]
    assert list(lines(chunks)) == [line for line in whole.split(b"\n") if line.strip()]
