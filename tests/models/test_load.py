"""A file that does not fit is refused with what was found and what was expected."""

import re

import numpy as np
import pytest

from refollama.errors import FormatError, UnsupportedModel
from refollama.models.config import HARMLESS, ModelConfig
from refollama.models.load import load_net
from refollama.weights.gguf import open_gguf, write_gguf
from tests.tiny import metadata, write_model


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ({"drop": "blk.1.ffn_up.weight"}, FormatError, ["blk.1.ffn_up.weight", "96 × 64"]),
        ({"drop": "output_norm.weight"}, FormatError, ["output_norm.weight", "missing", "64"]),
        ({"drop": "token_embd.weight"}, FormatError, ["token_embd.weight", "any × 64"]),
        (
            {"extra": {"rope_freqs.weight": (9,)}},
            FormatError,
            ["rope_freqs.weight", "shape 9", "expected 8"],
        ),
        ({"extra": {"blk.0.attn_q.bias": (63,)}}, FormatError, ["blk.0.attn_q.bias", "63", "64"]),
        ({"extra": {"blk.0.attn_sinks": (4,)}}, UnsupportedModel, ["blk.0.attn_sinks"]),
        ({"extra": {"blk.2.attn_norm.weight": (64,)}}, UnsupportedModel, ["blk.2.attn_norm"]),
        (
            {"extra": {"blk.0.attn_q.weight": (32, 64)}},
            FormatError,
            ["blk.0.attn_q.weight", "32 × 64", "64 × 64"],
        ),
        (
            {"extra": {"output_norm.weight": (1, 64)}},
            FormatError,
            ["output_norm.weight", "1 × 64", "expected 64"],
        ),
        ({"keys": {"general.architecture": "falcon"}}, UnsupportedModel, ["falcon", "llama"]),
        ({"rope.scaling.type": "su"}, UnsupportedModel, ["'su'", "linear, yarn, longrope"]),
        (
            {
                "rope.scaling.type": "longrope",
                "extra": {"rope_factors_long.weight": (8,)},
            },
            FormatError,
            ["rope_factors_short.weight is missing", "8"],
        ),
        ({"extra": {"rope_factors_long.weight": (8,)}}, UnsupportedModel, ["rope_factors_long"]),
        (
            {"rope.dimension_count": 8, "extra": {"rope_freqs.weight": (8,)}},
            FormatError,
            ["rope_freqs.weight", "expected 4"],
        ),
        ({"expert_count": 8}, FormatError, ["expert_used_count is 0", "expert_count is 8"]),
        (
            {"expert_count": 2, "expert_used_count": 3},
            FormatError,
            ["expert_used_count is 3", "expert_count is 2"],
        ),
        ({"rope.scaling.factor": 1e-30}, FormatError, ["factor is", "1/1000 to 1000"]),
        ({"keys": {"llama.rope.scaling.type": [1, 2]}}, UnsupportedModel, ["scaling.type is"]),
        ({"claims": {"general.architecture": [1, 2]}}, UnsupportedModel, ["architecture is"]),
        ({"rope.freq_base": 0.5}, FormatError, ["freq_base is 0.5", "1.001 to"]),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.yarn_beta_fast": 0.0},
            FormatError,
            ["beta_fast is 0"],
        ),
        ({"rope.dimension_count": 7}, FormatError, ["dimension_count is 7", "16 wide", "even"]),
        ({"rope.dimension_count": 18}, FormatError, ["dimension_count is 18", "16 wide"]),
        ({"rope.dimension_count": 0}, FormatError, ["dimension_count is 0"]),
        ({"claims": {"llama.attention.value_length": 0}}, FormatError, ["value_length is 0"]),
        (
            {"claims": {"llama.attention.value_length": 8}},
            FormatError,
            ["attn_v.weight", "32 × 64", "16 × 64"],
        ),
        ({"keys": {"llama.attention.sliding_window": -1}}, FormatError, ["sliding_window is -1"]),
        ({"rope.scaling.yarn_ext_factor": 1.5}, FormatError, ["ext_factor is 1.5", "-1 to 1"]),
        ({"rope.scaling.yarn_log_multiplier": -1.0}, FormatError, ["log_multiplier is -1"]),
        ({"rope.scaling.attn_factor": float("inf")}, FormatError, ["attn_factor is inf"]),
        (
            {"claims": {"llama.attention.head_count": [4, 4, 4]}},
            FormatError,
            ["head_count has 3 entries for 2 layers"],
        ),
        ({"claims": {"llama.feed_forward_length": [96, 0]}}, FormatError, ["length is 0"]),
        (
            {"claims": {"llama.feed_forward_length": [96.0, 96.0]}},
            FormatError,
            ["llama.feed_forward_length must be one integer, not 96.0"],
        ),
        (
            {"claims": {"llama.attention.head_count_kv": [2, 3]}},
            FormatError,
            ["head_count is 4", "head_count_kv = 3"],
        ),
        (
            {
                "expert_count": 2,
                "expert_used_count": 1,
                "extra": {"blk.0.ffn_up_exps.bias": (2, 96)},
            },
            UnsupportedModel,
            ["blk.0.ffn_up_exps.bias"],
        ),
        ({"extra": {"blk.0.attn_norm.bias": (64,)}}, UnsupportedModel, ["blk.0.attn_norm.bias"]),
        ({"keys": {"llama.attention.head_count_kv": 3}}, FormatError, ["head_count_kv = 3"]),
        ({"keys": {"llama.context_length": 0}}, FormatError, ["context_length is 0"]),
        ({"keys": {"llama.context_length": "long"}}, FormatError, ["context_length", "integer"]),
        (
            {"keys": {"llama.attention.layer_norm_rms_epsilon": float("nan")}},
            FormatError,
            ["epsilon", "finite"],
        ),
        ({"attention.key_length": 15, "tied": True}, FormatError, ["15 wide", "even"]),
    ],
)
def test_misfits(tmp_path, how, error, said):
    path = write_model(tmp_path / "m.gguf", **how)
    with pytest.raises(error) as caught:
        load_net(path)
    assert all(part in str(caught.value) for part in said), caught.value


@pytest.mark.parametrize(
    "key",
    [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ],
)
def test_a_missing_key_is_named(tmp_path, key):
    with pytest.raises(FormatError, match=f"llama.{key}"):
        ModelConfig.from_metadata(metadata(**{key: None}))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_divisor_that_divides_nothing_is_found(tmp_path, value):
    path = write_model(tmp_path / "m.gguf", extra={"rope_freqs.weight": (8,)})
    file = open_gguf(path)
    tensors = {name: (t.type, t.shape, file.bytes_of(name)) for name, t in file.tensors.items()}
    bad = np.array([1.0] * 7 + [value], np.float32).view(np.uint8)
    tensors["rope_freqs.weight"] = (0, (8,), bad)
    keys = {key: file.typed(key) for key in file.metadata}
    write_gguf(tmp_path / "bad.gguf", keys, tensors)
    with pytest.raises(FormatError, match=r"rope_freqs\.weight must hold positive numbers"):
        load_net(tmp_path / "bad.gguf")


def test_old_leftovers_are_ignored(tmp_path):
    extra = {"blk.0.attn_rot_embd.weight": (8,)}
    load_net(write_model(tmp_path / "m.gguf", extra=extra))


def test_a_lying_block_count_is_found_at_the_first_missing_tensor(tmp_path):
    path = write_model(tmp_path / "m.gguf", claims={"llama.block_count": 4000})
    with pytest.raises(FormatError, match=r"blk\.2\.attn_norm\.weight is missing"):
        load_net(path)


@pytest.mark.parametrize("key", HARMLESS)
def test_what_would_change_the_computation_is_refused_by_name(key):
    """Whatever is not built is never ignored; a value that changes nothing may stand in a file."""
    for harmless in HARMLESS[key]:
        ModelConfig.from_metadata(metadata(**{key: harmless}))
    for value in (0.5, 2, "yes", [1, 2], not HARMLESS[key][0]):
        if value in HARMLESS[key]:
            continue
        with pytest.raises(UnsupportedModel, match=re.escape(f"llama.{key} is {value!r}")):
            ModelConfig.from_metadata(metadata(**{key: value}))
