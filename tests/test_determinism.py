"""The same request with the same seed gives the same text, whatever happens around it.

Not by luck: a token's logits are the same to the last bit however its prompt was read.
"""

import itertools
import threading

import pytest

import refollama
from tests.tiny import write_model

PROMPT = "the rest is on the sand and then she ran into the wind again"
OPTIONS = {"temperature": 1.2, "seed": 11, "num_predict": 30, "num_ctx": 64}  # it shifts, too
SHORT = OPTIONS | {"num_predict": 3}
BATCHES = (1, 2, 7, 16, 512)


@pytest.fixture(scope="module", params=["F32", pytest.param("Q4_0", marks=pytest.mark.slow)])
def path(request, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("m") / "m.gguf", seed=5, type=request.param)


@pytest.fixture(scope="module")
def expected(path):
    with refollama.load(path) as fresh:
        return fresh.generate(PROMPT, options=OPTIONS).text


def answer(llm, streamed, **options):
    if streamed:
        return "".join(llm.stream(PROMPT, options=OPTIONS | options))
    return llm.generate(PROMPT, options=OPTIONS | options).text


def test_streamed_or_not_first_or_hundredth_cached_or_not_in_any_steps(path, expected, measured):
    """All of these combinations, a hundred requests on one model."""
    ways = itertools.product((True, False), BATCHES, ("fresh", "same", "other", "longer", "half"))
    with refollama.load(path) as llm:
        texts = set()
        for streamed, num_batch, before in itertools.islice(itertools.cycle(ways), 100):
            {
                "fresh": llm.forget,
                "same": lambda: llm.generate(PROMPT, options=SHORT),
                "other": lambda: llm.generate("another story", options=SHORT),
                "longer": lambda: llm.generate(PROMPT + " and", options=SHORT),
                "half": lambda: llm.generate(PROMPT[:30], options=SHORT),
            }[before]()
            texts.add(answer(llm, streamed, num_batch=num_batch))
    assert texts == {expected}
    measured("determinism", "streamed or not × num_batch × what is cached", "itself", "equal", 100)


def test_with_neighbours_on_the_same_model(path, expected, measured):
    """Four answers side by side share every product."""
    with refollama.load(path, slots=4) as llm:
        texts = []

        def ask(n):
            llm.generate("a neighbour " * n, options=OPTIONS | {"seed": n})
            texts.append(answer(llm, True, num_batch=n + 1))

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert texts == [expected] * 6
    measured("determinism", "beside other answers", "alone", "equal", len(texts))


@pytest.mark.parametrize("num_thread", [1, 2, 3])
def test_with_any_number_of_threads(path, expected, num_thread):
    with refollama.load(path) as llm:
        assert answer(llm, False, num_thread=num_thread) == expected


def test_a_conversation_that_goes_on_equals_one_sent_whole(path):
    """`context` carries exact ids, and what is cached of them changes nothing."""
    with refollama.load(path) as llm, refollama.load(path) as fresh:
        options = llm.defaults.updated(OPTIONS | {"num_ctx": 128, "num_predict": 20})
        ids = llm.tokens("the rest")
        for turn in (" and then", " again", " in the end"):
            *_, record = llm.answer(ids, options)
            ids = llm.tokens(turn, record.context)
            fresh.forget()
            *_, alone = fresh.answer(ids, options)
            *_, found = llm.answer(ids, options)
            assert found.context == alone.context
            assert found.stats is not None and alone.stats is not None
            assert found.stats.prompt_eval_count == alone.stats.prompt_eval_count == len(ids)
            assert alone.stats.prompt_cached_count == 0 < found.stats.prompt_cached_count


def test_a_hook_never_meets_what_was_cached_without_it(path, expected):
    """Reuse is for the same net only: hooked, changed or swapped, it starts anew."""
    import torch

    with refollama.load(path) as llm, refollama.load(path) as fresh:
        answer(llm, False)
        for model in (llm, fresh):
            layer = model.net.get_submodule("blk.0.attn_v")
            hook = layer.register_forward_hook(lambda module, args, out: out * 1.5)
            if model is llm:
                hooked = answer(llm, False)
                hook.remove()
        assert answer(fresh, False) == hooked
        assert answer(llm, False) == expected
        norm = llm.net.get_submodule("blk.0.attn_norm")
        with torch.no_grad():
            norm.get_buffer("weight").mul_(2.0)
        louder = answer(llm, False)
        llm.forget()
        assert answer(llm, False) == louder
