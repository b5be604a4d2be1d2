"""Adapters' files: what does not fit is refused, in a sentence that says what and why."""

import json
import re
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refollama.errors import FormatError, NotFound, RefollamaError, UnsupportedModel
from refollama.weights import open_gguf
from refollama.weights.lora import ggla, open_adapter, save_adapter
from refollama.weights.safetensors import encoded
from tests import adapters
from tests.tiny import metadata, shapes

Q = "blk.0.attn_q"
SHAPES = shapes(metadata())
ONE = adapters.halves(SHAPES, [Q])
A, B = ONE[Q]
BAD = {  # of Q, which is 64 × 64
    "shape": ({Q: (A, B[:32])}, "attn_q.weight has shape 32 × 64, but the model's .* 64 × 64"),
    "width": ({Q: (A[:, :8], B)}, "attn_q.weight has shape 64 × 8, but the model's .* 64 × 64"),
    "rank": ({Q: (A, B[:, :3])}, "attn_q.weight have the shapes 4 × 64 and 64 × 3"),
    "name": ({"blk.7.attn_q": (A, B)}, "blk.7.attn_q.weight, which the model does not have"),
    "infinite": ({Q: (A, B * np.inf)}, "attn_q.weight has numbers that are not finite"),
    "nan": ({Q: (A * np.nan, B)}, "attn_q.weight has numbers that are not finite"),
    "nothing": ({}, "changes nothing"),
}


@pytest.fixture(scope="module")
def model(tiny):
    with open_gguf(tiny) as file:
        yield file


def refused(path, model, kind=RefollamaError):
    with pytest.raises(kind) as caught:
        open_adapter(path, model)
    assert caught.value.status in (400, 404)
    return str(caught.value)


@pytest.mark.filterwarnings("ignore:invalid value")  # 0 · ∞, in making them
@pytest.mark.parametrize("why", BAD)
@pytest.mark.parametrize("write", [adapters.write_plain, adapters.write_peft, adapters.write_ggla])
def test_what_does_not_fit_is_named_with_both_shapes(tmp_path, model, write, why):
    change, sentence = BAD[why]
    told = refused(write(tmp_path / "adapter", change), model)
    assert re.search(sentence, told), told


@pytest.mark.parametrize(
    ("write", "lost"),
    [
        (adapters.write_plain, f"{Q}.weight.lora_b"),
        (adapters.write_plain, f"{Q}.weight.lora_a"),
        (adapters.write_ggla, f"{Q}.loraB"),
        (adapters.write_peft, next(iter(adapters.hf_tensors(ONE)))),
    ],
)
def test_half_a_change_is_refused_by_the_name_of_the_other_half(tmp_path, model, write, lost):
    told = refused(write(tmp_path / "adapter", ONE, drop=lost), model, FormatError)
    assert lost.split(".")[-1].removesuffix("weight") in told and "missing" in told


@pytest.mark.parametrize(
    ("says", "sentence"),
    [
        ({"general__type": "model"}, "general.type is 'model'; expected 'adapter'"),
        ({"adapter__type": "control"}, "adapter.type is 'control'; expected 'lora'"),
        ({"general__architecture": "qwen2"}, "architecture 'qwen2', but this one is 'llama'"),
        ({"general__type": [1, 2]}, "general.type is ''; expected 'adapter'"),
        ({"adapter__type": ["lora"]}, "adapter.type is ''; expected 'lora'"),
        ({"general__architecture": [1, 2]}, "architecture '', but this one is 'llama'"),
        ({"adapter__lora__alpha": "x"}, "adapter.lora.alpha is 'x'; expected a number"),
        ({"adapter__alora__invocation_tokens": [1, 2]}, "aLoRA"),
    ],
)
def test_what_a_file_says_of_itself_is_held_against_the_model(tmp_path, model, says, sentence):
    file = adapters.write_plain(tmp_path / "a.gguf", ONE, **says)
    told = refused(file, model)
    assert told.startswith("a.gguf: ") and sentence in told


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; expected 'LORA'"),
        ({"use_dora": True}, "use_dora is chosen"),
        ({"bias": "all"}, "bias is chosen"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is chosen"),
        ({"lora_alpha": "much"}, "lora_alpha is 'much'; expected a number"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf; expected a number"),
        ({"r": 7}, "has rank 4, but adapter_config.json says 7"),
        ({"r": 0}, "has rank 4, but adapter_config.json says 0"),
        ({"rank_pattern": {"(a+)+b": 4}}, "must name modules plainly"),
    ],
)
def test_choices_that_cannot_be_followed_are_named(tmp_path, model, choices, sentence):
    assert sentence in refused(adapters.write_peft(tmp_path / "p", ONE, **choices), model)


@pytest.mark.parametrize(
    ("start", "better"),
    [
        ("pissa", "path_initial_model_for_weight_conversion"),
        ("pissa_niter_16", "path_initial_model_for_weight_conversion"),
        ("OLoRA", "path_initial_model_for_weight_conversion"),
        ("corda", "path_initial_model_for_weight_conversion"),
        ("lora_ga", "path_initial_model_for_weight_conversion"),
        ("loftq", "merge_and_unload"),
    ],
)
def test_beginnings_that_change_the_base_are_named(tmp_path, model, start, better):
    folder = adapters.write_peft(tmp_path / "p", ONE, init_lora_weights=start)
    told = refused(folder, model, UnsupportedModel)
    assert f"init_lora_weights is '{start}', which changes the base weights" in told
    assert better in told


@pytest.mark.parametrize(
    "start", [True, False, None, "gaussian", "eva", "orthogonal", "mica", "of 2030", ["pissa"]]
)
def test_beginnings_that_leave_the_base_alone_pass(tmp_path, model, start):
    folder = adapters.write_peft(tmp_path / "p", ONE, init_lora_weights=start)
    assert list(open_adapter(folder, model).pairs) == [Q]


def test_a_name_in_a_ggla_file_is_cut_out_without_the_rest_of_the_file(tmp_path):
    class Watched(bytes):
        def __getitem__(self, part):
            found = super().__getitem__(part)
            cut.append(len(found))
            return found

    cut: list[int] = []
    raw = adapters.write_ggla(tmp_path / "a", adapters.halves(SHAPES)).read_bytes()
    assert len(dict(ggla._tensors(Watched(raw)))) == 2 * len(adapters.LINEARS)
    assert max(cut) <= ggla.LONGEST


def test_a_folder_whose_weights_are_a_pickle(tmp_path, model):
    folder = adapters.write_peft(tmp_path / "p", ONE)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(b"PK\3\4" + weights.read_bytes())
    assert "pickle" in refused(folder, model)
    weights.rename(folder / "adapter_model.bin")
    assert "adapter_model.bin is a pickle" in refused(folder, model)
    (folder / "adapter_model.bin").unlink()
    assert "adapter_model.safetensors is missing" in refused(folder, model, NotFound)


@pytest.mark.parametrize(
    ("name", "values", "sentence"),
    [
        ("base_model.model.model.layers.0.mlp.gate_proj.weight", A, "no half of a change"),
        ("base_model.model.model.layers.0.mlp.experts.lora_A.weight", A, "is missing"),
        ("base_model.model.model.norm.lora_A.weight", A, "is missing"),
        ("base_model.model.lm_head.base_layer.weight", A, "4 × 64, but the model's token_embd"),
        ("base_model.model.lm_head.lora_A.weight", A[0], "expected a matrix of floats"),
    ],
)
def test_tensors_that_are_no_change_are_named(tmp_path, model, name, values, sentence):
    folder = adapters.write_peft(tmp_path / "p", ONE)
    tensors = {name: adapters.made(values, "F32")}
    (folder / "adapter_model.safetensors").write_bytes(b"".join(encoded(tensors)))
    told = refused(folder, model)
    assert sentence in told and name.split(".lora_")[0].split("model.")[-1][:20] in told


def test_a_module_that_no_llama_has(tmp_path, model):
    folder = adapters.write_peft(tmp_path / "p", {})
    tensors = {
        f"base_model.model.model.layers.0.attn.{half}.weight": adapters.made(A, "F32")
        for half in ("lora_A", "lora_B")
    }
    (folder / "adapter_model.safetensors").write_bytes(b"".join(encoded(tensors)))
    told = refused(folder, model, UnsupportedModel)
    assert "'model.layers.0.attn'; what can be changed are model.embed_tokens, lm_head" in told


def test_rank_zero(tmp_path, model):
    """No writer makes such a file, so its numbers are changed by hand."""
    data = bytearray(adapters.write_ggla(tmp_path / "a", ONE).read_bytes())
    struct.pack_into("<i", data, 8, 0)
    (tmp_path / "a").write_bytes(data)
    assert "version 1 and rank 0; expected" in refused(tmp_path / "a", model)
    empty = {Q: (A[:0], B[:, :0])}
    assert "it is empty" in refused(adapters.write_peft(tmp_path / "p", empty, rank=0), model)


def test_files_of_no_known_kind(tmp_path, model):
    (tmp_path / "x").write_bytes(b"hello")
    (tmp_path / "empty").write_bytes(b"")
    for name in ("x", "empty"):
        assert "neither a GGUF file nor a ggla file" in refused(tmp_path / name, model, FormatError)
    refused(tmp_path / "none", model, NotFound)
    refused(tmp_path, model, NotFound)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_folder_saved_as_gguf_is_the_same_adapter(tmp_path, model, dtype):
    """Of ranks and alphas of their own, and scaled by the root of the rank."""
    special = {"lora_alpha": 3, "use_rslora": True, "alpha_pattern": {"v_proj": 5}}
    change = adapters.halves(SHAPES, [*adapters.LINEARS, "token_embd"])
    folder = adapters.write_peft(tmp_path / "p", change, dtype=dtype, **special)
    first = open_adapter(folder, model)
    assert first.pairs["blk.1.attn_v"].scale == 5 / 2 and first.pairs[Q].scale == 3 / 2
    save_adapter(tmp_path / "a.gguf", first, model)
    again = open_adapter(tmp_path / "a.gguf", model)
    assert again.pairs.keys() == first.pairs.keys()
    for name, (a, b, scale) in first.pairs.items():
        other = again.pairs[name]
        torch.testing.assert_close(other.scale * other.b, scale * b)
        torch.testing.assert_close(other.a, a)


def test_ranks_by_module(tmp_path, model):
    change = adapters.halves(SHAPES, [Q]) | adapters.halves(SHAPES, ["blk.1.ffn_up"], rank=2)
    pattern = {"^model.layers.1.mlp.up_proj": 2}
    pairs = open_adapter(
        adapters.write_peft(tmp_path / "p", change, rank_pattern=pattern), model
    ).pairs
    assert (pairs[Q].scale, pairs["blk.1.ffn_up"].scale) == (2.0, 4.0)


FUZZ = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(data=st.data(), kind=st.sampled_from(["ggla", "safetensors", "config"]))
def test_damaged_files_are_refused_or_read_but_never_crash(tmp_path, model, data, kind):
    if kind == "ggla":
        path = file = adapters.write_ggla(tmp_path / "a", ONE)
    else:
        path = adapters.write_peft(tmp_path / "p", ONE)
        file = path / ("adapter_config.json" if kind == "config" else "adapter_model.safetensors")
    raw = bytearray(file.read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=4)):
        raw[at] = data.draw(st.integers(0, 255))
    file.write_bytes(
        raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    )
    try:
        open_adapter(path, model)
    except RefollamaError as error:
        assert len(str(error)) < 400


def test_a_config_that_is_no_json(tmp_path, model):
    folder = adapters.write_peft(tmp_path / "p", ONE)
    for text in ("{", "[1]", json.dumps({"peft_type": "LORA", "rank_pattern": [1]}), "\udc80"):
        (folder / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        assert "adapter_config.json" in refused(folder, model)
