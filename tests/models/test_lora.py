"""An adapter beside packed weights computes what merging it into plain weights would."""

from typing import Any

import numpy as np
import pytest
import torch

from refollama.loaded import load_file
from refollama.models.lora import LoraLinear, rescaled
from refollama.options import Options
from tests import adapters, oracle_llama
from tests.exactness import same
from tests.tiny import metadata, shapes, write_model

LIMIT = 1e-3
TOKENS = [1, 265, 290, 277, 4, 268, 281]
SHAPES = shapes(metadata())
ALL = (*adapters.LINEARS, "output", "token_embd")
MIXTURE: dict[str, Any] = {"expert_count": 4, "expert_used_count": 2}
STACKED = shapes(metadata(**MIXTURE))
EXPERTS = (*(f"blk.1.{name}_exps" for name in adapters.FEED_FORWARD), "blk.0.ffn_gate_inp")


def logits(path, *files, scales=()):
    return load_file(path, Options(adapters=scales), adapters=files).logits(TOKENS)


def judged(path, *changes):
    """Logits of the weights in the file, unpacked, with each change (adapter, scale) added."""
    weights, config = oracle_llama.read(path)
    for adapter, scale in changes:
        weights = adapters.merged(weights, adapter, scale)
    return torch.from_numpy(oracle_llama.forward(weights, config, TOKENS)).float()


def assert_near(found, wanted, base):
    """… and the adapter is not a whisper."""
    assert (found - wanted).abs().max() < LIMIT
    assert (found - base).abs().max() > 100 * LIMIT


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("lora") / "base.gguf")


@pytest.mark.parametrize("type", ["F32", "F16", "Q8_0", "Q4_0"])
def test_beside_packed_weights_equals_merging(tmp_path, type):
    path = write_model(tmp_path / "m.gguf", type=type)
    change = adapters.halves(SHAPES, ALL)
    file = adapters.write_plain(tmp_path / "a.gguf", change, alpha=8)
    assert_near(logits(path, file), judged(path, (change, 2.0)), logits(path))


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (adapters.write_plain, "a.gguf"),
        (adapters.write_peft, "folder"),
        (adapters.write_ggla, "ggml-adapter-model.bin"),
    ],
)
def test_all_formats_say_the_same(tmp_path, base, write, name):
    """PEFT and ggla have the rows of Q and K in another order."""
    change = adapters.halves(SHAPES)
    file = write(tmp_path / name, change, alpha=6)
    assert_near(logits(base, file), judged(base, (change, 1.5)), logits(base))


def test_the_embedding_and_the_output_of_a_folder(tmp_path, base):
    change = adapters.halves(SHAPES, ALL)
    folder = adapters.write_peft(tmp_path / "p", change)
    assert_near(logits(base, folder), judged(base, (change, 2.0)), logits(base))


def test_one_table_with_two_uses_is_changed_where_it_is_meant(tmp_path):
    path = write_model(tmp_path / "m.gguf", tied=True)
    weights, config = oracle_llama.read(path)
    weights["output.weight"] = weights["token_embd.weight"]
    for name in ("output", "token_embd"):
        change = adapters.halves(SHAPES, [name])
        file = adapters.write_plain(tmp_path / f"{name}.gguf", change)
        untied = adapters.merged(weights, change, 2.0)
        wanted = torch.from_numpy(oracle_llama.forward(untied, config, TOKENS)).float()
        assert_near(logits(path, file), wanted, logits(path))


@pytest.mark.parametrize("write", [adapters.write_plain, adapters.write_peft])
def test_experts_have_branches_of_their_own(tmp_path, write):
    path = write_model(tmp_path / "m.gguf", **MIXTURE)
    change = adapters.halves(STACKED, EXPERTS[: 3 if write is adapters.write_peft else 4])
    file = write(tmp_path / "a", change)
    assert_near(logits(path, file), judged(path, (change, 2.0)), logits(path))


def test_norms_of_the_trainer_of_2023(tmp_path, base):
    """It wrote rows as GGUF has them, and pairs for norms: matrices of one row."""
    row = {"blk.0.attn_norm.weight": (1, 64), "output_norm.weight": (1, 64)}
    names = [*(name.removesuffix(".weight") for name in row), "blk.0.attn_q", "token_embd"]
    change = adapters.halves(SHAPES | row, names)
    file = adapters.write_ggla(tmp_path / "a", change, turn=False)
    assert_near(logits(base, file), judged(base, (change, 2.0)), logits(base))


def test_several_add_up_with_their_scales(tmp_path, base):
    one, two = adapters.halves(SHAPES), adapters.halves(SHAPES, ALL, rank=2, seed=2)
    two = {name: tuple(np.float32(np.float16(half)) for half in two[name]) for name in two}
    files = [
        adapters.write_plain(tmp_path / "1.gguf", one, alpha=None),  # no alpha: a scale of 1
        adapters.write_plain(tmp_path / "2.gguf", two, type="F16"),
    ]
    for scales in ((1.0, 1.0), (0.5, 0.0), (-1.0, 0.25)):
        wanted = judged(base, (one, scales[0]), (two, 4 * scales[1]))
        assert (logits(base, *files, scales=scales) - wanted).abs().max() < LIMIT


def test_a_scale_of_nothing_is_the_model_itself(tmp_path, base):
    file = adapters.write_plain(tmp_path / "a.gguf", adapters.halves(SHAPES, ALL))
    assert torch.equal(logits(base, file, scales=(0.0,)), logits(base))


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_one_by_one_equals_all_at_once(tmp_path, base, rank):
    """Rows of branches depend on no other row either; so an answer may be cut and cached."""
    change = adapters.halves(SHAPES, ALL, rank=rank)
    file = adapters.write_plain(tmp_path / "a.gguf", change)
    net = load_file(base, adapters=[file]).net
    cache = net.new_cache(2)
    with torch.no_grad():
        for at, token in enumerate(TOKENS):
            single = net(torch.tensor([[token]]), torch.tensor([[at]]), cache.rows([0], at + 1))
        places = torch.arange(len(TOKENS))[None]
        whole = net(torch.tensor([TOKENS]), places, cache.rows([1], len(TOKENS)))
    assert same(single, whole)


def test_other_scales_share_weights_and_hooks(tmp_path, base):
    """Memory: base once, branches once; and what is hooked is hooked everywhere."""
    file = adapters.write_plain(tmp_path / "a.gguf", adapters.halves(SHAPES, ALL))
    net = load_file(base, adapters=[file]).net
    other = rescaled(net, (0.5,))
    assert other is not net
    assert [id(tensor) for tensor in net.buffers()] == [id(tensor) for tensor in other.buffers()]
    seen = []
    hook = net.get_submodule("blk.0.attn_q").register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        other(torch.tensor([[1]]), torch.tensor([[0]]), other.new_cache().rows([0], 1))
    hook.remove()
    assert seen == [1]


def test_the_matrix_of_a_part_is_the_merged_one(tmp_path, base):
    change = adapters.halves(SHAPES)
    net = load_file(base, adapters=[adapters.write_plain(tmp_path / "a.gguf", change)]).net
    weights, _ = oracle_llama.read(base)
    wanted = adapters.merged(weights, change, 2.0)["blk.1.ffn_up.weight"]
    part = net.get_submodule("blk.1.ffn_up")
    assert isinstance(part, LoraLinear)
    found = part.dense()
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5)
