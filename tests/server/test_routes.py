"""The small routes, and the manners of all."""

import json
import re

import pytest

from refollama.errors import BadRequest
from refollama.server import wire
from refollama.server.app import create_app
from refollama.version import __version__
from tests.server.conftest import unchanged


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["/", "/api/version", "/api/tags"])
def test_get_and_head(http, method, path):
    response = http.request(method, path)
    assert response.status_code == 200
    assert (response.content == b"") == (method == "HEAD")


def test_home_and_version(http):
    assert http.get("/").text == "Ollama is running"
    assert http.get("/").headers["Content-Type"] == "text/plain; charset=utf-8"
    assert http.get("/api/version").json() == {"version": __version__}


def test_tags_lists_the_store(http, tiny):
    entries = http.get("/api/tags").json()["models"]
    assert [entry["name"] for entry in entries] == ["shy:latest", "tiny:latest"]
    entry = entries[1]
    assert entry["model"] == entry["name"] and entry["size"] > tiny.stat().st_size
    assert re.fullmatch("[0-9a-f]{64}", entry["digest"])
    assert entry["details"]["family"] == "llama" and entry["details"]["format"] == "gguf"
    assert re.search(r"([+-]\d\d:\d\d|Z)$", entry["modified_at"])


def test_tags_of_an_empty_store_is_an_empty_list(tmp_path):
    import httpx

    from refollama.server.app import create_app
    from refollama.service import Service
    from refollama.shelf import LoadedModels
    from refollama.store import Store

    app = create_app(Service(Store(tmp_path / "none"), LoadedModels(), local_files=True))
    with httpx.Client(transport=httpx.WSGITransport(app), base_url="http://localhost") as client:
        assert client.get("/api/tags").json() == {"models": []}
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("POST", "/api/nothing", 404),
        ("GET", "/api/generate", 405),
        ("POST", "/api/tags", 405),
        ("DELETE", "/api/create", 405),
    ],
)
def test_wrong_ways_answer_json(http, method, path, status):
    response = http.request(method, path)
    assert response.status_code == status and path in response.json()["error"]
    assert (status == 405) == ("Allow" in response.headers)


def test_a_body_that_is_too_large_is_refused(http, app):
    app.config["MAX_CONTENT_LENGTH"] = 1000
    response = http.post("/api/generate", content=b"x" * 1001)
    assert response.status_code == 413 and "larger" in response.json()["error"]


@pytest.mark.parametrize(("value", "mib"), [("", 64), ("1", 1), (" 200 ", 200)])
def test_the_largest_body_is_a_matter_of_the_environment(service, monkeypatch, value, mib):
    monkeypatch.setenv("REFOLLAMA_MAX_BODY", value)
    assert create_app(service).config["MAX_CONTENT_LENGTH"] == mib << 20


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "a lot", "²"])
def test_a_largest_body_that_is_none_is_said(service, monkeypatch, value):
    monkeypatch.setenv("REFOLLAMA_MAX_BODY", value)
    with pytest.raises(BadRequest, match="REFOLLAMA_MAX_BODY must be a whole number"):
        create_app(service)


def test_our_own_mistakes_show_no_traceback(http, service, monkeypatch):
    monkeypatch.setattr(service, "tags", lambda: 1 / 0)
    response = http.get("/api/tags")
    assert response.status_code == 500
    assert response.json() == {"error": "internal error: the server's log says more"}


# ── create ────────────────────────────────────────────────────────────────────────────────────


def create(http, **body):
    response = http.post("/api/create", json=body)
    return response, [json.loads(line) for line in response.text.splitlines()]


def test_create_streams_its_steps_and_the_model_answers(http, tiny):
    response, steps = create(http, model="mine", modelfile=f"FROM {tiny}\nPARAMETER num_predict 2")
    assert response.headers["Content-Type"] == "application/x-ndjson"
    statuses = [step["status"] for step in steps]
    assert statuses[-2:] == ["writing manifest", "success"]
    assert any(
        re.fullmatch(r"(writing|using already created) layer sha256:\w+", s) for s in statuses
    )
    answer = http.post("/api/generate", json={"model": "mine", "prompt": "a", "stream": False})
    assert answer.json().get("eval_count", 0) <= 2


def test_create_unstreamed_answers_success_alone(http, tiny):
    response, steps = create(http, name="mine", modelfile=f"FROM {tiny}", stream=False)
    assert response.status_code == 200 and steps == [{"status": "success"}]


def test_create_from_a_relative_path_and_from_a_model(http, tiny):
    _, steps = create(http, model="a", modelfile="FROM ./tiny.gguf", directory=str(tiny.parent))
    assert steps[-1] == {"status": "success"}
    _, steps = create(http, model="b", modelfile="FROM a\nSYSTEM hello")
    assert steps[-1] == {"status": "success"}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({}, 400, "model is required"),
        ({"model": "m"}, 400, "FROM"),
        ({"model": "m", "modelfile": "SYSTEM hi"}, 400, "FROM"),
        ({"model": "m", "modelfile": 7}, 400, "modelfile must be a string"),
        ({"model": "../m", "modelfile": "FROM tiny"}, 400, "'..'"),
        ({"model": "m", "modelfile": "FROM ./nope.gguf"}, 400, "nope"),
        ({"model": "m", "modelfile": "FROM {text}"}, 400, "text.gguf"),
        ({"model": "m", "modelfile": "FROM /dev/zero"}, 400, "/dev/zero"),
        ({"model": "m", "modelfile": "FROM {folder}"}, 400, ""),
        ({"model": "m", "modelfile": "FROM tiny\nPARAMETER nope 1"}, 400, "line 2"),
        ({"model": "m", "modelfile": "FROM tiny\nPARAMETER top_p high"}, 400, "top_p"),
        ({"model": "m", "modelfile": "FROM tiny\nTEMPLATE {{ if"}, 400, "template"),
        ({"model": "m", "modelfile": "FROM tiny\nADAPTER ./x"}, 400, "ADAPTER"),
    ],
)
def test_creates_that_fail_leave_the_store_as_it_was(
    http, service, tmp_path, body, status, said, stream
):
    (tmp_path / "text.gguf").write_text("this is not a model\n" * 100)
    if isinstance(body.get("modelfile"), str):
        modelfile = body["modelfile"].replace("{text}", str(tmp_path / "text.gguf"))
        body = body | {"modelfile": modelfile.replace("{folder}", str(tmp_path))}
    with unchanged(service.store):
        response, (answer,) = create(http, **body, stream=stream)
    assert response.status_code == status, answer
    assert set(answer) == {"error"} and said in answer["error"] and "\n" not in answer["error"]


def test_a_file_cut_anywhere_is_refused_and_nothing_is_stored(http, service, tiny, tmp_path):
    import random

    whole = tiny.read_bytes()
    rng = random.Random(5)
    with unchanged(service.store):
        for _ in range(50):
            cut = tmp_path / "cut.gguf"
            cut.write_bytes(whole[: rng.randrange(len(whole))])
            response, answer = create(http, model="m", modelfile=f"FROM {cut}")
            assert response.status_code == 400, answer
            assert set(answer[0]) == {"error"} and "cut.gguf" in answer[0]["error"]


def test_the_story_cut_anywhere(http, service, oracles, tmp_path):
    import random

    whole = (oracles / "stories260K.gguf").read_bytes()
    rng = random.Random(6)
    with unchanged(service.store):
        for _ in range(50):
            cut = tmp_path / "cut.gguf"
            cut.write_bytes(whole[: rng.randrange(len(whole))])
            response, answer = create(http, model="m", modelfile=f"FROM {cut}", stream=False)
            assert response.status_code == 400 and "cut.gguf" in answer[0]["error"]
            run = http.post("/api/generate", json={"model": str(cut), "prompt": "a"})
            assert run.status_code == 400 and "cut.gguf" in run.json()["error"]


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
def test_no_number_reaches_the_wire_that_json_does_not_know(number):
    """Judge: json itself, told to take nothing but JSON."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    with pytest.raises(ValueError, match="JSON"):
        wire.dumps({"a": [number]})
    lines = list(wire.ndjson([{"a": 1}, {"a": number}, {"a": 2}]))
    first, end = (json.loads(line, parse_constant=refuse) for line in lines)
    assert first == {"a": 1} and list(end) == ["error"]
