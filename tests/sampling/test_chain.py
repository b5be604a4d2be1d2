"""The sampler: stages in order, chance from the seed alone."""

import collections
import math

import pytest
import torch

from refollama.errors import RefollamaError
from refollama.options import Options
from refollama.sampling.chain import Sampler, draw

PLAIN = Options(repeat_penalty=1.0, top_k=0, top_p=1.0, temperature=1.0, seed=7)


def with_(**changes):
    return PLAIN.updated(changes)


def test_temperature_zero_takes_the_first_of_the_best():
    assert Sampler(with_(temperature=0))(torch.tensor([1.0, 3.0, 3.0])) == 1


def test_penalties_count_at_temperature_zero_too():
    sampler = Sampler(with_(temperature=0, repeat_penalty=2.0))
    logits = torch.tensor([1.5, 2.0])
    assert [sampler(logits) for _ in range(2)] == [1, 0]


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others():
    logits = torch.zeros(1000)

    def tokens(seed):
        sampler = Sampler(with_(seed=seed))
        return [sampler(logits) for _ in range(20)]

    assert tokens(1) == tokens(1) != tokens(2)
    assert tokens(-1) != tokens(-1)


def test_samplers_do_not_share_their_chance():
    logits = torch.zeros(1000)
    alone = Sampler(PLAIN)
    expected = [alone(logits) for _ in range(5)]
    first, second = Sampler(PLAIN), Sampler(with_(seed=8))
    torch.manual_seed(0)
    mixed = [(first(logits), second(logits)) for _ in range(5)]
    assert [a for a, _ in mixed] == expected


def test_frequencies_of_draws_are_the_probabilities():
    """A chi-square test at 20,000 draws; 3 degrees of freedom exceed 16.3 once in a thousand."""
    probs, n = [0.1, 0.2, 0.3, 0.4], 20_000
    rng = torch.Generator().manual_seed(3)
    logits = torch.tensor(probs).log()
    seen = collections.Counter(draw(logits, rng) for _ in range(n))
    chi = sum((seen[i] - n * p) ** 2 / (n * p) for i, p in enumerate(probs))
    assert chi < 16.3


def test_a_dropped_candidate_is_never_drawn():
    rng = torch.Generator().manual_seed(0)
    logits = torch.tensor([-math.inf, 0.0, -math.inf])
    assert {draw(logits, rng) for _ in range(100)} == {1}


def test_temperature_sharpens():
    """Tempered by 1/2, p becomes p² renormalised: 0.4² / 0.3 of all for the best of four."""
    probs, n = [0.1, 0.2, 0.3, 0.4], 4000
    sampler = Sampler(with_(temperature=0.5, repeat_last_n=0))
    logits = torch.tensor(probs).log()
    best = sum(sampler(logits) == 3 for _ in range(n)) / n
    assert abs(best - 0.16 / 0.30) < 0.03


def test_stages_run_in_the_documented_order_and_can_be_watched():
    seen = []
    sampler = Sampler(with_(top_k=2), on_stage=lambda name, logits: seen.append((name, logits)))
    token = sampler(torch.tensor([0.0, 2.0, 1.0]))
    names = ["penalties", "top_k", "tfs_z", "typical_p", "top_p", "min_p", "temperature"]
    assert [name for name, _ in seen] == names
    assert seen[1][1].tolist() == [-math.inf, 2.0, 1.0] and token in (1, 2)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"temperature": 0}, ["penalties"]),
        ({"temperature": -1, "mirostat": 2}, ["penalties"]),
        ({"mirostat": 1}, ["penalties", "temperature", "mirostat"]),
    ],
)
def test_the_other_chains(changes, names):
    assert [name for name, _ in Sampler(with_(**changes)).stages()] == names


@pytest.mark.parametrize(
    ("last_n", "n_ctx", "window"),
    [(2, 8, [4, 5]), (0, 8, []), (-1, 3, [3, 4, 5]), (64, 8, [1, 2, 3, 4, 5])],
)
def test_the_penalty_window_is_the_end_of_the_prompt(last_n, n_ctx, window):
    sampler = Sampler(with_(repeat_last_n=last_n), [1, 2, 3, 4, 5], n_ctx=n_ctx)
    assert list(sampler.window) == window


def test_a_newline_may_be_spared():
    options = with_(temperature=0, repeat_penalty=10.0, penalize_newline=False)
    logits = torch.tensor([1.0, 5.0])
    sampler = Sampler(options, [1], newline=1)
    assert sampler(logits) == 1
    assert Sampler(options, [1])(logits) == 0


@pytest.mark.parametrize("t", [5e-324, 1e-46, 1e-44, 1e-10, 1e30])
def test_the_smallest_and_the_largest_temperatures_draw_what_may_be_drawn(t):
    sampler = Sampler(with_(temperature=t))
    tokens = {sampler(torch.tensor([-3.0, -1.0, -1e30, -2.0])) for _ in range(40)}
    assert tokens == ({1} if t < 1 else {0, 1, 2, 3})


@pytest.mark.parametrize(("x", "penalty"), [(-3.4e38, 1.1), (3.4e38, 0.001), (-3.4e38, 1000.0)])
def test_the_largest_logits_stay_finite_under_penalties(x, penalty):
    sampler = Sampler(with_(repeat_penalty=penalty), [0, 1])
    assert sampler(torch.tensor([x, x])) in (0, 1)


def test_logits_that_are_no_numbers_are_an_error_and_not_a_token():
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(RefollamaError, match="not a number"):
            Sampler(PLAIN)(torch.tensor([0.0, bad]))
