"""POST /api/embed and /api/embeddings, as the documents, Ollama's own tests and its client ask."""

import contextlib
import json
import math

import pytest
import torch

import refollama
from tests.server.process import running
from tests.tiny import write_model

LONG = "why is the sky blue " * 60  # 300 words


def post(http, path, status=200, **body):
    response = http.post(path, json={"model": "tiny"} | body)
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/json; charset=utf-8"
    return response.json()


@pytest.fixture
def embed(http):
    return lambda status=200, **body: post(http, "/api/embed", status, **body)


@pytest.fixture
def embeddings(http):
    return lambda status=200, **body: post(http, "/api/embeddings", status, **body)


@pytest.fixture
def llm(tiny):
    with refollama.load(tiny) as model:
        yield model


def length(row):
    return math.sqrt(math.fsum(x * x for x in row))


# ── /api/embeddings ───────────────────────────────────────────────────────────────────────────


def test_embeddings_gives_the_vector_as_the_model_made_it(embeddings, llm):
    """The document's example: no template, no length of 1, each number a float32 written whole."""
    answer = embeddings(prompt="Here is an article about llamas...")
    assert list(answer) == ["embedding"]
    expected = llm.embed("Here is an article about llamas...")
    assert torch.equal(torch.tensor(answer["embedding"]), expected)
    assert length(answer["embedding"]) > 1.5


@pytest.mark.parametrize("body", [{}, {"prompt": ""}, {"prompt": None}])
def test_an_empty_prompt_has_an_empty_vector(embeddings, body):
    assert embeddings(**body) == {"embedding": []}


def test_the_template_and_the_system_text_take_no_part(embeddings):
    assert embeddings(model="shy", prompt="the") == embeddings(prompt="the")


# ── /api/embed ────────────────────────────────────────────────────────────────────────────────


def test_embed_gives_rows_of_length_one_in_the_order_of_the_texts(embed, llm):
    texts = ["the sand", "a", "the"]
    answer = embed(input=texts)
    assert answer["model"] == "tiny"
    for row, text in zip(answer["embeddings"], texts, strict=True):
        vector = llm.embed(text)
        assert length(row) == pytest.approx(1, abs=1e-6)
        assert row == pytest.approx((vector / vector.norm()).tolist(), abs=1e-6)
    assert answer["prompt_eval_count"] == sum(len(llm.tokens(text)) for text in texts)
    assert answer["total_duration"] >= answer["load_duration"] > 0


def test_one_text_or_a_list_of_one_is_the_same(embed):
    assert embed(input="the")["embeddings"] == embed(input=["the"])["embeddings"]


@pytest.mark.parametrize("body", [{}, {"input": ""}, {"input": []}, {"input": None}])
def test_without_input_the_model_is_loaded(embed, body):
    answer = embed(**body)
    assert answer["embeddings"] == [] and answer["load_duration"] > 0


def test_without_input_and_with_nothing_to_keep_the_model_goes(embed, embeddings, service):
    embed()
    assert [one.name for one in service.ps()] == ["tiny:latest"]
    assert embed(keep_alive=0)["embeddings"] == [] and service.ps() == []
    embed(input="the", keep_alive="1h")
    assert len(service.ps()) == 1
    assert embeddings(keep_alive=0) == {"embedding": []} and service.ps() == []
    assert len(embed(input="the", keep_alive=0)["embeddings"]) == 1 and service.ps() == []


def test_fewer_dimensions_are_normalised_again(embed):
    whole = embed(input="the")["embeddings"][0]
    for dimensions in (1, 5, 64, 1000):
        (row,) = embed(input="the", dimensions=dimensions)["embeddings"]
        part = whole[:dimensions]
        assert row == pytest.approx([x / length(part) for x in part], abs=1e-6)


def test_a_batch_with_a_long_text_in_the_middle_is_cut(embed):
    """runEmbedTruncation."""
    options = {"num_ctx": 30}
    answer = embed(input=["short", LONG, "short"], options=options)
    assert len(answer["embeddings"]) == 3 and answer["prompt_eval_count"] <= 90
    one = embed(input="the sand")["prompt_eval_count"]
    assert embed(input=["the sand"] * 3)["prompt_eval_count"] == 3 * one


@pytest.mark.parametrize("texts", [LONG, [LONG], ["a", LONG, "a"]])
def test_a_long_text_that_may_not_be_cut_is_refused(embed, texts, service, monkeypatch):
    """runEmbedStatusCode; before any work is put into its neighbours."""
    monkeypatch.setattr("refollama.loaded.LoadedModel.vector", lambda *_: pytest.fail("work"))
    answer = embed(400, input=texts, truncate=False, options={"num_ctx": 10})
    assert answer["error"].startswith("the input length exceeds the context length")


def test_a_text_that_just_fits_need_not_be_cut(embed, llm):
    exact = len(llm.tokens("the sand"))
    embed(input="the sand", truncate=False, options={"num_ctx": exact})
    embed(400, input="the sand", truncate=False, options={"num_ctx": exact - 1})


def test_a_narrow_window_sees_the_beginning(embed, llm):
    """runAllMiniLMEmbedTruncate, whose model puts two tokens around a text, ours one."""
    first = llm.tokenizer.decode(llm.tokens("the sand")[1:2])
    cut = embed(input="the sand", options={"num_ctx": 2})
    assert cut["embeddings"] == embed(input=first)["embeddings"]
    for n_ctx in (0, 1):
        answer = embed(400, input="the sand", options={"num_ctx": n_ctx})
        assert answer["error"].startswith("input after truncation exceeds maximum context length")


@pytest.mark.parametrize("words", [256, 512, 800])
def test_large_inputs_have_one_row_each(embed, words):
    """runEmbedLargeInput."""
    (row,) = embed(input="word " * words)["embeddings"]
    assert len(row) == 64 and any(row)


@pytest.mark.parametrize("path", ["/api/embed", "/api/embeddings"])
@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"model": ""}, 400, "model is required"),
        ({"model": "nope"}, 404, "try pulling it first"),
        ({"model": "../x"}, 404, "GGUF"),
        ({"model": 7}, 400, "model must be a string"),
        ({"options": {"num_ctx": "x"}}, 400, "num_ctx"),
        ({"options": {"nope": 1}, "strict": True}, 400, "nope"),
        ({"options": []}, 400, "options must be an object"),
    ],
)
def test_errors_of_both(http, path, body, status, said):
    texts = {"input": "a", "prompt": "a"}
    assert said in post(http, path, status, **texts | body)["error"]


@pytest.mark.parametrize("bad", [7, {}, True, [7], ["a", None], [["a"]]])
def test_input_of_another_kind(embed, bad):
    if bad == {}:
        bad = {"a": 1}
    assert embed(400, input=bad)["error"].startswith("invalid input type")


def test_negative_dimensions_are_refused(embed):
    assert "dimensions" in embed(400, input="a", dimensions=-1)["error"]


def test_numbers_that_are_none_are_an_error(embed, monkeypatch):
    nothing = lambda net, ids: iter([torch.full((1, 64), torch.nan)])  # noqa: E731
    monkeypatch.setattr("refollama.loaded._states", nothing)
    assert embed(500, input="a") == {"error": "embedding contains NaN or Inf values"}


def test_the_place_in_the_queue_is_given_back(embed, service):
    service.max_queue = 1
    for _ in range(3):
        embed(400, input="a", options={"num_ctx": 1})
    with service._place():
        pass


def test_the_official_client(tmp_path, tiny):
    import ollama

    with running(OLLAMA_MODELS=str(tmp_path / "store")) as (url, _):
        with contextlib.closing(ollama.Client(host=url)) as client:
            name = str(tiny)
            batch = client.embed(name, ["the", "a"], options={"num_ctx": 64}, dimensions=8)
            assert [len(row) for row in batch.embeddings] == [8, 8]
            assert batch.model == name and (batch.prompt_eval_count or 0) > 2
            assert len(client.embed(name, "the", truncate=True).embeddings) == 1
            assert len(client.embeddings(name, "the").embedding) == 64
            assert list(client.embeddings(name, "").embedding) == []
            with pytest.raises(ollama.ResponseError, match="context length") as caught:
                client.embed(name, "the " * 300, truncate=False)
            assert caught.value.status_code == 400
        with refollama.Client(url) as ours:
            assert ours.embed(name, ["the", "a"], dimensions=8) == batch.model_dump()["embeddings"]
            assert len(ours.embeddings(name, "the")) == 64


def test_bodies_are_read_as_leniently_as_all_others(http):
    raw = b'{"MODEL": "tiny", "Input": ["the"], "truncate": null, "what": 1} and more'
    response = http.post("/api/embed", content=raw, headers={"Content-Type": "x/y"})
    assert len(json.loads(response.content)["embeddings"]) == 1


@pytest.mark.parametrize("ready", [True, False])
def test_a_model_made_for_embeddings_does_nothing_else(http, tmp_path, ready):
    """One whose file says how its vectors are pooled; loading it for an answer is refused too."""
    path = str(write_model(tmp_path / "bert.gguf", keys={"llama.pooling_type": 1}))
    answer = post(http, "/api/embed", model=path, input="a text")
    assert length(answer["embeddings"][0]) == pytest.approx(1)
    said = {"prompt": "hi" * ready, "messages": [{"role": "user", "content": "hi"}] * ready}
    for name in ("generate", "chat"):
        answer = post(http, f"/api/{name}", 400, model=path, **said)
        assert answer == {"error": f'"{path}" does not support {name}'}
