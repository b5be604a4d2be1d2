"""Packed here, read there: each type has the same perplexity in llama.cpp, within one percent.

llama.cpp rounds activations to 8 bits before it multiplies, and we do not; so a model that is sure
of itself is as surprised as there, but not to the last digit. In float32 nothing is rounded.
"""

import json
from pathlib import Path

import pytest

import refollama
from refollama.imatrix import collect
from refollama.perplexity import perplexity
from refollama.quantize import plan
from refollama.weights import open_gguf
from refollama.weights.mixes import MIXES
from tests.golden import peaked_model

GOLDEN = json.loads((Path(__file__).parent / "golden" / "quantised.json").read_text())
QUICK = ("F32", "Q4_K_M")
TYPES = [
    type if type in QUICK else pytest.param(type, marks=pytest.mark.slow)
    for type in GOLDEN["types"]
]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return peaked_model.write(tmp_path_factory.mktemp("peaked") / "source.gguf")


def test_every_type_was_recorded():
    assert set(MIXES) <= set(GOLDEN["types"])


@pytest.mark.parametrize("named", TYPES)
def test_a_packed_model_foretells_as_in_llama_cpp(source, named, measured):
    type, _, weighed = named.partition(" + ")
    importance = None
    if weighed:
        with refollama.load(source) as llm:
            importance = collect(llm, GOLDEN["ids"], peaked_model.NUM_CTX)
    target = source.with_name(f"{type}.gguf")
    with open_gguf(source) as file:
        plan(file, type, importance=importance).write(target)
    with refollama.load(target) as llm:
        *_, last = perplexity(llm, GOLDEN["ids"], peaked_model.NUM_CTX)
    ours, theirs = last.so_far.perplexity, GOLDEN["types"][named]["perplexity"]
    cases = len(GOLDEN["types"][named]["windows"]) * (peaked_model.NUM_CTX // 2 - 1)
    measured("packed models", named, "llama.cpp's perplexity", abs(ours / theirs - 1), cases)
    assert ours == pytest.approx(theirs, rel=1e-5 if type == "F32" else 0.01)
