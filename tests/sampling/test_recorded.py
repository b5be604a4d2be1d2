"""Our sampler against llama.cpp's own functions, recorded once (`tests/golden`)."""

import json
from pathlib import Path

import pytest
import torch

from refollama.options import Options
from refollama.sampling import filters
from refollama.sampling.chain import Sampler
from refollama.sampling.mirostat import Mirostat
from tests.golden import hand_made

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "samplers.json").read_text())
JUDGE = "llama.cpp's samplers"
CLOSE = 2e-5  # relative: float32 throughout there, float64 sums here

FILTERS = {
    "top_k": filters.top_k,
    "top_p": filters.top_p,
    "min_p": filters.min_p,
    "typical_p": filters.typical_p,
    "temperature": filters.temperature,
}


def named(record):
    return f"{record['logits']}: " + " ".join(
        f"{name}={value}" for name, value in record["options"].items()
    )


def sampler_of(record):
    """With the hand-made window as the prompt."""
    return Sampler(Options().updated(record["options"]), hand_made.window(record["logits"]))


def after_all_stages(sampler, logits):
    for _, stage in sampler.stages():
        logits = stage(logits)
    return logits


def logits_of(record):
    return torch.tensor(hand_made.logits(record["logits"]))


def off_by(logits, record):
    """By how much a probability differs at most; the survivors must be the recorded ones."""
    ids, probs = filters.candidates(logits)
    found = dict(zip(ids.tolist(), probs.tolist(), strict=True))
    assert sorted(found) == record["ids"]
    expected = dict(zip(record["ids"], record["probs"], strict=True))
    assert found == pytest.approx(expected, rel=CLOSE)
    return max(abs(found[id] - expected[id]) for id in found)


@pytest.mark.parametrize(
    "record",
    GOLDEN["filters"],
    ids=lambda record: "{logits}: {filter}={value}".format(**record),
)
def test_each_filter_alone(record, measured):
    name, value = record["filter"], record["value"]
    out = FILTERS[name](logits_of(record), int(value) if name == "top_k" else value)
    measured("sampling", name, JUDGE, off_by(out, record))


@pytest.mark.parametrize("record", GOLDEN["penalties"], ids=named)
def test_penalties_over_a_window(record, measured):
    name, penalize = sampler_of(record).stages()[0]
    assert name == "penalties"
    measured("sampling", name, JUDGE, off_by(penalize(logits_of(record)), record))


@pytest.mark.parametrize("record", GOLDEN["greedy"], ids=named)
def test_temperature_zero_chooses_the_one_that_survives(record, measured):
    assert [sampler_of(record)(logits_of(record))] == record["ids"]
    measured("sampling", "penalties, then temperature 0", JUDGE, "equal")


@pytest.mark.parametrize("record", GOLDEN["chains"], ids=named)
def test_the_whole_chain(record, measured):
    out = after_all_stages(sampler_of(record), logits_of(record))
    measured("sampling", "the whole chain", JUDGE, off_by(out, record))


@pytest.mark.parametrize("record", GOLDEN["chains"], ids=named)
def test_only_survivors_are_drawn(record):
    assert sampler_of(record)(logits_of(record)) in record["ids"]


@pytest.mark.parametrize(
    "record",
    GOLDEN["mirostats"],
    ids=lambda r: f"version {r['version']}, tau {r['tau']}, temperature {r['temperature']}",
)
def test_mirostat_learns_the_same_from_the_same_draws(record, measured):
    """Each recorded draw is what ours learns from: the next cut must agree again."""
    mirostat = Mirostat(record["version"], record["tau"], record["eta"])
    for step, token in enumerate(record["tokens"]):
        logits = torch.tensor(hand_made.logits_of_step(step))
        out = mirostat.cut(filters.temperature(logits, record["temperature"]))
        best = logits.argsort(descending=True)[: record["kept"][step]]
        assert sorted(filters.candidates(out)[0].tolist()) == sorted(best.tolist())
        mirostat.learn(float(out.double().softmax(0)[token]))
    measured("sampling", "mirostat", JUDGE, "equal", len(record["tokens"]))
