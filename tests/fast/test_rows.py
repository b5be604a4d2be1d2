"""Rows as they lie: products of floats, alike beside others, of any size."""

import copy
import pickle
import shutil

import pytest
import torch

from refollama.fast import has_routines, lacking, warm
from refollama.fast.half import HalfLinear
from refollama.fast.laned import TOGETHER
from refollama.fast.routines import forget
from refollama.fast.rows import (
    PAIR,
    TILES,
    WIDE,
    RowsProduct,
    at_once,
    compiled_rows_times,
    name_of,
    path_of,
    rows_are_there,
    rows_times,
)
from tests.fast.test_fast import part, tokens
from tests.fast.test_lanes import net_of, place  # noqa: F401

compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
COUNTS = [1, 3, 4, 8, 11]


def off(found, x, matrix) -> float:
    """From what float64 says, relative to what is added up."""
    x, matrix = x.double(), matrix.double()
    return ((found - x @ matrix.T).abs() / (x.abs() @ matrix.abs().T)).max().item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [1, 6, 7])
@pytest.mark.parametrize("width", [24, PAIR, 6 * PAIR])
@pytest.mark.parametrize("count", [1, 2, TOGETHER])
def test_a_product_is_that_of_floats(dtype, n, width, count):
    x, matrix = torch.randn(count, width), torch.randn(n, width).to(dtype)
    assert off(rows_times(x, matrix), x, matrix) < 1e-6


@pytest.mark.parametrize(
    ("count", "n", "width", "rows"),
    [(1, 4, WIDE - PAIR, 1), (1, 4, WIDE, 4), (1, 6, WIDE, 1), (8, 4, WIDE, 2), (8, 5, PAIR, 1)],
)
def test_rows_share_several_tokens_or_a_wide_one(count, n, width, rows):
    assert at_once(count, n, width) == rows
    assert (count, rows) in (*TILES, (8, 1))  # odd heights have no routine for eight


@pytest.mark.parametrize("count", [1, TOGETHER])
def test_how_many_rows_go_together_changes_no_bit(count):
    x, matrix = torch.randn(count, WIDE), torch.randn(8, WIDE).half()
    whole = rows_times(x, matrix)
    each = [rows_times(x, row) for row in torch.split(matrix, 1)]
    assert torch.equal(whole, torch.cat(each, 1))


def eager(given):
    """What is compiled, uncompiled."""
    return [RowsProduct()(*given)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("n", [48, 49])
def test_tokens_go_alone_or_in_eights(monkeypatch, count, n):
    sizes = []

    def routine(given):
        sizes.append(len(given[0]))
        return eager(given)

    monkeypatch.setattr("refollama.fast.rows.loaded", lambda path: routine)
    x, matrix = torch.randn(count, 3, 2 * PAIR), torch.randn(n, 2 * PAIR).half()
    found = compiled_rows_times(x, matrix)
    assert found is not None
    assert found.shape == (count, 3, n)
    assert off(found.flatten(0, 1), x.flatten(0, 1), matrix) < 1e-6
    rows = 3 * count
    eights = rows >= 4 and n % 2 == 0
    assert sizes == ([TOGETHER] * -(-rows // TOGETHER) if eights else [1] * rows)


def test_a_matrix_without_routines_rounds_as_it_did(place, monkeypatch):  # noqa: F811
    net = net_of("F16")
    assert lacking(net) == ["float16"]
    assert not has_routines(net)
    before = net.F16(tokens(1))
    monkeypatch.setattr("refollama.fast.rows.loaded", lambda path: eager)
    assert torch.equal(net.F16(tokens(1)), before), "it changed in the midst of an answer"
    net.F16.join()
    assert has_routines(net)
    assert not torch.equal(net.F16(tokens(1)), before)


def test_rows_that_fill_no_pairs_go_on_as_they_did(place, monkeypatch):  # noqa: F811
    monkeypatch.setattr("refollama.fast.rows.loaded", lambda path: eager)
    odd, even = (HalfLinear(part("F16", columns=n), "F16") for n in (72, 64))
    assert not odd.has_routines
    assert even.has_routines
    assert odd(tokens(1, 72)).shape == even(tokens(1, 64)).shape
    assert even(tokens(0, 64)).shape == (0, len(even.weight))


# ── compiled ──────────────────────────────────────────────────────────────────────────────────


@compiler
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["F16", "BF16", "IQ2_XS"])
def test_compiled_rows_are_exact_and_alike_beside_others(place, kind):  # noqa: F811
    net, told = net_of(kind), []
    old = net.get_submodule(kind)
    assert type(old) is HalfLinear
    assert warm(net, told=lambda *done: told.append(done)) == 0  # there are no blocks
    assert told == [(done, 7) for done in range(8)]  # four for prompts, too
    assert has_routines(net)
    assert not lacking(net)
    assert net.get_submodule(kind) is old
    for rows, columns in ((48, 512), (1, 256), (33, 2048), (12, WIDE)):
        plain = part(kind, rows=rows, columns=columns, bias=True)
        ours = HalfLinear(plain, kind)
        assert ours.has_routines
        x = tokens(45, columns)[:, None]
        together = ours(x)
        (matrix,) = ours.prepared()
        assert off(together[:, 0] - plain.bias, x[:, 0], matrix) < 1e-5
        for count in (1, 2, 3, 5, 8):
            assert torch.equal(ours(x[:count]), together[:count])
            assert torch.equal(ours(x[-count:]), together[-count:])
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(other(x), together)
    x = tokens(1).requires_grad_()
    old(x).sum().backward()  # goes the long way
    assert x.grad is not None
    number = name_of(old.dtype)
    path_of(number, 1, 4).unlink()
    forget()
    assert not rows_are_there(number)
    assert old(tokens(1)).isfinite().all()
