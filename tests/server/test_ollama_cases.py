"""Ollama's own tests of its server, asked again over HTTP: those that no other page has.

The rest stand where the thing itself is tested; each says which of Ollama's tests it repeats.
"""

import json
import threading
from datetime import datetime

import httpx
import pytest

from refollama.messages import Create
from refollama.server.app import create_app
from refollama.service import Service
from refollama.version import __version__
from tests.server.conftest import GREEDY, unchanged
from tests.text.more_formats import MORE_FORMATS, MORE_TALKS, expected
from tests.tiny import write_model

PLAIN = (
    "{{ if .System }}System: {{ .System }} {{ end }}{{ if .Prompt }}User: {{ .Prompt }} {{ end }}"
)
HELLO = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Weights whose context holds long templates."""
    return write_model(tmp_path_factory.mktemp("wide") / "wide.gguf", context_length=512)


@pytest.fixture
def models(service, wide):
    """`test` has a template, `test-system` a system text, too: as in Ollama's tests."""
    text = f'FROM {wide}\nTEMPLATE """{PLAIN}"""\nSYSTEM You are a helpful assistant.\n'
    list(service.create(Create("test-system", text)))
    list(service.create(Create("test", f'FROM {wide}\nTEMPLATE """{PLAIN}"""\n')))


def records(http, route, **body):
    answer = http.post(f"/api/{route}", json=body)
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def rendered(http, route, **body):
    (record,) = records(http, route, _debug_render_only=True, **body)
    return record["_debug_info"]["rendered_template"]


def test_the_version_is_json(http):
    """Case 1."""
    answer = http.get("/api/version")
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    assert answer.json() == {"version": __version__}


@pytest.mark.parametrize("type", ["Q8_0", "Q4_K_S", "Q4_K_M", "Q4_K"])
def test_a_model_is_quantised_and_answers(http, type):
    """Case 51: runQuantization, of a small model with random weights."""
    *told, last = records(http, "create", model="small", **{"from": "tiny"}, quantize=type)
    assert last == {"status": "success"}
    name = {"Q4_K": "Q4_K_M"}.get(type, type)
    packed = [one for one in told if one["status"] == f"quantizing F32 model to {name}"]
    assert packed[-1]["completed"] == packed[-1]["total"] and packed[-1]["digest"]
    details = http.post("/api/show", json={"model": "small"}).json()["details"]
    assert details["quantization_level"] == name
    *_, answer = records(http, "chat", model="small", messages=HELLO, options=GREEDY)
    assert answer["done"] and answer["eval_count"] > 0


def test_what_is_quantised_is_not_quantised_again(http):
    list(records(http, "create", model="small", **{"from": "tiny"}, quantize="Q8_0"))
    body = {"model": "smaller", "from": "small", "quantize": "Q4_0"}
    answer = http.post("/api/create", json=body)
    assert (answer.status_code, answer.json()) == (
        400,
        {
            "error": "quantization is only supported for F16, BF16 and F32 models, and this one is "
            "Q8_0"
        },
    )


def test_the_list_after_a_create(http):
    """Case 3: the names are full, and nothing in it expires."""
    assert records(http, "create", model="test-model", stream=False, **{"from": "tiny"})
    named = {model["name"]: model for model in http.get("/api/tags").json()["models"]}
    assert set(named) == {"shy:latest", "test-model:latest", "tiny:latest"}
    entry = named["test-model:latest"]
    assert entry["model"] == entry["name"] and "expires_at" not in entry
    assert entry["capabilities"] == ["completion"]
    assert entry["details"]["context_length"] == 128
    assert entry["details"]["embedding_length"] == 64


@pytest.mark.parametrize("body", ["null", "{}"])
@pytest.mark.parametrize("route", ["generate", "chat"])
def test_no_model(http, route, body):
    """Case 9; of generate, too, the document of 2023 says 400."""
    answer = http.post(f"/api/{route}", content=body)
    assert (answer.status_code, answer.json()) == (400, {"error": "model is required"})


@pytest.mark.parametrize("route", ["generate", "chat"])
def test_a_model_that_does_not_think(http, route):
    """Case 10."""
    body = {"model": "tiny", "prompt": "a", "messages": HELLO, "options": GREEDY}
    answer = http.post(f"/api/{route}", json=body | {"think": True})
    assert answer.status_code == 400
    assert answer.json() == {"error": '"tiny" does not support thinking'}
    assert records(http, route, **body, think=False)[-1]["done"] is True


def test_prompts_of_generate(http, models):
    """Cases 14 and 15: the model's system text, the request's, its template, and raw."""
    ask = {"model": "test-system", "prompt": "Hello!"}
    assert rendered(http, "generate", model="test", prompt="Hello!") == "User: Hello! "
    own = "System: You are a helpful assistant. User: Hello! "
    assert rendered(http, "generate", **ask) == own
    assert rendered(http, "chat", model="test-system", messages=HELLO) == own
    abra = "System: You can perform magic tricks. User: Hello! "
    magic = "You can perform magic tricks."
    assert rendered(http, "generate", **ask, system=magic) == abra
    turns = [{"role": "system", "content": magic}, *HELLO]
    assert rendered(http, "chat", model="test-system", messages=turns) == abra
    template = "{{ .System }} {{ .Prompt }}"
    assert rendered(http, "generate", **ask, system=magic, template=template) == f"{magic} Hello!"
    assert rendered(http, "generate", **ask, raw=True) == "Hello!"


@pytest.mark.parametrize("stream", [True, False])
def test_what_is_rendered_is_one_object(http, models, stream):
    """Case 18."""
    raw = {"model": "test", "prompt": "[INST] a [/INST]", "raw": True}
    for body in (raw, {"model": "test", "messages": HELLO}):
        route = "generate" if "prompt" in body else "chat"
        (record,) = records(http, route, _debug_render_only=True, stream=stream, **body)
        info = record["_debug_info"]
        shown = "User: Hello! " if route == "chat" else raw["prompt"]
        assert (info["rendered_template"], info["image_count"]) == (shown, 0)
        assert "eval_count" not in record and record.get("response", "") == ""


def test_what_a_window_holds(http, service, wide):
    """Case 19: all of it, or the last message; system texts stay; neighbours become one."""
    template = "{{ range .Messages }}<{{ .Role }}>{{ .Content }}{{ end }}"
    list(service.create(Create("m", f'FROM {wide}\nTEMPLATE """{template}"""')))
    turns = [
        {"role": "system", "content": "you are the test who lived."},
        {"role": "user", "content": "you're a test, harry!"},
        {"role": "assistant", "content": "i-i'm a what?"},
        {"role": "user", "content": "a test."},
        {"role": "user", "content": "and a thumping good one at that, i'd wager."},
    ]
    last = "a test.\n\nand a thumping good one at that, i'd wager."
    head = "<system>you are the test who lived."
    middle = "<user>you're a test, harry!<assistant>i-i'm a what?"

    def shown(messages, num_ctx):
        return rendered(http, "chat", model="m", messages=messages, options={"num_ctx": num_ctx})

    assert shown(turns, 512) == f"{head}{middle}<user>{last}"
    assert shown(turns, 1) == f"{head}<user>{turns[-1]['content']}"
    assert shown(turns[1:], 1) == f"<user>{turns[-1]['content']}"


@pytest.mark.parametrize("name", list(MORE_FORMATS))
def test_every_format_over_http(http, service, wide, name):
    """Case 20: a model with each template, asked with each conversation."""
    form = MORE_FORMATS[name]
    for template in filter(None, (form.turn, form.messages)):
        list(service.create(Create("m", f'FROM {wide}\nTEMPLATE """{template}"""')))
        for talk in MORE_TALKS.values():
            turns = [{"role": turn.role, "content": turn.content} for turn in talk]
            shown = rendered(http, "chat", model="m", messages=turns, truncate=False)
            assert shown == expected(form, talk)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "a/../../x.gguf", "..", "C:\\x.gguf"]
)
def test_names_of_files_that_climb(http, service, name):
    """Case 29: TestConvertFromSafetensors."""
    with unchanged(service.store):
        answer = http.post(
            "/api/create", json={"model": "m", "files": {name: "sha256:" + "0" * 64}}
        )
    assert answer.status_code == 400 and "file path must be relative" in answer.json()["error"]


@pytest.mark.parametrize(
    "digest", ["", "sha256:1", "sha256:" + "z" * 64, "md5:" + "0" * 64, "a/../b"]
)
@pytest.mark.parametrize("field", ["files", "adapters"])
def test_what_is_no_digest_is_no_file(http, service, field, digest):
    """Case 30."""
    body = {"model": "m", "from": "tiny", field: {"a.gguf": digest}}
    if field == "files":
        del body["from"]
    with unchanged(service.store):
        answer = http.post("/api/create", json=body)
    assert answer.status_code == 400 and "invalid digest format" in answer.json()["error"]


# ── what comes back ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("route", ["generate", "chat"])
def test_every_number_of_an_answer_and_the_lists_after_it(http, route, stream):
    """Case 39: the api test."""
    body = {"model": "tiny", "prompt": "the rest", "messages": HELLO, "options": GREEDY}
    *pieces, end = records(http, route, stream=stream, **body)
    assert bool(pieces) is stream and all(piece["done"] is False for piece in pieces)
    for name in ("total", "load", "prompt_eval", "eval"):
        assert end[f"{name}_duration"] > 0
    assert end["eval_count"] > 0 and end["prompt_eval_count"] > 0 and end["done_reason"]
    assert end.get("context") if route == "generate" else "context" not in end
    (loaded,) = http.get("/api/ps").json()["models"]
    assert loaded["name"] == loaded["model"] == "tiny:latest" and loaded["size"] > 0
    assert len(loaded["digest"]) == 64 and datetime.fromisoformat(loaded["expires_at"]).tzinfo
    for model in http.get("/api/tags").json()["models"]:
        assert model["name"] and model["model"] and model["size"] > 0 and model["details"]["format"]
    shown = http.post("/api/show", json={"model": "tiny"}).json()
    assert shown["modelfile"] and shown["details"] and shown["tensors"] and shown["model_info"]


@pytest.mark.parametrize("top", [0, 1, 5])
@pytest.mark.parametrize("route", ["generate", "chat"])
def test_log_probabilities(http, route, top):
    """Cases 17, 40 and 41: one entry a token, sorted, none above 0, exactly ten in ten tokens."""
    options = {"seed": 123, "temperature": 0, "num_predict": 10}
    body = {"model": "tiny", "prompt": "the", "messages": HELLO, "options": options}
    plain = records(http, route, **body)
    assert all("logprobs" not in record for record in plain)
    answer = records(http, route, logprobs=True, top_logprobs=top, **body)
    found = [one for record in answer for one in record.get("logprobs", [])]
    assert answer[-1]["done_reason"] == "length" and len(found) == 10
    for one in found:
        assert one["logprob"] <= 0 and bytes(one["bytes"]).decode(errors="replace") == one["token"]
        best = [other["logprob"] for other in one.get("top_logprobs", [])]
        assert len(best) == top and best == sorted(best, reverse=True)
    (whole,) = records(http, route, logprobs=True, top_logprobs=top, stream=False, **body)
    assert whole["logprobs"] == found


def test_equal_texts_count_alike(http):
    """Case 42: three equal inputs have three times the tokens of one; a window bounds each."""

    def count(texts, **options):
        body = {"model": "tiny", "input": texts, "options": options}
        return http.post("/api/embed", json=body).json()["prompt_eval_count"]

    assert count(["the rest"] * 3) == 3 * count(["the rest"])
    assert count(["a", "word " * 100, "b"], num_ctx=30) <= 90


@pytest.mark.parametrize("route", ["generate", "chat"])
def test_more_than_the_window_holds_before_and_after(http, route):
    """Case 46: a long prompt is answered or refused; a long answer goes on, or ends cleanly."""
    story = "lorem ipsum " * 200
    body = {"model": "tiny", "prompt": story, "messages": [{"role": "user", "content": story}]}
    *_, end = records(http, route, **body, options=GREEDY | {"num_ctx": 128})
    assert end["done"] and end["prompt_truncated"] > 0 and end["prompt_eval_count"] <= 128
    answer = http.post(f"/api/{route}", json=body | {"truncate": False, "shift": False})
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("the prompt is longer than the context length")
    body = {"model": "tiny", "prompt": "the", "messages": [{"role": "user", "content": "the"}]}
    *_, end = records(http, route, **body, options=GREEDY | {"num_predict": 300, "num_ctx": 64})
    assert (end["eval_count"], end["done_reason"]) == (300, "length")


@pytest.mark.parametrize("route", ["generate", "chat"])
def test_histories_do_not_mix(http, app, route):
    """Case 47: two at a time, two turns each, every one with its own past."""

    def talk(client, word):
        body = {"model": "tiny", "options": GREEDY, "stream": False}
        if route == "generate":
            (first,) = records(client, route, prompt=word, **body)
            (second,) = records(client, route, prompt="and", context=first["context"], **body)
            return first["response"], second["response"], second["context"]
        turns = [{"role": "user", "content": word}]
        (first,) = records(client, route, messages=turns, **body)
        turns += [first["message"], {"role": "user", "content": "and"}]
        (second,) = records(client, route, messages=turns, **body)
        return first["message"], second["message"]

    words = ["the rest is sand", "in an instant", "on and on"]
    alone = {word: talk(http, word) for word in words}
    told = {}

    def work(word):
        with httpx.Client(
            transport=httpx.WSGITransport(app), base_url="http://localhost"
        ) as client:
            told[word] = talk(client, word)

    at_once(work, words)
    assert told == alone and len({json.dumps(one) for one in alone.values()}) == len(words)


def test_one_more_than_there_are_places(tiny, monkeypatch):
    """Case 48: OLLAMA_NUM_PARALLEL and one more, three chats each: all of them are complete."""
    monkeypatch.setenv("OLLAMA_NUM_PARALLEL", "2")
    service = Service.default(local_files=True)
    transport = httpx.WSGITransport(create_app(service))
    ends = []

    def work(number):
        with httpx.Client(transport=transport, base_url="http://localhost") as client:
            for turn in range(3):
                said = [{"role": "user", "content": f"the {'abc'[number]} {turn}"}]
                body = {"model": str(tiny), "messages": said, "options": GREEDY}
                ends.append(records(client, "chat", **body)[-1])

    at_once(work, range(3))
    service.close()
    assert len(ends) == 9 and all(end["eval_count"] == 12 for end in ends)


def at_once(work, each):
    threads = [threading.Thread(target=work, args=(one,)) for one in each]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
