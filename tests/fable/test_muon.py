"""Muon goes along all directions of a matrix alike."""

import pytest
import torch

from refollama.fable.muon import Muon, orthogonal

SHAPES = [(24, 24), (12, 40), (40, 12), (1, 9)]


def drawn(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one_and_vectors_stay(shape):
    """Judged by the decomposition that it does without."""
    matrix = drawn(shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.T @ orthogonal(matrix) @ v.T
    values = inside.diagonal()
    assert values.min() > 0.3
    assert values.max() < 1.3
    assert (inside - torch.diag(values)).abs().max() < 1e-4


def test_the_size_of_a_gradient_does_not_matter():
    matrix = drawn((16, 30))
    torch.testing.assert_close(orthogonal(1000 * matrix), orthogonal(matrix), atol=1e-4, rtol=1e-3)
    assert not orthogonal(torch.zeros(3, 5)).any()


def test_three_steps_are_those_of_torch():
    """Which computes the iteration in bfloat16."""
    ours, theirs = (drawn((20, 32)).requires_grad_() for _ in range(2))
    mine = Muon([ours], lr=0.01, weight_decay=0.1)
    judge = torch.optim.Muon(
        [theirs], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(3):
        ours.grad = drawn((20, 32), 7 + step)
        theirs.grad = ours.grad.clone()
        mine.step()
        judge.step()
    moved = (ours - drawn((20, 32))).norm()
    assert (ours - theirs).norm() < 0.02 * moved
    assert moved > 0.1


def test_windows_are_matrices_with_a_row_for_each():
    windows, matrix = (
        drawn((6, 36)).view(6, 3, 3, 4).requires_grad_(),
        drawn((6, 36)).requires_grad_(),
    )
    for weight in (windows, matrix):
        weight.grad = drawn((6, 36), 3).view_as(weight)
        Muon([weight], lr=0.1, weight_decay=0).step()
    assert torch.equal(windows.view(6, 36), matrix)


def test_it_goes_on_from_a_saved_state():
    one, two = (drawn((6, 8)).requires_grad_() for _ in range(2))
    first, second = (Muon([w], lr=0.01, weight_decay=0) for w in (one, two))
    for optimizer, weight in ((first, one), (second, two)):
        weight.grad = drawn((6, 8), 1)
        optimizer.step()
    resumed = Muon([two], lr=1.0, weight_decay=1.0)
    resumed.load_state_dict(second.state_dict())
    for optimizer, weight in ((first, one), (resumed, two)):
        weight.grad = drawn((6, 8), 2)
        optimizer.step()
    assert torch.equal(one, two)
