"""Real weights: the published story, byte for byte, through the library and over HTTP.

And the way of a model through the whole house: from a registry, into a chat, to a registry.

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


def test_from_a_registry_into_a_chat_and_back_to_a_registry(oracles, story, tmp_path):
    """Two servers that know each other by the registry alone; the second one answers."""
    import httpx

    from refollama.messages import Create, Push
    from refollama.server.app import create_app
    from refollama.service import Service
    from refollama.shelf import LoadedModels
    from refollama.store import Name, Store
    from tests.registry.fake import FakeRegistry

    with FakeRegistry() as registry:
        name = f"{registry.host}/me/storyteller"
        first = Service(Store(tmp_path / "first"), LoadedModels(), local_files=True)
        weights = oracles / "stories260K.gguf"
        template = 'TEMPLATE "{{ .Prompt }}"'
        list(first.create(Create(name, f"FROM {weights}\n{template}\nPARAMETER temperature 0\n")))
        list(first.push(Push(name, insecure=True)))
        first.close()

        second = Service(Store(tmp_path / "second"), LoadedModels(), local_files=False)
        transport = httpx.WSGITransport(create_app(second))
        with httpx.Client(transport=transport, base_url="http://localhost") as client:
            asked = {"model": name, "insecure": True, "stream": False}
            assert client.post("/api/pull", json=asked).json() == {"status": "success"}
            said = [{"role": "user", "content": "Once upon a time"}]
            options = {"repeat_penalty": 1, "num_predict": 40}
            body = {"model": name, "messages": said, "options": options, "stream": False}
            answer = client.post("/api/chat", json=body).json()["message"]["content"]
            assert story.startswith("Once upon a time" + answer) and len(answer) > 100

            copied = {"source": name, "destination": f"{registry.host}/you/storyteller"}
            client.post("/api/copy", json=copied)
            asked["model"] = copied["destination"]
            assert client.post("/api/push", json=asked).json() == {"status": "success"}
        second.close()
        assert second.store.manifests.read(Name.parse(name)).manifest.layers
        there = {place: json.loads(data) for (place, _), data in registry.manifests.items()}
        assert there["me/storyteller"]["layers"] == there["you/storyteller"]["layers"]
