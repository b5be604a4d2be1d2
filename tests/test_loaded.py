"""A loaded model as a notebook sees it."""

import contextlib
import threading
import types
from pathlib import Path

import pytest
import torch

import refollama
from refollama.engine.generate import generate
from refollama.errors import (
    BadOption,
    BadRequest,
    FormatError,
    ModelNotFound,
    NotFound,
)
from refollama.loaded import load_file
from refollama.options import Options
from tests.tiny import TOKENS, write_model

GREEDY = {"temperature": 0, "repeat_penalty": 1, "num_predict": 20}


@pytest.fixture
def llm(tiny):
    model = refollama.load(tiny)
    yield model
    model.close()


def test_load_takes_a_path_a_text_and_a_name(tiny):
    from refollama.create import create
    from refollama.messages import Create
    from refollama.store import Store

    ask = Create("small", f"FROM {tiny}\nPARAMETER num_predict 3\nPARAMETER temperature 0\n")
    list(create(Store.default(), ask, local_files=True))
    texts = set()
    for source in (tiny, str(tiny), "small", "small:latest"):
        llm = refollama.load(source)
        texts.add(llm.generate("the", options={"num_predict": 3, "temperature": 0}).text)
        llm.close()
    assert len(texts) == 1
    llm = refollama.load("small")
    stats = llm.generate("the").record.stats
    assert stats is not None and stats.eval_count == 3  # its Modelfile says so
    llm.close()


@pytest.mark.parametrize(
    ("source", "error"),
    [("nope", ModelNotFound), ("./nope.gguf", NotFound), (Path("/no/where"), NotFound)],
)
def test_what_is_not_there_is_said(source, error):
    with pytest.raises(error, match="nope|where"):
        refollama.load(source)


def test_a_model_that_is_dropped_frees_its_threads_and_memory(tiny):
    import gc
    import weakref

    before = threading.active_count()
    with refollama.load(tiny) as llm:
        llm.generate("the", options=GREEDY)
    dropped = refollama.load(tiny)
    next(dropped.stream("the", options=GREEDY | {"num_predict": -1}))
    net = weakref.ref(dropped.net)
    del dropped
    gc.collect()
    assert net() is None and threading.active_count() == before


def test_streamed_joined_equals_generated(llm):
    text, record = llm.generate("the", options=GREEDY)
    assert "".join(llm.stream("the", options=GREEDY)) == text
    assert record.done and record.stats.eval_count == 20
    assert record.context == (*llm.tokens("the"), *record.context[2:])


def test_the_answer_is_what_the_textbook_loop_draws(llm):
    """Tokens by the loop, text by decoding all at once: none of the streaming takes part."""
    prompt = llm.tokens("the")
    options = Options().updated(GREEDY)
    drawn = list(generate(llm.net, prompt, options, eos=llm.tokenizer.eos_ids))
    before, whole = llm.tokenizer.decode(prompt), llm.tokenizer.decode([*prompt, *drawn])
    assert llm.generate("the", options=GREEDY).text == whole[len(before) :]


@contextlib.contextmanager
def scripted(prompt, ids):
    """An engine that says what it is told to."""
    said = Said(ids)
    said.sequence = types.SimpleNamespace(
        prompt=prompt, likely=[], started=1, prompt_read=2, cached=0, dropped=0
    )
    yield said


class Said(list[int]):
    sequence: types.SimpleNamespace


def test_context_holds_what_was_shown_and_no_more(llm, monkeypatch):
    """Stop strings that begin anywhere, in the middle of tokens too."""
    said = " the rest is on the sand"
    ids = llm.tokenizer.encode(said, continues=True)
    assert len(ids) < len(said) - 5  # so that many cuts are inside of a token
    monkeypatch.setattr(llm, "start", lambda tokens, options, extras: scripted(tokens, ids))
    for start in range(len(said)):
        text, record = llm.generate("a", options={"stop": [said[start:]]})
        assert text == said[:start] and record.done_reason == "stop"
        assert llm.tokenizer.decode(record.context) == "a" + text


@pytest.mark.parametrize("num_batch", [1, 3, 512])
@pytest.mark.parametrize("f16_kv", [True, False])
def test_batches_of_the_prompt_do_not_change_the_answer(llm, num_batch, f16_kv):
    options = GREEDY | {"f16_kv": f16_kv}
    expected = llm.generate("the rest and the", options=options).text
    assert llm.generate("the rest and the", options=options | {"num_batch": num_batch}).text == (
        expected
    )


def test_logits_are_those_of_the_net_and_need_no_gradient(llm):
    logits = llm.logits([1, 290, 291, 5])
    assert logits.shape == (4, len(TOKENS)) and logits.dtype == torch.float32
    assert not logits.requires_grad
    one = llm.net(torch.tensor([[1]]), torch.tensor([[0]]), llm.net.new_cache().rows([0], 1))
    torch.testing.assert_close(logits[0], one[0])


def test_greedy_answers_follow_the_logits(llm):
    """Each token of a greedy answer is the best one by `logits` of all before it."""
    _, record = llm.generate("the", options=GREEDY | {"f16_kv": False})
    ids = list(record.context)
    best = llm.logits(ids).argmax(-1).tolist()
    assert ids[2:] == best[1:-1]


@pytest.mark.parametrize("ids", [[len(TOKENS)], [-1], [10**12]])
def test_ids_that_do_not_exist_are_refused(llm, ids):
    with pytest.raises(BadRequest, match="vocabulary"):
        llm.logits(ids)


def test_a_prompt_that_is_too_long_is_cut_and_the_record_says_so(llm):
    text, record = llm.generate("q" * 199, options=GREEDY)
    assert record.stats.prompt_truncated == 126 and record.stats.prompt_eval_count == 75
    whole = llm.tokens("q" * 199)
    assert record.context[:75] == (1, *whole[-74:])  # BOS stays
    assert "".join(llm.stream("q" * 199, options=GREEDY)) == text


def test_closing_the_iterator_stops_the_engine(llm):
    pieces = llm.stream("the", options=GREEDY | {"num_predict": -1})
    next(pieces)
    pieces.close()
    assert llm.generate("the", options=GREEDY).text


def test_a_vocabulary_of_another_size_is_refused(tmp_path):
    claims = {"tokenizer.ggml.tokens": TOKENS[:-1]}
    path = write_model(tmp_path / "m.gguf", claims=claims | columns(len(TOKENS) - 1))
    with pytest.raises(FormatError, match=f"{len(TOKENS) - 1} tokens.*{len(TOKENS)} rows"):
        load_file(path)


def columns(count):
    from refollama.weights.gguf import Typed, ValueType
    from tests.tiny import SCORES, TYPES

    return {
        "tokenizer.ggml.scores": Typed(SCORES[:count], ValueType.FLOAT32),
        "tokenizer.ggml.token_type": Typed(TYPES[:count], ValueType.INT32),
    }


@pytest.mark.parametrize("f16_kv", [True, False])
def test_f16_kv_decides_what_the_cache_holds(llm, f16_kv):
    """The option is the only way in: two requests, two caches beside the same weights."""
    llm.generate("the", options=GREEDY | {"f16_kv": not f16_kv})
    llm.generate("the", options=GREEDY | {"f16_kv": f16_kv})
    *_, engine = llm._engines.values()
    kinds = {tensor.dtype for tensor in (*engine._cache.keys, *engine._cache.values)}
    assert kinds == {torch.float16 if f16_kv else torch.float32}
    assert engine.net is llm.net and len(llm._engines) == 2


def test_a_num_gqa_that_the_file_contradicts_is_refused(llm):
    """The tiny model has four query heads and two key heads."""
    for fits in (0, 1, 2):
        llm.generate("the", options={"num_gqa": fits, "num_predict": 1})
    with pytest.raises(BadOption, match=r"'num_gqa' is 8, but this model has 2 query heads"):
        llm.generate("the", options={"num_gqa": 8})


def test_idle_engines_make_room_for_other_kinds_of_memory(llm):
    for base in range(2000, 2010):
        llm.generate("the", options=GREEDY | {"rope_frequency_base": base, "num_predict": 1})
    assert len(llm._engines) == 2
