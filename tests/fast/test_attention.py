"""Attention in parts against attention at once: every bit, and how much is looked at."""

import math
from functools import partial
from typing import Any

import pytest
import torch

from refollama.fast import attention, hasten
from refollama.fast.attention import attend_in_parts
from refollama.fast.products import onednn
from refollama.fast.step import attend_one
from refollama.kvcache import PIECE
from refollama.models.layers import attend
from refollama.models.load import load_net
from tests.exactness import same
from tests.models.test_llama import all_logits, some_tokens, stepwise
from tests.tiny import write_model


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Parts of a few tokens."""
    monkeypatch.setattr(attention, "SCORES", 5 * 4 * 3 * PIECE)


@pytest.fixture(params=["all heads", "each head"])
def ways(request, monkeypatch):
    """All key heads at once, and each by itself where oneDNN is the sooner one."""
    if request.param == "each head":
        if not attention.heads_are_alike(8, 8):
            pytest.skip("torch's own choice is the sooner one here")
        monkeypatch.setattr(attention, "ROWS", 16)


def given(*, T=37, first=600, window=10_000, B=1):
    """q, k, v, visible: T tokens from this place on, 4 heads of 2 key heads, three pieces."""
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(B, T, 4, 8, generator=rng)
    k, v = torch.randn(2, B, 2, 3 * PIECE, 8, generator=rng)
    positions = first + torch.arange(T).expand(B, T)
    ago = positions[..., None] - torch.arange(3 * PIECE)
    return q, k, v, (ago >= 0) & (ago < window)


@pytest.mark.parametrize("first", [0, 230, 600, 3 * PIECE - 37])
@pytest.mark.parametrize("window", [10_000, 40])
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.usefixtures("ways")
def test_it_is_attention_at_once(first, window, B):
    some = given(first=first, window=window, B=B)
    assert same(attend_in_parts(*some), attend(*some))


@pytest.mark.usefixtures("ways")
def test_places_that_come_later_are_not_looked_at():
    """Were they, what lies there would be multiplied by nothing: and that is no number."""
    q, k, v, visible = given(first=0)
    k[:, :, PIECE:], v[:, :, PIECE:] = math.nan, math.inf
    assert attend_in_parts(q, k, v, visible).isfinite().all()
    assert not attend(q, k, v, visible).isfinite().all()


@pytest.mark.parametrize(("last", "places"), [(0, 256), (255, 256), (256, 512), (700, 768)])
def test_what_is_looked_at_ends_with_a_piece(last, places):
    visible = torch.zeros(2, 5, 768, dtype=torch.bool)
    visible[1, 3, last] = True
    assert attention._last_seen(visible) == places
    assert attention._last_seen(torch.zeros_like(visible)) == PIECE
    assert attention._last_seen(visible[..., :300]) <= 300


@pytest.mark.parametrize(
    ("T", "plainly", "parts"), [(1, [1], []), (5, [5], []), (12, [], [5, 5, 2])]
)
def test_few_tokens_are_attended_to_at_once(monkeypatch, T, plainly, parts):
    called: dict[str, list[int]] = {"attend": [], "_attend": []}

    def watched(name: str, way: Any, q: Any, *others: Any) -> Any:
        called[name].append(q.shape[1])
        return way(q, *others)

    for name in called:
        way = partial(watched, name, getattr(attention, name))
        monkeypatch.setattr(attention, name, way)
    attend_in_parts(*given(T=T))
    assert called == {"attend": plainly, "_attend": parts}


@pytest.mark.parametrize(
    ("G", "S", "tokens"),
    [(4, 512, 256), (4, 2048, 128), (1, 512, 256), (8, 4096, 64), (999, 8192, 1)],
)
def test_a_part_of_one_head_has_more_tokens(monkeypatch, G, S, tokens):
    monkeypatch.undo()
    assert attention._of_a_head(G, S) == tokens


def test_heads_go_by_themselves_only_if_that_is_the_same(monkeypatch):
    def almost(*given):
        return onednn(*given) * (1 + 1e-6)

    monkeypatch.setattr(attention, "by_onednn", lambda: True)
    monkeypatch.setattr(attention, "onednn", almost)
    assert not attention.heads_are_alike.__wrapped__(8, 8)
    monkeypatch.setattr(attention, "by_onednn", lambda: False)
    monkeypatch.setattr(attention, "onednn", onednn)
    assert not attention.heads_are_alike.__wrapped__(8, 8)


@pytest.mark.parametrize(
    ("first", "window", "places"), [(600, 10_000, 601), (0, 10_000, 1), (600, 40, 0), (0, 40, 1)]
)
def test_only_what_some_token_may_not_see_is_hidden(first, window, places):
    *_, visible = given(first=first, window=window)
    assert attention._seen_by_all(visible) == places
    assert attention._seen_by_all(torch.ones_like(visible)) == 3 * PIECE


def test_whoever_goes_backwards_finds_the_same_way():
    q, k, v, visible = given()
    gradients = []
    for way in (attend, attend_in_parts):
        leaf = q.clone().requires_grad_()
        way(leaf, k, v, visible).sin().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


@torch.no_grad()
@pytest.mark.usefixtures("ways")
def test_a_net_with_it_reads_as_one_without(tmp_path):
    """Also behind something that was read before, and in blocks that are left as they are."""
    path = write_model(tmp_path / "m.gguf", type="F32")
    plain, fast = load_net(path), load_net(path)
    hasten(fast)
    assert all(block.attend is attend_in_parts for block in fast.blk)
    assert all(block.attend is attend for block in plain.blk)
    ids = some_tokens(90)
    assert same(all_logits(fast, ids), all_logits(plain, ids))
    for ours, theirs in zip(
        *(stepwise(net, ids, (60, 1, 29)) for net in (fast, plain)), strict=True
    ):
        assert same(ours, theirs)


# ── one token of each row, as compiled blocks attend ──────────────────────────────────────────


@pytest.mark.parametrize(
    ("heads", "shared_by", "D", "Dv"),
    [
        (4, 1, 64, 64),
        (2, 4, 64, 64),
        (1, 8, 64, 64),
        (2, 3, 24, 40),
        (2, 6, 16, 128),
        (1, 5, 8, 512),
    ],
)
def test_one_token_attends_as_it_would_among_others(heads, shared_by, D, Dv):
    B, S, rng = 3, 300, torch.Generator().manual_seed(0)
    q = torch.randn(B, heads * shared_by, D, generator=rng)
    k = torch.randn(B, heads, S, D, generator=rng).half()
    v = torch.randn(B, heads, S, Dv, generator=rng).half()
    visible = torch.arange(S) <= torch.tensor([0, 7, 250])[:, None]
    k[1, :, 200:], v[1, :, 200:] = 1000, 5  # what nobody sees
    theirs = attend(q[:, None], k.float(), v.float(), visible[:, None])[:, 0]
    ours = attend_one(q, k, v, visible)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[0], v[0, :, 0].float().repeat_interleave(shared_by, 0))
