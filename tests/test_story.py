"""Real weights: the published story, byte for byte, through the library and over HTTP."""

import json

import pytest

import refollama

GREEDY = {"temperature": 0, "repeat_penalty": 1}


@pytest.fixture(scope="module")
def story(oracles):
    return (oracles / "stories260K.txt").read_text()


@pytest.fixture(scope="module")
def llm(oracles):
    model = refollama.load(oracles / "stories260K.gguf")
    yield model
    model.close()


@pytest.mark.parametrize("f16_kv", [True, False])
def test_from_nothing_but_bos(llm, story, f16_kv):
    options = GREEDY | {"num_predict": 201, "f16_kv": f16_kv}
    text, record = llm.generate("", options=options)
    assert text == story
    assert record.stats.prompt_eval_count == 1 and record.stats.eval_count == 201
    assert "".join(llm.stream("", options=options)) == story


@pytest.mark.parametrize("prefix", ["Once upon a time", "Once upon a time, there was a little"])
def test_over_http_from_a_prefix(oracles, story, prefix):
    import httpx

    from refollama.server.app import create_app
    from refollama.service import Service

    service = Service.default(local_files=True)
    transport = httpx.WSGITransport(create_app(service))
    count = 201 - (len(refollama.load_tokenizer(oracles / "stories260K.gguf").encode(prefix)))
    body = {
        "model": str(oracles / "stories260K.gguf"),
        "prompt": prefix,
        "raw": True,
        "options": GREEDY | {"num_predict": count},
    }
    with httpx.Client(transport=transport, base_url="http://localhost") as client:
        whole = client.post("/api/generate", json=body | {"stream": False}).json()
        lines = client.post("/api/generate", json=body).text.splitlines()
    assert prefix + whole["response"] == story
    assert "".join(json.loads(line)["response"] for line in lines) == whole["response"]
    service.close()
