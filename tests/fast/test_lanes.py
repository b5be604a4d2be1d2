"""Matrices in lanes: every bit of a block is there, products are exact, and alike beside others."""

import re
import shutil
from typing import Any

import numpy as np
import pytest
import torch

import refollama
from refollama.fable.bundled import FOLDER
from refollama.fable.lessons import conversation
from refollama.fable.vocabulary import written
from refollama.fast import exactly, has_routines, hasten, lacking, reading, warm
from refollama.fast.choice import copied_bytes
from refollama.fast.experts import FastExperts
from refollama.fast.laned import ROUTINES, TOGETHER, LaneLinear, Product, is_there, path_of
from refollama.fast.lanes import CODE, LANES, fits, form, laid, pieces_of
from refollama.fast.nibbles import Int4Linear
from refollama.fast.routines import forget
from refollama.fast.slabs import by_slabs
from refollama.models.load import load_net
from refollama.quantize import plan
from refollama.weights import open_gguf
from refollama.weights.blocks import TYPE_ID
from refollama.weights.quants import LAYOUTS
from tests.fast.test_dots import source
from tests.fast.test_fast import part, random_rows, tokens
from tests.models.test_llama import all_logits
from tests.tiny import write_model
from tests.weights.test_quants import random_blocks

compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
ROWS, COLUMNS = 48, 512
OFF = {2: 1e-4, 1: 1e-2}  # of a product of tokens of so many bytes, relative to its largest
NAME = {2: "warm", 1: "warm, prompt_bits 8"}


def value(made, kind, row, column):
    """One weight, computed slowly from what lies in lanes."""
    code, where = CODE[kind], (row // LANES, row % LANES)
    tile, lane = where
    group, inside = divmod(column, code.group)
    byte, four = divmod(inside, code.group // 4)
    q = 0
    for one in pieces_of(code.bits, code.group)[four]:
        word = int(made[0][tile, group, one.word, lane]) & 0xFFFFFFFF
        q |= (word >> 8 * byte + one.shift & one.mask) << one.base
    small = [one[tile, ..., lane].numpy() for one in made[1:]]
    groups = LAYOUTS[TYPE_ID[kind]].block.values // code.group
    block, part = divmod(group, groups)
    at = part // (groups // 4) + part % (groups // 4) * 4 if groups > 1 else 0
    d = np.float32(small.pop(0)[block])
    s = np.float32(np.frombuffer(small.pop(0)[block].tobytes(), np.int8)[at] if code.s else 1)
    m = np.float32(small.pop(0)[block] if small else 0)
    least = np.float32(np.frombuffer(small.pop(0)[block].tobytes(), np.int8)[at] if small else -1)
    assert not small
    return d * s * np.float32(q - code.middle) - m * least


@pytest.mark.parametrize("kind", CODE)
def test_every_bit_of_a_block_is_kept(kind):
    """Of any blocks at all, in any place."""
    layout = LAYOUTS[TYPE_ID[kind]]
    packed = torch.from_numpy(random_blocks(layout, ROWS * COLUMNS // layout.block.values))
    packed = packed.view(ROWS, -1)
    made, dense = laid(packed, kind), layout.unpack_rows(packed)
    for row, column in np.random.default_rng(0).integers((ROWS, COLUMNS), size=(400, 2)):
        assert value(made, kind, row, column) == dense[row, column].item(), (row, column)


@pytest.mark.parametrize("kind", CODE)
def test_each_bit_of_four_codes_has_a_place_of_its_own(kind):
    bits, group = CODE[kind].bits, CODE[kind].group
    found = pieces_of(bits, group)
    pieces = [one for four in found for one in four]
    places = [(one.word, one.shift + bit) for one in pieces for bit in range(one.width)]
    assert len(found) == group // 4
    assert sorted(places) == [(word, bit) for word in range(group * bits // 32) for bit in range(8)]
    for four in found:
        assert [one.base + bit for one in four for bit in range(one.width)] == [*range(bits)]


@pytest.mark.parametrize("kind", CODE)
def test_types_and_shapes_are_known_before(kind):
    packed = random_rows(LAYOUTS[TYPE_ID[kind]], ROWS, COLUMNS)
    made = laid(packed, kind)
    assert [(one.dtype, tuple(one.shape)) for one in made] == form(kind, ROWS, COLUMNS)
    assert all(one.is_contiguous() for one in made)
    assert sum(one.nbytes for one in made) < 2 * packed.nbytes


def multiplied(x, made, kind, nbytes=2):
    """(G, M, in) → (G, M, out)"""
    place = torch.empty(*x.shape[:2], len(made[0]), LANES)
    Product(kind, nbytes)(x, place, *made)
    return place.flatten(2)


@pytest.mark.parametrize("kind", CODE)
@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("nbytes", OFF)
def test_a_product_is_that_of_the_unpacked_matrix(kind, count, nbytes, measured):
    plain, x = part(kind, rows=ROWS), tokens(count)
    ours = multiplied(x[None], laid(plain.weight, kind), kind, nbytes)[0]
    theirs = x.double() @ plain.dense().double().T
    off = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert off < OFF[nbytes]
    measured("fast parts", f"{kind}, {NAME[nbytes]}", "plain path", off, count)


@pytest.mark.parametrize("kind", CODE)
def test_a_matrix_of_zeros_gives_zeros(kind):
    layout = LAYOUTS[TYPE_ID[kind]]
    packed = torch.zeros(LANES, layout.block.nbytes, dtype=torch.uint8)
    made = laid(packed, kind)
    zeros = multiplied(tokens(2, layout.block.values)[None], made, kind)
    assert torch.equal(zeros, torch.zeros(1, 2, LANES))


def test_heights_that_fill_no_vector_and_types_of_tables_are_not_laid():
    assert fits("Q4_0", 32)
    assert not fits("Q4_0", 40)
    assert not fits("IQ2_XS", 32)
    assert not fits("F16", 32)
    assert not fits("", 32)


# ── which parts ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def place(tmp_path, monkeypatch):
    """All nets count as large; what is compiled lies in a place of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("refollama.fast.choice.SMALL", -1)


def net_of(*kinds) -> Any:
    net: Any = torch.nn.Module()
    net.blk = torch.nn.ModuleList()
    for kind in kinds:
        net.add_module(kind, part(kind))
    hasten(net)
    return net


def test_without_routines_nothing_is_laid(place):
    net = net_of("Q4_0", "Q6_K", "F16", "IQ2_XS")
    assert not is_there("Q4_0")
    assert lacking(net) == ["Q4_0", "Q6_K", "float16"]
    assert not any(isinstance(one, LaneLinear) for one in net.children())


def test_if_compiling_fails_the_net_is_as_it_was(place, monkeypatch):
    def fail(kind, together, nbytes):
        assert isinstance(net.Q4_0, LaneLinear)
        raise KeyboardInterrupt

    net = net_of("Q4_0", "Q6_K")
    before = list(net.children())
    monkeypatch.setattr("refollama.fast.choice.compile_product", fail)
    with pytest.raises(KeyboardInterrupt):
        warm(net)
    assert list(net.children()) == before
    assert not any(isinstance(one, LaneLinear) for one in before)


def eager(kind, sizes=None, nbytes=2):
    """What is compiled, uncompiled; it notes how many tokens it is given."""

    def routine(given):
        if sizes is not None:
            sizes.append(given[0].shape[:2])
        Product(kind, nbytes)(*given)
        return []

    return routine


@pytest.mark.parametrize("count", [0, 1, 3, 4, 8, 11, 600])
def test_tokens_go_alone_or_in_eights(place, monkeypatch, count):
    sizes: list[tuple[int, ...]] = []
    monkeypatch.setattr("refollama.fast.laned.loaded", lambda path: eager("Q5_K", sizes))
    ours = LaneLinear(part("Q5_K", bias=True), "Q5_K")
    found, given = ours(tokens(count)[:, None]), sizes.copy()
    theirs = part("Q5_K", bias=True)(tokens(count)[:, None])
    torch.testing.assert_close(found, theirs, atol=3e-3, rtol=1e-4)
    eights = -(-count // TOGETHER)
    many = [16] * (eights // 16) + [eights % 16] * (eights % 16 > 0)
    assert given == ([(some, TOGETHER) for some in many] if count >= 4 else [(1, 1)] * count)


@pytest.mark.parametrize("bits", [0, 8, 16, 32])
def test_prompts_go_in_eights_unless_in_bfloat16(place, monkeypatch, bits):
    sizes: list[tuple[int, ...]] = []
    monkeypatch.setattr("refollama.fast.laned.loaded", lambda path: eager("Q4_K", sizes))
    ours, x = LaneLinear(part("Q4_K"), "Q4_K"), tokens(40)[None]
    with reading(bits):
        found = ours(x)
        assert sizes == ([] if bits == 16 else [(5, TOGETHER)])
        assert torch.equal(found, by_slabs(ours, x)) == (bits == 16)
    if bits != 16:
        torch.testing.assert_close(found, by_slabs(part("Q4_K"), x), atol=3e-3, rtol=1e-4)
    x.requires_grad_()
    ours(x).sum().backward()  # goes the long way
    assert x.grad is not None
    assert len(sizes) == (bits != 16)


@pytest.mark.parametrize("bits", [0, 8, 16, 32])
def test_each_prompt_has_the_routine_of_its_bits(place, monkeypatch, bits):
    paths = {path_of("Q4_0", *which): which for which in ROUTINES}
    seen = []
    monkeypatch.setattr("refollama.fast.laned.loaded", lambda path: seen.append(paths[path]))
    with reading(bits):
        for count in (1, 9):
            LaneLinear(part("Q4_0"), "Q4_0")(tokens(count))
    few = [(1, 2), (TOGETHER, 2)]
    assert seen == {0: few, 8: [(TOGETHER, 1)] * 2, 16: [], 32: few}[bits]


def test_what_is_exact_rounds_nothing(place, monkeypatch):
    monkeypatch.setattr("refollama.fast.laned.loaded", lambda path: eager("Q4_0"))
    ours = LaneLinear(part("Q4_0"), "Q4_0")
    for count in (1, 40):
        with exactly():
            found = ours(tokens(count))
        assert torch.equal(found, by_slabs(part("Q4_0"), tokens(count)))
        assert not torch.equal(found, ours(tokens(count)))


@pytest.mark.parametrize("type", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize(("bits", "most"), [(32, 1e-7), (8, 2e-3)])
def test_a_talk_is_as_likely_to_lanes(place, monkeypatch, tmp_path, type, bits, most, measured):
    """fable itself, packed as this type: mean KL of the next token's distribution, over a talk that
    it never saw."""
    path, routine = tmp_path / "fable.gguf", eager(type, nbytes=1 if bits == 8 else 2)
    with open_gguf(FOLDER / "fable" / "fable.gguf") as file:
        plan(file, type, again=True).write(path)
    monkeypatch.setattr("refollama.fast.laned.loaded", lambda path: routine)
    with refollama.load(path) as llm, torch.no_grad():
        parts = [part for part in llm.net.modules() if isinstance(part, LaneLinear)]
        ids = llm.tokenizer.encode(written(conversation(1, 0, held=True)), bos=True, special=True)
        with exactly():
            plain = all_logits(llm.net, ids).double().log_softmax(-1)
        with reading(bits):
            ours = all_logits(llm.net, ids).double().log_softmax(-1)
    assert parts
    kl = (plain.exp() * (plain - ours)).sum(-1).mean().item()
    assert 0 < kl < most
    name = f"fable as {type}, {NAME[1 if bits == 8 else 2]}"
    measured("fast parts", name, "plain path, KL", kl, len(ids))


def test_experts_are_laid_as_well(place, monkeypatch, tmp_path):
    monkeypatch.setattr("refollama.fast.laned.loaded", lambda path: eager("Q6_K"))
    mixture: Any = {"expert_count": 4, "expert_used_count": 2, "embedding_length": 256}
    path = write_model(tmp_path / "m.gguf", type="Q6_K", feed_forward_length=256, **mixture)
    net: Any = load_net(path)
    plain = net.blk[0].ffn_down_exps
    hasten(net)
    experts, x = net.blk[0].ffn_down_exps, tokens(5, 256)
    each: list[Any] = experts.each
    assert isinstance(experts, FastExperts)
    assert [type(one) for one in each] == [LaneLinear] * 4
    for expert in range(4):
        torch.testing.assert_close(experts(x, expert), plain(x, expert), atol=1e-4, rtol=1e-4)
    assert sum(one.more_bytes for one in each) == copied_bytes(plain)


def test_a_small_mixture_stays_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = write_model(tmp_path / "m.gguf", type="Q8_0", expert_count=4, expert_used_count=2)
    net: Any = load_net(path)
    hasten(net)
    before = list(net.modules())
    assert lacking(net) == []
    assert warm(net) == 0
    assert list(net.modules()) == before
    assert not has_routines(net)


# ── compiled ──────────────────────────────────────────────────────────────────────────────────


@compiler
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_compiled_product_is_exact_and_alike_beside_others_and_for_all_sizes(place, measured):
    kind = "Q4_0"
    net = net_of(kind)
    assert isinstance(net.Q4_0, Int4Linear)
    told: list[tuple[int, int]] = []
    assert warm(net, told=lambda *done: told.append(done)) == 0  # there are no blocks
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert has_routines(net)
    assert not lacking(net)
    assert isinstance(net.Q4_0, LaneLinear)
    for rows, columns in ((ROWS, 512), (LANES, 32), (2 * LANES, 2048)):
        plain = part(kind, rows=rows, columns=columns)
        ours = LaneLinear(plain, kind)
        x = tokens(45, columns)[:, None]
        together, theirs = ours(x), x.double() @ plain.dense().double().T
        off = ((together - theirs).abs().max() / theirs.abs().max()).item()
        assert off < OFF[2]
        for count in (1, 2, 3, 5, 8):
            assert torch.equal(ours(x[:count]), together[:count])
            assert torch.equal(ours(x[-count:]), together[-count:])
        with reading(8):
            short = ours(x)
        slowly = multiplied(x[None, :, 0], ours.prepared(), kind, nbytes=1)[0][:, None]
        assert (short - slowly).abs().max() < 1e-3 * theirs.abs().max()
        off_by_8 = ((short - theirs).abs().max() / theirs.abs().max()).item()
        assert OFF[2] < off_by_8 < OFF[1]
        measured("fast parts", f"{kind}, warm", "plain path", off, 45)
    written = source(path_of(kind, 1, 2))
    assert "dpbusd" in written or "_maddubs_" in written
    assert "loadu(in_ptr" in written
    assert "__builtin_prefetch(in_ptr" in written
    assert not re.search(r"int32_t[^;]*::loadu\([^;]*, static_cast<int64_t>\(\d+\)\);", written)
    x = tokens(1).requires_grad_()
    net.Q4_0(x).sum().backward()  # goes the long way
    assert x.grad is not None
    net.Q4_0.weight[0] = 0
    assert net.Q4_0(tokens(1))[0, 0] == 0
    path_of(kind, 1, 2).unlink()
    forget()
    assert torch.equal(net.Q4_0(tokens(1)), by_slabs(net.Q4_0, tokens(1)))
