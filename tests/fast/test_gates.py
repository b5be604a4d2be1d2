"""Gates in parts against all gates at once: every bit, and how many go together."""

import pytest
import torch

from refollama.fast import gates, hasten
from refollama.fast.gates import swiglu_in_parts
from refollama.models.layers import swiglu
from refollama.models.load import load_net
from tests.tiny import write_model

WIDTH, TOGETHER = 24, 5


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Parts of a few tokens, if there is one row."""
    monkeypatch.setattr(gates, "GATES", WIDTH * TOGETHER)


def given(T, B=1):
    rng = torch.Generator().manual_seed(0)
    return 9 * torch.randn(2, B, T, WIDTH, generator=rng)


@pytest.mark.parametrize("B", [1, 2, 7])
@pytest.mark.parametrize("T", [1, 5, 6, 23])
def test_they_are_gates_at_once(T, B):
    gate, up = given(T, B)
    found = swiglu_in_parts(gate, up)
    assert torch.equal(found, swiglu(gate, up))
    assert found.is_contiguous()


@pytest.mark.parametrize(
    ("T", "B", "parts"), [(5, 1, [5]), (12, 1, [5, 5, 2]), (5, 2, [2, 2, 1]), (2, 9, [1, 1])]
)
def test_as_many_go_together_as_have_room(monkeypatch, T, B, parts):
    called = []

    def watched(gate, up):
        called.append(gate.shape[1])
        return swiglu(gate, up)

    monkeypatch.setattr(gates, "swiglu", watched)
    swiglu_in_parts(*given(T, B))
    assert called == parts


def test_whoever_goes_backwards_finds_the_same_way():
    gradients = []
    for way in (swiglu, swiglu_in_parts):
        gate, up = (one.clone().requires_grad_() for one in given(23))
        way(gate, up).sin().sum().backward()
        gradients.append((gate.grad, up.grad))
    assert all(map(torch.equal, *gradients))


def test_a_fast_net_has_them(tmp_path):
    path = write_model(tmp_path / "m.gguf", type="F32")
    plain, fast = load_net(path), load_net(path)
    hasten(fast)
    assert all(block.swiglu is swiglu_in_parts for block in fast.blk)
    assert all(block.swiglu is swiglu for block in plain.blk)
