"""The model against a float64 forward from the papers, and against itself by other ways."""

from typing import Any

import numpy as np
import pytest
import torch

from refollama.models.config import RopeConfig
from refollama.models.layers import Experts, Linear, frequencies
from refollama.models.load import load_net
from refollama.models.mixtral import MixtralBlock
from refollama.weights.gguf import open_gguf
from tests import oracle_llama
from tests.tiny import TOKENS, apart, write_model

LONGROPE: dict[str, Any] = {
    "rope.scaling.type": "longrope",
    "rope.scaling.attn_factor": 1.2,
    "extra": {"rope_factors_long.weight": (8,), "rope_factors_short.weight": (8,)},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tied": True},
    "one key head": {"attention.head_count_kv": 1},
    "all key heads": {"attention.head_count_kv": 4},
    "wide heads": {"attention.key_length": 32, "attention.value_length": 32},
    "base": {"rope.freq_base": 1e6},
    "linear": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    "yarn": {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64,
    },
    "weak yarn": {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 8.0,
        "rope.scaling.original_context_length": 16,
        "rope.scaling.yarn_ext_factor": 0.5,
        "rope.scaling.yarn_attn_factor": 0.9,
        "rope.scaling.attn_factor": 1.2,
        "rope.scaling.yarn_log_multiplier": 0.7,
        "rope.scaling.yarn_beta_fast": 4.0,
        "rope.scaling.yarn_beta_slow": 0.5,
    },
    "yarn without its blend": {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.yarn_ext_factor": 0.0,
        "rope.scaling.yarn_attn_factor": 1.3,
    },
    "yarn that shrinks": {"rope.scaling.type": "yarn", "rope.scaling.factor": 0.5},
    "no scaling": {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
    "divisors": {"extra": {"rope_freqs.weight": (8,)}},
    "longrope, long": LONGROPE | {"rope.scaling.original_context_length": 64},
    "longrope, short": LONGROPE | {"rope.scaling.original_context_length": 128},
    "partial rotation": {"rope.dimension_count": 6},
    "partial yarn": {
        "rope.dimension_count": 12,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64,
    },
    "narrow values": {"attention.key_length": 24, "attention.value_length": 10},
    "wide values": {"attention.value_length": 40, "attention.head_count_kv": 1},
    "a layer unlike the other": {
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.head_count": [4, 6],
        "attention.head_count_kv": [4, 3],
        "feed_forward_length": [96, 64],
    },
    "window": {"attention.sliding_window": 7},
    "window of one": {"attention.sliding_window": 1},
    "no window": {"attention.sliding_window": 0},
    "biases": {
        "extra": {
            "blk.0.attn_q.bias": (64,),
            "blk.1.attn_k.bias": (32,),
            "blk.1.attn_v.bias": (32,),
            "blk.1.attn_output.bias": (64,),
            "blk.0.ffn_gate.bias": (96,),
            "blk.1.ffn_up.bias": (96,),
            "blk.0.ffn_down.bias": (64,),
            "output.bias": (len(TOKENS),),
        }
    },
    "experts": {"expert_count": 5, "expert_used_count": 2},
    "a biased router": {
        "expert_count": 4,
        "expert_used_count": 2,
        "extra": {"blk.0.ffn_gate_inp.bias": (4,)},
    },
    "packed experts": {"expert_count": 3, "expert_used_count": 1, "type": "Q8_0"},
    "all experts": {"expert_count": 3, "expert_used_count": 3},
    "F16": {"type": "F16"},
    "BF16": {"type": "BF16"},
    "Q8_0": {"type": "Q8_0"},
    "Q4_0": {"type": "Q4_0"},
}


def some_tokens(count, seed=0):
    return np.random.default_rng(seed).integers(3, len(TOKENS), count)


@torch.no_grad()
def all_logits(net, tokens):
    """(T,) → (T, V), in one step."""
    ids = torch.tensor(np.asarray(tokens))[None]
    rows = net.new_cache().rows([0], ids.shape[1])
    return net.output(net.hidden(ids, torch.arange(ids.shape[1])[None], rows)[0])


@torch.no_grad()
def stepwise(net, tokens, sizes, dtype=torch.float32):
    """Logits after each step of so many tokens, through one cache."""
    cache, found, end = net.new_cache(dtype=dtype), [], 0
    for size in sizes:
        start, end = end, end + size
        ids = torch.tensor(np.asarray(tokens[start:end]))[None]
        found.append(net(ids, torch.arange(start, end)[None], cache.rows([0], end))[0])
    return torch.stack(found)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_a_float64_forward(variant, tmp_path, measured):
    path = write_model(tmp_path / "m.gguf", seed=1, **VARIANTS[variant])
    tokens = some_tokens(40)
    expected = oracle_llama.from_file(path, tokens)
    found = all_logits(load_net(path), tokens)
    assert found.dtype == torch.float32
    off = np.abs(found.numpy() - expected).max()
    assert off < 2e-5
    measured("models", variant, "float64", off, len(tokens))


@pytest.mark.parametrize("sizes", [[1] * 24, [24], [7, 1, 1, 15], [23, 1]])
def test_one_by_one_equals_all_at_once(tiny, sizes, measured):
    """The cache is an optimisation: it may not change a logit by more than rounding."""
    net, tokens = load_net(tiny), some_tokens(24)
    ends = np.cumsum(sizes) - 1
    expected = all_logits(net, tokens)[ends]
    found = stepwise(net, tokens, sizes)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    measured("models", "plain", "all at once", (found - expected).abs().max(), len(found))


def test_a_cache_of_half_precision_stays_near(tiny, measured):
    net, tokens = load_net(tiny), some_tokens(24)
    exact = stepwise(net, tokens, [1] * 24)
    half = stepwise(net, tokens, [1] * 24, torch.float16)
    assert 0 < (half - exact).abs().max() < 5e-3
    measured("options", "f16_kv", "float32 cache", (half - exact).abs().max(), len(tokens))


@torch.no_grad()
def test_a_column_of_sequences_equals_each_alone(tiny, measured):
    net = load_net(tiny)
    prompts = [some_tokens(n, seed=n) for n in (3, 11, 6)]
    cache = net.new_cache(slots=3)
    for slot, tokens in enumerate(prompts):
        ids = torch.tensor(tokens[:-1])[None]
        net(ids, torch.arange(len(tokens) - 1)[None], cache.rows([slot], len(tokens) - 1))
    order = [2, 0, 1]
    last = torch.tensor([[int(prompts[slot][-1])] for slot in order])
    positions = torch.tensor([[len(prompts[slot]) - 1] for slot in order])
    column = net(last, positions, cache.rows(order, 11))
    for row, slot in zip(column, order, strict=True):
        alone = all_logits(net, prompts[slot])[-1]
        torch.testing.assert_close(row, alone, atol=1e-4, rtol=0)
        measured("models", "plain", "alone", (row - alone).abs().max())


@torch.no_grad()
def test_only_what_came_before_counts(tiny):
    net = load_net(tiny)
    tokens = some_tokens(12)
    changed = tokens.copy()
    changed[8] = (tokens[8] + 1) % len(TOKENS)
    before, after = all_logits(net, tokens), all_logits(net, changed)
    torch.testing.assert_close(before[:8], after[:8], atol=1e-5, rtol=0)
    assert (before[8:] - after[8:]).abs().amax(-1).min() > 1e-3


def test_modules_carry_the_names_of_the_tensors(tiny):
    names = {name for name, _ in load_net(tiny).named_buffers()}
    assert names == set(open_gguf(tiny).tensors)


def test_a_hook_on_a_named_module_sees_and_changes(tiny):
    net, tokens, seen = load_net(tiny), some_tokens(5), []
    plain = all_logits(net, tokens)
    module = net.get_submodule("blk.1.attn_q")

    def silence(module, args, output):
        seen.append(output.shape)
        return output * 0

    handle = module.register_forward_hook(silence)
    assert not torch.equal(all_logits(net, tokens), plain) and seen == [(1, 5, 64)]
    handle.remove()
    assert torch.equal(all_logits(net, tokens), plain)


def test_only_the_chosen_experts_are_unpacked(tmp_path):
    path = write_model(tmp_path / "m.gguf", expert_count=6, expert_used_count=1)
    net, unpacked = load_net(path), []
    experts = net.get_submodule("blk.0.ffn_up_exps")
    assert isinstance(experts, Experts)
    real = experts.unpack

    def watched(weight):
        unpacked.append(weight.shape)
        return real(weight)

    experts.unpack = watched
    all_logits(net, some_tokens(1))
    assert len(unpacked) == 1 and len(unpacked[0]) == 2


def test_of_equal_experts_the_lower_numbers_are_chosen(tmp_path):
    net = load_net(write_model(tmp_path / "m.gguf", expert_count=6, expert_used_count=2))
    block = net.get_submodule("blk.0")
    assert isinstance(block, MixtralBlock)
    block.ffn_gate_inp.weight = torch.zeros_like(block.ffn_gate_inp.weight)
    shares, chosen = block.route(torch.randn(3, 64))
    assert chosen.tolist() == [[0, 1]] * 3 and shares.tolist() == [[0.5, 0.5]] * 3


def test_one_tensor_for_each_expert_is_the_same_model(tmp_path):
    """The layout of 2023."""
    stacked = write_model(tmp_path / "new.gguf", expert_count=3, expert_used_count=2)
    old = apart(stacked, tmp_path / "old.gguf", 3)
    tokens = some_tokens(9)
    assert torch.equal(all_logits(load_net(old), tokens), all_logits(load_net(stacked), tokens))


def test_yarn_by_the_published_check_values():
    """D = 128, trained on 4096, base 10,000: the blend runs from pair 20 to pair 46."""
    config = RopeConfig(scale=0.25, ext_factor=1, trained_on=4096)
    plain = frequencies(RopeConfig(), 128)
    ratio = frequencies(config, 128) / plain
    assert (ratio[:21] == 1).all() and torch.allclose(ratio[46:], torch.tensor(0.25).double())
    assert (ratio[21:46].diff() < 0).all() and ratio[21] < 1


def test_weights_stay_packed(tmp_path):
    net = load_net(write_model(tmp_path / "q.gguf", type="Q4_0"))
    q = net.get_submodule("blk.0.attn_q")
    assert isinstance(q, Linear)
    assert q.weight.dtype == torch.uint8 and q.weight.shape == (64, 64 // 32 * 18)
    assert q.dense().shape == (64, 64)


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("stories260K", 1e-4),
        ("random/gqa", 1e-4),
        ("random/linear", 1e-4),
        ("random/tied-base1e6", 1e-3),
        ("random/yarn", 1e-4),
        ("random/freqs", 1e-4),
        ("random/mixtral", 1e-4),
    ],
)
def test_logits_that_llama_cpp_recorded(oracles, name, limit, measured):
    recorded = np.load(oracles / f"{name}.npz")
    net = load_net(oracles / f"{name}.gguf")
    found = all_logits(net, recorded["tokens"]).numpy()
    off = np.abs(found - recorded["logits"]).max()
    assert off < limit
    measured("models", name, "llama.cpp's logits", off, len(found))
    single = stepwise(net, recorded["tokens"], [1] * len(recorded["tokens"])).numpy()
    assert np.abs(single - found).max() < 1e-4
    measured("models", name, "all at once", np.abs(single - found).max(), len(found))


@pytest.mark.parametrize("name", ["random/q8_0", "random/q4_0"])
def test_quantised_weights_give_the_exact_product(oracles, name, measured):
    tokens = np.load(oracles / f"{name}.npz")["tokens"]
    expected = oracle_llama.from_file(oracles / f"{name}.gguf", tokens)
    found = all_logits(load_net(oracles / f"{name}.gguf"), tokens).numpy()
    assert np.abs(found - expected).max() < 1e-3
    measured("models", name, "float64", np.abs(found - expected).max(), len(tokens))
