"""Whose requests are heard: pages of this machine, and those that OLLAMA_ORIGINS lists."""

import httpx
import pytest

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
        ("https://any.example", "a,*", True),
        ("app://obsidian.md", " app://* , x", True),
    ],
)
def test_origins(origin, listed, yes):
    assert allowed(origin, listed) is yes


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


def test_a_local_page_may_ask_and_is_told_so(http):
    origin = {"Origin": "http://localhost:3000"}
    preflight = http.options("/api/generate", headers=origin)
    assert preflight.status_code == 204
    assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
    answer = http.get("/api/version", headers=origin)
    assert answer.headers["Access-Control-Allow-Origin"] == "http://localhost:3000"
    assert answer.headers["Vary"] == "Origin"


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
