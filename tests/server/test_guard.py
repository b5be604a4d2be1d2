"""Whose requests are heard: pages of this machine, and those that OLLAMA_ORIGINS lists."""

import contextlib

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refollama.errors import BadRequest
from refollama.server.app import create_app
from refollama.server.guard import local_host, origins


def allowed(origin, listed=""):
    return any(pattern.fullmatch(origin) for pattern in origins(listed))


@pytest.mark.parametrize(
    ("origin", "listed", "yes"),
    [
        ("http://localhost", "", True),
        ("https://localhost:3000", "", True),
        ("http://127.0.0.1:5173", "", True),
        ("http://[::1]:80", "", True),
        ("http://evil.example", "", False),
        ("http://localhost.evil.example", "", False),
        ("http://localhost:80@evil.example", "", False),
        ("null", "", False),
        ("https://chat.example", "https://chat.example", True),
        ("https://chat.example.evil", "https://chat.example", False),
        ("https://a.chat.example", "https://*.chat.example", True),
        ("https://evil.example/a.chat.example", "https://*.chat.example", False),
        ("https://any.example", "*", True),
        ("https://any.example", "http://a,*", True),
        ("null", "*", True),
        ("x-app://notes", " x-app://* , http://x", True),
        # As in Ollama's own table.
        ("http://10.0.0.1", "http://10.0.0.1", True),
        ("http://10.0.0.1:80", "http://10.0.0.1", False),
        ("http://10.0.0.10", "http://10.0.0.1", False),
        ("http://172.16.0.1", "http://172.16.0.1,https://192.168.0.1", True),
        ("https://192.168.0.1", "http://172.16.0.1,https://192.168.0.1", True),
        ("http://192.168.0.1", "http://172.16.0.1,https://192.168.0.1", False),
        ("http://definitely.legit", "http://totally.safe,http://definitely.legit", True),
        ("HTTP://Totally.Safe", "http://totally.safe", True),
        ("http://localhost", "http://totally.safe", True),
        ("http://0.0.0.0:8000", "", True),
        ("app://obsidian.md", "", True),
        ("tauri://localhost", "", True),
        ("vscode-webview://1qmh", "", True),
        ("file://", "", True),
        ("chrome-extension://abc", "", False),
        ("chrome-extension://abc", "chrome-extension://*", True),
        # A star at the end, at the beginning, in the middle.
        ("http://192.168.1.7:3000", "http://192.168.1.*", True),
        ("http://192.168.1.7@evil.example", "http://192.168.1.*", False),
        ("http://localhost.evil.example", "http://localhost:*", False),
        ("https://a.chat.example", "*.chat.example", True),
        ("https://evil.example/a.chat.example", "*.chat.example", False),
        ("https://a.chat.example.evil", "*.chat.example", False),
        ("http://box:1", '"http://box:*"', True),
    ],
)
def test_origins(origin, listed, yes):
    assert allowed(origin, listed) is yes


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ("http://*.a.*", r"only one \* is allowed"),
        ("chat.example", r"'chat.example': an origin must contain '\*'"),
        ("http://ok,localhost:3000", "'localhost:3000'"),
        ("http://", "'http://'"),
    ],
)
def test_a_list_that_makes_no_sense_stops_the_server_at_its_start(
    service, monkeypatch, listed, said
):
    monkeypatch.setenv("OLLAMA_ORIGINS", listed)
    with pytest.raises(BadRequest, match=f"^OLLAMA_ORIGINS .*{said}"):
        create_app(service)


@given(st.text(max_size=20), st.text(max_size=20))
def test_any_list_is_patterns_or_bad_request(listed, origin):
    with contextlib.suppress(BadRequest):
        allowed(origin, listed)


@pytest.mark.parametrize(
    ("host", "yes"),
    [
        ("localhost", True),
        ("localhost:11434", True),
        ("127.0.0.1:11434", True),
        ("[::1]:11434", True),
        ("0.0.0.0:11434", True),
        ("192.168.1.5", True),
        ("box.local", True),
        ("evil.example", False),
        ("8.8.8.8", False),
        ("[::1", False),
        ("", False),
    ],
)
def test_hosts(host, yes):
    assert local_host(host) is yes


def test_a_page_from_elsewhere_is_refused_before_anything_happens(http, service, monkeypatch):
    monkeypatch.setattr(service, "tags", lambda: pytest.fail("the handler ran"))
    response = http.get("/api/tags", headers={"Origin": "http://evil.example"})
    assert response.status_code == 403 and "origin" in response.json()["error"]
    assert "Access-Control-Allow-Origin" not in response.headers


def test_a_rebound_name_is_refused(http):
    response = http.get("/api/tags", headers={"Host": "evil.example"})
    assert response.status_code == 403 and "Host" in response.json()["error"]


def test_a_server_for_others_takes_any_host(service):
    app = create_app(service, loopback=False)
    with httpx.Client(transport=httpx.WSGITransport(app), base_url="http://box.example") as client:
        assert client.get("/api/version").status_code == 200


@pytest.mark.parametrize("path", ["/api/generate", "/api/tags", "/", "/nothing"])
def test_a_preflight_is_answered_on_any_path(http, path):
    headers = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    preflight = http.options(path, headers=headers)
    assert preflight.status_code == 204 and preflight.content == b""
    told = preflight.headers
    assert told["Access-Control-Allow-Origin"] == "http://localhost:3000"
    assert told["Access-Control-Allow-Methods"] == "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS"
    headers = told["Access-Control-Allow-Headers"].split(",")
    assert {"Origin", "Content-Length", "Content-Type", "Authorization"} <= set(headers)
    assert told["Access-Control-Max-Age"] == "43200" and told["Vary"] == "Origin"
    assert "Access-Control-Allow-Credentials" not in told


def test_a_local_page_may_ask_and_is_told_so(http):
    answer = http.get("/api/version", headers={"Origin": "http://localhost:3000"})
    assert answer.headers["Access-Control-Allow-Origin"] == "http://localhost:3000"
    assert answer.headers["Vary"] == "Origin"


def test_an_error_can_be_read_by_the_page_that_made_it(http):
    headers = {"Origin": "http://localhost:3000"}
    answer = http.post("/api/generate", json={}, headers=headers)
    assert answer.status_code == 400
    assert answer.headers["Access-Control-Allow-Origin"] == "http://localhost:3000"


@pytest.mark.parametrize("headers", [{}, {"Origin": "http://localhost"}])
def test_without_an_origin_or_from_our_own_page_there_is_nothing_to_say(http, headers):
    answer = http.get("/api/version", headers=headers)
    assert answer.status_code == 200
    assert not any(name.lower().startswith("access-control") for name in answer.headers)


def test_a_star_lets_everybody_in_and_says_so(service, monkeypatch):
    monkeypatch.setenv("OLLAMA_ORIGINS", "*")
    app = create_app(service)
    with httpx.Client(transport=httpx.WSGITransport(app), base_url="http://localhost") as client:
        answer = client.get("/api/version", headers={"Origin": "https://any.example"})
    assert answer.headers["Access-Control-Allow-Origin"] == "*"


def test_files_are_for_this_machine_only(tiny):
    from refollama.service import Service
    from refollama.shelf import LoadedModels
    from refollama.store import Store

    open_to_all = Service(Store.default(), LoadedModels(), local_files=False)
    app = create_app(open_to_all, loopback=False)
    with httpx.Client(transport=httpx.WSGITransport(app), base_url="http://box") as client:
        for path in (str(tiny), "/no/such/file.gguf"):
            run = client.post("/api/generate", json={"model": path, "prompt": "a"})
            made = client.post("/api/create", json={"model": "m", "modelfile": f"FROM {path}"})
            assert (run.status_code, made.status_code) == (400, 400)
            assert "file" in run.json()["error"] and "exist" not in made.json()["error"]
