"""Numbers instead of text: log-probabilities, hidden states, and what an answer notes of itself."""

import numpy as np
import pytest
import torch

import refollama
from refollama.errors import BadRequest, PromptTooLong
from tests import oracle_llama
from tests.exactness import same
from tests.tiny import TOKENS

TEXT = "the rest is on the sand and then"
GREEDY = {"temperature": 0, "repeat_penalty": 1, "num_predict": 20}


@pytest.fixture
def llm(tiny):
    with refollama.load(tiny) as model:
        yield model


def judged(path, ids):
    """Log-probabilities of everything after each token, by the float64 forward.  (T, V)"""
    logits = torch.tensor(oracle_llama.from_file(path, np.array(ids)))
    return logits.log_softmax(-1)


def test_score_is_the_log_probability_of_each_token_given_those_before(llm, tiny, measured):
    ids = llm.tokens(TEXT)
    expected = judged(tiny, ids)[torch.arange(len(ids) - 1), ids[1:]].float()
    found = llm.score(TEXT)
    assert found.shape == (len(ids) - 1,) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert torch.equal(llm.score(ids), found)
    measured("models", "score of a text", "float64", (found - expected).abs().max(), len(found))


def test_a_long_text_is_scored_in_parts_that_do_not_show(llm, monkeypatch):
    """To the last bit: the parts are matters of memory alone."""
    whole = llm.score(TEXT), llm.logits(llm.tokens(TEXT)), llm.hidden(llm.tokens(TEXT), 1)
    monkeypatch.setattr("refollama.loaded.AT_ONCE", 3)
    parts = llm.score(TEXT), llm.logits(llm.tokens(TEXT)), llm.hidden(llm.tokens(TEXT), 1)
    assert all(same(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("text", ["", []])
def test_nothing_has_no_score(llm, text):
    assert llm.score(text).shape == (0,)


def test_a_span_of_logits_is_cut_from_all_of_them(llm):
    ids = llm.tokens(TEXT)
    every = llm.logits(ids)
    assert every.shape == (len(ids), len(TOKENS))
    assert same(llm.logits(ids, 2, 5), every[2:5])
    assert same(llm.logits(ids, -1), every[-1:])


def test_hidden_states_layer_by_layer(llm):
    """The first is the embedding; normed, the last is what the output matrix turns into logits."""
    ids = llm.tokens(TEXT)
    states = [llm.hidden(ids, layer) for layer in range(3)]
    assert all(state.shape == (len(ids), 64) for state in states)
    assert torch.equal(states[0], llm.net.token_embd(torch.tensor(ids)))
    seen = []
    hook = llm.net.get_submodule("blk.0").register_forward_hook(
        lambda module, args, out: seen.append(out[0])
    )
    llm.logits(ids)
    hook.remove()
    assert torch.equal(states[1], seen[0])
    normed = llm.net.output_norm(states[2])
    assert torch.equal(llm.hidden(ids), normed)
    assert torch.equal(llm.net.output(normed), llm.logits(ids))


def test_what_cannot_be_scored_is_said(llm):
    with pytest.raises(BadRequest, match=r"layer 3 .* 0 … 2"):
        llm.hidden([1], 3)
    with pytest.raises(BadRequest, match="layer -1"):
        llm.hidden([1], -1)
    with pytest.raises(BadRequest, match="vocabulary"):
        llm.score([1, 10**6])
    with pytest.raises(PromptTooLong, match=r"129 tokens.* 128"):
        llm.score([1] * 129)


# ── what an answer notes of itself ────────────────────────────────────────────────────────────


@pytest.mark.parametrize("options", [GREEDY, GREEDY | {"temperature": 1.5, "seed": 4, "top_k": 9}])
def test_logprobs_are_those_of_the_untempered_model(llm, options):
    options = options | {"f16_kv": False}
    _, record = llm.generate("the", options=options, logprobs=2)
    ids = list(record.context)
    start = len(ids) - record.stats.eval_count
    every = llm.logits(ids).log_softmax(-1)[start - 1 : -1]
    drawn = record.logprobs[: record.stats.eval_count]
    assert [one.id for one in drawn] == ids[start:]
    found = torch.tensor([one.logprob for one in drawn])
    expected = every[torch.arange(len(drawn)), ids[start:]]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for one, row in zip(drawn, every, strict=True):
        assert [top.id for top in one.top] == row.topk(2).indices.tolist()


def test_the_bytes_of_the_logprobs_are_the_answer(llm):
    text, record = llm.generate("the", options=GREEDY | {"temperature": 2, "seed": 1}, logprobs=0)
    whole = b"".join(one.bytes for one in record.logprobs[: record.stats.eval_count])
    assert whole.decode(errors="replace") == text
    assert all(one.token == one.bytes.decode(errors="replace") for one in record.logprobs)


def test_the_end_token_has_a_logprob_too(llm):
    """A model that wants nothing but to end; the three other tokens share what is left."""

    def only_the_end(module, args, out):
        out = torch.full_like(out, -100.0)
        out[..., 2], out[..., 3:6] = 1.0, 0.0
        return out

    llm.net.output.register_forward_hook(only_the_end)
    text, record = llm.generate("the", options=GREEDY, logprobs=1)
    assert (text, record.done_reason, record.stats.eval_count) == ("", "stop", 0)
    (end,) = record.logprobs
    assert (end.id, end.token, end.bytes) == (2, "</s>", b"</s>")
    assert end.logprob == pytest.approx(1 - np.log(np.e + 3)) and end.top[0].id == 2


def test_without_asking_nothing_is_noted(llm):
    assert llm.generate("the", options=GREEDY).record.logprobs == ()


def test_the_stages_of_every_token_can_be_watched(llm):
    seen = []
    text, record = llm.generate("the", options=GREEDY, on_stage=lambda *args: seen.append(args))
    draws = [candidates.ids.tolist() for name, candidates in seen if name == "draw"]
    assert [id for (id,) in draws] == list(record.context[-record.stats.eval_count :])
    streamed: list[tuple[str, object]] = []
    again = list(llm.stream("the", options=GREEDY, on_stage=lambda *args: streamed.append(args)))
    assert "".join(again) == text and [name for name, _ in streamed] == [name for name, _ in seen]
