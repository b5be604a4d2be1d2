"""Rotation by request, and the context shift: what a turn of keys may do, and what it equals."""

from typing import Any

import numpy as np
import pytest
import torch

from refollama.models.load import load_net
from tests import oracle_llama
from tests.models.test_llama import VARIANTS, all_logits, some_tokens
from tests.tiny import write_model

YARN = VARIANTS["yarn"]
STRETCHED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "base": ({}, {"base": 5e5}, {"rope.freq_base": 5e5}),
    "scale": ({}, {"scale": 0.25}, {"rope.scaling.factor": 4.0}),
    "both": (
        {"rope.freq_base": 1e5, "rope.scaling.factor": 2.0},
        {"base": 5e5, "scale": 0.125},
        {"rope.freq_base": 5e5, "rope.scaling.factor": 8.0},
    ),
    "of yarn": (YARN, {"scale": 0.125}, YARN | {"rope.scaling.factor": 8.0}),
    "with divisors": (
        VARIANTS["divisors"],
        {"base": 5e5},
        VARIANTS["divisors"] | {"rope.freq_base": 5e5},
    ),
}


@pytest.mark.parametrize("case", STRETCHED)
def test_a_rotation_by_request_equals_a_file_that_asks_for_it(case, tmp_path, measured):
    plain, asked, written = STRETCHED[case]
    net = load_net(write_model(tmp_path / "plain.gguf", seed=2, **plain))
    expected = load_net(write_model(tmp_path / "written.gguf", seed=2, **written))
    tokens = some_tokens(40)
    before = all_logits(net, tokens)
    other = net.with_rope(**asked)
    assert torch.equal(all_logits(other, tokens), all_logits(expected, tokens))
    assert torch.equal(all_logits(net, tokens), before)  # the original is as it was
    assert not torch.equal(all_logits(other, tokens), before)
    back = other.with_rope(**{name: getattr(net.config.rope, name) for name in asked})
    assert torch.equal(all_logits(back, tokens), before)
    for name in asked:
        measured("options", f"rope_frequency_{name}", "in the file", "equal")


def test_a_rotation_by_request_shares_every_weight(tmp_path):
    net = load_net(write_model(tmp_path / "m.gguf", **VARIANTS["divisors"]))
    other = net.with_rope(base=5e5)
    names = [name for name, _ in net.named_modules()]
    assert [name for name, _ in other.named_modules()] == names
    ours, theirs = dict(net.named_buffers()), dict(other.named_buffers())
    assert ours.keys() == theirs.keys()
    assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in ours)
    assert not other.training


def test_a_hook_on_a_shared_module_sees_both(tiny):
    net, seen = load_net(tiny), []
    other = net.with_rope(base=5e5)
    net.get_submodule("blk.0.attn_q").register_forward_hook(lambda *_: seen.append(1))
    all_logits(net, some_tokens(3))
    all_logits(other, some_tokens(3))
    assert seen == [1, 1]


def test_a_rotation_as_the_file_has_it_is_the_net_itself(tiny):
    net = load_net(tiny)
    assert net.with_rope() is net.with_rope(0, 0, 0) is net.with_rope(10000.0, 1.0) is net


@pytest.mark.parametrize(("n_ctx", "used"), [(64, "short"), (65, "long")])
def test_longrope_goes_by_the_context_in_use(n_ctx, used, tmp_path):
    long = VARIANTS["longrope, long"]  # trained on 64 tokens, made for 128
    net = load_net(write_model(tmp_path / "m.gguf", seed=3, **long))
    short = load_net(write_model(tmp_path / "s.gguf", seed=3, **VARIANTS["longrope, short"]))
    tokens = some_tokens(20)
    expected = all_logits({"short": short, "long": net}[used], tokens)
    assert torch.equal(all_logits(net.with_rope(n_ctx=n_ctx), tokens), expected)
    assert not torch.equal(all_logits(net, tokens), all_logits(short, tokens))


# ── context shift ─────────────────────────────────────────────────────────────────────────────


SHIFTED = ["plain", "yarn", "weak yarn", "divisors", "longrope, long", "partial rotation"]
SHIFTED += ["narrow values", "a layer unlike the other", "experts"]
KEEP, STOP, END = 5, 17, 30  # 5 … 16 are dropped, 17 … 29 become 5 … 17
KEPT = [*range(KEEP), *range(STOP, END)]


@torch.no_grad()
def prefill(net, tokens, slot=0, **kind):
    cache = net.new_cache(slots=slot + 1, **kind)
    ids, positions = torch.as_tensor(tokens)[None], torch.arange(len(tokens))[None]
    net(ids, positions, cache.rows([slot], len(tokens)))
    return cache


def shifted(net, tokens, slot=0, **kind):
    cache = prefill(net, tokens, slot, **kind)
    before = [tensor.clone() for tensor in (*cache.keys, *cache.values)]
    net.shift(cache, slot, KEEP, STOP, END)
    return cache, before


@torch.no_grad()
def following(net, cache, token, position):
    ids, positions = torch.tensor([[int(token)]]), torch.tensor([[position]])
    return net(ids, positions, cache.rows([0], position + 1))[0]


@pytest.mark.parametrize("variant", SHIFTED)
def test_the_first_layer_is_as_if_the_rest_had_been_read_alone(variant, tmp_path):
    """Its keys and values depend on each token and its place, and on nothing before."""
    net = load_net(write_model(tmp_path / "m.gguf", seed=4, **VARIANTS[variant]))
    tokens = some_tokens(END)
    cache, _ = shifted(net, tokens)
    fresh = prefill(net, tokens[KEPT])
    torch.testing.assert_close(cache.keys[0], fresh.keys[0], atol=1e-5, rtol=0)
    assert torch.equal(cache.values[0], fresh.values[0])


@pytest.mark.parametrize("variant", SHIFTED)
def test_a_model_of_one_layer_goes_on_as_if_the_rest_had_been_read_alone(
    variant, tmp_path, measured
):
    one: dict[str, Any] = {
        key: value[:1] if isinstance(value, list) else value
        for key, value in VARIANTS[variant].items()
    }
    net = load_net(write_model(tmp_path / "m.gguf", seed=5, block_count=1, **one))
    tokens = some_tokens(END + 1)
    cache, _ = shifted(net, tokens[:END])
    found = following(net, cache, tokens[END], len(KEPT))
    expected = following(net, prefill(net, tokens[:END][KEPT]), tokens[END], len(KEPT))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    measured("context shift", variant, "kept alone", (found - expected).abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("variant", SHIFTED)
def test_every_key_is_turned_back_and_nothing_else_changes(variant, dtype, tmp_path, measured):
    """By complex numbers in float64: a pair turns back by its frequency times the way it went."""
    path = write_model(tmp_path / "m.gguf", seed=6, **VARIANTS[variant])
    net, (_, config) = load_net(path), oracle_llama.read(path)
    cache, before = shifted(net, some_tokens(END), dtype=dtype)
    layers = len(cache.keys)
    for old, new in zip(before[:layers], cache.keys, strict=True):
        expected = turned_back(old[0, :, STOP:END].double().numpy(), STOP - KEEP, config)
        limit = 1e-5 if dtype == torch.float32 else 2e-3 * np.abs(expected).max()
        off = np.abs(new[0, :, KEEP : len(KEPT)].double().numpy() - expected).max()
        assert off < limit
        kind = variant if dtype == torch.float32 else f"{variant}, float16"
        measured("context shift", kind, "complex turn", off, len(KEPT) - KEEP)
    for old, new in zip(before[layers:], cache.values, strict=True):
        assert torch.equal(new[0, :, KEEP : len(KEPT)], old[0, :, STOP:END])
    for old, new in zip(before, (*cache.keys, *cache.values), strict=True):
        assert torch.equal(new[0, :, :KEEP], old[0, :, :KEEP])
        assert not new[0, :, len(KEPT) :].any()


def turned_back(keys, way, config):
    """(Hk, n, D) float64 → the same"""
    R = config["rotated"] or keys.shape[-1]
    turns = np.exp([-1j * way * oracle_llama.omega(i, R, config) for i in range(R // 2)])
    pairs = (keys[..., 0:R:2] + 1j * keys[..., 1:R:2]) * turns
    out = keys.copy()
    out[..., 0:R:2], out[..., 1:R:2] = pairs.real, pairs.imag
    return out


def test_a_shift_leaves_the_other_slots_alone(tiny):
    net, tokens = load_net(tiny), some_tokens(END)
    cache, before = shifted(net, tokens, slot=1)
    for old, new in zip(before, (*cache.keys, *cache.values), strict=True):
        assert torch.equal(old[0], new[0])
        assert not torch.equal(old[1], new[1])


def test_many_small_shifts_are_one_large_one(tiny):
    """Rounding does not pile up: twelve turns by one place are a turn by twelve."""
    net, tokens = load_net(tiny), some_tokens(END)
    cache, _ = shifted(net, tokens)
    slow = prefill(net, tokens)
    for gone in range(STOP - KEEP):
        net.shift(slow, 0, KEEP, KEEP + 1, END - gone)
    for one, other in zip(cache.keys, slow.keys, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_nothing_to_drop_changes_nothing(tiny):
    net, tokens = load_net(tiny), some_tokens(END)
    cache = prefill(net, tokens)
    before = [tensor.clone() for tensor in (*cache.keys, *cache.values)]
    net.shift(cache, 0, KEEP, KEEP, END)
    assert all(map(torch.equal, before, (*cache.keys, *cache.values)))
