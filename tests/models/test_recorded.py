"""Our logits against those of Hugging Face's own models, recorded once (`tests/golden`)."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from refollama.models.exact import fewest
from refollama.models.load import load_net
from refollama.weights.blocks import TYPE_ID
from refollama.weights.gguf import write_gguf
from tests import adapters
from tests.golden.small_models import MODELS, head_width, some_tokens, weights

GOLDEN = Path(__file__).parent.parent / "golden"
LIMIT = 1e-4

NAMES = {  # of a checkpoint's tensors → of a GGUF file's
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
for _expert in range(4):
    for _theirs, _ours in {"w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up"}.items():
        NAMES[f"block_sparse_moe.experts.{_expert}.{_theirs}"] = f"{_ours}.{_expert}"
KEYS = {  # of config.json → of a GGUF file, behind `llama.`
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "head_dim": "attention.key_length",
    "sliding_window": "attention.sliding_window",
    "rope_theta": "rope.freq_base",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
}
SCALING_KEYS = {
    "rope_type": "type",
    "factor": "factor",
    "original_max_position_embeddings": "original_context_length",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}


def write(path, settings):
    """The checkpoint as a GGUF file, float32 throughout."""
    H, Hk = settings["num_attention_heads"], settings["num_key_value_heads"]
    tensors = {}
    for name, values in weights(settings).items():
        if "q_proj" in name or "k_proj" in name:
            values = neighbours(values, H if "q_proj" in name else Hk)
        tensors[gguf_name(name)] = values
    if (settings.get("rope_scaling") or {}).get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = divisors(settings)
    write_gguf(
        path,
        metadata(settings),
        {name: (TYPE_ID["F32"], x.shape, x.tobytes()) for name, x in tensors.items()},
    )
    return path


def metadata(settings):
    found = {"general.architecture": "llama"}
    if value_length := settings.get("head_dim"):
        found["llama.attention.value_length"] = value_length
    for ours, key in KEYS.items():
        if settings.get(ours) is not None:
            found[f"llama.{key}"] = settings[ours]
    scaling = settings.get("rope_scaling") or {"rope_type": "llama3"}
    if scaling["rope_type"] != "llama3":  # whose scaling is in its tensor of divisors
        for ours, key in SCALING_KEYS.items():
            if ours in scaling:
                found[f"llama.rope.scaling.{key}"] = scaling[ours]
    return found


def gguf_name(name):
    head, kind = name.removeprefix("model.").rsplit(".", 1)
    if not head.startswith("layers."):
        return f"{NAMES[head]}.{kind}"
    _, layer, part = head.split(".", 2)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def neighbours(rows, heads):
    """Rows of a head's first and second half → by turns: what is rotated together lies together.

    Shapes: (heads · D, …) → the same.
    """
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])  # (heads, 2, D/2, …)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def divisors(settings):
    """Llama 3.1's divisor of each pair's frequency, by its wavelength in tokens.  → (D/2,)

    Below old / high a pair is left alone, above old / low it is slowed by the factor; a blend of
    the frequencies lies between. Source: the model's published settings, `rope_type` llama3.
    """
    scaling, D = settings["rope_scaling"], head_width(settings)
    old, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi * settings["rope_theta"] ** (np.arange(0, D, 2) / D)
    share = np.clip((old / wavelengths - low) / (high - low), 0, 1)  # of the unslowed frequency
    return (1 / (share + (1 - share) / factor)).astype(np.float32)


@torch.no_grad()
def logits_of(net, tokens, step):
    """(T,) → (T, V), so many tokens at a time through one cache."""
    ids, cache, found = torch.tensor(tokens)[None], net.new_cache(), []
    for start in range(0, len(tokens), step):
        part = ids[:, start : start + step]
        end = start + part.shape[1]
        rows = cache.rows([0], end)
        found.append(net.output(net.hidden(part, torch.arange(start, end)[None], rows)[0]))
    return torch.cat(found).numpy()


def recorded(name):
    return json.loads((GOLDEN / f"logits-{name}.json").read_text())


@pytest.mark.parametrize("step", [40, 3])
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_recorded(name, step, tmp_path, measured):
    golden = recorded(name)
    net = load_net(write(tmp_path / "m.gguf", MODELS[name]))
    found = logits_of(net, golden["tokens"], step)
    off = np.abs(found - np.array(golden["logits"])).max()
    assert off < LIMIT
    measured("models", f"transformers/{name}", "transformers", off, len(found))


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("mistral-window", "sliding_window"),
        ("mistral", "rope_theta"),
        ("llama3", "rope_scaling"),
        ("yarn", "rope_scaling"),
        ("linear", "rope_scaling"),
    ],
)
def test_the_recording_can_tell_whether_a_setting_is_honoured(name, left_out, tmp_path):
    """Without the setting that a model is there for, its logits are far from the recorded."""
    golden, settings = recorded(name), MODELS[name] | {left_out: None}
    found = logits_of(load_net(write(tmp_path / "m.gguf", settings)), golden["tokens"], 40)
    assert np.abs(found - np.array(golden["logits"])).max() > 100 * LIMIT


def test_divisors_by_the_published_check_values():
    """Llama 3.1: D = 128, base 500,000, 8 times 8192 tokens."""
    settings = {
        "head_dim": 128,
        "rope_theta": 5e5,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }
    found = divisors(settings)
    between = [1.2075, 1.5534, 2.0263, 2.6945, 3.6843, 5.2573]
    np.testing.assert_allclose(found, [1] * 29 + between + [8] * 29, atol=1e-4)


def test_an_adapter_computes_what_peft_computes(tmp_path):
    """Scales by module, by the root of the rank; the rows of Q and K in PEFT's order."""
    settings = MODELS["mistral"]
    shapes = {gguf_name(name): values.shape for name, values in weights(settings).items()}
    names = (*adapters.LINEARS, "output")
    folder = adapters.write_peft(
        tmp_path / "lora",
        adapters.halves(shapes, names),
        alpha=6,
        use_rslora=True,
        alpha_pattern={"k_proj": 3},
    )
    net = load_net(write(tmp_path / "m.gguf", settings), adapters=[folder])
    wanted = np.array(recorded("lora")["logits"])
    found = logits_of(net, some_tokens(settings), 40)[-len(wanted) :]
    limit = LIMIT if fewest() == 1 else 5 * LIMIT  # another library, or another order of adding
    assert np.abs(found - wanted).max() < limit
