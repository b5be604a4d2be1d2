"""Prompts in fixed point: as near as 14 bits are, alike beside others, and of all sizes."""

import copy
import pickle
import shutil

import numpy as np
import pytest
import torch

import refollama
from refollama.fable.bundled import FOLDER
from refollama.fable.lessons import conversation
from refollama.fable.vocabulary import written
from refollama.fast import exactly, lacking, reading, warm
from refollama.fast.choice import _jobs
from refollama.fast.dots import GROUP, pairs
from refollama.fast.fixed import (
    MOST,
    FixedProduct,
    Largest,
    Laying,
    Rounding,
    fits,
    fixed_times,
    is_there,
    laid,
    largest_found,
    largest_in,
    largest_of_rows,
    laying_of,
    product,
    rounding,
)
from refollama.fast.half import NATIVE, HalfLinear
from refollama.fast.lanes import LANES
from refollama.fast.prepared import FEW
from refollama.fast.routines import forget
from refollama.fast.rows import name_of
from refollama.fast.slabs import by_slabs
from refollama.quantize import plan
from refollama.weights import open_gguf
from tests.fast.test_dots import words
from tests.fast.test_fast import large, off, part, tokens
from tests.fast.test_lanes import net_of, place  # noqa: F401
from tests.models.test_llama import all_logits

__all__ = ["large"]  # all nets count as large

compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
NUMBERS = torch.float16, torch.bfloat16, torch.float32
NEAR = 0.0002  # relative: two roundings to 14 bits come to 0.00012


def test_a_sum_is_that_of_all_halves():
    rng = np.random.default_rng(0)
    codes = rng.integers(-MOST, MOST + 1, (16, 3, 1, LANES, 2)).astype(np.int16)
    numbers = rng.integers(-MOST, MOST + 1, (1, 2, 16, 2)).astype(np.int16)
    codes[:, 0] = MOST
    numbers[:, 0], numbers[:, 1] = MOST, -MOST  # the largest sums that there are
    found = pairs([*words(codes, 2)], words(numbers, 2))
    slow = np.einsum("wtglh,gwh->tgl", codes.astype(float)[:, :, [0, 0]], numbers[0].astype(float))
    assert found.dtype == torch.int32
    assert np.array_equal(found.numpy(), slow)


def test_words_are_two_numbers_sixteen_apart():
    matrix = random(32, 2 * GROUP).half()
    rows = matrix.view(2, LANES, 2, GROUP)
    found, units = laid(rows, largest_in(rows))
    halves = found.view(torch.int32).numpy().view(np.int16).reshape(2, 2, 16, LANES, 2)
    for row in range(32):
        for group in range(2):
            its = halves[row // LANES, group, :, row % LANES]  # (16, 2)
            values = its.T.flatten() * float(units[row // LANES, group, row % LANES])
            unit = float(matrix[row].abs().view(2, GROUP)[group].max()) / MOST
            assert abs(values - matrix[row].view(2, GROUP)[group].numpy()).max() < 0.51 * unit


def eager(path):
    """Of a path what is compiled, uncompiled."""
    others = {product(): FixedProduct(), rounding(): Rounding()}
    others |= {largest_of_rows(name_of(dtype)): Largest() for dtype in NUMBERS}
    made = others.get(path, Laying())

    def routine(given):
        found = made(*given)
        return [*found] if isinstance(found, tuple) else [found]

    return routine


@pytest.fixture
def joined(place, monkeypatch):  # noqa: F811
    """Makes matrices whose routines are not compiled."""
    monkeypatch.setattr("refollama.fast.fixed.loaded", eager)
    monkeypatch.setattr("refollama.fast.half.rows_are_there", lambda number: True)
    monkeypatch.setattr("refollama.fast.half.compiled_rows_times", lambda x, matrix: None)

    def make(rows, columns, kind="F16"):
        plain = part(kind, rows=rows, columns=columns, bias=True)
        ours = HalfLinear(plain, kind)
        assert ours.in_fixed_point == fits(rows, columns)
        return ours

    return make


def product_of(x, matrix):
    """As it is compiled, uncompiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("refollama.fast.fixed.loaded", eager)
        largest = largest_found(matrix)
        assert largest is not None
        found = fixed_times(x, matrix, largest)
    assert found is not None
    return found


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("dtype", NUMBERS)
def test_a_product_is_as_near_as_14_bits(dtype):
    matrix, x = random(48, 3 * GROUP).to(dtype), random(16, 3 * GROUP)
    x[3], matrix[5] = 0, 0
    found = product_of(x, matrix)
    assert 0 < off(found, x @ matrix.float().T) < NEAR
    assert (found[3] == 0).all()
    assert (found[:, 5] == 0).all()


@pytest.mark.parametrize("kind", [*NATIVE, "IQ2_XS", "MXFP4"])
def test_a_prompt_is_off_by_as_much(joined, kind, measured):
    """What was copied to float16 is off by that, too."""
    ours, x = joined(128, 512, kind), tokens(40)
    with reading(32):
        far = off(ours(x) - ours.bias, by_slabs(ours, x) - ours.bias)
    assert 0 < far < (0.0003 if kind == "IQ2_XS" else NEAR)
    measured("fast parts", f"{kind}, warm", "plain path", far, len(x))


@pytest.mark.parametrize("kind", NATIVE)
def test_a_talk_is_as_likely_in_fixed_point(joined, tmp_path, kind, measured):
    """fable itself, packed as this type: mean KL of the next token's distribution, over a talk that
    it never saw."""
    path = tmp_path / "fable.gguf"
    with open_gguf(FOLDER / "fable" / "fable.gguf") as file:
        plan(file, kind, again=True).write(path)
    with refollama.load(path) as llm, torch.no_grad():
        parts = [part for part in llm.net.modules() if isinstance(part, HalfLinear)]
        assert any(part.in_fixed_point for part in parts)
        ids = llm.tokenizer.encode(written(conversation(1, 0, held=True)), bos=True, special=True)
        with exactly():
            plain = all_logits(llm.net, ids).double().log_softmax(-1)
        with reading(32):
            ours = all_logits(llm.net, ids).double().log_softmax(-1)
    assert parts
    kl = (plain.exp() * (plain - ours)).sum(-1).mean().item()
    assert 0 < kl < 1e-6
    measured("fast parts", f"fable as {kind}, warm", "plain path, KL", kl, len(ids))


def test_it_is_nearer_than_float16_for_tokens():
    """Which is what llama.cpp makes of them."""
    matrix, x = random(64, 2048).half(), random(32, 2048)
    exact = x @ matrix.float().T
    assert off(product_of(x, matrix), exact) < 0.7 * off(x.half().float() @ matrix.float().T, exact)


def test_one_large_value_takes_bits_from_its_32_only():
    matrix, x = random(16, 8 * GROUP).half(), random(8, 8 * GROUP)
    matrix[:, 5] = 300
    x[:, 5] = 0
    x[:, -1] = 1000
    matrix[:, -1] = 0
    far = off(product_of(x, matrix), x @ matrix.float().T)
    assert far < 0.02  # two of eight groups have nine bits, or five
    matrix[:, 5], x[:, -1] = 0, 0
    assert off(product_of(x, matrix), x @ matrix.float().T) < NEAR


@pytest.mark.parametrize("count", [1, 8, 19])
@pytest.mark.parametrize("rows", [16, 80])
def test_any_number_of_tokens_and_slabs(monkeypatch, count, rows):
    matrix, x = random(rows, 4 * GROUP).half(), random(2, count, 4 * GROUP)
    whole = product_of(x, matrix)
    monkeypatch.setattr("refollama.fast.fixed.AT_ONCE", 32 * 4 * GROUP)  # two, two, one
    assert whole.shape == (2, count, rows)
    assert off(whole, x @ matrix.float().T) < NEAR
    assert torch.equal(product_of(x, matrix), whole)


def test_prompts_go_by_it_and_nothing_else(joined, monkeypatch):
    counts = []

    def watched(x, *others):
        counts.append(x.shape[:-1].numel())
        return fixed_times(x, *others)

    monkeypatch.setattr("refollama.fast.fixed.fixed_times", watched)
    ours, x = joined(48, 64), tokens(FEW + 1, 64)
    ours(x[None])  # whoever does not say what it is
    with reading(32):
        assert off(ours(x), by_slabs(ours, x)) < NEAR
        ours(x[:1])
    assert counts == [FEW + 1, FEW + 1, 1]
    ours(x[None, :FEW])  # is written
    with exactly():
        ours(x[None])
    for bits in (16, 8):
        with reading(bits):
            ours(x)
    with reading(32):
        assert ours(x[:0]).shape == (0, 48)
    x.requires_grad_()
    ours(x[None]).sum().backward()
    assert x.grad is not None
    assert len(counts) == 3


def test_the_largest_of_each_32_is_found_once(joined, monkeypatch):
    found = []

    def watched(matrix):
        found.append(largest_found(matrix))
        return found[-1]

    monkeypatch.setattr("refollama.fast.fixed.largest_found", watched)
    ours, x = joined(48, 64), tokens(40, 64)
    before = ours.more_bytes
    with reading(32):
        first = ours(x)
        assert torch.equal(ours(x), first)
        [largest] = found
        assert largest is not None
        slow = ours.prepared()[0].float().view(3, LANES, 2, GROUP).abs().amax(-1)
        assert torch.equal(largest.float(), slow.transpose(1, 2))
        assert ours.more_bytes - before == largest.nbytes == 48 * 2 * 2
        ours.weight.view(torch.float16)[:] *= 2  # of what is written it is found anew
        assert off(ours(x) - ours.bias, 2 * (first - ours.bias)) < 1e-6
        assert len(found) == 2
        ours.release()
        assert ours.more_bytes == before
        monkeypatch.setattr("refollama.fast.fixed.largest_found", lambda matrix: None)
        assert torch.equal(ours(x), by_slabs(ours, x))  # its routine is gone


def test_matrices_that_fill_no_lanes_go_on_as_they_did(joined):
    ours, x = joined(49, 64), tokens(40, 64)
    assert [fits(48, 64), fits(49, 64), fits(48, 72), fits(0, 64)] == [True, False, False, False]
    with reading(32):
        assert torch.equal(ours(x), by_slabs(ours, x))


def test_without_vectors_there_are_routines_for_rows_alone(place, monkeypatch):  # noqa: F811
    """Neither is a sum of pairs an instruction there, nor can it be compiled."""
    net = net_of("F16")
    assert len(_jobs(net)) == 7
    monkeypatch.setattr("refollama.fast.fixed.has_avx2", lambda: False)
    assert len(_jobs(net)) == 3
    assert lacking(net) == ["float16"]
    monkeypatch.setattr("refollama.fast.choice.rows_are_there", lambda number: True)
    assert lacking(net) == []


# ── compiled ──────────────────────────────────────────────────────────────────────────────────


@compiler
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["F16", "BF16", "IQ2_XS"])
def test_a_compiled_prompt_is_near_and_alike_beside_others(place, kind):  # noqa: F811
    net = net_of(kind)
    warm(net)
    old = net.get_submodule(kind)
    number = name_of(old.dtype)
    assert is_there(number)
    for rows, columns in ((48, 512), (16, 256), (1040, 2048)):
        plain = part(kind, rows=rows, columns=columns, bias=True)
        ours = HalfLinear(plain, kind)
        assert ours.in_fixed_point
        x = tokens(45, columns)
        with reading(32):
            together = ours(x)
            (matrix,) = ours.prepared()
            exact = x @ matrix.float().T + plain.bias
            assert 0 < off(together - plain.bias, exact - plain.bias) < NEAR
            assert off(together, product_of(x, matrix) + plain.bias) < 1e-6
            for count in (1, 8, 33):
                assert torch.equal(ours(x[:count]), together[:count])
                assert torch.equal(ours(x[-count:]), together[-count:])
            for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
                assert torch.equal(other(x), together)
    laying_of(number).unlink()
    forget()
    assert lacking(net) == [number]
    with reading(32):
        assert torch.equal(old(tokens(40)), by_slabs(old, tokens(40)))
