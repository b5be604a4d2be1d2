"""What is kept, cut and forgotten, in numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refollama.engine import limits
from refollama.errors import BadRequest, PromptTooLong
from refollama.options import Options

lengths = st.integers(1, 200)


@pytest.mark.parametrize(
    ("num_keep", "bos", "n_ctx", "kept"),
    [
        (0, None, 100, 0),
        (0, 1, 100, 1),  # BOS stays
        (0, 7, 100, 0),  # the prompt does not begin with this one
        (5, 1, 100, 6),
        (5, None, 100, 5),
        (50, 1, 100, 20),  # the prompt is no longer
        (-1, 1, 100, 20),
        (-1, 1, 12, 8),  # some places always move
        (3, 1, 3, 0),
    ],
)
def test_kept_tokens(num_keep, bos, n_ctx, kept):
    prompt = list(range(1, 21))
    assert limits.keep(prompt, Options(num_keep=num_keep), n_ctx, bos) == kept


def test_the_published_example_of_a_cut():
    prompt = list(range(5000))
    assert limits.cut(prompt, 0, 2048) == prompt[3072:]


@given(st.integers(1, 5000), lengths, st.integers(-1, 300))
def test_a_cut_prompt_fits_keeps_its_beginning_and_its_end(n, n_ctx, num_keep):
    prompt = list(range(n))
    kept = limits.keep(prompt, Options(num_keep=num_keep), n_ctx, bos=0)
    found = limits.cut(prompt, kept, n_ctx)
    if n <= n_ctx:
        assert found == prompt
        return
    assert 0 < len(found) <= n_ctx and found[:kept] == prompt[:kept]
    end = found[kept:]
    assert end and end == prompt[-len(end) :]
    assert len(end) * 2 >= min(n_ctx - kept, 2)  # about half of what moves, or more, is left


@given(lengths, st.integers(-1, 300))
def test_a_shift_makes_room_and_never_touches_the_kept(n_ctx, num_keep):
    kept = limits.keep(range(n_ctx), Options(num_keep=num_keep), n_ctx, bos=0)
    dropped = limits.discard(kept, n_ctx)
    assert 1 <= dropped <= n_ctx - kept


@pytest.mark.parametrize(
    ("num_predict", "shift", "drawn"),
    [
        (5, True, 5),
        (5, False, 5),
        (50, True, 50),
        (50, False, 8),
        (-1, True, 100),
        (-1, False, 8),
        (-2, True, 8),
        (-2, False, 8),
        (0, True, 0),
    ],
)
def test_how_many_may_be_drawn(num_predict, shift, drawn):
    """Three tokens of prompt in a context of ten."""
    assert limits.answer(3, Options(num_predict=num_predict), 10, shift=shift) == drawn


def test_what_cannot_be_answered():
    with pytest.raises(PromptTooLong, match=r"11 tokens.* 10"):
        limits.answer(11, Options(), 10, shift=True)
    with pytest.raises(BadRequest, match="empty"):
        limits.answer(0, Options(), 10, shift=True)
