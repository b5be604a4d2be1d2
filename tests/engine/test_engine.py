"""The engine against the textbook loop, and its manners: cancelling, queueing, failing, closing."""

import os
import threading
import time

import pytest
import torch

from refollama.engine.engine import Engine
from refollama.engine.generate import generate
from refollama.engine.sequence import End, Extras, Marks, Read
from refollama.errors import Abandoned, BadRequest, PromptTooLong, RefollamaError, ServerBusy
from refollama.options import Options
from tests.engine.fake import FakeNet, V, expected, following

GREEDY = Options(temperature=0, repeat_penalty=1.0, f16_kv=False, num_predict=20)

FOREVER = GREEDY.updated({"num_predict": -1, "num_ctx": 0})


@pytest.fixture
def engine():
    engines = []

    def make(net=None, *, slots=1, eos=(), bos=None, **how):
        net = net or FakeNet()
        marks = Marks(eos=frozenset(eos), bos=bos)
        engines.append(Engine(net, net.new_cache(slots), marks, **how))
        return engines[-1]

    yield make
    for one in engines:
        one.close()


def wait_until(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def test_the_textbook_loop_computes_the_net():
    assert list(generate(FakeNet(), [5, 6, 7], GREEDY)) == expected([5, 6, 7], 20)


@pytest.mark.parametrize("options", [GREEDY, GREEDY.updated({"temperature": 60, "seed": 4})])
def test_the_engine_gives_the_tokens_of_the_textbook_loop(engine, options, measured):
    prompt = [5, 6, 7]
    assert list(engine().stream(prompt, options)) == list(generate(FakeNet(), prompt, options))
    measured("determinism", "engine or plain loop", "textbook loop", "equal")


@pytest.mark.parametrize("num_batch", [1, 2, 3, 512])
def test_reading_the_prompt_in_parts_changes_nothing(engine, num_batch, measured):
    net = FakeNet()
    options = GREEDY.updated({"num_batch": num_batch})
    assert list(engine(net).stream(range(1, 8), options)) == expected(range(1, 8), 20)
    assert max(width for _, width in net.steps) == min(num_batch, 7)
    measured("options", "num_batch", "definition", "equal")


@pytest.mark.parametrize("slots", [1, 2, 8])
def test_many_at_once_equal_each_alone(engine, slots):
    one = engine(slots=slots)
    prompts = [list(range(n, 2 * n + 1)) for n in range(1, 9)]
    answers = {}

    def ask(n):
        answers[n] = list(one.stream(prompts[n], GREEDY))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {n: expected(prompts[n], 20) for n in range(8)}


def test_a_step_is_one_row_or_one_column(engine):
    net = FakeNet()
    one = engine(net, slots=4)
    streams = [one.stream(range(1, 5 + n), GREEDY) for n in range(4)]
    for stream in streams:
        list(stream)
    assert all(1 in shape for shape in net.steps)
    assert any(rows > 1 for rows, _ in net.steps)


def test_running_answers_go_on_while_a_long_prompt_is_read(engine):
    net = FakeNet(before_step=lambda tokens: time.sleep(0.001))
    one = engine(net, slots=2)
    talking = one.stream([1], GREEDY.updated({"num_predict": 300}))
    next(talking)
    list(one.stream(range(1, 200), GREEDY.updated({"num_batch": 1, "num_predict": 1})))
    prefill = [i for i, shape in enumerate(net.steps) if shape == (1, 1)]
    assert len(talking.sequence.answer) > 100, prefill


@pytest.mark.parametrize(
    ("num_predict", "num_ctx", "count"),
    [(0, 0, 0), (1, 0, 1), (20, 0, 20), (-1, 10, 100), (-2, 10, 8), (20, 10, 20), (-2, 0, 510)],
)
def test_num_predict_is_exact_and_the_context_is_filled(
    engine, num_predict, num_ctx, count, measured
):
    """Three tokens of prompt and n of answer: the last one needs no place of its own.

    -2 stops when the context is full, -1 when ten contexts have been written.
    """
    options = GREEDY.updated({"num_predict": num_predict, "num_ctx": num_ctx})
    stream = engine().stream([1, 2, 3], options)
    assert len(list(stream)) == count
    assert stream.sequence.done_reason == "length"
    assert len(list(generate(FakeNet(), [1, 2, 3], options))) == count
    for name in ("num_predict", "num_ctx"):
        measured("options", name, "definition", "equal")


def test_the_end_token_ends_and_is_not_shown(engine):
    answer = expected([3], 20)
    eos = answer[6]
    stream = engine(eos=[eos]).stream([3], GREEDY)
    assert list(stream) == answer[: answer.index(eos)]
    assert stream.sequence.done_reason == "stop"
    assert (
        list(generate(FakeNet(), [3], GREEDY, Marks(frozenset((eos,)))))
        == answer[: answer.index(eos)]
    )


def test_closing_frees_the_slot_for_the_next_at_once(engine):
    net = FakeNet(n_ctx=10**6)
    one = engine(net, slots=1)
    endless = one.stream([1], FOREVER)
    next(endless)
    waiting = one.stream([2], GREEDY)
    assert waiting.sequence.slot is None
    endless.close()
    steps = len(net.steps)
    assert list(waiting) == expected([2], 20)
    assert len(net.steps) <= steps + 22
    wait_until(lambda: one.active == 0)


def test_a_stream_that_is_dropped_is_cancelled(engine):
    net = FakeNet(before_step=lambda tokens: time.sleep(0.005))
    one = engine(net)
    stream = one.stream([1], GREEDY.updated({"num_predict": -1}))
    next(stream)
    del stream
    wait_until(lambda: one.active == 0)
    assert len(net.steps) < 100


def test_closing_while_waiting_leaves_the_queue(engine):
    one = engine(FakeNet(n_ctx=10**6), slots=1)
    first = one.stream([1], FOREVER)
    next(first)
    with one.stream([2], FOREVER):
        assert one.active == 2
    wait_until(lambda: one.active == 1)
    first.close()
    wait_until(lambda: one.active == 0)


def test_a_reader_that_is_gone_is_noticed_while_nothing_comes(engine):
    one = engine(FakeNet(n_ctx=10**6), slots=1)
    first = one.stream([1], FOREVER)
    next(first)
    waiting = one.stream([2], GREEDY, Extras(gone=lambda: True))
    with pytest.raises(Abandoned):
        next(waiting)
    wait_until(lambda: one.active == 1)
    first.close()


def test_a_full_queue_says_so(engine):
    release = threading.Event()
    one = engine(FakeNet(before_step=lambda tokens: release.wait(5)), slots=1, max_queue=1)
    streams = [one.stream([1], GREEDY)]
    wait_until(lambda: streams[0].sequence.slot is not None)
    streams.append(one.stream([1], GREEDY))
    with pytest.raises(ServerBusy):
        one.stream([1], GREEDY)
    release.set()
    assert [list(s) for s in streams] == [expected([1], 20)] * 2


def test_a_net_that_fails_ends_its_sequence_and_not_the_engine(engine):
    def fail(tokens):
        if tokens.shape[1] == 2:
            raise RuntimeError("out of memory")

    one = engine(FakeNet(before_step=fail))
    with pytest.raises(RefollamaError, match="failed with RuntimeError"):
        list(one.stream([66, 66], GREEDY))
    assert list(one.stream([1], GREEDY)) == expected([1], 20)
    assert one.active == 0


def test_one_that_fails_does_not_take_its_neighbours_along(engine):
    """A sampler that raises, in the same decode step as a healthy sequence."""
    release = threading.Event()
    one = engine(FakeNet(before_step=lambda tokens: release.wait(5)), slots=2)
    well, ill = one.stream([1], GREEDY), one.stream([2], GREEDY)
    calls = iter([3, 4])
    ill.sequence.sampler = lambda logits: next(calls)  # the third draw raises StopIteration
    release.set()
    assert list(well) == expected([1], 20)
    with pytest.raises(RuntimeError):  # what a StopIteration becomes on its way
        raise_from(ill)
    wait_until(lambda: one.active == 0)


def raise_from(stream):
    """Read to the end; an error that came out of the sampler is wrapped, so that it is seen."""
    while True:
        item = stream.sequence.outbox.get(timeout=5)
        if isinstance(item, End):
            assert item.error is not None
            raise RuntimeError("the sampler failed") from item.error


def test_a_cache_that_cannot_be_cleared_fails_its_sequence_and_not_the_engine(engine, monkeypatch):
    net = FakeNet()
    one = engine(net)

    def broken(slot, start):
        raise RuntimeError("no memory")

    monkeypatch.setattr(net.cache, "clear", broken)
    with pytest.raises(RefollamaError, match="RuntimeError"):
        list(one.stream([1], GREEDY))
    monkeypatch.undo()
    assert list(one.stream([1], GREEDY)) == expected([1], 20)


def test_who_waits_behind_one_whose_slot_cannot_be_made_ready_is_served(engine, monkeypatch):
    """No step is done for the one that fails, and nobody else will wake the engine."""
    all_wait = threading.Event()
    net = FakeNet(before_step=lambda tokens: all_wait.wait(5))
    one, clear, cleared = engine(net), net.cache.clear, []

    def broken_once(slot, start):
        cleared.append(slot)
        if len(cleared) == 2:
            raise RuntimeError("no memory")
        clear(slot, start)

    monkeypatch.setattr(net.cache, "clear", broken_once)
    streams = [one.stream([first], GREEDY) for first in (1, 2, 3)]
    all_wait.set()
    wait_until(lambda: streams[2].sequence.done_reason)
    assert list(streams[2]) == expected([3], 20)
    with pytest.raises(RefollamaError, match="RuntimeError"):
        list(streams[1])


def test_an_answer_that_is_whole_when_the_engine_closes_ends_well(engine):
    """The last token is drawn in the very step during which `close` comes."""
    inside, release = threading.Event(), threading.Event()

    def wait(tokens):
        inside.set()
        release.wait(5)

    one = engine(FakeNet(before_step=wait))
    stream = one.stream([1], GREEDY.updated({"num_predict": 1}))
    assert inside.wait(5)
    closing = threading.Thread(target=one.close)
    closing.start()
    time.sleep(0.05)
    release.set()
    closing.join()
    assert list(stream) == expected([1], 1) and stream.sequence.done_reason == "length"


def test_an_error_belongs_to_each_sequence_alone(engine):
    def fail(tokens):
        if tokens.shape[0] == 2:
            raise MemoryError

    one = engine(FakeNet(before_step=fail), slots=2)
    errors = []
    for stream in [one.stream([1], GREEDY), one.stream([2], GREEDY)]:
        with pytest.raises(RefollamaError, match="MemoryError") as caught:
            list(stream)
        errors.append(caught.value)
    assert errors[0] is not errors[1]


def test_closing_the_engine_ends_the_running_and_refuses_the_next(engine):
    one = engine(FakeNet(before_step=lambda tokens: time.sleep(0.002)))
    stream = one.stream([1], GREEDY.updated({"num_predict": -1}))
    next(stream)
    one.close()
    one.close()
    with pytest.raises(RefollamaError, match="unloaded"):
        list(stream)
    with pytest.raises(RefollamaError, match="unloaded"):
        one.stream([1], GREEDY)


def test_prompts_that_cannot_be_run(engine):
    with pytest.raises(BadRequest, match="empty"):
        engine().stream([], GREEDY)
    with pytest.raises(BadRequest, match="empty"):
        list(generate(FakeNet(), [], GREEDY))
    with pytest.raises(PromptTooLong, match=r"513 tokens.* 512"):
        engine().stream([1] * 513, GREEDY, Extras(truncate=False))


@pytest.mark.parametrize(("num_keep", "bos"), [(0, None), (0, 1), (4, None), (-1, 1)])
def test_a_prompt_that_is_too_long_is_cut(engine, num_keep, bos):
    prompt = list(range(1, 60))
    options = GREEDY.updated({"num_ctx": 16, "num_keep": num_keep})
    stream = engine(bos=bos).stream(prompt, options)
    answer, seq = list(stream), stream.sequence
    assert answer == list(generate(FakeNet(), prompt, options, Marks(bos=bos)))
    assert answer == shifted(seq.prompt, 20, 16, seq.keep)
    assert seq.dropped + len(seq.prompt) == 59 and len(seq.prompt) <= 16
    assert seq.prompt == prompt[: seq.keep] + prompt[seq.keep + seq.dropped :]


def test_times_are_taken_in_order(engine):
    stream = engine().stream([1, 2], GREEDY)
    list(stream)
    seq = stream.sequence
    assert 0 < seq.started <= seq.prompt_read <= seq.ended


def test_nothing_of_the_last_sequence_is_left_in_its_slot(engine):
    """An infinity that stayed would turn a weight of zero into no number at all."""
    net = FakeNet()
    one = engine(net, slots=1)
    list(one.stream(range(1, 90), GREEDY))
    net.cache.keys[0][:, :, : 89 + 19] = float("inf")  # all that it wrote
    assert list(one.stream([4], GREEDY)) == expected([4], 20)
    assert not net.cache.keys[0].isinf().any()


# ── when the context is full ──────────────────────────────────────────────────────────────────


def shifted(prompt, n, n_ctx, keep):
    """The fake net with a full context, in plain Python: a list from which the middle is cut."""
    past, answer = list(prompt), list[int]()
    while len(answer) < n:
        answer.append(following(past))
        if len(past) == n_ctx:
            del past[keep : keep + (n_ctx - keep) // 2]
        past.append(answer[-1])
    return answer


@pytest.mark.parametrize(("num_keep", "bos", "keep"), [(0, None, 0), (0, 5, 1), (3, None, 3)])
def test_a_full_context_forgets_what_follows_the_kept(engine, num_keep, bos, keep, measured):
    options = GREEDY.updated({"num_ctx": 10, "num_predict": 60, "num_keep": num_keep})
    expected = shifted([5, 6, 7], 60, 10, keep)
    assert list(engine(bos=bos).stream([5, 6, 7], options)) == expected
    assert list(generate(FakeNet(), [5, 6, 7], options, Marks(bos=bos))) == expected
    measured("options", "num_keep", "definition", "equal")


def test_neighbours_shift_each_for_itself(engine):
    one = engine(slots=3)
    sizes = {9: 1, 12: 2, 10: 5}
    streams = {
        n_ctx: one.stream(range(1, n + 1), GREEDY.updated({"num_ctx": n_ctx, "num_predict": 40}))
        for n_ctx, n in sizes.items()
    }
    for n_ctx, stream in streams.items():
        assert list(stream) == shifted(range(1, sizes[n_ctx] + 1), 40, n_ctx, 0)


def test_without_shift_the_answer_ends_when_the_context_is_full(engine):
    stream = engine().stream([1, 2, 3], GREEDY.updated({"num_ctx": 10}), Extras(shift=False))
    assert list(stream) == expected([1, 2, 3], 8)
    assert stream.sequence.done_reason == "length" and not stream.sequence.shifted


# ── what is in the cache already ──────────────────────────────────────────────────────────────


def read_tokens(net):
    return sum(rows * width for rows, width in net.steps)


def test_a_common_beginning_is_not_read_again(engine):
    net = FakeNet()
    one = engine(net)
    first = one.stream([1, 2, 3, 4], GREEDY)
    turn = [1, 2, 3, 4, *first, 9, 9]
    assert first.sequence.cached == 0
    before = read_tokens(net)
    second = one.stream(turn, GREEDY)
    assert list(second) == expected(turn, 20)
    # All but the last token of the answer, which was drawn and never read, and the new turn.
    assert second.sequence.cached == 4 + 19
    assert read_tokens(net) - before == 3 + 19


def test_the_same_prompt_reads_one_token(engine):
    one = engine()
    prompt = list(range(1, 9))
    answers = [one.stream(prompt, GREEDY) for _ in range(3)]
    assert [list(answer) for answer in answers] == [expected(prompt, 20)] * 3
    assert [answer.sequence.cached for answer in answers] == [0, 7, 7]


@pytest.mark.parametrize("slots", [1, 2])
def test_conversations_that_take_turns_keep_their_slots(engine, slots):
    one = engine(slots=slots)
    talks = {1: [1, 1, 1], 2: [2, 2, 2]}
    cached = []
    for _ in range(3):
        for talk in talks.values():
            stream = one.stream(list(talk), GREEDY)
            answer = list(stream)
            assert answer == expected(talk, 20)
            cached.append(stream.sequence.cached)
            talk += [*answer, 7]
    assert cached == ([0] * 6 if slots == 1 else [0, 0, 22, 22, 43, 43])


def test_what_has_met_forgotten_tokens_is_not_used_again(engine):
    """After a shift only the kept tokens are what a fresh reading would give."""
    one = engine()
    options = GREEDY.updated({"num_ctx": 10, "num_keep": 2, "num_predict": 30})
    list(one.stream([5, 6, 7], options))
    prompt = [5, 6, *range(1, 9)]
    again = one.stream(prompt, GREEDY)
    assert list(again) == expected(prompt, 20) and again.sequence.cached == 2


def test_a_sequence_that_failed_leaves_nothing_to_use(engine):
    def fail(tokens):
        if int(tokens[0, -1]) == 66:
            raise RuntimeError("out of memory")

    one = engine(FakeNet(before_step=fail))
    with pytest.raises(RefollamaError):
        list(one.stream([1, 2, 3, 66], GREEDY.updated({"num_batch": 3})))
    after = one.stream([1, 2, 3, 4], GREEDY)
    assert list(after) == expected([1, 2, 3, 4], 20) and after.sequence.cached == 0


def test_one_that_was_cancelled_leaves_what_it_had_read(engine):
    net = FakeNet(n_ctx=10**6)
    one = engine(net)
    with one.stream([1, 2, 3], FOREVER) as endless:
        next(endless)
    after = one.stream([1, 2, 3, 4], GREEDY)
    assert list(after) == expected([1, 2, 3, 4], 20) and after.sequence.cached == 3


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_a_prompt_that_many_have_is_read_once(engine, slots):
    """From a slot that is in use it is copied; each still draws what it would draw alone."""
    all_wait = threading.Event()
    net = FakeNet(before_step=lambda tokens: all_wait.wait(5))
    one = engine(net, slots=slots)
    prompt = list(range(1, 41))
    hot = GREEDY.updated({"temperature": 60, "num_batch": 8})  # read in parts: who comes in waits
    options = [hot.updated({"seed": seed}) for seed in range(5)]
    streams = [one.stream(prompt, each) for each in options]
    all_wait.set()
    answers = [list(stream) for stream in streams]
    assert answers == [list(generate(FakeNet(), prompt, each)) for each in options]
    assert sorted(stream.sequence.cached for stream in streams) == [0, 39, 39, 39, 39]
    assert read_tokens(net) == 40 + 4 + 5 * 19
    assert max(rows for rows, _ in net.steps) == slots


def test_who_comes_in_beside_another_shares_what_is_common(engine):
    one = engine(FakeNet(n_ctx=10**6), slots=2)
    with one.stream([1, 2, 3, 4, 5], FOREVER) as endless:
        next(endless)
        beside = one.stream([1, 2, 3, 9], GREEDY)
        assert list(beside) == expected([1, 2, 3, 9], 20)
        assert beside.sequence.cached == 3


@pytest.mark.parametrize("beside", [True, False])
def test_what_a_shift_has_moved_is_not_taken_for_the_prompt(engine, beside):
    """Only the kept tokens are where they were, in a slot that is in use as in one that is free."""
    one = engine(slots=2 if beside else 1)
    first = one.stream([5, 6, 7, 8], FOREVER.updated({"num_ctx": 12, "num_keep": 1}))
    for _ in range(30):
        next(first)
    if not beside:
        first.close()
    again = one.stream([5, 6, 7, 8], GREEDY)
    assert list(again) == expected([5, 6, 7, 8], 20) and again.sequence.cached == 1
    first.close()


def test_behind_a_copy_nothing_is_left_of_what_the_slot_held(engine):
    """An infinity that has been left there, times a weight of zero, is not a number."""
    net = FakeNet(n_ctx=10**6)
    one = engine(net, slots=2)
    before = one.stream(range(50, 60), GREEDY)
    list(before)
    with one.stream([1, 2, 3, 4, 5], FOREVER) as endless:
        next(endless)
        assert endless.sequence.slot != before.sequence.slot
        net.cache.keys[0][before.sequence.slot, :, 4:29] = torch.inf
        beside = one.stream([1, 2, 3, 9], GREEDY)
        assert list(beside) == expected([1, 2, 3, 9], 20) and beside.sequence.cached == 3
    assert beside.sequence.slot == before.sequence.slot


def test_what_was_read_by_another_net_is_not_copied(engine):
    one = engine(FakeNet(n_ctx=10**6), slots=2)
    with one.stream([1, 2, 3, 4, 5], FOREVER) as endless:
        next(endless)
        one.forget()
        beside = one.stream([1, 2, 3, 9], GREEDY)
        assert list(beside) == expected([1, 2, 3, 9], 20) and beside.sequence.cached == 0


def test_a_cache_that_cannot_be_copied_fails_its_sequence_and_not_its_neighbour(
    engine, monkeypatch
):
    def broken(source, slot, end):
        raise RuntimeError("no memory")

    both_wait = threading.Event()
    net = FakeNet(before_step=lambda tokens: both_wait.wait(5))
    one = engine(net, slots=2)
    monkeypatch.setattr(net.cache, "copy", broken)
    streams = [one.stream([1, 2, 3], GREEDY) for _ in range(2)]
    both_wait.set()
    assert list(streams[0]) == expected([1, 2, 3], 20)
    with pytest.raises(RefollamaError, match="the model failed"):
        list(streams[1])


def test_forget_lets_nothing_be_found(engine):
    one = engine()
    list(one.stream([1, 2, 3], GREEDY))
    one.forget()
    again = one.stream([1, 2, 3], GREEDY)
    list(again)
    assert again.sequence.cached == 0


# ── what else may be asked ────────────────────────────────────────────────────────────────────


def test_how_much_of_the_prompt_has_been_read_is_told_before_the_answer(engine):
    one = engine()
    list(one.stream([1, 2], GREEDY))
    ask = one.stream(range(1, 8), GREEDY.updated({"num_batch": 2}), Extras(progress=True))
    items = list(ask.items())
    assert items == [Read(2), Read(4), Read(6), Read(7), *expected(range(1, 8), 20)]
    again = one.stream(range(1, 8), GREEDY, Extras(progress=True))
    assert list(again) == expected(range(1, 8), 20)  # who does not listen hears tokens alone


def test_who_has_a_bell_does_not_wait(engine):
    gate, bell = threading.Event(), threading.Event()
    one = engine(FakeNet(before_step=lambda tokens: gate.wait(5)))
    items = one.stream([1, 2, 3], GREEDY, Extras(bell=bell)).items()
    assert next(items) is None and not bell.is_set()
    gate.set()
    heard = []
    for item in items:
        if item is None:
            assert bell.wait(5)
            bell.clear()
        else:
            heard.append(item)
    assert heard == expected([1, 2, 3], 20)


class ThreeTokens:
    """A grammar, and the walk through it: any three tokens."""

    count = 0

    def begin(self):
        return ThreeTokens()

    @property
    def complete(self):
        return self.count == 3

    def allowed(self, logits):
        return logits

    def step(self, token):
        self.count += 1


def test_what_is_complete_ends_though_the_model_would_go_on(engine):
    stream = engine().stream([5, 6], GREEDY, Extras(grammar=ThreeTokens()))
    plain = generate(FakeNet(), [5, 6], GREEDY, grammar=ThreeTokens())
    assert list(stream) == list(plain) == expected([5, 6], 3)
    assert stream.sequence.done_reason == "stop"


def test_logprobs_of_tokens_that_are_named(engine):
    stream = engine().stream([3], GREEDY, Extras(logprobs=0, named=(7, 2, 7)))
    drawn = list(stream)
    for one, token in zip(stream.sequence.likely, drawn, strict=True):
        whole = torch.nn.functional.one_hot(torch.tensor(token), V).double() * 50
        likely = whole.log_softmax(0)
        assert one.best == () and [id for id, _ in one.named] == [7, 2, 7]
        assert [value for _, value in one.named] == likely[[7, 2, 7]].tolist()


def test_logprobs_of_every_token_and_of_the_end(engine):
    answer = expected([3], 20)
    stop = answer[6]
    stream = engine(eos=[stop]).stream(
        [3], GREEDY.updated({"temperature": 60, "top_k": 1}), Extras(logprobs=3)
    )
    drawn = list(stream)
    noted = stream.sequence.likely
    assert [one.id for one in noted] == [*drawn, stop]
    whole = torch.nn.functional.one_hot(torch.tensor(noted[0].id), V).double() * 50
    assert noted[0].logprob == pytest.approx(float(whole.log_softmax(0)[noted[0].id]))
    assert [len(one.best) for one in noted] == [3] * len(noted)
    assert all(one.best[0] == (one.id, one.logprob) for one in noted)


def test_num_thread_holds_for_the_steps_of_that_request(engine, measured):
    before, seen = torch.get_num_threads(), []
    one = engine(FakeNet(before_step=lambda tokens: seen.append(torch.get_num_threads())))
    for count in (1, 0, 1024):
        list(one.stream([1], GREEDY.updated({"num_thread": count})))
    assert seen == [1] * 20 + [before] * 20 + [os.cpu_count()] * 20
    measured("options", "num_thread", "definition", "equal")


def test_a_net_may_be_written_by_fewer_threads_than_it_is_read_by(engine):
    """Unless a request says how many it wants."""
    before, seen = torch.get_num_threads(), []
    one = engine(
        FakeNet(before_step=lambda tokens: seen.append(torch.get_num_threads())), writing_threads=1
    )
    list(one.stream([1], GREEDY))
    list(one.stream([2], GREEDY.updated({"num_thread": os.cpu_count()})))
    assert seen == [before] + [1] * 19 + [os.cpu_count()] * 20
    assert torch.get_num_threads() == before


# ── when something breaks, or changes ─────────────────────────────────────────────────────────


def test_a_step_that_fails_leaves_nothing_to_use_of_those_who_had_gone(engine):
    """Cancelled in the very step that fails: its slot may hold anything."""
    inside, release = threading.Event(), threading.Event()

    def fail(tokens):
        if tokens.shape[1] == 1:
            inside.set()
            release.wait(5)
            raise RuntimeError("out of memory")

    one = engine(FakeNet(before_step=fail))
    stream = one.stream([1, 2, 3], GREEDY)
    assert inside.wait(5)
    stream.close()
    release.set()
    wait_until(lambda: one.active == 0)
    after = one.stream([1, 2, 3, 4], GREEDY.updated({"num_predict": 1}))
    assert list(after) == expected([1, 2, 3, 4], 1) and after.sequence.cached == 0


def test_forget_reaches_those_who_are_still_running(engine):
    net = FakeNet(n_ctx=10**6)
    one = engine(net)
    with one.stream([1, 2, 3], FOREVER) as endless:
        next(endless)
        one.forget()
    after = one.stream([1, 2, 3, 4], GREEDY)
    assert list(after) == expected([1, 2, 3, 4], 20) and after.sequence.cached == 0


def test_an_engine_that_breaks_lets_nobody_wait(engine, monkeypatch):
    """Its own mistake, not the net's: every answer ends, and new ones are refused."""
    release = threading.Event()
    one = engine(FakeNet(before_step=lambda tokens: release.wait(5)))
    running, waiting = one.stream([1], GREEDY), one.stream([2], GREEDY)

    def broken():
        raise ZeroDivisionError

    monkeypatch.setattr(one._scheduler, "next_step", broken)
    release.set()
    for stream in (running, waiting):
        with pytest.raises(RefollamaError, match="ZeroDivisionError"):
            list(stream)
    with pytest.raises(RefollamaError, match="unloaded"):
        one.stream([1], GREEDY)


def test_a_long_prompt_is_never_one_enormous_step(engine):
    net = FakeNet(n_ctx=2000)
    options = GREEDY.updated({"num_ctx": 0, "num_batch": 2**31 - 1})
    prompt = [1] + [0] * 1400  # the fake net adds in float32
    assert list(engine(net).stream(prompt, options)) == expected(prompt, 20)
    assert max(width for _, width in net.steps) == 512
