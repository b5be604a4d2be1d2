"""Fast parts against the plain ones: how far they are off, which is taken, what is noticed."""

from typing import Any

import pytest
import torch

import refollama
from refollama.fable.bundled import FOLDER
from refollama.fast import exactly, hasten, more_bytes, products, threads_for_writing
from refollama.fast.choice import copied_bytes
from refollama.fast.experts import FastExperts
from refollama.fast.half import COPIED, NATIVE, HalfLinear
from refollama.fast.kept import KeptLinear
from refollama.fast.nibbles import LINES, Int4Linear
from refollama.fast.slabs import SlabLinear, type_of
from refollama.models.layers import Experts, Linear
from refollama.models.load import load_net
from refollama.models.lora import Branch, LoraLinear, adapt
from refollama.options import Options
from refollama.quantize import plan
from refollama.weights import open_gguf
from refollama.weights.blocks import TYPE_ID
from refollama.weights.quants import LAYOUTS, pack
from tests.exactness import same
from tests.models.test_llama import all_logits, some_tokens
from tests.tiny import write_model
from tests.weights.test_quants import random_blocks

ROUNDED = 0.006  # of a product, relative: half of what bfloat16 keeps, of several numbers
nibbles = pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"),
    reason="torch multiplies nibbles on processors with AVX2",
)
KINDS = {**dict.fromkeys(NATIVE | COPIED, HalfLinear), **dict.fromkeys(LINES, Int4Linear)}
# Where the exponents of scales stand, and what is put there: (bytes, bits that stay, others).
SCALES = {"MXFP4": ((0,), 7, 112), "NVFP4": ((0, 1, 2, 3), 63, 0), "Q8_K": ((3,), 0x80, 0x3C)}
SCALES |= {"Q8_1": ((1, 3), 0x83, 0x20), "TQ1_0": ((53,), 0x83, 0x20), "TQ2_0": ((65,), 0x83, 0x20)}
SCALES |= {"IQ1_M": ((55,), 0x8F, 0x20)}


def part(type, *, rows=128, columns=512, bias=False):
    rng = torch.Generator().manual_seed(1)
    layout = LAYOUTS[TYPE_ID[type]]
    if layout.pack is None:
        packed = random_rows(layout, rows, columns)
    else:
        values = torch.randn(rows, columns, generator=rng) * torch.rand(rows, 1, generator=rng)
        packed = pack(values, type)
    bias = torch.randn(rows, generator=rng) if bias else None
    return Linear(packed, layout.unpack_rows, bias)


def random_rows(layout, rows, columns):
    """Any bytes, with scales of a size that weights have."""
    blocks = random_blocks(layout, rows * columns // layout.block.values, seed=1)
    places, kept, others = SCALES.get(layout.name, ((1,), 0x83, 0x20))  # a float16: some 2 ** -7
    blocks[:, list(places)] = blocks[:, list(places)] & kept | others
    return torch.from_numpy(blocks).view(rows, -1)


def replaced(plain):
    """By what `hasten` takes in a large net."""
    net: Any = torch.nn.Module()
    net.part = plain
    hasten(net)
    return net.part


def net_of(path) -> Any:
    return load_net(path)


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """All nets count as large."""
    monkeypatch.setattr("refollama.fast.choice.SMALL", -1)


def off(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def tokens(count, columns=512):
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(count))


@nibbles
@pytest.mark.parametrize("type", KINDS)
@pytest.mark.parametrize("count", [1, 3, 16])
def test_few_tokens_are_multiplied_as_well_as_rounding_allows(type, count, measured):
    plain = part(type, bias=count == 3)
    fast = replaced(plain)
    assert type_of(plain) == type
    assert isinstance(fast, KINDS[type])
    x = tokens(count)
    error = off(fast(x[None])[0], plain(x))
    assert error < ROUNDED
    measured("fast parts", type, "plain path", error, count)
    assert fast(x[:, None]).shape == (count, 1, 128)


@pytest.mark.parametrize("columns", [512, 2048])
@pytest.mark.parametrize("type", KINDS)
def test_a_token_is_multiplied_alike_beside_others(type, columns):
    """Answers that are written side by side are those that each would be alone."""
    fast = replaced(part(type, columns=columns))
    together = tokens(20, columns)[:, None]
    alone = torch.cat([fast(row[None]) for row in together])
    for count in (*range(2, 8), 15, 16, 17, 20):
        assert torch.equal(fast(together[:count]), alone[:count])


@pytest.mark.parametrize("type", [*KINDS, "F32"])
@pytest.mark.parametrize("bias", [False, True])
def test_many_tokens_are_multiplied_in_slabs_exactly(monkeypatch, type, bias):
    plain = part(type, bias=bias)
    fast = replaced(plain)
    monkeypatch.setattr("refollama.fast.slabs.SLAB", 48 * 512)  # 128 rows: three slabs
    x = tokens(40)
    assert off(fast(x[None])[0], plain(x)) < 1e-6  # by whatever library
    monkeypatch.setattr(products, "by_onednn", lambda: False)
    torch.testing.assert_close(fast(x[None])[0], plain(x), atol=1e-5, rtol=1e-6)


def test_what_is_not_packed_goes_in_slabs():
    plain = part("F32")
    fast = replaced(plain)
    assert isinstance(fast, SlabLinear)
    torch.testing.assert_close(fast(tokens(1)), plain(tokens(1)), atol=1e-5, rtol=1e-6)


def test_a_height_that_torch_cannot_lay_is_copied_as_16_bits():
    assert isinstance(replaced(part("Q4_0", rows=96)), HalfLinear)


def test_without_vector_instructions_there_are_no_nibbles(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert isinstance(replaced(part("Q4_0")), HalfLinear)
    assert copied_bytes(part("Q4_0")) == 2 * 128 * 512


@pytest.mark.parametrize("type", ["MXFP4", "NVFP4"])
def test_bfloat16_holds_floats_of_4_bits(type):
    plain = part(type)
    (matrix,) = HalfLinear(plain, type).prepare()
    assert torch.equal(matrix.float(), plain.dense())


@nibbles
@pytest.mark.parametrize("type", LINES)
def test_slabs_of_nibbles_are_those_of_the_whole(monkeypatch, type):
    plain = part(type, rows=320)
    whole = Int4Linear(plain, type).prepared()
    monkeypatch.setattr("refollama.fast.nibbles.SLAB", 64 * 512)
    parts = Int4Linear(plain, type).prepared()
    assert len(whole) == len(parts) == (2 if LINES[type][1] == 4 else 4)
    assert all(map(torch.equal, whole, parts))


def test_a_row_of_zeros_stays_one():
    plain = Linear(pack(torch.zeros(64, 256), "Q4_K"), LAYOUTS[TYPE_ID["Q4_K"]].unpack_rows)
    assert replaced(plain)(tokens(1, 256)).abs().max() == 0


def test_what_float16_cannot_hold_is_multiplied_in_float32(monkeypatch):
    monkeypatch.setattr(products, "by_onednn", lambda: False)  # as on the plain path
    plain = part("F16")
    x = tokens(1) * 1e5
    assert x.half().isinf().any()
    torch.testing.assert_close(replaced(plain)(x), plain(x))
    x = tokens(1) * 1e4
    assert x.half().isfinite().all()
    assert plain(x).half().isinf().any()
    torch.testing.assert_close(replaced(plain)(x), plain(x))


@pytest.mark.parametrize("type", ["Q4_0", "Q6_K", "F16", "Q3_K"])
def test_what_is_written_into_a_weight_is_seen(type):
    fast = replaced(part(type))
    fast(tokens(1))
    fast.weight.zero_()
    assert fast(tokens(1)).abs().max() == 0
    fast.weight = part(type).weight
    assert fast(tokens(1)).abs().max() > 0


def test_a_small_net_is_kept_unpacked_and_no_bit_changes(tmp_path, monkeypatch):
    monkeypatch.setattr("refollama.fast.choice.SMALL", 1 << 26)
    path = write_model(tmp_path / "m.gguf", type="Q8_0")
    plain, fast = net_of(path), net_of(path)
    hasten(fast)
    assert type(fast.blk[0].attn_q) is KeptLinear
    ids = some_tokens(9)
    assert torch.equal(all_logits(fast, ids), all_logits(plain, ids))
    assert torch.equal(fast.blk[1].ffn_up.dense(), plain.blk[1].ffn_up.dense())
    dense = sum(part.dense().nbytes for part in fast.modules() if isinstance(part, Linear))
    assert more_bytes(fast) == dense
    assert more_bytes(plain) == 0


def test_a_tiny_net_is_written_by_one_thread(tmp_path, monkeypatch):
    monkeypatch.setattr("refollama.fast.choice.SMALL", 1 << 26)
    path = write_model(tmp_path / "m.gguf", type="Q8_0")
    tiny, plain = load_net(path), load_net(path)
    hasten(tiny)
    assert (threads_for_writing(tiny), threads_for_writing(plain)) == (1, 0)
    monkeypatch.setattr("refollama.fast.choice.TINY", 1000)
    assert threads_for_writing(tiny) == 0


MIXTURE: Any = {"expert_count": 4, "expert_used_count": 2}


@pytest.mark.parametrize("packed", ["Q4_0", "Q8_0", "F16", "Q6_K", "Q3_K", "F32"])
def test_experts_are_replaced_as_matrices_of_their_type_are(tmp_path, packed):
    wide: Any = {"embedding_length": 256, "feed_forward_length": 256}
    path = write_model(tmp_path / "m.gguf", type=packed, **MIXTURE, **wide)
    plain, fast = net_of(path), net_of(path)
    hasten(fast)
    experts = fast.blk[1].ffn_down_exps
    assert type(experts) is FastExperts
    matrices = [part for part in plain.modules() if type(part) in (Linear, Experts)]
    assert sum(map(copied_bytes, matrices)) == more_bytes(fast)
    width = len(plain.blk[1].ffn_gate_exps.weight[0])
    x = tokens(20, columns=width)
    for expert in range(4):
        ours, theirs = experts(x, expert), plain.blk[1].ffn_down_exps(x, expert)
        assert off(ours, theirs) < ROUNDED
        for row in (0, 5, 19):
            assert same(experts(x[row : row + 1], expert)[0], ours[row])
    with exactly():
        exact = experts(x, 2)
    torch.testing.assert_close(exact, plain.blk[1].ffn_down_exps(x, 2), atol=1e-5, rtol=1e-5)


def test_an_experts_weight_that_is_written_or_replaced_is_seen(tmp_path):
    net = net_of(write_model(tmp_path / "m.gguf", type="Q8_0", **MIXTURE))
    hasten(net)
    experts = net.blk[0].ffn_up_exps
    x = tokens(1, columns=net.config.d_model)
    before, whole = experts(x, 1), experts.weight
    experts.weight[1].zero_()
    assert experts(x, 1).abs().max() == 0
    assert experts(x, 2).abs().max() > 0
    experts.weight = whole.flip(0).clone()
    assert experts(x, 2).abs().max() == 0
    assert experts(x, 1).abs().max() > 0
    assert not torch.equal(experts(x, 1), before)


def test_experts_of_a_small_net_change_no_bit(tmp_path, monkeypatch):
    monkeypatch.setattr("refollama.fast.choice.SMALL", 1 << 26)
    path = write_model(tmp_path / "m.gguf", type="Q8_0", **MIXTURE)
    plain, fast = net_of(path), net_of(path)
    hasten(fast)
    ids = some_tokens(9)
    assert torch.equal(all_logits(fast, ids), all_logits(plain, ids))


def test_one_can_go_backwards_through_what_was_made_in_inference_mode(tmp_path, monkeypatch):
    monkeypatch.setattr("refollama.fast.choice.SMALL", 1 << 26)
    net = net_of(write_model(tmp_path / "m.gguf", type="Q8_0"))
    hasten(net)
    with torch.inference_mode():
        first = net.blk[0].attn_q(torch.ones(1, net.config.d_model))
    x = torch.ones(1, net.config.d_model, requires_grad=True)
    net.blk[0].attn_q(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    torch.testing.assert_close(net.blk[0].attn_q(x).detach(), first.clone())


@pytest.mark.parametrize("type", ["Q4_0", "Q8_0", "F16", "Q6_K", "Q3_K"])
def test_one_can_go_backwards_through_a_large_net(type):
    plain = part(type)
    fast = replaced(plain)
    x = tokens(1).requires_grad_()
    (ours,) = torch.autograd.grad(fast(x).sum(), x)
    (theirs,) = torch.autograd.grad(plain(x).sum(), x)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@nibbles
@pytest.mark.parametrize(("free", "kind"), [(10**9, Int4Linear), (10**4, SlabLinear)])
def test_copies_are_made_where_there_is_room(tmp_path, monkeypatch, caplog, free, kind):
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {free // 1024} kB\n")
    monkeypatch.setattr("refollama.fast.choice.MEMINFO", tmp_path / "meminfo")
    assert type(replaced(part("Q8_0"))) is kind
    assert ("not enough memory" in caplog.text) is (kind is SlabLinear)
    monkeypatch.setattr("refollama.fast.choice.MEMINFO", tmp_path / "nowhere")
    assert type(replaced(part("Q8_0"))) is Int4Linear


@nibbles
@pytest.mark.parametrize("type", KINDS)
def test_the_bytes_of_copies_are_known_before(type):
    plain = part(type)
    assert replaced(plain).more_bytes == copied_bytes(plain)


def test_no_tokens_have_no_outputs():
    assert replaced(part("Q4_0"))(torch.zeros(0, 512)).shape == (0, 128)


@pytest.mark.parametrize("packed", ["Q4_0", "F16"])
def test_an_answer_is_the_same_however_its_prompt_was_divided(tmp_path, packed):
    """A prompt is never rounded; the tokens of an answer always are."""
    path = write_model(tmp_path / "m.gguf", type=packed)
    prompt = some_tokens(30).tolist()
    found = []
    for more in ({"num_batch": 512}, {"num_batch": 7}, {"num_batch": 1}):
        llm = refollama.load(path)
        options = {"temperature": 0, "num_predict": 12, "f16_kv": False, **more}
        with llm.start(prompt, Options().updated(options)) as ids:
            found.append(list(ids))
        llm.close()
    assert found[0] == found[1] == found[2]


def test_parts_with_branches_stay_as_they_are(tmp_path):
    net = net_of(write_model(tmp_path / "m.gguf", type="Q8_0"))
    height, width = len(net.blk[0].attn_q.weight), net.config.d_model
    adapt(net, {"blk.0.attn_q": [Branch(torch.ones(2, width), torch.ones(height, 2), 1)]})
    hasten(net)
    assert type(net.blk[0].attn_q) is LoraLinear
    assert type(net.blk[1].attn_q) is not Linear


@nibbles
@pytest.mark.parametrize("packed", ["Q4_0", "F16"])
def test_where_numbers_are_asked_for_nothing_is_rounded(tmp_path, packed):
    """`logits`, `hidden`, `score` and `embed` of a large net: those of the plain path."""
    path = write_model(tmp_path / "m.gguf", type=packed)
    plain, fast = (refollama.load(path, {"fast": fast}) for fast in (False, True))
    ids = some_tokens(5).tolist()
    kinds = {type(part) for part in fast.net.modules()}
    assert kinds & {Int4Linear, HalfLinear}
    for ask in (
        lambda llm: llm.logits(ids),
        lambda llm: llm.score(ids),
        lambda llm: llm.embed("a"),
    ):
        torch.testing.assert_close(ask(fast), ask(plain), atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        rounded, exact = (all_logits(llm.net, ids) for llm in (fast, plain))
    assert (rounded - exact).abs().max() > 1e-5
    plain.close()
    fast.close()


@pytest.mark.parametrize("fast", [True, False])
def test_the_option_decides(tmp_path, fast, measured):
    path = write_model(tmp_path / "m.gguf", type="Q8_0")
    llm = refollama.load(path, {"fast": fast})
    kinds = {type(part) for part in llm.net.modules() if isinstance(part, Linear)}
    assert (Linear in kinds) is not fast
    measured("options", "fast", "definition", "equal")
    llm.close()


@pytest.mark.parametrize("type", ["Q4_0", "Q8_0", "F16"])
def test_a_story_is_as_likely_to_the_fast_parts(tmp_path, type, measured):
    """fable itself, packed as this type: mean KL of the next token's distribution."""
    path = tmp_path / "fable.gguf"
    with open_gguf(FOLDER / "fable" / "fable.gguf") as file:
        plan(file, type, again=True).write(path)
    text = "Once upon a time there was a brave mouse called Tim. Tim was grey and lived in a barn."
    found = []
    for fast in (False, True):
        llm = refollama.load(path, {"fast": fast})
        ids = llm.tokens(text)
        cache = llm.net.new_cache()
        with torch.no_grad():
            steps = [
                llm.net(torch.tensor([[id]]), torch.tensor([[at]]), cache.rows([0], at + 1))
                for at, id in enumerate(ids)
            ]
        found.append(torch.cat(steps).double().log_softmax(-1))
        llm.close()
    plain, ours = found
    kl = (plain.exp() * (plain - ours)).sum(-1).mean().item()
    assert 0 <= kl < 1e-3
    measured("fast parts", f"fable as {type}", "plain path, KL", kl, len(plain))
