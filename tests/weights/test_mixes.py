"""Each tensor gets the type that llama.cpp gives it, in files of every type."""

import json
from pathlib import Path

import numpy as np
import pytest

from refollama.errors import BadRequest
from refollama.weights.blocks import BLOCKS, TYPE_ID
from refollama.weights.mixes import MIXES, Traits, file_type, tensor_type, word
from tests.golden.mixed_models import MODELS, by_types, shapes

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "mixes.json").read_text())


@pytest.mark.parametrize("type", MIXES)
@pytest.mark.parametrize("model", MODELS)
def test_types_are_those_that_llama_cpp_chooses(model, type):
    keys, tensors = shapes(model)
    traits = Traits.of(keys, tuple(tensors))
    found = {
        name: tensor_type(name, shape, "F32", type, traits)
        for name, shape in tensors.items()
        if len(shape) > 1
    }
    assert by_types(found) == GOLDEN[model][type]


def test_the_recorded_models_are_those_that_are_compared():
    assert set(GOLDEN) - {"recorded_by"} == set(MODELS)
    assert all(set(types) == set(MIXES) for name, types in GOLDEN.items() if name != "recorded_by")


@pytest.mark.parametrize("type", MIXES)
@pytest.mark.parametrize("columns", [1, 31, 32, 96, 255, 256, 1024])
@pytest.mark.parametrize("part", ["output", "token_embd", "blk.0.attn_v", "blk.9.ffn_down"])
def test_every_row_is_filled_by_its_blocks(type, columns, part):
    traits = Traits(n_layers=10, shared_by=4)
    found = tensor_type(f"{part}.weight", (7, columns), "F32", type, traits)
    assert columns % BLOCKS[TYPE_ID[found]].values == 0


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.0.attn_norm.weight", (256,)),
        ("blk.0.attn_q.bias", (256, 256)),
        ("blk.0.ffn_gate_inp.weight", (8, 256)),
        ("rope_freqs.weight", (32,)),
        ("position_embd.weight", (64, 256)),
    ],
)
@pytest.mark.parametrize("old", ["F32", "F16"])
def test_what_is_no_matrix_of_weights_stays(name, shape, old):
    assert tensor_type(name, shape, old, "Q4_K_M", Traits(n_layers=8)) == old


@pytest.mark.parametrize("type", MIXES)
def test_experts_that_lie_apart_get_the_type_of_those_in_one_tensor(type):
    """As in files of 2023, whose experts are put together when they are loaded."""
    traits = Traits(n_layers=8, n_experts=8)
    together, *apart = (
        [
            tensor_type(f"blk.{layer}.{part}.weight", (256, 256), "F16", type, traits)
            for layer in range(8)
        ]
        for part in ("ffn_down_exps", "ffn_down.0", "ffn_down.7", "ffn_down.12")
    )
    assert apart == [together] * 3
    assert type != "Q4_K_M" or together[0] == "Q6_K"


@pytest.mark.parametrize("name", [".weight", "a\nb.weight", "blk.0..weight"])
def test_a_matrix_without_a_proper_name_gets_the_base_type(name):
    assert tensor_type(name, (7, 256), "F32", "Q4_K_M", Traits(n_layers=8)) == "Q4_K"


@pytest.mark.parametrize("value", [7, True, 1.5, [1, 2], np.array([1, 2]), ["llama"], None])
def test_what_is_no_word_is_none(value):
    assert word({"a": value}, "a", "model") == ""
    assert (word({}, "a"), word({}, "a", "model"), word({"a": "b"}, "a")) == ("", "model", "b")


def test_traits_of_layers_that_differ_are_those_of_the_first():
    keys = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.attention.head_count": np.array([8, 4], np.int32),
        "llama.attention.head_count_kv": [2, 4],
    }
    assert Traits.of(keys, ("output.weight",)) == Traits(n_layers=2, shared_by=4)
    assert Traits.of({}, ()) == Traits(tied=True)


@pytest.mark.parametrize(
    ("given", "name"),
    [("q4_0", "Q4_0"), (" Q4_K ", "Q4_K_M"), ("q5_k", "Q5_K_M"), ("bf16", "BF16")],
)
def test_names_are_read_as_people_write_them(given, name):
    assert file_type(given) == name


@pytest.mark.parametrize("given", ["", "q9", "Q8_K", "IQ2_XS", "x" * 10_000])
def test_an_unknown_type_is_told_with_those_that_there_are(given):
    with pytest.raises(BadRequest) as raised:
        file_type(given)
    assert "Q4_K_M, Q4_K_S" in str(raised.value) and len(str(raised.value)) < 300
