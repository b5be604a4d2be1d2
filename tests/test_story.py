"""Real weights: the published story, byte for byte, through the library and over HTTP.

The published text is 201 tokens with BOS: 200 that are drawn. The next one would be " said".
"""

import json

import pytest

import refollama

GREEDY = {"temperature": 0, "repeat_penalty": 1}
DRAWN = 200


@pytest.fixture(scope="module")
def story(oracles):
    return (oracles / "stories260K.txt").read_text()


@pytest.fixture(scope="module")
def llm(oracles):
    model = refollama.load(oracles / "stories260K.gguf")
    yield model
    model.close()


@pytest.mark.parametrize("f16_kv", [True, False])
def test_from_nothing_but_bos(llm, story, f16_kv, measured):
    options = GREEDY | {"num_predict": DRAWN, "f16_kv": f16_kv}
    text, record = llm.generate("", options=options)
    assert text == story
    measured("models", "stories260K", "published story", "equal", DRAWN)
    assert record.stats.prompt_eval_count == 1 and record.stats.eval_count == DRAWN
    assert len(record.context) == DRAWN + 1
    assert "".join(llm.stream("", options=options)) == story


def test_one_token_more_continues_it(llm, story):
    options = GREEDY | {"num_predict": DRAWN + 1}
    assert llm.generate("", options=options).text == story + " said"


def test_every_token_is_the_best_by_a_float64_forward(llm, story, oracles):
    from tests import oracle_llama

    ids = [1, *llm.tokenizer.encode(story)]
    logits = oracle_llama.from_file(oracles / "stories260K.gguf", ids)
    assert logits.argmax(-1)[:-1].tolist() == ids[1:]


@pytest.mark.parametrize("prefix", ["Once upon a time", "Once upon a time, there was a little"])
def test_over_http_from_a_prefix(oracles, story, prefix):
    import httpx

    from refollama.server.app import create_app
    from refollama.service import Service

    service = Service.default(local_files=True)
    transport = httpx.WSGITransport(create_app(service))
    given = refollama.load_tokenizer(oracles / "stories260K.gguf").encode(prefix)
    body = {
        "model": str(oracles / "stories260K.gguf"),
        "prompt": prefix,
        "raw": True,
        "options": GREEDY | {"num_predict": DRAWN - len(given)},
    }
    with httpx.Client(transport=transport, base_url="http://localhost") as client:
        whole = client.post("/api/generate", json=body | {"stream": False}).json()
        lines = client.post("/api/generate", json=body).text.splitlines()
    assert prefix + whole["response"] == story
    assert "".join(json.loads(line)["response"] for line in lines) == whole["response"]
    service.close()
