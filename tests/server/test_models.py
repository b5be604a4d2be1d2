"""Making, showing, copying, deleting and unloading models, over HTTP and by the official client."""

import hashlib
import json
import re
import threading
import time
from contextlib import closing
from datetime import datetime, timedelta, timezone

import httpx
import ollama
import pytest

from refollama.client import Client
from refollama.errors import NotFound
from refollama.server.app import create_app
from refollama.service import Service
from refollama.shelf import LoadedModels
from refollama.store import Store
from tests import adapters
from tests.server.conftest import unchanged, wait_until
from tests.server.process import running
from tests.store.helpers import gguf
from tests.tiny import metadata, shapes


@pytest.fixture
def official(app):
    """The official client, as people install it, without a socket."""
    client = ollama.Client(host="http://localhost", transport=httpx.WSGITransport(app))
    with closing(client):
        yield client


def sha(data):
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def post(http, route, **body):
    return http.post(f"/api/{route}", json=body)


def delete(http, **body):
    return http.request("DELETE", "/api/delete", json=body)


def names(http):
    return [model["name"] for model in http.get("/api/tags").json()["models"]]


# ── blobs ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("chunked", [False, True])
def test_a_blob_is_uploaded_once(http, service, chunked):
    data = gguf(elements=1 << 19)
    path = f"/api/blobs/{sha(data)}"
    sent = (data[at : at + 1000] for at in range(0, len(data), 1000)) if chunked else data
    assert http.head(path).status_code == 404
    answer = http.post(path, content=sent)
    assert (answer.status_code, answer.content) == (201, b"")
    assert http.head(path).status_code == 200 and http.head(path).content == b""
    assert service.store.blobs.path(sha(data)).read_bytes() == data
    with unchanged(service.store):
        assert http.post(path, content=data).status_code == 200
    assert http.head(path.replace("sha256:", "sha256-")).status_code == 200


def test_a_blob_may_be_larger_than_any_request(http, app):
    app.config["MAX_CONTENT_LENGTH"] = 1000
    data = gguf(elements=1000)
    assert http.post(f"/api/blobs/{sha(data)}", content=data).status_code == 201
    assert (
        post(http, "create", model="x", files={"m": sha(data)}, pad="x" * 1000).status_code == 413
    )


def test_a_damaged_blob_is_mended_by_an_upload(http, service):
    data = gguf()
    path = service.store.blobs.path(service.store.blobs.add(data))
    path.write_bytes(b"half")
    assert http.post(f"/api/blobs/{sha(data)}", content=data).status_code == 200
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    "digest",
    [
        *("x", "sha256:", "sha256:12", "sha256:" + "g" * 64, "sha512:" + "0" * 64, ".."),
        *("%2e%2e%2fetc", "sha256:" + "0" * 65, "sha256:%2e%2e%2f" + "0" * 61),
        "sha256:" + "0" * 64 + "%0a",
    ],
)
def test_what_is_no_digest(http, service, digest):
    with unchanged(service.store):
        assert http.head(f"/api/blobs/{digest}").status_code in (400, 404)
        answer = http.post(f"/api/blobs/{digest}", content=b"x")
    assert answer.status_code in (400, 404) and set(answer.json()) == {"error"}


def test_what_has_another_digest_is_refused_and_leaves_nothing(http, service):
    wanted = sha(b"other")
    with unchanged(service.store):
        answer = http.post(f"/api/blobs/{wanted}", content=b"this")
    assert answer.status_code == 400
    assert answer.json()["error"] == f'digest mismatch, expected "{wanted}", got "{sha(b"this")}"'


def test_over_a_real_socket_without_a_length_and_cut_off(tmp_path):
    import socket

    data = gguf(elements=1 << 20)
    with running() as (url, _):
        chunks = (data[at : at + 70_000] for at in range(0, len(data), 70_000))
        assert httpx.post(f"{url}/api/blobs/{sha(data)}", content=chunks).status_code == 201
        assert httpx.head(f"{url}/api/blobs/{sha(data)}").status_code == 200
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as caller:
            head = f"POST /api/blobs/{sha(data[1:])} HTTP/1.1\r\nHost: {host}\r\n"
            caller.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data[:1000])
        time.sleep(0.2)
        assert httpx.head(f"{url}/api/blobs/{sha(data[1:])}").status_code == 404
    files = [path.name for path in Store.default().blobs.folder.iterdir()]
    assert files == [sha(data).replace(":", "-")]


# ── create ────────────────────────────────────────────────────────────────────────────────────


def test_create_from_files(http, tiny):
    """Cases 4 and 21 of Ollama's tests."""
    data = tiny.read_bytes()
    delete(http, model="shy"), delete(http, model="tiny")
    assert http.post(f"/api/blobs/{sha(data)}", content=data).status_code == 201
    answer = post(http, "create", name="m", files={"m.gguf": sha(data)}, stream=False)
    assert (answer.status_code, answer.json()) == (200, {"status": "success"})
    post(http, "create", model="n", **{"from": "m"}, stream=False)
    first, second = (post(http, "show", model=name).json()["modelfile"] for name in ("m", "n"))
    assert "FROM m:latest" in second and sha(data).removeprefix("sha256:") in first
    answer = post(
        http, "generate", model="n", prompt="the", stream=False, options={"num_predict": 2}
    )
    assert answer.json()["eval_count"] == 2


def test_layers_are_replaced_and_what_nobody_names_is_removed(http, service):
    """Case 22: TestCreateRemovesLayers."""
    make = {"model": "m", "stream": False, "from": "tiny"}
    post(http, "create", **make, template="{{ .Prompt }} a", system="one")
    old = set(service.store.blobs.folder.iterdir())
    post(http, "create", **make, template="{{ .Prompt }} b", system="one")
    new = set(service.store.blobs.folder.iterdir())
    assert len(old - new) == len(new - old) == 2  # template and config
    assert post(http, "show", model="m").json()["template"] == "{{ .Prompt }} b"


def test_an_empty_system_sets_none(http, tiny, service):
    """Case 23: TestCreateUnsetsSystem."""
    digest = service.store.blobs.add(tiny.read_bytes())
    for system in ("Say hi!", ""):
        post(http, "create", model="m", files={"m": digest}, system=system, stream=False)
    assert "system" not in post(http, "show", model="m").json()


def test_parameters_are_merged_and_lists_replaced(http):
    """Cases 24 and 7: TestCreateMergeParameters, and the text of `parameters`."""
    first = {"temperature": 1, "top_k": 10, "stop": ["USER:", "ASSISTANT:"]}
    post(http, "create", model="a", **{"from": "tiny"}, parameters=first, stream=False)
    more = {"temperature": 0.6, "top_p": 0.7, "stop": ["<|endoftext|>"], "seed": 42}
    post(http, "create", model="b", **{"from": "a"}, parameters=more, stream=False)
    lines = sorted(post(http, "show", model="b").json()["parameters"].splitlines())
    assert [re.sub(" +", " ", line) for line in lines] == [
        *("seed 42", 'stop "<|endoftext|>"', "temperature 0.6", "top_k 10", "top_p 0.7")
    ]
    assert lines[0] == "seed" + " " * 27 + "42"


def test_messages_are_replaced_and_shown_in_order(http):
    """Case 25: TestCreateReplacesMessages."""
    said = [
        {"role": "assistant", "content": "What is my purpose?"},
        {"role": "user", "content": "b"},
    ]
    post(http, "create", model="a", **{"from": "tiny"}, messages=said, stream=False)
    post(http, "create", model="b", **{"from": "a"}, stream=False)
    assert post(http, "show", model="b").json()["messages"] == said
    post(http, "create", model="b", **{"from": "a"}, messages=said[1:], stream=False)
    assert post(http, "show", model="b").json()["messages"] == said[1:]


@pytest.mark.parametrize("template", ["{{ .Prompt", "{{ if .Prompt }}", "{{ Prompt }}"])
def test_a_broken_template_is_refused(http, template):
    """Case 26: TestCreateTemplateSystem."""
    answer = post(http, "create", model="m", **{"from": "tiny"}, template=template)
    assert answer.status_code == 400 and "line 1" in answer.json()["error"]


def test_licences_by_one_or_many(http):
    """Case 27: TestCreateLicenses."""
    for given, shown in (("MIT", "MIT"), (["MIT", "Apache"], "MIT\nApache")):
        post(http, "create", model="m", **{"from": "tiny"}, license=given, stream=False)
        assert post(http, "show", model="m").json()["license"] == shown


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"files": {"m": "sha256:1"}}, 400, "invalid digest format"),
        ({"files": {"m": 5}}, 400, "files must be an object of strings"),
        ({"files": ["m"]}, 400, "files must be an object"),
        ({"files": {"../m.safetensors": "sha256:" + "0" * 64}}, 400, "must be relative"),
        ({"files": {"m.safetensors": "sha256:" + "0" * 64}}, 404, "not found: upload it first"),
        ({"from": "tiny", "quantize": "q9"}, 400, "unknown type 'q9': quantise to one of Q8_0, "),
        ({"from": "tiny", "quantization": "q9"}, 400, "unknown type"),
        ({"from": "tiny", "quantize": 4}, 400, "quantize must be a string"),
        ({"from": "tiny", "messages": "hi"}, 400, "messages must be a list"),
        ({"from": "tiny", "messages": ["hi"]}, 400, "messages must be a list of messages"),
        ({"from": "tiny", "messages": [{"role": 1}]}, 400, "must be strings"),
        ({"from": "tiny", "messages": [{"role": "user", "images": ["x"]}]}, 400, "images"),
        ({"from": "tiny", "messages": [{"tool_calls": [{}], "role": "user"}]}, 400, "tool_calls"),
        ({"from": "tiny", "messages": [{"role": "user", "Thinking": "x"}]}, 400, "thinking"),
        ({"from": "tiny", "messages": [{"role": "user", "tool_name": "x"}]}, 400, "tool_name"),
        ({"from": "tiny", "messages": [{"role": "user", "tool_call_id": "x"}]}, 400, "tool_call"),
        ({"path": "~no-such-user/x"}, 400, "is not a regular file"),
        ({"from": "tiny", "messages": [{"role": "robot"}]}, 400, "message role must be one of"),
        ({"from": "tiny", "license": {"a": 1}}, 400, "license must be a string or a list"),
        ({"from": "tiny", "license": [1]}, 400, "license must be a string or a list"),
        ({"from": "tiny", "parameters": [1]}, 400, "parameters must be an object"),
        ({}, 400, "neither 'from' or 'files' was specified"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_what_create_refuses(http, service, body, status, said, stream):
    with unchanged(service.store):
        answer = post(http, "create", model="m", stream=stream, **body)
    assert (answer.status_code, set(answer.json())) == (status, {"error"}), answer.text
    assert said in answer.json()["error"] and "\n" not in answer.json()["error"]


def test_what_has_no_effect_is_said_in_the_log_once_each(http, caplog):
    fields = {"renderer": "a", "parser": "b", "requires": "0.1", "info": {"k": "v"}}
    fields |= {
        "remote_host": "h",
        "Draft_Model": "d",
        "draft_\nx": "y",
        "template": "{{ .Prompt }}",
    }
    answer = post(http, "create", model="m", **{"from": "tiny"}, stream=False, **fields)
    assert answer.json() == {"status": "success"}
    said = [r.getMessage() for r in caplog.records if "no effect" in r.getMessage()]
    for name in ("renderer", "parser", "requires", "info", "remote_host", "draft_model"):
        assert len([line for line in said if name in line]) == 1, name
    assert len(said) == 6 and not any("\n" in line for line in said)


def test_a_modelfile_by_its_path(http, tiny, tmp_path):
    """api-2023-12.md: "path (optional): path to the Modelfile"."""
    (tmp_path / "Modelfile").write_text(f"FROM {tiny}\nSYSTEM You are mario from Super Mario Bros.")
    answer = post(http, "create", name="mario", path=str(tmp_path / "Modelfile"), stream=False)
    assert answer.json() == {"status": "success"}
    assert post(http, "show", name="mario").json()["system"].startswith("You are mario")


def test_a_stranger_names_no_path(tiny, tmp_path):
    (tmp_path / "Modelfile").write_text(f"FROM {tiny}")
    far = Service(Store(tmp_path / "far"), LoadedModels(), local_files=False)
    with httpx.Client(
        transport=httpx.WSGITransport(create_app(far)), base_url="http://localhost"
    ) as client:
        answers = [
            client.post("/api/create", json={"model": "x", "path": str(tmp_path / name)}).json()
            for name in ("Modelfile", "gone")
        ]
    assert answers[0] == answers[1] and "only allowed from the machine" in answers[0]["error"]


# ── show, copy, delete ────────────────────────────────────────────────────────────────────────


def test_show_has_the_keys_of_both_eras(http):
    shown = post(http, "show", name="shy").json()
    assert set(shown) == {
        *("modelfile", "parameters", "template", "system", "details", "model_info", "tensors"),
        *("capabilities", "modified_at"),
    }
    assert shown["details"] == {
        "parent_model": "",
        "format": "gguf",
        "family": "llama",
        "families": ["llama"],
        "parameter_size": shown["details"]["parameter_size"],
        "quantization_level": "unknown",
    }
    info = shown["model_info"]
    assert info["general.architecture"] == "llama" and info["llama.context_length"] == 128
    assert info["tokenizer.ggml.tokens"] is None and "general.name" not in info
    assert shown["tensors"][0] == {"name": "token_embd.weight", "type": "F32", "shape": [64, 300]}
    assert shown["capabilities"] == ["completion"]
    assert datetime.fromisoformat(shown["modified_at"]).tzinfo is not None
    verbose = post(http, "show", model="shy", verbose=True).json()["model_info"]
    assert len(verbose["tokenizer.ggml.tokens"]) == 300


@pytest.mark.parametrize("body", [{}, {"model": ""}, {"name": None}])
@pytest.mark.parametrize("path", ["show", "delete"])
def test_a_name_is_needed(http, path, body):
    method = "DELETE" if path == "delete" else "POST"
    answer = http.request(method, f"/api/{path}", json=body)
    assert (answer.status_code, answer.json()) == (400, {"error": "model is required"})


@pytest.mark.parametrize("name", ["nope", "a/nope:7b"])
def test_what_is_not_there_is_named_as_it_was_asked_for(http, name):
    said = {"error": f"model '{name}' not found, try pulling it first"}
    for answer in (
        post(http, "show", model=name),
        post(http, "copy", source=name, destination="x"),
        delete(http, model=name),
        post(http, "generate", model=name, prompt="hi"),
    ):
        assert (answer.status_code, answer.json()) == (404, said)


def test_copy(http):
    """Case 5, and the example of api-2023-12.md."""
    answer = post(http, "copy", source="shy", destination="beefsteak")
    assert (answer.status_code, answer.content) == (200, b"")
    shown, original = (post(http, "show", model=name).json() for name in ("beefsteak", "shy"))
    assert shown["system"] == original["system"] and "beefsteak:latest" in names(http)
    tags = {m["name"]: m["digest"] for m in http.get("/api/tags").json()["models"]}
    assert tags["beefsteak:latest"] == tags["shy:latest"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "source add destination are required"),
        ({"source": "shy"}, "source add destination are required"),
        ({"destination": "shy"}, "source add destination are required"),
        ({"source": "shy", "destination": "../x"}, "'..'"),
        ({"source": "a b", "destination": "x"}, "a b"),
        ({"source": "shy", "destination": "x:a:b"}, "a:b"),
        ({"source": 5, "destination": "x"}, "source must be a string"),
    ],
)
def test_what_copy_refuses(http, service, body, said):
    with unchanged(service.store):
        answer = post(http, "copy", **body)
    assert answer.status_code == 400 and said in answer.json()["error"]


def test_a_copy_over_a_model_removes_what_only_that_one_had(http, service):
    with unchanged(service.store):
        post(http, "create", model="old", **{"from": "tiny"}, system="of the old one", stream=False)
        assert post(http, "copy", source="shy", destination="OLD").status_code == 200
        delete(http, model="old")


def test_delete_keeps_what_others_share(http, service):
    """Cases 6 and 31: TestDelete."""
    post(http, "copy", source="shy", destination="twin")
    answer = delete(http, name="shy")
    assert (answer.status_code, answer.content) == (200, b"")
    assert names(http) == ["tiny:latest", "twin:latest"]
    assert post(http, "generate", model="twin", prompt="a", stream=False).status_code == 200
    delete(http, model="twin")
    delete(http, model="tiny")
    assert list(service.store.blobs.folder.iterdir()) == [] and names(http) == []


def test_a_layer_that_is_named_twice_is_deleted_once(http, service):
    """Case 31: TestDeleteDuplicateLayers."""
    path = service.store.root / "manifests/registry.ollama.ai/library/tiny/latest"
    manifest = json.loads(path.read_text())
    manifest["layers"].append(manifest["layers"][0])
    path.write_text(json.dumps(manifest))
    delete(http, model="shy")
    assert delete(http, model="tiny").status_code == 200
    assert list(service.store.blobs.folder.iterdir()) == []


def test_letter_case_makes_no_second_model(http):
    """Case 32: TestManifestCaseSensitivity."""
    make = {"stream": False, "from": "tiny"}
    for name in ("Mixed/Name:Tag", "mixed/name:TAG", "MIXED/NAME:tag"):
        assert post(http, "create", model=name, **make).status_code == 200
        assert post(http, "copy", source="TINY", destination=name.swapcase()).status_code == 200
    assert [n for n in names(http) if "/" in n] == ["Mixed/Name:Tag"]
    assert post(http, "show", model="mIXED/nAME:tAG").status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("GET", "show"), ("GET", "copy"), ("GET", "blobs/x"), ("POST", "ps")),
        *(("POST", "delete"), ("GET", "delete"), ("PUT", "blobs/x")),
    ],
)
def test_wrong_methods(http, method, path):
    """Case 8."""
    answer = http.request(method, f"/api/{path}")
    assert answer.status_code == 405 and path in answer.json()["error"]


# ── ps and keep_alive ─────────────────────────────────────────────────────────────────────────


def loaded(http):
    return http.get("/api/ps").json()["models"]


def test_ps_tells_what_is_in_memory(http, service, tiny):
    assert http.get("/api/ps").json() == {"models": []} and http.head("/api/ps").status_code == 200
    post(http, "generate", model="Shy", options={"num_ctx": 100})
    (one,) = loaded(http)
    assert set(one) == {
        *("name", "model", "size", "digest", "details", "expires_at", "size_vram"),
        "context_length",
    }
    assert one["name"] == one["model"] == "shy:latest" and one["context_length"] == 100
    assert one["size_vram"] == 0 < one["size"] < 2 * tiny.stat().st_size
    tags = {m["name"]: m for m in http.get("/api/tags").json()["models"]}
    assert one["digest"] == tags["shy:latest"]["digest"]
    assert one["details"]["family"] == "llama"
    left = datetime.fromisoformat(one["expires_at"]) - datetime.now(timezone.utc)
    assert timedelta(seconds=290) < left <= timedelta(seconds=300)
    delete(http, model="shy")  # it goes on, without its name in the store
    assert [(m["name"], m["digest"]) for m in loaded(http)] == [("shy:latest", "")]


def test_a_file_that_runs_where_it_lies_is_listed_by_its_path(http, tiny):
    post(http, "generate", model=str(tiny))
    assert [(m["name"], m["digest"]) for m in loaded(http)] == [(str(tiny), "")]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        *((42, 42), (42.5, 42.5), ("42m", 2520), (None, 300), ("1h", 3600)),
        *((-1, 9e9), (-3.14, 9e9), ("-1m", 9e9), (1e300, 9e9)),
    ],
)
def test_keep_alive_in_all_its_spellings(http, value, seconds):
    """Case 33: TestKeepAliveParsingFromJSON, seen in /api/ps."""
    assert post(http, "generate", model="tiny", keep_alive=value).json()["done_reason"] == "load"
    expires = datetime.fromisoformat(loaded(http)[0]["expires_at"])
    left = (expires - datetime.now(timezone.utc)).total_seconds()
    assert left == pytest.approx(min(seconds, 2**63 / 1e9), abs=5, rel=0.1)


@pytest.mark.parametrize("value", ["5", "soon", True, [], {"s": 5}])
def test_keep_alive_that_makes_no_sense(http, value):
    answer = post(http, "generate", model="tiny", keep_alive=value)
    assert answer.status_code == 400 and "keep_alive must be" in answer.json()["error"]
    assert loaded(http) == []


@pytest.mark.parametrize("stream", [True, False])
def test_an_empty_prompt_without_time_unloads_and_never_loads(http, service, monkeypatch, stream):
    """Case 13: TestGenerateUnload."""
    post(http, "generate", model="tiny")
    assert len(loaded(http)) == 1
    body = {"model": "tiny", "prompt": "", "keep_alive": 0, "stream": stream}
    monkeypatch.setattr("refollama.shelf.load_file", lambda *_, **__: 1 / 0)
    for _ in range(2):
        answer = post(http, "generate", **body)
        assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
        assert answer.json()["done_reason"] == "unload" and answer.json()["done"] is True
        assert loaded(http) == []
    assert post(http, "generate", **body | {"model": "nope"}).status_code == 404


def test_an_answer_without_time_unloads_when_it_ends(http):
    body = {"model": "tiny", "prompt": "the", "keep_alive": 0, "options": {"num_predict": 3}}
    assert json.loads(post(http, "generate", **body).text.splitlines()[-1])["eval_count"] == 3
    assert loaded(http) == []


def test_a_model_that_is_idle_goes_by_itself(http):
    post(http, "generate", model="tiny", keep_alive="200ms")
    assert len(loaded(http)) == 1
    wait_until(lambda: loaded(http) == [], 5)


def test_the_environment_says_how_long(tiny):
    with running(OLLAMA_KEEP_ALIVE="1h") as (url, process):
        client = ollama.Client(host=url)
        with closing(client):
            client.create("m", files={"m": client.create_blob(tiny)})
            client.generate("m")
            expires = client.ps().models[0].expires_at
        assert expires is not None
        left = expires - datetime.now(timezone.utc)
        assert timedelta(minutes=59) < left <= timedelta(minutes=60)
        process.terminate()
        assert process.wait(10) == 0  # the timer does not hold up the end


# ── the official client ───────────────────────────────────────────────────────────────────────


def test_the_official_client_makes_shows_copies_lists_and_deletes(official, tiny, tmp_path):
    digest = official.create_blob(tiny)
    done = official.create(
        *("mine",),
        files={"tiny.gguf": digest},
        template="{{ .System }}{{ .Prompt }}",
        license=["MIT", "Apache"],
        system="be brief",
        parameters={"num_ctx": 64, "stop": ["."]},
        messages=[
            {"role": "user", "content": "hi"},
            ollama.Message(role="assistant", content="ho"),
        ],
    )
    assert done.status == "success"
    statuses = [p.status for p in official.create("child", from_="mine", system="s", stream=True)]
    assert statuses[0] == "reading model metadata" and statuses[-1] == "success"
    shown = official.show("mine")
    assert shown.license == "MIT\nApache" and shown.details.family == "llama"
    assert shown.modelinfo["llama.embedding_length"] == 64
    assert shown.capabilities == ["completion"] and shown.template == "{{ .System }}{{ .Prompt }}"
    assert official.show("child").details.parent_model == "mine:latest"
    assert official.copy("mine", "copy").status == "success"
    listed = {model.model: model for model in official.list().models}
    assert set(listed) == {
        "shy:latest",
        "tiny:latest",
        "mine:latest",
        "child:latest",
        "copy:latest",
    }
    assert listed["copy:latest"].digest == listed["mine:latest"].digest
    assert official.delete("copy").status == "success"
    official.generate("mine", "the", options={"num_predict": 1}, keep_alive="7m")
    (process,) = official.ps().models
    assert process.model == "mine:latest" and process.size > 0 and process.context_length == 64
    assert process.expires_at > datetime.now(timezone.utc) + timedelta(minutes=6)
    assert official.generate("mine", keep_alive=0).done_reason == "unload"
    assert official.ps().models == []


def test_the_official_client_hears_errors(official):
    for call in (
        lambda: official.show("nope"),
        lambda: official.copy("nope", "x"),
        lambda: official.delete("nope"),
        lambda: official.create("m", from_="nope"),
    ):
        with pytest.raises(ollama.ResponseError, match="not found") as problem:
            call()
        assert problem.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="'nope:latest' not found, and not to be pulled"):
        list(official.create("m", from_="nope", stream=True))


# ── our own client, against the real server ───────────────────────────────────────────────────


def test_our_client_does_the_same_over_a_socket(tiny):
    data = tiny.read_bytes()
    with running() as (url, _), Client(url) as client:
        assert not client.has_blob(sha(data))
        client.send_blob(sha(data), iter([data[:1000], data[1000:]]))
        assert client.has_blob(sha(data))
        done = list(client.create("m", files={"m.gguf": sha(data)}, system="s"))
        assert done[-1] == {"status": "success"}
        assert list(client.create("child", "FROM m\nSYSTEM t"))[-1] == {"status": "success"}
        assert client.show("child")["system"] == "t"
        assert len(client.show("m", verbose=True)["model_info"]["tokenizer.ggml.tokens"]) == 300
        client.copy("m", "n")
        client.delete("m")
        assert [model["name"] for model in client.tags()] == ["child:latest", "n:latest"]
        list(client.generate("n", keep_alive="2m"))
        assert [model["name"] for model in client.ps()] == ["n:latest"]
        assert list(client.generate("n", keep_alive=0))[-1]["done_reason"] == "unload"
        assert client.ps() == []
        with pytest.raises(NotFound, match="model 'm' not found"):
            client.show("m")


def test_a_model_with_adapters_answers_under_the_scales_of_each_request(
    http, service, tiny, tmp_path
):
    made = adapters.halves(shapes(metadata()))
    adapter = adapters.write_plain(tmp_path / "a.gguf", made).read_bytes()
    files = {"m": service.store.blobs.add(tiny.read_bytes())}
    lora = {"a": service.store.blobs.add(adapter)}
    for name, more in (("m", {"adapters": lora}), ("plain", {})):
        answer = post(http, "create", model=name, files=files, stream=False, **more)
        assert answer.json() == {"status": "success"}
    assert "\nADAPTER /" in post(http, "show", model="m").json()["modelfile"]

    def said(model, **options):
        options |= {"temperature": 0, "num_predict": 5}
        ask = {"model": model, "prompt": "a b", "options": options, "stream": False}
        return post(http, "generate", **ask).json()

    assert said("m", adapters=[0])["context"] == said("plain")["context"]
    assert said("m")["context"] != said("plain")["context"]
    wrong = said("m", adapters=[0, 1])["error"]
    assert wrong.startswith("option 'adapters' must have a number for each")


def test_a_projector_is_shown(http, service):
    files = {"m": service.store.blobs.add(gguf()), "p": service.store.blobs.add(gguf("clip"))}
    post(http, "create", model="m", files=files, stream=False)
    shown = post(http, "show", model="m").json()
    assert shown["projector_info"]["general.architecture"] == "clip"
    assert "vision" in shown["capabilities"] and shown["details"]["families"] == ["llama", "clip"]


# ── many at once ──────────────────────────────────────────────────────────────────────────────


def test_making_copying_and_deleting_at_once_breaks_nothing(app, service):
    """Whatever the order: no error but "not found", and no blob is missing in what is left."""
    answers = []

    def work(number):
        with httpx.Client(transport=httpx.WSGITransport(app), base_url="http://localhost") as http:
            for turn in range(8):
                make = {"model": "shared", "from": "tiny", "system": f"{number % 2} {turn % 2}"}
                answers.append(post(http, "create", stream=False, **make).status_code)
                answers.append(
                    post(http, "copy", source="shared", destination=f"c{number}").status_code
                )
                answers.append(post(http, "show", model=f"c{number}").status_code)
                answers.append(delete(http, model="shared").status_code)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(answers) <= {200, 404}
    named = {digest.replace(":", "-") for digest in service.store.manifests.named()}
    assert {path.name for path in service.store.blobs.folder.iterdir()} == named
