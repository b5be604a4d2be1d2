"""Several answers to one prompt: each is what a request of its own would get."""

import threading
import time

import pytest

import refollama
from refollama.dialogue import Prompt, converse, gathered
from refollama.engine.sequence import Extras
from refollama.errors import BadRequest, RefollamaError
from refollama.messages import IDLE, Chunk, Reached, Stats
from refollama.options import Options
from refollama.several import MOST_ANSWERS, SEEDS, several
from refollama.text.thinking import Tags
from tests.exactness import alike
from tests.tiny import write_model

FORM = {"type": "array", "items": {"enum": ["the cat", "a fish", "sand"]}, "minItems": 2}
PROMPT = "the rest is on the sand"
HOT: dict[str, float] = {"temperature": 1.3, "seed": 40, "num_predict": 12, "num_ctx": 64}


def alone(llm, count, **how):
    """The answers of so many requests, each with a seed of its own."""
    found = []
    for seed in range(40, 40 + count):
        llm.forget()
        found.append(llm.generate(PROMPT, HOT | {"seed": seed}, **how))
    llm.forget()
    return found


@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("more", [{}, {"format": FORM}, {"logprobs": 2}])
def test_answer_k_is_that_of_seed_plus_k(tiny, slots, more, measured):
    with refollama.load(tiny, slots=slots) as llm:
        single = alone(llm, 5, **more)
        text, record = llm.generate(PROMPT, HOT, n=5, **more)
    assert [each.text for each in record.answers] == [one.text for one in single]
    assert len({one.text for one in single}) > 2 and text == single[0].text
    for each, (_, one) in zip(record.answers, single, strict=True):
        assert (each.done_reason, each.context) == (one.done_reason, one.context)
        assert alike(each.logprobs, one.logprobs)
    measured("determinism", "several answers to one prompt", "alone", "equal", 5)


def test_the_prompt_counts_once_and_the_answers_all(tiny):
    with refollama.load(tiny, slots=2) as llm:
        _, record = llm.generate(PROMPT, HOT, n=4)
        whole = len(llm.tokens(PROMPT))
    each, total = [one.stats or Stats() for one in record.answers], record.stats or Stats()
    assert total.prompt_eval_count == whole and total.prompt_cached_count == 0
    assert [one.prompt_cached_count for one in each] == [0] + [whole - 1] * 3
    assert total.eval_count == sum(one.eval_count for one in each) == 48
    assert total.prompt_eval_duration > 0 < total.eval_duration


def test_durations_are_of_a_clock():
    """Of what goes on side by side no sum is told."""
    age = 10**15

    def start(options, extras):
        yield Chunk("a")
        spent = Stats(total_duration=options.seed, prompt_eval_duration=1, eval_duration=age)
        yield Chunk(done=True, stats=spent)

    *_, end = several(start, Options(seed=5), Extras(), 3)
    assert end.stats is not None and 0 < end.stats.eval_duration < age
    assert (end.stats.total_duration, end.stats.prompt_eval_duration) == (7, 1)


def test_a_seed_that_is_drawn_is_drawn_once():
    seeds = []

    def start(options, extras):
        seeds.append(options.seed)
        yield Chunk(done=True, stats=Stats())

    list(several(start, Options(), Extras(), 4))
    assert seeds == list(range(seeds[0], seeds[0] + 4)) and seeds[0] >= 0
    seeds.clear()
    list(several(start, Options(seed=SEEDS - 1), Extras(), 2))
    assert seeds == [SEEDS - 1, 0]  # the one behind the last is an option, too


def test_one_answer_is_told_as_ever():
    def start(options, extras):
        yield Chunk("a")
        yield Chunk(done=True)

    assert list(several(start, Options(), Extras(), 1)) == [Chunk("a"), Chunk(done=True)]


@pytest.mark.parametrize("count", [0, -1, MOST_ANSWERS + 1])
def test_how_many_there_may_be(tiny, count):
    with refollama.load(tiny) as llm, pytest.raises(BadRequest, match="between 1 and 16"):
        llm.generate("the", n=count)


def test_closing_cancels_all_of_them(tmp_path):
    path = write_model(tmp_path / "m.gguf", seed=3, claims={"llama.context_length": 1_000_000})
    options = Options(num_predict=-1, num_ctx=0, temperature=0, repeat_penalty=1)
    with refollama.load(path, slots=2) as llm:
        tokens = llm.tokens(PROMPT)
        chunks = several(lambda *how: llm.answer(tokens, *how), options, Extras(), 4)
        next(chunks)
        assert llm.active == 4
        chunks.close()
        assert llm.generate(PROMPT, HOT).text  # there is a slot at once
        assert llm.active == 0


def test_one_that_fails_ends_all():
    closed = []

    def start(options, extras):
        try:
            yield Chunk(str(options.seed))
            if options.seed == 2:
                raise RefollamaError("damaged")
            while True:
                yield IDLE
        finally:
            closed.append(options.seed)

    heard = []
    with pytest.raises(RefollamaError) as failure:
        for chunk in several(start, Options(seed=0), Extras(), 4):
            heard.append((chunk.index, chunk.text))
    assert str(failure.value) == "damaged"  # its traceback still knows them all: none just drops
    assert heard == [(0, "0"), (1, "1"), (2, "2"), (3, "3")] and sorted(closed) == [0, 1, 2, 3]


def test_nobody_is_waited_for_while_another_speaks():
    """The first answer begins when the second has come to its end, and wakes the listener."""
    over = threading.Event()

    def wake(bell):
        over.set()
        bell.set()

    def start(options, extras):
        if options.seed == 1:
            yield Chunk("b")
            threading.Timer(0.01, wake, [extras.bell]).start()
            yield Chunk(done=True, stats=Stats())
        while not over.is_set():
            yield IDLE
        yield Chunk("a")
        yield Chunk(done=True, stats=Stats())

    heard = [(c.index, c.text, c.done) for c in several(start, Options(seed=0), Extras(), 2)]
    assert heard == [
        (1, "b", False),
        (1, "", False),
        (0, "a", False),
        (0, "", False),
        (None, "", True),
    ]


def test_what_comes_while_nobody_listens_wakes_at_once(monkeypatch):
    """The bell rings just behind the last look, and then never again."""
    monkeypatch.setattr("refollama.several.LOOK_AROUND", 20)

    def start(options, extras):
        extras.bell.set()
        yield IDLE
        yield Chunk(done=True, stats=Stats())

    begun = time.monotonic()
    assert len(list(several(start, Options(seed=0), Extras(), 2))) == 3
    assert time.monotonic() - begun < 10


def test_thoughts_that_come_first_do_not_keep_others_waiting(tiny):
    """Each answer is two, thoughts and what has the form; all take turns."""
    with refollama.load(tiny, slots=2) as llm:
        prompt = Prompt(PROMPT, llm.tokens(PROMPT), tags=Tags("<t>", "</t>"))
        extras = Extras(grammar=llm.grammar(FORM))
        seeds = [llm.defaults.updated(HOT | {"seed": 40 + k}) for k in range(3)]
        single = [gathered(converse(llm, prompt, each, extras)) for each in seeds]
        both = several(lambda *how: converse(llm, prompt, *how), seeds[0], extras, 3)
        whole = gathered(both)
    assert [one.text for one in whole.answers] == [one.text for one in single]


def test_the_first_ones_progress_is_everybodys(tiny):
    with refollama.load(tiny) as llm:
        tokens = llm.tokens(PROMPT)
        extras = Extras(progress=True)
        options = llm.defaults.updated(HOT)
        chunks = list(several(lambda *how: llm.answer(tokens, *how), options, extras, 3))
    told = [chunk.progress for chunk in chunks if chunk.progress is not None]
    assert told == [Reached("prompt", done, len(tokens)) for done in (0, len(tokens))]
