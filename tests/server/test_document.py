"""The examples of the API document of December 2023, sent as curl sends them, one test for each.

The models that it names are copies of a small one. Judge: what the document says comes back.
"""

import hashlib
import json
import re
from dataclasses import replace
from datetime import datetime

import pytest

from refollama.messages import Create
from refollama.store.registry import session
from tests.registry.fake import FakeRegistry
from tests.store.helpers import gguf

SKY = "Why is the sky blue?"
DURATIONS = {"total_duration", "load_duration", "prompt_eval_duration", "eval_duration"}
COUNTS = {"prompt_eval_count", "eval_count"}
PNG = "iVBORw0KGgoAAAANSUhEUgAAAG0="  # the document's own, of which only the beginning matters
FORM = {"Content-Type": "application/x-www-form-urlencoded"}  # what `curl -d` calls any body


@pytest.fixture
def curl(http, service, tiny):
    """`curl [-X method] http://localhost/… -d body` → the response; `llama2` and its kin exist."""
    limits = "PARAMETER num_predict 16\nPARAMETER seed 1\n"
    list(service.create(Create("base", f"FROM {tiny}\nTEMPLATE [{{{{ .Prompt }}}}]\n{limits}")))
    for name in ("llama2", "llama2:13b", "llava", "mistral"):
        body = {"source": "base", "destination": name}
        assert http.post("/api/copy", json=body).status_code == 200

    def send(path, body, method="POST"):
        return http.request(method, path, content=body.encode(), headers=FORM)

    return send


def streamed(response):
    """The records of a stream: all but the last are not done."""
    assert (response.status_code, response.headers["Content-Type"]) == (200, "application/x-ndjson")
    *pieces, last = [json.loads(line) for line in response.text.splitlines()]
    assert pieces and not any(piece["done"] for piece in pieces) and last["done"] is True
    return pieces, last


def whole(response):
    assert response.status_code == 200, response.text
    assert response.headers["Content-Type"] == "application/json; charset=utf-8"
    return response.json()


def check_end(record, model):
    """What the final response carries: the model as it was sent, a time, counts and durations."""
    assert record["model"] == model and record["done"] is True
    assert datetime.fromisoformat(record["created_at"].replace("Z", "+00:00")).tzinfo is not None
    assert all(type(record[name]) is int and record[name] > 0 for name in DURATIONS | COUNTS)
    assert record["total_duration"] >= record["load_duration"] + record["eval_duration"]


# ── generate a completion ─────────────────────────────────────────────────────────────────────


def test_request(curl):
    pieces, last = streamed(
        curl(
            "/api/generate",
            """{
"model": "llama2",
"prompt": "Why is the sky blue?"
}""",
        )
    )
    assert all({"model", "created_at", "response", "done"} == set(piece) for piece in pieces)
    assert last["response"] == "" and all(isinstance(id, int) for id in last["context"])
    check_end(last, "llama2")


NO_STREAM = """{
"model": "llama2",
"prompt": "Why is the sky blue?",
"stream": false
}"""


def test_request_no_streaming(curl):
    pieces, _ = streamed(curl("/api/generate", NO_STREAM.replace("false", "true")))
    record = whole(curl("/api/generate", NO_STREAM))
    assert record["response"] == "".join(piece["response"] for piece in pieces) != ""
    assert record["context"]
    check_end(record, "llama2")


def test_context_keeps_a_conversational_memory(curl):
    """`context`: "this can be sent in the next request to keep a conversational memory"."""
    first = whole(curl("/api/generate", NO_STREAM))
    again = json.loads(NO_STREAM) | {"context": first["context"]}
    second = whole(curl("/api/generate", json.dumps(again)))
    assert second["context"][: len(first["context"])] == first["context"]
    assert second["prompt_eval_count"] > len(first["context"])


def test_request_with_images(curl):
    """As printed the body has no end; with one, a model without vision says what it cannot do."""
    body = """{
"model": "llava",
"prompt":"What is in this picture?",
"stream": false,
"images": ["PNG"]
}""".replace("PNG", PNG)
    answer = curl("/api/generate", body)
    assert answer.status_code == 400 and "images" in answer.json()["error"]
    answer = curl("/api/generate", body.replace('"]', "\n"))
    assert answer.status_code == 400 and "not JSON" in answer.json()["error"]


def test_request_raw_mode(curl, http):
    """The prompt is what the model sees; no context comes back, whatever the document shows."""
    record = whole(
        curl(
            "/api/generate",
            """{
"model": "mistral",
"prompt": "[INST] why is the sky blue? [/INST]",
"raw": true,
"stream": false
}""",
        )
    )
    check_end(record, "mistral")
    text = {"model": "mistral", "text": "[INST] why is the sky blue? [/INST]", "bos": True}
    ids = http.post("/api/tokenize", json=text).json()["tokens"]
    assert record["prompt_eval_count"] == len(ids) and "context" not in record


def test_request_json_mode(curl):
    record = whole(
        curl(
            "/api/generate",
            """{
"model": "llama2",
"prompt": "What color is the sky at different times of the day? Respond using JSON",
"format": "json",
"stream": false
}""",
        )
    )
    assert record["response"].startswith("{")
    if record["done_reason"] == "stop":
        assert isinstance(json.loads(record["response"]), dict)
    else:
        assert record["done_reason"] == "length" and record["eval_count"] == 16
    check_end(record, "llama2")


def test_request_with_options(curl):
    record = whole(
        curl(
            "/api/generate",
            """{
"model": "llama2",
"prompt": "Why is the sky blue?",
"stream": false,
"options": {
"num_keep": 5,
"seed": 42,
"num_predict": 100,
"top_k": 20,
"top_p": 0.9,
"tfs_z": 0.5,
"typical_p": 0.7,
"repeat_last_n": 33,
"temperature": 0.8,
"repeat_penalty": 1.2,
"presence_penalty": 1.5,
"frequency_penalty": 1.0,
"mirostat": 1,
"mirostat_tau": 0.8,
"mirostat_eta": 0.6,
"penalize_newline": true,
"stop": ["\\n", "user:"],
"numa": false,
"num_ctx": 1024,
"num_batch": 2,
"num_gqa": 1,
"num_gpu": 1,
"main_gpu": 0,
"low_vram": false,
"f16_kv": true,
"logits_all": false,
"vocab_only": false,
"use_mmap": true,
"use_mlock": false,
"embedding_only": false,
"rope_frequency_base": 1.1,
"rope_frequency_scale": 0.8,
"num_thread": 8
}
}""",
        )
    )
    assert 16 < record["eval_count"] <= 100  # more than the model's own parameter allows
    assert "\n" not in record["response"]
    check_end(record, "llama2")


# ── generate a chat completion ────────────────────────────────────────────────────────────────


def test_chat(curl):
    pieces, last = streamed(
        curl(
            "/api/chat",
            """{
"model": "llama2",
"messages": [
{
"role": "user",
"content": "why is the sky blue?"
}
]
}""",
        )
    )
    assert all({"model", "created_at", "message", "done"} == set(piece) for piece in pieces)
    assert {piece["message"]["role"] for piece in pieces} == {"assistant"}
    assert any(piece["message"]["content"] for piece in pieces) and "context" not in last
    check_end(last, "llama2")


def test_chat_with_history(curl):
    body = """{
"model": "llama2",
"messages": [
{
"role": "user",
"content": "why is the sky blue?"
},
{
"role": "assistant",
"content": "due to rayleigh scattering."
},
{
"role": "user",
"content": "how is that different than mie scattering?"
}
]
}"""
    _, last = streamed(curl("/api/chat", body))
    check_end(last, "llama2")
    shown = json.loads(body) | {"_debug_render_only": True}
    prompt = whole(curl("/api/chat", json.dumps(shown)))["_debug_info"]["rendered_template"]
    assert prompt == (
        "[why is the sky blue?]due to rayleigh scattering."
        "[how is that different than mie scattering?]"
    )


def test_chat_with_images(curl):
    """As printed there is a comma too many; without it, the model says what it cannot do."""
    body = """{
"model": "llama2",
"messages": [
{
"role": "user",
"content": "what is in this image?",
"images": ["PNG"]
},
]
}""".replace("PNG", PNG)
    answer = curl("/api/chat", body)
    assert answer.status_code == 400 and "not JSON" in answer.json()["error"]
    answer = curl("/api/chat", body.replace("},\n]", "}\n]"))
    assert answer.status_code == 400 and "images" in answer.json()["error"]


# ── models ────────────────────────────────────────────────────────────────────────────────────


def test_create_a_model(curl, http):
    answer = curl(
        "/api/create",
        """{
"name": "mario",
"modelfile": "FROM llama2\\nSYSTEM You are mario from Super Mario Bros."
}""",
    )
    assert answer.headers["Content-Type"] == "application/x-ndjson"
    steps = [json.loads(line) for line in answer.text.splitlines()]
    assert all(set(step) >= {"status"} for step in steps) and steps[-1] == {"status": "success"}
    shown = http.post("/api/show", json={"name": "mario"}).json()
    assert shown["system"] == "You are mario from Super Mario Bros."
    assert shown["details"]["parent_model"] == "llama2:latest"


def test_check_if_a_blob_exists_and_create_it(http):
    """`curl -I …` and `curl -T model.bin -X POST …`."""
    path = "/api/blobs/sha256:29fdb92e57cf0827ded04ae6461b5931d01fa595843f55d36f5b275a52087dd2"
    assert http.head(path).status_code == 404
    answer = http.post(path, content=b"another file")
    assert answer.status_code == 400 and "digest mismatch" in answer.json()["error"]
    model = gguf()
    path = f"/api/blobs/sha256:{hashlib.sha256(model).hexdigest()}"
    assert http.head(path).status_code == 404
    assert http.post(path, content=model).status_code == 201
    assert (http.head(path).status_code, http.head(path).content) == (200, b"")


def test_list_local_models(curl):
    models = {model["name"]: model for model in whole(curl("/api/tags", "", "GET"))["models"]}
    for name in ("llama2:latest", "llama2:13b"):
        assert type(models[name]["size"]) is int and models[name]["size"] > 0
        assert re.fullmatch(
            r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?([+-]\d\d:\d\d|Z)", models[name]["modified_at"]
        )


def test_show_model_information(curl):
    shown = whole(
        curl(
            "/api/show",
            """{
"name": "llama2"
}""",
        )
    )
    assert "# FROM llama2:latest\n\nFROM " in shown["modelfile"]
    assert "PARAMETER num_predict 16" in shown["modelfile"]
    assert re.search(r"^num_predict +16$", shown["parameters"], re.M)
    assert shown["template"] == "[{{ .Prompt }}]"
    assert shown["details"]["format"] == "gguf" and shown["details"]["families"] == ["llama"]
    assert {"parameter_size", "quantization_level"} <= set(shown["details"])


def test_copy_a_model(curl, http):
    answer = curl(
        "/api/copy",
        """{
"source": "llama2",
"destination": "llama2-backup"
}""",
    )
    assert (answer.status_code, answer.content) == (200, b"")
    assert http.post("/api/show", json={"name": "llama2-backup"}).status_code == 200


def test_delete_a_model(curl, http):
    body = """{
"name": "llama2:13b"
}"""
    answer = curl("/api/delete", body, "DELETE")
    assert (answer.status_code, answer.content) == (200, b"")
    assert http.post("/api/show", json={"name": "llama2:13b"}).status_code == 404
    assert http.post("/api/show", json={"name": "llama2"}).status_code == 200
    assert curl("/api/delete", body, "DELETE").status_code == 404


# ── embeddings ────────────────────────────────────────────────────────────────────────────────


def test_generate_embeddings(curl):
    record = whole(
        curl(
            "/api/embeddings",
            """{
"model": "llama2",
"prompt": "Here is an article about llamas..."
}""",
        )
    )
    assert set(record) == {"embedding"} and len(record["embedding"]) == 64
    assert all(type(number) is float for number in record["embedding"])


# ── registries ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def registry(curl, service, monkeypatch):
    """One that has `llama2`, which is not here any more. Every name leads to it."""
    base = session._base

    def here(_, name):
        return base("http", replace(name, host=one.host))

    with FakeRegistry() as one:
        one.add_from(
            service.store.root, "library/llama2", like="registry.ollama.ai/library/llama2/latest"
        )
        monkeypatch.setattr(session, "_base", here)
        yield one


@pytest.mark.parametrize("stream", [True, False])
def test_pull_a_model(curl, registry, http, stream):
    http.request("DELETE", "/api/delete", json={"name": "llama2"})
    body = """{
"name": "llama2"
}"""
    answer = curl("/api/pull", body if stream else body.replace("\n}", ', "stream": false }'))
    assert answer.status_code == 200, answer.text
    steps = [json.loads(line) for line in answer.text.splitlines()]
    if not stream:
        assert steps == [{"status": "success"}]
    else:
        assert steps[0] == {"status": "pulling manifest"}
        assert steps[-4:] == [
            {"status": "verifying sha256 digest"},
            {"status": "writing manifest"},
            {"status": "removing any unused layers"},
            {"status": "success"},
        ]
        assert all({"status", "digest", "total"} <= set(step) for step in steps[1:-4])
    assert http.post("/api/show", json={"name": "llama2"}).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_push_a_model(curl, registry, http, stream):
    body = {"source": "llama2", "destination": "mattw/pygmalion"}
    assert http.post("/api/copy", json=body).status_code == 200
    text = """{
"name": "mattw/pygmalion:latest"
}"""
    answer = curl("/api/push", text if stream else text.replace("\n}", ', "stream": false }'))
    assert answer.status_code == 200, answer.text
    steps = [json.loads(line) for line in answer.text.splitlines()]
    if not stream:
        assert steps == [{"status": "success"}]
        return
    assert steps[0] == {"status": "retrieving manifest"}
    assert steps[-2:] == [{"status": "pushing manifest"}, {"status": "success"}]
    assert all({"status", "digest", "total"} <= set(step) for step in steps[1:-2])
