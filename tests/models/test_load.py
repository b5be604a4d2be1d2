"""A file that does not fit is refused with what was found and what was expected."""

import pytest

from refollama.errors import FormatError, UnsupportedModel
from refollama.models.config import ModelConfig
from refollama.models.load import load_net
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
        ({"rope.scaling.type": "longrope"}, UnsupportedModel, ["longrope", "linear, yarn"]),
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
        ({"rope.dimension_count": 8}, UnsupportedModel, ["dimension_count is 8", "16"]),
        ({"attention.value_length": 8}, UnsupportedModel, ["value_length is 8", "16"]),
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


def test_old_leftovers_are_ignored(tmp_path):
    extra = {"blk.0.attn_rot_embd.weight": (8,)}
    load_net(write_model(tmp_path / "m.gguf", extra=extra))


def test_a_lying_block_count_is_found_at_the_first_missing_tensor(tmp_path):
    path = write_model(tmp_path / "m.gguf", claims={"llama.block_count": 4000})
    with pytest.raises(FormatError, match=r"blk\.2\.attn_norm\.weight is missing"):
        load_net(path)
