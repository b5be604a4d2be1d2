"""What is trained is what runs."""

import itertools

import pytest
import torch
from torch.nn import functional

from refollama.fable import net, train
from refollama.fable.net import (
    SHARED,
    Lesson,
    attend_in_chunks,
    new_net,
    packed,
    read,
    sizes,
    weights,
)
from refollama.models.load import load_net
from refollama.weights.gguf import write_gguf
from tests.tiny import TOKENS, tokenizer

SMALL = {
    "block_count": 2,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "rope.dimension_count": 16,
}
METADATA = {"general.architecture": "llama", **sizes(**SMALL), **tokenizer()}


@pytest.fixture
def learner():
    return new_net(METADATA, len(TOKENS), seed=3)


def logits(llama, tokens):
    """After every token, by the plain path."""
    positions = torch.arange(tokens.shape[1])[None]
    cache = llama.new_cache().rows([0], tokens.shape[1])
    return llama.output(llama.hidden(tokens, positions, cache))


@pytest.mark.parametrize(("type", "near"), [("F32", 1e-4), ("Q8_0", 0.05)])
@torch.no_grad()
def test_the_file_that_is_written_gives_the_logits_that_were_learned(tmp_path, learner, type, near):
    path = tmp_path / "learned.gguf"
    write_gguf(path, METADATA, packed(learner, type))
    tokens = torch.randint(0, len(TOKENS), (1, 40), generator=torch.Generator().manual_seed(0))
    ours = learner.output(read(learner, tokens, torch.zeros_like(tokens)))
    theirs = logits(load_net(path), tokens)
    assert (ours - theirs).abs().max() < near
    assert ours.std() > 5 * near


@torch.no_grad()
def test_conversations_of_one_row_do_not_see_each_other(learner):
    rng = torch.Generator().manual_seed(1)
    one, two, other = (torch.randint(0, len(TOKENS), (1, 12), generator=rng) for _ in range(3))
    numbers = torch.tensor([[0] * 12 + [1] * 12])
    first = read(learner, torch.cat((one, two), 1), numbers)
    second = read(learner, torch.cat((other, two), 1), numbers)
    torch.testing.assert_close(first[:, 12:], second[:, 12:], atol=1e-5, rtol=1e-5)
    alone = read(learner, two, torch.zeros_like(two))
    torch.testing.assert_close(first[:, 12:], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_to_repeat_a_list_is_learned_at_once_by_heads_that_begin_so(monkeypatch):
    """Lists of 300 words, each said twice: how much of the second time is foretold?"""
    begun = _repeats(steps=60)
    monkeypatch.setattr(net, "begin_by_looking_up", lambda *given: None)
    by_chance = _repeats(steps=60)
    assert begun > 0.5
    assert by_chance < 0.1


def _repeats(steps, words=300, length=40):
    learning = new_net({"general.architecture": "llama", **sizes(), **tokenizer()}, words, seed=1)
    optimizers = train._optimizers(learning, rate=8e-3, calm=1.0)
    rng = torch.Generator().manual_seed(1)
    right = []
    for step in range(steps):
        once = torch.randint(words, (16, length), generator=rng)
        tokens = torch.cat((once, once), 1)
        hidden = read(learning, tokens, torch.zeros_like(tokens))[:, length:-1]
        logits = learning.output(hidden).flatten(0, 1)
        wanted = once[:, 1:].flatten()
        functional.cross_entropy(logits, wanted).backward()
        for one in optimizers:
            for group in one.param_groups:
                group["lr"] = 8e-3 * min(1, (step + 1) / 50)
            one.step()
            one.zero_grad()
        right.append((logits.argmax(-1) == wanted).float().mean().item())
    return sum(right[-5:]) / 5


def test_every_weight_learns_and_the_output_is_the_embedding(learner):
    tokens = torch.arange(20)[None]
    learner.output(read(learner, tokens, torch.zeros_like(tokens))).square().sum().backward()
    found = weights(learner)
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in found.values())
    assert set(found) == set(packed(learner))
    assert learner.output.weight is learner.token_embd.weight


def test_a_seed_decides_the_first_weights():
    one, two = (weights(new_net(METADATA, 50, seed=seed)) for seed in (5, 5))
    other = weights(new_net(METADATA, 50, seed=6))
    name = "blk.1.ffn_up.weight"
    assert torch.equal(one[name], two[name])
    assert not torch.equal(one[name], other[name])


@torch.no_grad()
def test_heads_begin_by_looking_at_what_is_alike_and_by_copying_it(deep):
    """What a token asks with is most like its own key, and what it then adds most like itself."""
    block = deep.blk[3]
    x = torch.randn(200, block.config.d_model, generator=torch.Generator().manual_seed(2))
    D = block.config.d_head
    scores = block.attn_q(x)[:, :D] @ block.attn_k(x)[:, :D].T
    assert scores.diagonal().mean() > 1.5 * scores.std()
    v = block.attn_v(x).view(200, -1, 1, D).expand(-1, -1, 2, -1).reshape(200, -1)
    likeness = torch.cosine_similarity(block.attn_output(v)[:, None], x[None], dim=2)
    assert likeness.diagonal().mean() > 2 * likeness.std()


@pytest.fixture
def deep():
    """As many blocks, heads and directions as fable has."""
    return new_net({"general.architecture": "llama", **sizes(), **tokenizer()}, 500, seed=3)


@torch.no_grad()
def test_the_first_blocks_begin_by_finding_what_followed_a_word(deep, monkeypatch):
    """A list of words is read twice: where do the heads look the second time?"""
    shares = []

    def watched(q, k, v, veil):
        k_of_each = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        shares.append((q @ k_of_each.mT * q.shape[3] ** -0.5 + veil[:, 0]).softmax(-1)[0])
        return attend_in_chunks(q, k, v, veil)

    monkeypatch.setattr(net, "attend_in_chunks", watched)
    n = 80
    once = torch.randperm(500, generator=torch.Generator().manual_seed(5))[:n]
    twice = torch.cat((once, once))[None]
    read(deep, twice, torch.zeros_like(twice))
    now = torch.arange(n + 5, 2 * n)

    def share(block, head, ago):  # of its attention, on average
        return sum(shares[block][head, now, now - back].mean().item() for back in ago)

    for head, back in enumerate(net.BACK):
        assert share(0, head, {back}) > 0.7
    for block, groups in enumerate(net.LOOKED_UP, 1):
        for head, pairs in enumerate(itertools.chain.from_iterable(groups)):
            ago = {here - there + times for here, there in pairs for times in (0, n)}
            by_chance = len(ago) / (1.5 * n)
            assert share(block, head, {back for back in ago if back >= 0}) > 5 * by_chance


@torch.no_grad()
def test_some_heads_begin_by_saying_what_stood_before_the_place_they_found(deep):
    """Among the words of a list, as the head of the next block would find them."""
    D, told = deep.config.d_head, torch.arange(60, 100)
    for (number, group), back in net.SAID_BEFORE.items():
        block = deep.blk[number + 1]
        seen: list[torch.Tensor] = []
        block.attn_v.register_forward_hook(lambda *call, seen=seen: seen.append(call[-1]))
        read(deep, told[None], torch.zeros(1, len(told)))
        noted = seen[0][0, :, group * D : (group + 1) * D]
        heads = deep.config.n_heads // deep.config.n_kv_heads
        for head in range(group * heads, (group + 1) * heads):
            said = noted @ block.attn_output.weight[:, head * D : (head + 1) * D].T
            words = deep.token_embd.weight[told]
            likest = (said @ (words - words.mean(0)).T).argmax(-1)
            assert (likest[back:] == torch.arange(len(told) - back)).float().mean() > 0.8


@torch.no_grad()
def test_words_that_are_spelled_alike_begin_alike():
    """And as large as before."""
    table = torch.randn(6, 64, generator=torch.Generator().manual_seed(7))
    sizes_before = table.norm(dim=1)
    net.begin_alike(table, ["\u2581Tim", "tim", "\u2581TIM", "\u2581fox", "Tom", "\u2581Fox"])
    torch.testing.assert_close(table.norm(dim=1), sizes_before)
    likeness = torch.cosine_similarity(table[:, None], table[None], dim=2)
    same = {(0, 1), (0, 2), (1, 2), (3, 5)}
    for pair in itertools.combinations(range(6), 2):
        assert (likeness[pair] > 0.5) == (pair in same)


def test_a_net_too_narrow_for_what_heads_note_says_so():
    with pytest.raises(ValueError, match="has no room for what 4 heads note"):
        narrow = sizes(**SMALL | {"embedding_length": 32, "rope.dimension_count": 8})
        new_net({"general.architecture": "llama", **narrow, **tokenizer()}, 50)


@pytest.mark.parametrize(("length", "queries"), [(1, 128), (128, 128), (300, 128), (20, 7)])
@torch.no_grad()
def test_attention_in_chunks_is_attention(monkeypatch, length, queries):
    """By torch's own; the last tokens of the second row are nobody's."""
    monkeypatch.setattr(net, "QUERIES", queries)
    rng = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, heads, length, 8, generator=rng) for heads in (4, 2, 2))
    numbers = torch.arange(length).div(9, rounding_mode="floor").expand(2, -1).clone()
    numbers[1, length // 2 :] = -1
    veil = Lesson(numbers).veil
    ours = attend_in_chunks(q, k, v, veil)
    theirs = functional.scaled_dot_product_attention(q, k, v, veil[:, 0] == 0, enable_gqa=True)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_in_bfloat16_it_reads_nearly_the_same(learner):
    """Products are rounded, weights are not: gradients come back as float32."""
    tokens = torch.arange(40)[None]
    exact = read(learner, tokens, torch.zeros_like(tokens))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = read(learner, tokens, torch.zeros_like(tokens))
    assert 1e-4 < ((rounded - exact).norm() / exact.norm()).item() < 0.04
    rounded.square().sum().backward()
    gradients = [weight.grad for weight in weights(learner).values()]
    assert {None if one is None else one.dtype for one in gradients} == {torch.float32}


def test_a_lesson_shows_what_came_before_and_no_more():
    visible = Lesson(torch.tensor([[0, 0, 1, 1]])).veil[0, 0, 0] == 0
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert visible.int().tolist() == expected


def test_what_is_shared_is_seen_by_all_conversations_behind_it():
    visible = Lesson(torch.tensor([[SHARED, 0, SHARED, 1]])).veil[0, 0, 0] == 0
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
    assert visible.int().tolist() == expected
