"""`format` over HTTP: the document's JSON mode, today's schemas, and what is refused.

Judges: `json`, `jsonschema`, and the official client.
"""

import json
from pathlib import Path

import httpx
import jsonschema
import ollama
import pytest

from tests.server.conftest import GREEDY

HOT = {"temperature": 1.5, "seed": 1, "num_predict": 100}
COLOURS = {
    "type": "object",
    "properties": {"when": {"enum": ["day", "the night"]}, "sky": {"type": "integer"}},
    "required": ["when"],
    "additionalProperties": False,
}
HI = [{"role": "user", "content": "hi"}]


def whole(records):
    return "".join(record["response"] for record in records)


def test_json_mode_as_in_the_document(ask):
    said = "What color is the sky at different times of the day? Respond using JSON"
    body = {"model": "tiny", "prompt": said, "format": "json", "stream": False}
    records = [record for s in range(8) for record in ask(**body, options=HOT | {"seed": s})]
    whole = [record["response"] for record in records if record["done_reason"] == "stop"]
    assert whole and all(isinstance(json.loads(text), dict) for text in whole)


@pytest.mark.parametrize("stream", [True, False])
def test_a_schema(ask, stream):
    for seed in range(5):
        records = ask(
            model="tiny", prompt="the", format=COLOURS, stream=stream, options=HOT | {"seed": seed}
        )
        if records[-1]["done_reason"] == "stop":
            jsonschema.validate(json.loads(whole(records)), COLOURS)
    assert records[-1]["done_reason"] == "stop"


@pytest.mark.parametrize("format", [None, "", "absent"])
def test_no_format_changes_nothing(ask, format):
    body = {} if format == "absent" else {"format": format}
    plain = ask(model="tiny", prompt="the", options=GREEDY)
    assert whole(ask(model="tiny", prompt="the", options=GREEDY, **body)) == whole(plain)


WRONG = "format must be json or a JSON schema"
REFUSED = [
    ("yaml", WRONG),
    ("JSON", WRONG),
    (1, WRONG),
    (True, WRONG),
    (False, WRONG),
    ([], WRONG),
    ('{"type": "object"}', WRONG),
    ({"not": {}}, 'this JSON schema cannot be enforced: Unimplemented keys: ["not"]'),
    ({"type": "object", "minProperties": 4}, "this JSON schema cannot be enforced: minProperties"),
    ({"$ref": "#"}, "this model cannot write what format asks for"),
]


@pytest.mark.parametrize(("format", "sentence"), REFUSED, ids=str)
@pytest.mark.parametrize("route", ["generate", "chat"])
def test_another_format_is_refused(http, route, format, sentence):
    said = {"prompt": "a"} if route == "generate" else {"messages": HI}
    response = http.post(f"/api/{route}", json={"model": "tiny", "format": format} | said)
    assert response.status_code == 400 and response.json()["error"].startswith(sentence)


def test_a_wrong_format_is_refused_before_a_model_is_loaded(http, service):
    for prompt in ("", "a"):
        body = {"model": "tiny", "prompt": prompt, "format": "yaml"}
        assert http.post("/api/generate", json=body).status_code == 400
    assert service.ps() == []


def test_an_empty_prompt_loads_whatever_the_format(ask):
    (record,) = ask(model="tiny", prompt="", format="json", stream=False)
    assert record["done_reason"] == "load" and record["response"] == ""


def test_a_chat_has_a_form_too(http):
    body = {"model": "tiny", "messages": HI, "format": COLOURS, "options": HOT, "stream": False}
    record = http.post("/api/chat", json=body).json()
    assert record["done_reason"] == "stop"
    jsonschema.validate(json.loads(record["message"]["content"]), COLOURS)


def test_the_official_client(app):
    client = ollama.Client("http://localhost", transport=httpx.WSGITransport(app))
    options = HOT | {"seed": 2}
    answer = client.generate("tiny", "the", format="json", options=options)
    assert isinstance(json.loads(answer.response or ""), dict)
    parts = client.generate("tiny", "the", format=COLOURS, options=options, stream=True)
    jsonschema.validate(json.loads("".join(part.response or "" for part in parts)), COLOURS)
    talk = client.chat("tiny", HI, format=COLOURS, options=options)
    jsonschema.validate(json.loads(talk.message.content or ""), COLOURS)


def test_a_form_needs_no_more_than_the_setup_installs():
    """The library is a dependency of the program; the judge is one of the tests."""
    setup = (Path(__file__).parents[2] / "setup.cfg").read_text()
    program, _, tests = setup.partition("[options.extras_require]")
    assert "llguidance>=" in program and "jsonschema>=" in tests
