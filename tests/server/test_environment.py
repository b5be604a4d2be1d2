"""What the environment says holds where neither the model nor the request says otherwise."""

import httpx
import pytest

from refollama.errors import BadRequest
from refollama.messages import Create
from refollama.server.app import create_app
from refollama.service import Service


@pytest.fixture
def small(tiny, monkeypatch):
    """A client of a server whose contexts hold 40 tokens, with `plain`, and `wide` that says 60."""
    monkeypatch.setenv("OLLAMA_CONTEXT_LENGTH", "40")
    service = Service.default(local_files=True)
    list(service.create(Create("plain", f"FROM {tiny}")))
    list(service.create(Create("wide", f"FROM {tiny}\nPARAMETER num_ctx 60")))
    transport = httpx.WSGITransport(create_app(service))
    with httpx.Client(transport=transport, base_url="http://localhost") as client:
        yield client
    service.close()


@pytest.mark.parametrize(
    ("model", "options", "n_ctx"),
    [
        ("plain", {}, 40),
        ("plain", {"num_ctx": None}, 40),
        ("plain", {"num_ctx": 50}, 50),
        ("wide", {}, 60),
        ("wide", {"num_ctx": 70}, 70),
    ],
)
def test_the_context_of_the_environment_is_the_weakest_word(small, model, options, n_ctx):
    body = {"model": model, "prompt": "q" * 200, "options": {"num_predict": 1} | options}
    answer = small.post("/api/generate", json=body | {"stream": False}).json()
    assert n_ctx // 2 <= answer["prompt_eval_count"] <= n_ctx and answer["prompt_truncated"]
    (loaded,) = small.get("/api/ps").json()["models"]
    assert loaded["context_length"] == n_ctx
    answer = small.post("/api/embed", json={"model": model, "input": "q" * 200, "options": options})
    assert answer.json()["prompt_eval_count"] == n_ctx


def test_more_than_a_model_was_trained_for_is_cut_to_that(tiny, monkeypatch):
    monkeypatch.setenv("OLLAMA_CONTEXT_LENGTH", "100000")
    service = Service.default(local_files=True)
    transport = httpx.WSGITransport(create_app(service))
    with httpx.Client(transport=transport, base_url="http://localhost") as client:
        client.post("/api/generate", json={"model": str(tiny)})
        (loaded,) = client.get("/api/ps").json()["models"]
    service.close()
    assert loaded["context_length"] == 128


@pytest.mark.parametrize("value", ["many", "-1", "1.5"])
def test_a_context_that_is_none_is_told(monkeypatch, value):
    monkeypatch.setenv("OLLAMA_CONTEXT_LENGTH", value)
    with pytest.raises(BadRequest, match="OLLAMA_CONTEXT_LENGTH must be a whole number"):
        Service.default(local_files=True)
