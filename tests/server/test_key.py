"""OLLAMA_API_KEY: on a shared machine only those are heard who send it."""

import hashlib
import logging
from contextlib import closing

import httpx
import ollama
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refollama.client import Client
from refollama.errors import BadRequest, RefollamaError
from refollama.server.app import create_app
from refollama.server.guard import Rules
from refollama.server.run import _tell_who_may_ask
from tests.server.process import running
from tests.server.test_intake import header, parsed

KEY = "s3cret~!"


@pytest.fixture
def guarded(service, monkeypatch):
    """A client of a server that wants the key; it has none itself."""
    monkeypatch.setenv("OLLAMA_API_KEY", KEY)
    app = create_app(service)
    monkeypatch.delenv("OLLAMA_API_KEY")
    with httpx.Client(transport=httpx.WSGITransport(app), base_url="http://localhost") as client:
        yield client


@pytest.mark.parametrize(
    "sent",
    [None, "", KEY, "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}",
     f"Bearer {KEY.upper()}", f"Bearer {KEY} {KEY}"],
)  # fmt: skip
def test_every_route_is_closed_but_the_one_that_says_a_server_runs(guarded, app, sent):
    headers = {} if sent is None else {"Authorization": sent}
    for rule in app.url_map.iter_rules():
        path = rule.rule.replace("<digest>", "sha256:" + "0" * 64)
        for method in rule.methods:
            answer = guarded.request(method, path, headers=headers)
            assert answer.status_code == (200 if path == "/" else 401), (method, path)
    assert guarded.get("/nothing", headers=headers).status_code == 401
    assert answer.headers["WWW-Authenticate"].lower() == "bearer"


@pytest.mark.parametrize("sent", [f"Bearer {KEY}", f"bearer  {KEY} "])
def test_with_the_key_all_is_open(guarded, sent):
    answer = guarded.get("/api/tags", headers={"Authorization": sent})
    assert answer.status_code == 200 and len(answer.json()["models"]) == 2
    body = {"model": "shy", "prompt": "a", "stream": False}
    answer = guarded.post("/api/generate", json=body, headers={"Authorization": sent})
    assert answer.status_code == 200


def test_the_sentence_says_what_is_missing_and_not_what_it_is(guarded):
    error = guarded.get("/api/tags").json()["error"]
    assert "OLLAMA_API_KEY" in error and KEY not in error


def test_a_browser_asks_first_without_the_key_and_may_read_the_refusal(guarded):
    page = {"Origin": "http://localhost:3000"}
    preflight = guarded.options("/api/chat", headers=page)
    assert preflight.status_code == 204
    assert "Authorization" in preflight.headers["Access-Control-Allow-Headers"].split(",")
    answer = guarded.post("/api/chat", json={}, headers=page)
    assert answer.status_code == 401
    assert answer.headers["Access-Control-Allow-Origin"] == page["Origin"]


def test_the_key_opens_nothing_to_a_page_from_elsewhere(guarded):
    headers = {"Authorization": f"Bearer {KEY}", "Origin": "http://evil.example"}
    assert guarded.get("/api/tags", headers=headers).status_code == 403


@pytest.mark.parametrize("key", ["", " "])
def test_without_a_key_what_is_sent_does_not_matter(http, monkeypatch, key):
    """Clients that have one for another server send it to this one, too."""
    monkeypatch.setenv("OLLAMA_API_KEY", key)
    assert not Rules(loopback=True).wants_key
    assert http.get("/api/tags", headers={"Authorization": "Bearer other"}).status_code == 200


@given(st.text(st.characters(max_codepoint=255), max_size=20))
def test_no_header_but_the_right_one(sent):
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OLLAMA_API_KEY", KEY)
        rules = Rules(loopback=True)
    right = sent.lower().startswith("bearer ") and sent[7:].strip() == KEY
    assert rules.knows(sent) is right
    assert rules.knows(f"Bearer {sent}") is (sent.strip() == KEY)


@pytest.mark.parametrize("key", ["two words", "schl\u00fcssel", "a\tb"])
def test_a_key_that_no_header_carries_is_told_on_both_sides(service, monkeypatch, key):
    monkeypatch.setenv("OLLAMA_API_KEY", key)
    with pytest.raises(BadRequest, match="OLLAMA_API_KEY"):
        create_app(service)
    with pytest.raises(BadRequest, match="OLLAMA_API_KEY"):
        Client("127.0.0.1:1")


@pytest.mark.parametrize(
    ("host", "key", "said"),
    [
        ("127.0.0.1", "", ""),
        ("127.0.0.1", KEY, "requests must carry it"),
        ("0.0.0.0", KEY, "requests must carry it"),
        ("0.0.0.0", "", "everybody who can reach 0.0.0.0 may use this server"),
    ],
)
def test_the_log_says_who_may_ask(monkeypatch, caplog, host, key, said):
    monkeypatch.setenv("OLLAMA_API_KEY", key)
    caplog.set_level(logging.INFO, "refollama")
    _tell_who_may_ask(host, Rules(loopback=True))
    assert said in caplog.text and bool(said) == bool(caplog.text) and KEY not in caplog.text


@pytest.mark.parametrize(("sent", "large"), [(None, False), ("Bearer x", False), (KEY, True)])
def test_no_large_upload_is_taken_in_without_the_key(tmp_path, monkeypatch, sent, large):
    monkeypatch.setenv("OLLAMA_API_KEY", KEY)
    carried = f"Bearer {sent}" if sent == KEY else sent
    parser = parsed(tmp_path, header(Authorization=carried))
    assert (parser.error is None) is large


def test_clients_send_the_key_over_a_socket(tiny, monkeypatch):
    digest = f"sha256:{hashlib.sha256(tiny.read_bytes()).hexdigest()}"
    with running(OLLAMA_API_KEY=KEY) as (url, _):
        with Client(url) as stranger:
            assert stranger.is_running()
            with pytest.raises(RefollamaError, match="wants a key"):
                stranger.tags()
        with (
            closing(ollama.Client(url)) as stranger,
            pytest.raises(ollama.ResponseError) as refused,
        ):
            stranger.list()
        assert refused.value.status_code == 401
        monkeypatch.setenv("OLLAMA_API_KEY", KEY)
        with Client(url) as friend:
            friend.send_blob(digest, iter([tiny.read_bytes()]))
            assert list(friend.create("m", files={"m": digest}))[-1] == {"status": "success"}
        with closing(ollama.Client(url)) as friend:
            assert [model.model for model in friend.list().models] == ["m:latest"]
