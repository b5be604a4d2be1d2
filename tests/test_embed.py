"""A text as one vector: what the float64 forward says its tokens become, pooled."""

import threading

import numpy as np
import pytest
import torch

import refollama
from refollama.errors import Abandoned, BadRequest, RefollamaError, Stopping, UnsupportedModel
from refollama.loaded import load_file
from refollama.models.vectors import pool, unit
from refollama.options import Options
from tests import oracle_llama
from tests.exactness import same
from tests.tiny import write_model

TEXT = "the rest is on the sand and then"


@pytest.fixture
def llm(tiny):
    with refollama.load(tiny) as model:
        yield model


def states(path, ids):
    """What each token becomes, normed, (T, d_model) float64: the output matrix is the identity."""
    weights, config = oracle_llama.read(path)
    weights["output.weight"] = np.eye(weights["token_embd.weight"].shape[1])
    return torch.tensor(oracle_llama.forward(weights, config, np.array(ids)))


@pytest.mark.parametrize(
    ("claims", "judge"),
    [
        ({}, lambda rows: rows[-1]),
        ({"llama.pooling_type": 0}, lambda rows: rows[-1]),
        ({"llama.pooling_type": 1}, lambda rows: sum(rows) / len(rows)),
        ({"llama.pooling_type": 2}, lambda rows: rows[0]),
        ({"llama.pooling_type": 3}, lambda rows: rows[-1]),
    ],
)
def test_each_pooling_is_that_of_the_float64_forward(tmp_path, claims, judge):
    path = write_model(tmp_path / "m.gguf", claims=claims)
    with refollama.load(path) as llm:
        expected = judge(states(path, llm.tokens(TEXT))).float()
        found = llm.embed(TEXT)
    assert found.shape == (64,) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_model_that_ranks_is_another_model(tmp_path):
    path = write_model(tmp_path / "m.gguf", claims={"llama.pooling_type": 4})
    with pytest.raises(UnsupportedModel, match=r"pooling_type is 4"):
        load_file(path)


def test_a_real_model(oracles):
    path = oracles / "stories260K.gguf"
    with refollama.load(path) as llm:
        ids = llm.tokens("Once upon a time, there was a little girl")
        expected = states(path, ids)[-1].float()
        found = llm.embed("Once upon a time, there was a little girl")
    assert torch.cosine_similarity(found, expected, dim=0) > 1 - 1e-6


def test_many_texts_are_what_each_is_alone(llm):
    texts = [TEXT, "a", "", "the sand"]
    rows = llm.embed(texts)
    assert rows.shape == (4, 64)
    assert all(torch.equal(row, llm.embed(text)) for row, text in zip(rows, texts, strict=True))
    assert llm.embed([]).shape == (0, 64)


def test_it_is_the_last_row_of_hidden_however_it_is_divided(llm, monkeypatch):
    whole = llm.embed(TEXT)
    assert torch.equal(whole, llm.hidden(llm.tokens(TEXT))[-1])
    monkeypatch.setattr("refollama.loaded.AT_ONCE", 3)
    assert same(llm.embed(TEXT), whole)


def test_a_long_text_is_cut_at_its_end(llm):
    ids = llm.tokens(TEXT)
    for n_ctx in range(2, len(ids) + 1):
        found = llm.embed(TEXT, options={"num_ctx": n_ctx})
        assert torch.equal(found, llm.hidden(ids[:n_ctx])[-1])
    endless = "the " * 1_000_000  # far beyond the trained 128 tokens
    assert torch.equal(llm.embed(endless), llm.embed("the " * 200))


def test_an_end_token_that_the_model_wants_is_not_cut(tmp_path):
    """Where the file asks for EOS, a model that pools its last token was trained on just that."""
    keys = {"tokenizer.ggml.add_eos_token": True}
    with refollama.load(write_model(tmp_path / "m.gguf", keys=keys)) as llm:
        ids = llm.fitting(TEXT, Options().updated({"num_ctx": 5}))
        plain = llm.tokenizer.encode(TEXT, special=True)
        assert ids == [1, *plain[:3], 2]
        with pytest.raises(BadRequest, match="after truncation"):
            llm.embed("a", options={"num_ctx": 2})


@pytest.mark.parametrize("n_ctx", [0, 1])
def test_nothing_left_after_the_cut_is_an_error(llm, n_ctx):
    with pytest.raises(BadRequest, match="^input after truncation exceeds maximum context length"):
        llm.embed("a", options={"num_ctx": n_ctx})


def test_options_that_turn_positions_count(llm):
    assert not torch.equal(llm.embed(TEXT, options={"rope_frequency_scale": 0.5}), llm.embed(TEXT))
    with pytest.raises(BadRequest, match="num_gqa"):
        llm.embed(TEXT, options={"num_gqa": 7})


def test_without_a_first_token_an_empty_text_is_an_error(tmp_path):
    keys = {"tokenizer.ggml.add_bos_token": False}
    with (
        refollama.load(write_model(tmp_path / "m.gguf", keys=keys)) as llm,
        pytest.raises(BadRequest, match="empty"),
    ):
        llm.embed("")


def test_closing_and_going_away_end_it_in_the_middle(llm, monkeypatch):
    monkeypatch.setattr("refollama.loaded.AT_ONCE", 1)
    ids, asked = llm.tokens(TEXT), []

    def gone():
        asked.append(True)
        return len(asked) == 3

    with pytest.raises(Abandoned):
        llm.vector(ids, Options(), gone)
    assert len(asked) == 3
    llm.vector(ids, Options())  # the next one finds the way free
    with pytest.raises(Stopping):
        llm.vector(ids, Options(), lambda: bool(llm.close()))


def test_from_many_threads_and_beside_an_answer_it_is_the_same(llm):
    alone, found = llm.embed(TEXT), []
    stream = llm.stream("the", options={"num_predict": 50, "temperature": 0})
    next(stream)
    threads = [threading.Thread(target=lambda: found.append(llm.embed(TEXT))) for _ in range(6)]
    for thread in threads:
        thread.start()
    list(stream)
    for thread in threads:
        thread.join()
    assert len(found) == 6 and all(torch.equal(one, alone) for one in found)


# ── from many numbers to few ──────────────────────────────────────────────────────────────────


def test_unit_vectors():
    vector = torch.tensor([3.0, 4.0, 12.0])
    assert unit(vector).tolist() == pytest.approx([3 / 13, 4 / 13, 12 / 13])
    assert unit(vector, 2).tolist() == pytest.approx([0.6, 0.8])
    assert torch.equal(unit(vector, 99), unit(vector))
    assert unit(torch.zeros(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["last", "mean", "cls"])
def test_what_is_no_number_is_an_error(bad, kind):
    with pytest.raises(RefollamaError, match="NaN or Inf"):
        pool(torch.full((1, 4), bad), kind)
