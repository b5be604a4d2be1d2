"""A loaded model as a notebook sees it, and the shelf that the server keeps models on."""

import contextlib
import threading
import time
import types
from pathlib import Path

import pytest
import torch

import refollama
from refollama.engine.generate import generate
from refollama.errors import (
    Abandoned,
    BadRequest,
    FormatError,
    ModelNotFound,
    NotFound,
    PromptTooLong,
    Stopping,
)
from refollama.loaded import LoadedModels, load_file
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


class Scripted:
    """An engine that says what it is told to."""

    def __init__(self, ids):
        self.ids = ids

    @contextlib.contextmanager
    def stream(self, tokens, options, gone):
        yield Said(self.ids)


class Said(list[int]):
    sequence = types.SimpleNamespace(started=1, prompt_read=2, done_reason="length")


def test_context_holds_what_was_shown_and_no_more(llm, monkeypatch):
    """Stop strings that begin anywhere, in the middle of tokens too."""
    said = " the rest is on the sand"
    ids = llm.tokenizer.encode(said, continues=True)
    assert len(ids) < len(said) - 5  # so that many cuts are inside of a token
    monkeypatch.setattr(llm, "engine", lambda f16_kv: Scripted(ids))
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


def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(llm):
    with pytest.raises(PromptTooLong, match=r"201 tokens.* 128"):
        llm.generate("q" * 199)


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


# ── the shelf ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def shelf():
    models = LoadedModels(limit=1)
    yield models
    models.close()


def test_a_model_is_loaded_once(shelf, tiny):
    with shelf.lease(tiny) as first, shelf.lease(tiny) as second:
        assert first is second
    with shelf.lease(tiny) as third:
        assert third is first


def test_many_at_once_load_it_once(shelf, tiny):
    seen, barrier = [], threading.Barrier(8)

    def lease():
        barrier.wait()
        with shelf.lease(tiny) as model:
            seen.append(model)

    threads = [threading.Thread(target=lease) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8 and len(set(map(id, seen))) == 1


def test_the_idle_one_makes_room(shelf, tiny, tmp_path):
    other = write_model(tmp_path / "other.gguf", seed=2)
    with shelf.lease(tiny) as first:
        pass
    with shelf.lease(other):
        assert len(shelf._entries) == 1
    with shelf.lease(tiny) as again:
        assert again is not first


def test_a_newcomer_waits_while_the_other_is_in_use(shelf, tiny, tmp_path):
    other = write_model(tmp_path / "other.gguf", seed=2)
    got = threading.Event()

    def second():
        with shelf.lease(other):
            got.set()

    with shelf.lease(tiny):
        thread = threading.Thread(target=second)
        thread.start()
        assert not got.wait(0.2)
    thread.join(5)
    assert got.is_set()


def test_a_file_that_was_replaced_is_loaded_anew(shelf, tmp_path):
    path = write_model(tmp_path / "m.gguf", seed=1)
    with shelf.lease(path) as model:
        before = model.generate("the", options=GREEDY).text
    write_model(path, seed=2)
    with shelf.lease(path) as model:
        assert model.generate("the", options=GREEDY).text != before


def test_a_model_that_fails_to_load_leaves_no_trace(shelf, tiny, tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF")
    for _ in range(2):
        with pytest.raises(FormatError), shelf.lease(bad):
            pass
        assert shelf._entries == {}
    with shelf.lease(tiny) as model:
        assert model.generate("the", options=GREEDY).text


def test_many_who_wait_for_a_load_that_fails_each_get_an_error_of_their_own(
    shelf, tiny, monkeypatch
):
    loads, entered, release = [], threading.Event(), threading.Event()

    def fails(path, **how):
        loads.append(path)
        entered.set()
        release.wait(5)
        raise MemoryError

    monkeypatch.setattr("refollama.loaded.load_file", fails)
    errors = []

    def ask():
        try:
            with shelf.lease(tiny):
                pass
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert entered.wait(5)
    time.sleep(0.2)
    release.set()
    for thread in threads:
        thread.join(5)
    assert len(loads) == 1 and len(set(map(id, errors))) == 4
    assert shelf._entries == {}


def test_a_file_that_has_gone_is_said(shelf, tmp_path):
    with pytest.raises(NotFound, match=r"gone\.gguf"), shelf.lease(tmp_path / "gone.gguf"):
        pass


def test_the_longest_idle_goes_and_its_engine_with_it(tmp_path):
    paths = [write_model(tmp_path / f"{n}.gguf", seed=n) for n in range(3)]
    shelf = LoadedModels(limit=2)
    models = []
    for path in (paths[0], paths[1], paths[0]):
        with shelf.lease(path) as model:
            model.generate("the", options=GREEDY)
            models.append(model)
    with shelf.lease(paths[2]):
        assert models[1]._engines == {}  # 1 was idle longest: closed
        assert models[0]._engines != {}
    shelf.close()


def test_waiting_for_a_model_ends_when_whoever_asked_is_gone(shelf, tiny, tmp_path):
    other = write_model(tmp_path / "other.gguf", seed=2)
    with shelf.lease(tiny), pytest.raises(Abandoned), shelf.lease(other, gone=lambda: True):
        pass
    with shelf.lease(other) as model:
        assert model.generate("the", options=GREEDY).text


def test_a_newcomer_is_not_starved_by_those_who_come_after_it(shelf, tiny, tmp_path):
    """Two clients that always overlap on one model; a third wants another."""
    other = write_model(tmp_path / "other.gguf", seed=2)
    stop, served = threading.Event(), threading.Event()

    def busy():
        while not stop.is_set():
            with shelf.lease(tiny):
                stop.wait(0.05)

    def newcomer():
        with shelf.lease(other):
            served.set()

    threads = [threading.Thread(target=busy) for _ in range(2)]
    for thread in threads:
        thread.start()
    late = threading.Thread(target=newcomer)
    late.start()
    assert served.wait(5)
    stop.set()
    for thread in (*threads, late):
        thread.join()


def test_making_room_does_not_hold_up_the_others(tmp_path):
    """Closing an engine waits for its step; who leases another model must not wait for that."""
    warm, slow, new = (write_model(tmp_path / f"{n}.gguf", seed=n) for n in range(3))
    shelf = LoadedModels(limit=2)
    entered, release = threading.Event(), threading.Event()

    def wait_in_the_middle(*_):
        entered.set()
        release.wait(10)

    def newcomer():
        with shelf.lease(new):
            pass

    with shelf.lease(warm):
        with shelf.lease(slow) as model:
            model.net.register_forward_pre_hook(wait_in_the_middle)
            stream = model.engine().stream([1], Options().updated(GREEDY))
            assert entered.wait(5)
        thread = threading.Thread(target=newcomer)
        thread.start()  # `slow` is idle, and must go; but its engine is in the middle of a step
        time.sleep(0.2)
        start = time.monotonic()
        with shelf.lease(warm):
            assert time.monotonic() - start < 1 and thread.is_alive()
        release.set()
        thread.join(10)
        assert not thread.is_alive()
    with pytest.raises(Stopping):
        list(stream)
    shelf.close()


def test_a_closed_shelf_loads_nothing_more(tiny):
    shelf = LoadedModels()
    with shelf.lease(tiny) as model:
        shelf.close()
        with pytest.raises(Stopping):
            model.generate("the", options=GREEDY)
    with pytest.raises(Stopping), shelf.lease(tiny):
        pass
