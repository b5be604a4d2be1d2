"""Packing by importance: an error counts as much as the column in which it stands."""

import pytest
import torch
from torch import Tensor

from refollama.weights.blocks import TYPE_ID
from refollama.weights.quants import LAYOUTS, pack

SIMPLE = ["Q4_0", "Q4_1", "Q5_0", "Q5_1"]
K_TYPES = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
EVERY = pytest.mark.parametrize("name", SIMPLE + K_TYPES)


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def values(rows: int = 24, columns: int = 512) -> Tensor:
    return torch.randn(rows, columns, generator=draw(1))


def importance(columns: int = 512, spread: float = 1.5) -> Tensor:
    """As of a real model: most columns alike, some a hundred times as important."""
    return (spread * torch.randn(columns, generator=draw(2))).exp()


def back(packed: Tensor, name: str) -> Tensor:
    return LAYOUTS[TYPE_ID[name]].unpack_rows(packed).double()


def weighed_errors(x: Tensor, name: str, given: Tensor | None, counted: Tensor) -> Tensor:
    """Of each row: Σ w · error²."""
    return ((back(pack(x, name, given), name) - x).square() * counted.double()).sum(-1)


@EVERY
def test_the_weighed_error_falls_in_every_row(name):
    x, w = values(), importance()
    plain, weighed = (weighed_errors(x, name, given, w) for given in (None, w))
    assert bool((weighed < plain).all())
    assert weighed.sum() < 0.8 * plain.sum()


@EVERY
def test_what_comes_out_of_the_matrix_is_nearer_to_the_truth(name):
    """The purpose of it all: |W x − Ŵ x|² on inputs like those that were sampled, but others."""
    x, scales = values(), importance().sqrt()
    sampled = torch.randn(300, 512, generator=draw(3)) * scales
    others = (torch.randn(300, 512, generator=draw(4)) * scales).double()
    w = sampled.square().mean(0)
    off = [
        (others @ (back(pack(x, name, given), name) - x.double()).T).square().mean()
        for given in (None, torch.ones(512), w)
    ]
    assert off[2] < 0.85 * off[0] and off[2] < 0.85 * off[1]


@pytest.mark.parametrize("name", K_TYPES)
def test_columns_that_matter_alike_change_no_byte(name):
    x = values()
    assert torch.equal(pack(x, name, torch.full((512,), 7.0)), pack(x, name))


@pytest.mark.parametrize(("name", "low", "high"), [("Q4_0", -8, 7), ("Q5_0", -16, 15)])
def test_no_step_size_would_be_much_better(name, low, high):
    """The judge tries hundreds for each block, each with every value at its nearest quant."""
    x, w = values(8, 64), importance(64)
    blocks, weights = x.view(-1, 32).double(), w.repeat(8, 1).view(-1, 32).double()
    packed = back(pack(x, name, w), name).view(-1, 32)
    found = ((packed - blocks).square() * weights).sum(-1)
    best = torch.full_like(found, torch.inf)
    for share in torch.linspace(0.4, 1.2, 300, dtype=torch.float64):
        for sign in (1, -1):
            d = sign * share * blocks.abs().amax(-1, keepdim=True) / high
            tried = (blocks / d).round().clamp(low, high) * d
            best = torch.minimum(best, ((tried - blocks).square() * weights).sum(-1))
    assert bool((found < 2.5 * best).all()) and found.sum() < 1.1 * best.sum()


@EVERY
def test_a_column_that_never_mattered_is_packed_all_the_same(name):
    """In this sample; and where none ever mattered, all count alike."""
    x, w = values(), importance()
    w[:256] = 0
    off = (back(pack(x, name, w), name) - x)[:, :256].square().mean()
    plain = (back(pack(x, name), name) - x)[:, :256].square().mean()
    assert off < 1.2 * plain
    flat, none = (pack(x, name, given) for given in (torch.ones(512), torch.zeros(512)))
    assert torch.equal(flat, none)


@EVERY
def test_each_expert_has_its_own(name):
    x = values(6).view(2, 3, 512)
    w = torch.stack((importance(), importance().flip(0)))
    each = torch.stack([pack(x[e], name, w[e]) for e in range(2)])
    same = (pack(x, name, w) == each).float().mean()
    assert same > 0.99  # sums that are taken of more columns at once may round otherwise
    assert (pack(x, name, w[0]) == each).float().mean() < same - 0.05


@EVERY
def test_blocks_of_zeros_and_of_one_value_stay_what_they_are(name):
    x = torch.zeros(2, 512)
    x[1] = 3.0
    found = back(pack(x, name, importance()), name)
    assert not found[0].any()
    assert torch.allclose(found[1], torch.tensor(3.0).double(), rtol=1e-2)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0"])
def test_what_leaves_no_choice_ignores_it(name):
    assert torch.equal(pack(values(), name, importance()), pack(values(), name))
