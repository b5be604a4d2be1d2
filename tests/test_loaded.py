"""A loaded model as a notebook sees it."""

import contextlib
import copy
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch

import refollama
from refollama.engine.generate import generate
from refollama.engine.sequence import Marks
from refollama.errors import (
    BadOption,
    BadRequest,
    FormatError,
    ModelNotFound,
    NotFound,
    PromptTooLong,
    ServerBusy,
    Stopping,
)
from refollama.loaded import load_file
from refollama.options import Options
from refollama.telling import token_ids
from refollama.text import tokenizer_from
from refollama.weights.gguf import open_gguf
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
    drawn = list(generate(llm.net, prompt, options, Marks(llm.tokenizer.eos_ids)))
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
    items = list.__iter__


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
    _, engine = llm._engines.engines
    kinds = {tensor.dtype for tensor in engine.memory()}
    assert kinds == {torch.float16 if f16_kv else torch.float32}
    assert engine.net is llm.net


def test_a_num_gqa_that_the_file_contradicts_is_refused(llm):
    """The tiny model has four query heads and two key heads."""
    for fits in (0, 1, 2):
        llm.generate("the", options={"num_gqa": fits, "num_predict": 1})
    with pytest.raises(BadOption, match=r"'num_gqa' is 8, but this model has 2 query heads"):
        llm.generate("the", options={"num_gqa": 8})


def test_idle_engines_make_room_for_other_kinds_of_memory(llm):
    for base in range(2000, 2010):
        llm.generate("the", options=GREEDY | {"rope_frequency_base": base, "num_predict": 1})
    assert len(llm._engines.engines) == 4


def test_more_kinds_of_memory_than_are_allowed_are_refused_while_all_are_busy(llm):
    """Each has a thread and a cache, so a client cannot have as many as it has numbers."""
    options = [GREEDY | {"rope_frequency_base": base, "num_predict": -1} for base in range(2, 7)]
    busy = [llm.stream("the", options=each) for each in options[:4]]
    for stream in busy:
        next(stream)
    with pytest.raises(ServerBusy, match="4 other choices of f16_kv, low_vram, adapters and rope"):
        next(llm.stream("the", options=options[4]))
    same = GREEDY | {"rope_frequency_base": 2.0}
    busy[0].close()
    assert llm.generate("the", options=same).text  # its engine is there already
    for stream in busy:
        stream.close()


def test_what_the_file_says_anyway_is_no_other_kind(llm):
    llm.generate("the", options=GREEDY)
    llm.generate("the", options=GREEDY | {"rope_frequency_base": 10000, "low_vram": True})
    llm.generate("the", options=GREEDY | {"rope_frequency_scale": 1})
    if not torch.cuda.is_available():
        assert len(llm._engines.engines) == 1


def test_a_part_that_was_swapped_counts_for_every_rotation(llm):
    options = GREEDY | {"rope_frequency_base": 500.0, "temperature": 1.5, "seed": 3}
    before = llm.generate("the", options=options).text
    llm.net.output = copy.deepcopy(llm.net.output)
    assert llm.generate("the", options=options).text == before
    with torch.no_grad():
        llm.net.output.weight.copy_(llm.net.output.weight.flip(0))
    assert llm.generate("the", options=options).text != before


def test_longrope_chooses_by_the_context_in_use(tmp_path):
    """Trained on 16 first: longer contexts turn by the long divisors, in answers and in scores."""
    keys = {"scaling.type": "longrope", "scaling.original_context_length": 16}
    path = write_model(
        tmp_path / "m.gguf",
        seed=2,
        keys={f"llama.rope.{key}": value for key, value in keys.items()},
        extra={"rope_factors_short.weight": (8,), "rope_factors_long.weight": (8,)},
    )
    seen = {}
    for n_ctx in (16, 17, 64):
        options = GREEDY | {"num_ctx": n_ctx, "num_predict": 1}
        with refollama.load(path, options) as llm:
            likely = llm.generate("the rest", logprobs=0).record.logprobs[0]
            ids = [*llm.tokens("the rest"), likely.id]
            assert float(llm.score(ids)[-1]) == pytest.approx(likely.logprob, abs=2e-3)
            seen[n_ctx] = likely.logprob
    assert seen[16] != seen[17] == seen[64]


def test_scores_are_those_of_the_model_that_answers(tiny):
    with refollama.load(tiny) as plain, refollama.load(tiny, {"rope_frequency_base": 9.0}) as other:
        likely = other.generate("the rest", options=GREEDY, logprobs=0).record.logprobs[0]
        ids = [*other.tokens("the rest"), likely.id]
        assert float(other.score(ids)[-1]) == pytest.approx(likely.logprob, abs=2e-3)
        assert abs(float(plain.score(ids)[-1]) - likely.logprob) > 0.01


def test_bos_ends_an_answer(llm):
    """Where it is drawn, another text would begin."""

    def wants_bos(module, args, out):
        out = torch.full_like(out, -100.0)
        out[..., 1] = 1.0
        return out

    llm.net.output.register_forward_hook(wants_bos)
    text, record = llm.generate("the", options=GREEDY)
    assert (text, record.done_reason, record.stats.eval_count) == ("", "stop", 0)


def test_a_newline_is_spared_where_the_option_says_so(llm):
    """The whole way: the file's line feed, the engine, the sampler."""
    newline = llm.tokenizer.newline_id

    def likes_newlines(module, args, out):
        out = torch.zeros_like(out)
        out[..., newline], out[..., 290] = 5.0, 4.0
        return out

    llm.net.output.register_forward_hook(likes_newlines)
    options = {"temperature": 0, "repeat_penalty": 2.0, "num_predict": 4}
    assert llm.generate("a", options=options | {"penalize_newline": False}).text == "\n" * 4
    assert llm.generate("a", options=options).text != "\n" * 4


def test_a_callback_may_ask_the_model_while_it_is_closed(tiny):
    """Closing waits for the step, and the step for the callback: no lock may be held meanwhile."""
    llm, inside = refollama.load(tiny), threading.Event()

    def watch(stage, candidates):
        inside.set()
        time.sleep(0.05)
        llm.active  # noqa: B018

    stream = llm.stream("the", options=GREEDY | {"num_predict": -1}, on_stage=watch)

    def read():
        with contextlib.suppress(Stopping):
            next(stream)

    threading.Thread(target=read, daemon=True).start()
    assert inside.wait(5)
    closing = threading.Thread(target=llm.close, daemon=True)
    closing.start()
    closing.join(10)
    assert not closing.is_alive()


def test_a_negative_number_of_logprobs_is_refused(llm):
    with pytest.raises(BadRequest, match="logprobs"):
        llm.generate("the", logprobs=-1)


def test_ids_are_checked_before_they_reach_the_engine(llm):
    with pytest.raises(BadRequest, match="vocabulary"):
        llm.start([-1], Options())


def test_a_program_that_ends_in_the_middle_of_an_answer_ends_well(tiny):
    code = (
        "import logging, refollama, sys\n"
        "logging.disable()\n"  # of a machine whose products are not exact
        f"llm = refollama.load({str(tiny)!r})\n"
        "s = llm.stream('the', {'num_predict': -1, 'temperature': 0, 'repeat_penalty': 1})\n"
        "next(s)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_flood_is_refused_before_any_work_with_the_sentence_that_is_said_after(llm):
    """By characters alone, and as `tokens` would refuse it."""
    options = llm.defaults.updated({"num_ctx": 8})
    characters = 8 * 100 * llm.tokenizer.longest
    llm.reader(options).check(characters)
    llm.tokens("q" * characters, options=options)
    more = characters + llm.tokenizer.longest
    said = []
    for refuse in (
        lambda: llm.reader(options).check(more),
        lambda: llm.tokens("q" * more, options=options),
        lambda: llm.chat([{"role": "user", "content": "q" * more}], {"num_ctx": 8}),
    ):
        with pytest.raises(PromptTooLong) as refused:
            refuse()
        said.append(str(refused.value))
    assert set(said) == {
        "the prompt is longer than the context length: it has at least 801 tokens, the context 8; "
        "shorten the prompt or raise num_ctx"
    }


@pytest.mark.parametrize(
    ("options", "passes"),
    [({"fast": False}, 1), ({}, 2), ({"use_mmap": False}, 3)],
)
def test_loading_tells_how_far_it_has_come(tiny, options, passes):
    """Bytes of all weights: as they are mapped, as they are read in, as parts are replaced."""
    size = passes * sum(info.nbytes for info in open_gguf(tiny).tensors.values())
    told: list[tuple[int, int]] = []
    refollama.load(tiny, options, told=lambda *at: told.append(at)).close()
    done = [at for at, _ in told]
    assert done == sorted(done) and done[0] == 0 and len(told) > 15 * passes
    assert {total for _, total in told} == {size}
    assert done[-1] == size and done.count(size) == 1


def test_likely_tokens_are_named_by_text_or_id(llm):
    """Judge: the plain path."""
    exact = GREEDY | {"f16_kv": False, "num_predict": 1}
    (one,) = llm.generate("the", exact, logprobs=["he", 5]).record.logprobs
    likely = llm.logits(llm.tokens("the"), -1)[0].log_softmax(0)
    he = TOKENS.index("he")
    assert [each.id for each in one.named] == [he, 5] and one.top == ()
    assert [each.logprob for each in one.named] == pytest.approx(likely[[he, 5]].tolist(), abs=1e-4)
    (alone,) = llm.generate("the", exact, logprobs="he").record.logprobs
    assert alone.named[0].id == he
    assert alone.named[0].logprob == pytest.approx(one.named[0].logprob, abs=1e-4)
    for wrong in ("hehe", "", "é", len(TOKENS), -1):
        with pytest.raises(BadRequest, match="is not one token|not in the vocabulary"):
            llm.generate("the", exact, logprobs=[wrong])


WITHOUT_BYTES = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a"],
    "tokenizer.ggml.scores": [0.0] * 4,
    "tokenizer.ggml.token_type": [2, 3, 3, 1],
}
WITH_ONE_BYTE = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["a", "\u00c3"],  # the first half of é
    "tokenizer.ggml.merges": [],
}


@pytest.mark.parametrize("vocabulary", [WITHOUT_BYTES, WITH_ONE_BYTE])
@pytest.mark.parametrize("text", ["é", "aé", "éa", "\ud800"])
def test_a_text_is_not_named_by_the_token_that_it_becomes(vocabulary, text):
    """What a vocabulary cannot write becomes <unk>, or gets lost: one token, of another text."""
    words = tokenizer_from(vocabulary)
    assert token_ids(words, ["a"]) == (vocabulary["tokenizer.ggml.tokens"].index("a"),)
    with pytest.raises(BadRequest, match="is not one token"):
        token_ids(words, [text])
