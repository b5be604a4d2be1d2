"""The sampler: stages in order, chance from the seed alone."""

import collections
import math

import pytest
import torch

from refollama.errors import RefollamaError
from refollama.options import Options
from refollama.sampling.chain import Candidates, Sampler, draw

PLAIN = Options(repeat_penalty=1.0, top_k=0, top_p=1.0, temperature=1.0, seed=7)


def with_(**changes):
    return PLAIN.updated(changes)


def test_temperature_zero_takes_the_first_of_the_best(measured):
    assert Sampler(with_(temperature=0))(torch.tensor([1.0, 3.0, 3.0])) == 1
    measured("sampling", "temperature", "definition", "equal")


def test_penalties_count_at_temperature_zero_too():
    sampler = Sampler(with_(temperature=0, repeat_penalty=2.0))
    logits = torch.tensor([1.5, 2.0])
    assert [sampler(logits) for _ in range(2)] == [1, 0]


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(measured):
    logits = torch.zeros(1000)

    def tokens(seed):
        sampler = Sampler(with_(seed=seed))
        return [sampler(logits) for _ in range(20)]

    assert tokens(1) == tokens(1) != tokens(2)
    assert tokens(-1) != tokens(-1)
    measured("options", "seed", "definition", "equal", 20)


def test_samplers_do_not_share_their_chance():
    logits = torch.zeros(1000)
    alone = Sampler(PLAIN)
    expected = [alone(logits) for _ in range(5)]
    first, second = Sampler(PLAIN), Sampler(with_(seed=8))
    torch.manual_seed(0)
    mixed = [(first(logits), second(logits)) for _ in range(5)]
    assert [a for a, _ in mixed] == expected


def test_frequencies_of_draws_are_the_probabilities(measured):
    """A chi-square test at 100,000 draws; 3 degrees of freedom exceed 16.3 once in a thousand."""
    probs, n = [0.1, 0.2, 0.3, 0.4], 100_000
    rng = torch.Generator().manual_seed(3)
    logits = torch.tensor(probs).log()
    seen = collections.Counter(draw(logits, rng) for _ in range(n))
    chi = sum((seen[i] - n * p) ** 2 / (n * p) for i, p in enumerate(probs))
    assert chi < 16.3
    off = max(abs(seen[i] / n - p) for i, p in enumerate(probs))
    measured("sampling", "draw", "probability", off, n)


def test_a_dropped_candidate_is_never_drawn():
    rng = torch.Generator().manual_seed(0)
    logits = torch.tensor([-math.inf, 0.0, -math.inf])
    assert {draw(logits, rng) for _ in range(100)} == {1}


def test_temperature_sharpens(measured):
    """Tempered by 1/2, p becomes p² renormalised: 0.4² / 0.3 of all for the best of four."""
    probs, n = [0.1, 0.2, 0.3, 0.4], 4000
    sampler = Sampler(with_(temperature=0.5, repeat_last_n=0))
    logits = torch.tensor(probs).log()
    best = sum(sampler(logits) == 3 for _ in range(n)) / n
    assert abs(best - 0.16 / 0.30) < 0.03
    measured("sampling", "temperature", "probability", abs(best - 0.16 / 0.30), n)


def watched(logits, **changes):
    """The stages of one draw: name → candidates, and the token."""
    seen: dict[str, Candidates] = {}
    sampler = Sampler(with_(**changes), on_stage=seen.__setitem__)
    return seen, sampler(logits)


def test_stages_run_in_the_documented_order_and_can_be_watched():
    seen, token = watched(torch.tensor([0.0, 2.0, 1.0]), top_k=2)
    filters = ["top_k", "tfs_z", "typical_p", "top_p", "min_p", "temperature"]
    assert list(seen) == ["logits", "penalties", *filters, "draw"]
    assert seen["logits"].ids.tolist() == [1, 2, 0] and seen["logits"].dropped.numel() == 0
    assert seen["top_k"].ids.tolist() == [1, 2] and seen["top_k"].dropped.tolist() == [0]
    assert seen["top_k"].logits.tolist() == [2.0, 1.0] and seen["top_p"].dropped.numel() == 0
    assert seen["draw"].ids.tolist() == [token] and seen["draw"].probs.tolist() == [1.0]


def test_every_candidate_is_dropped_once_or_drawn():
    """What is watched adds up: the vocabulary is the token and everything that was dropped."""
    logits = torch.randn(500, generator=torch.Generator().manual_seed(2)) * 3
    cut = {"top_k": 200, "tfs_z": 0.99, "typical_p": 0.95, "top_p": 0.9, "min_p": 0.01}
    seen, token = watched(logits, **cut)
    gone = torch.cat([one.dropped for one in seen.values()]).tolist()
    assert sorted([*gone, token]) == list(range(500))
    left = [len(one.ids) for one in seen.values()]
    assert left == sorted(left, reverse=True) and left[2] == 200
    for one in seen.values():
        assert one.logits.diff().le(0).all()
        assert float(one.probs.sum()) == pytest.approx(1)


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("k", [0, 1, 40, 499, 500])
@pytest.mark.parametrize(
    "changes", [{}, {"tfs_z": 0.9, "typical_p": 0.9, "top_p": 0.9, "min_p": 0.02}]
)
def test_watching_changes_nothing(k, changes, equal):
    """Though a sampler that nobody watches looks at the `top_k` best alone."""
    logits = torch.randn(500, generator=torch.Generator().manual_seed(2)) * 2
    logits = logits.round() if equal else logits
    options = with_(top_k=k, repeat_penalty=1.2, **changes)
    plain, shown = Sampler(options), Sampler(options, on_stage=lambda name, candidates: None)
    assert [plain(logits) for _ in range(50)] == [shown(logits) for _ in range(50)]


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
def test_the_penalty_window_is_the_end_of_the_prompt(last_n, n_ctx, window, measured):
    sampler = Sampler(with_(repeat_last_n=last_n), [1, 2, 3, 4, 5], n_ctx=n_ctx)
    assert list(sampler.window) == window
    measured("sampling", "repeat_last_n", "definition", "equal")


def test_a_newline_may_be_spared(measured):
    options = with_(temperature=0, repeat_penalty=10.0, penalize_newline=False)
    logits = torch.tensor([1.0, 5.0])
    sampler = Sampler(options, [1], newline=1)
    assert sampler(logits) == 1
    assert Sampler(options, [1])(logits) == 0
    measured("sampling", "penalize_newline", "definition", "equal", 2)


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
