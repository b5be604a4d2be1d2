"""Mirostat: a thermostat must hold the temperature; and its arithmetic, by hand."""

import math

import pytest
import torch

from refollama.options import Options
from refollama.sampling.chain import Sampler
from refollama.sampling.mirostat import Mirostat


def zipf(n, s=1.1):
    return -s * torch.arange(1, n + 1, dtype=torch.float64).log().float()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("tau", [5.0, pytest.param(3.0, marks=pytest.mark.slow)])
def test_the_mean_surprise_settles_at_tau(version, tau, monkeypatch, measured):
    """On 32,000 candidates; surprise is measured among those that were kept, as it is learned."""
    options = Options(mirostat=version, mirostat_tau=tau, temperature=1.0, repeat_last_n=0, seed=5)
    sampler, logits = Sampler(options), zipf(32_000)
    surprises = []
    learn = sampler.mirostat.learn

    def watched(probability):
        surprises.append(-math.log2(probability))
        learn(probability)

    monkeypatch.setattr(sampler.mirostat, "learn", watched)
    for _ in range(900):
        sampler(logits)
    mean = sum(surprises[300:]) / len(surprises[300:])
    assert abs(mean - tau) < 0.03 * tau
    measured("sampling", "mirostat_tau", "tau", abs(mean - tau) / tau, len(surprises[300:]))


def test_version_2_keeps_what_surprises_by_no_more_than_mu(measured):
    """Probabilities 1/2, 1/4, 1/8, 1/8 surprise by 1, 2, 3 and 3 bits."""
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    for mu, kept in ((0.5, 1), (1.01, 1), (2.01, 2), (3.01, 4)):
        mirostat = Mirostat(2, tau=3, eta=0.1)
        mirostat.mu = mu
        assert int((mirostat.cut(logits) > -math.inf).sum()) == kept
        measured("sampling", "mirostat", "definition", "equal")


def test_version_1_by_the_formula(measured):
    """The same estimate in plain Python, step by step."""
    probs = [0.5 * 0.8**i for i in range(40)]
    total = sum(probs)
    probs = [p / total for p in probs]
    t = [math.log((i + 2) / (i + 1)) for i in range(39)]
    b = [math.log(probs[i] / probs[i + 1]) for i in range(39)]
    s = sum(x * y for x, y in zip(t, b, strict=True)) / sum(x * x for x in t)
    mirostat = Mirostat(1, tau=2, eta=0.1)
    k = ((s - 1) * 2**mirostat.mu / (1 - 40 ** -(s - 1))) ** (1 / s)
    found = int((mirostat.cut(torch.tensor(probs).log()) > -math.inf).sum())
    assert found == max(1, min(40, int(k)))
    measured("sampling", "mirostat", "definition", "equal")


def test_it_starts_at_twice_tau_and_learns_by_eta(measured):
    mirostat = Mirostat(2, tau=5.0, eta=0.1)
    assert mirostat.mu == 10
    mirostat.learn(0.25)  # 2 bits: 3 less than tau
    assert math.isclose(mirostat.mu, 10.3)
    measured("sampling", "mirostat_eta", "definition", "equal")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "values", [[0.0], [0.0, 0.0], [0.0] * 50, [0.0, -1000.0], [0.0, -math.inf, -1.0]]
)
@pytest.mark.parametrize("mu", [-1e6, 0.0, 10.0, 1e6])
def test_something_is_always_kept(version, values, mu):
    mirostat = Mirostat(version, tau=5.0, eta=0.1)
    mirostat.mu = mu
    kept = mirostat.cut(torch.tensor(values)) > -math.inf
    assert kept[0] and kept.sum() <= sum(v > -math.inf for v in values)
