"""A token's logits, keys and values are the same to the last bit in whatever company it is read.

In one piece or many, one by one, beside other sequences, on one thread or two: only so may an
answer be reused, split or batched without a word of it changing.
"""

import os
import random
import subprocess
import sys
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn import functional

from refollama.kvcache import PIECE
from refollama.models import exact
from refollama.models.exact import NONE, fewest, linear, rows_are_exact, times
from refollama.models.layers import attend
from refollama.models.load import load_net
from tests.tiny import TOKENS, write_model

SHAPES: dict[str, dict[str, Any]] = {
    "F32": {},
    "F16": {"type": "F16"},
    "Q4_0": {"type": "Q4_0"},
    "one key head": {"attention.head_count_kv": 1},
    "one head": {"attention.head_count": 1, "attention.head_count_kv": 1},
    "odd widths": {
        "embedding_length": 60,
        "feed_forward_length": 77,
        "attention.head_count": 6,
        "attention.head_count_kv": 6,
    },
    "experts": {"expert_count": 5, "expert_used_count": 3},
    "packed experts": {"expert_count": 4, "expert_used_count": 2, "type": "Q8_0"},
    "biases": {"extra": {"blk.0.attn_q.bias": (64,), "blk.1.ffn_down.bias": (64,)}},
    "window, partly rotated": {"attention.sliding_window": 50, "rope.dimension_count": 6},
    "layers apart, narrow values": {
        "attention.key_length": 24,
        "attention.value_length": 10,
        "attention.head_count": [4, 6],
        "attention.head_count_kv": [1, 3],
    },
}
LENGTH = PIECE + 41  # tokens: the last ones see two pieces


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def exact_rows():
    if not rows_are_exact():
        pytest.skip("this BLAS adds a row in an order that depends on the number of rows")


def some_tokens(count, seed=0):
    return torch.randint(3, len(TOKENS), (count,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(net, tokens, sizes, *, cache=None, slot=0, start=0):
    """Read the tokens in steps of these sizes.  → logits (T, V), keys and values of each layer"""
    cache = cache or net.new_cache()
    logits, end = [], start
    for size, part in zip(sizes, tokens.split(sizes), strict=True):
        begin, end = end, end + size
        hidden = net.hidden(part[None], torch.arange(begin, end)[None], cache.rows([slot], end))
        logits.append(net.output(hidden[0]))
    return torch.cat(logits), memory(cache, slot, end)


def memory(cache, slot, end):
    return [tensor[slot, :, :end].clone() for tensor in (*cache.keys, *cache.values)]


def assert_same(found, expected):
    logits, tensors = found
    assert torch.equal(logits, expected[0])
    assert all(map(torch.equal, tensors, expected[1]))


def chunkings(length, seed):
    """All at once, one by one at either end, and random sizes in between."""
    rng = random.Random(seed)
    yield [length]
    yield [1] * 8 + [length - 16] + [1] * 8
    for most in (40, 200):
        sizes: list[int] = []
        while (left := length - sum(sizes)) > 0:
            sizes.append(min(left, rng.randint(1, most)))
        yield sizes


@pytest.fixture(scope="module", params=SHAPES)
def net(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("exact") / "m.gguf"
    return load_net(write_model(path, seed=3, **{"context_length": 2048} | SHAPES[request.param]))


def test_however_the_prompt_is_cut(net, measured):
    check_chunkings(net, some_tokens(LENGTH))
    measured("determinism", "steps × threads", "all at once", "bit for bit")


def check_chunkings(net, tokens):
    """On one thread in many ways, on two in some."""
    whole, by_ones, *random_sizes = chunkings(len(tokens), seed=len(tokens))
    with threads(1):
        expected = read(net, tokens, whole)
        for sizes in (by_ones, *random_sizes):
            assert_same(read(net, tokens, sizes), expected)
    with threads(2):
        for sizes in (whole, random_sizes[-1]):
            assert_same(read(net, tokens, sizes), expected)


def test_more_room_behind_the_end_changes_nothing(net, measured):
    tokens = some_tokens(30)
    expected = read(net, tokens, [30])
    roomy = net.new_cache(slots=2)
    read(net, some_tokens(3 * PIECE, seed=9), [3 * PIECE], cache=roomy, slot=0)
    roomy.clear(0)
    with torch.no_grad():
        hidden = net.hidden(tokens[None], torch.arange(30)[None], roomy.rows([0], 3 * PIECE))
    assert_same((net.output(hidden[0]), memory(roomy, 0, 30)), expected)
    measured("determinism", "room in the cache", "itself", "bit for bit")


@torch.no_grad()
def test_a_column_of_sequences_equals_each_alone(net, measured):
    """Three answers of different lengths are written side by side, in changing order."""
    prompts = [some_tokens(n, seed=n) for n in (8, PIECE + 2, 90)]
    steps = 5
    cache = net.new_cache(slots=3)
    for slot, prompt in enumerate(prompts):
        read(net, prompt[:-steps], [len(prompt) - steps], cache=cache, slot=slot)
    expected = [read(net, prompt, [len(prompt)]) for prompt in prompts]
    for step in range(-steps, 0):
        order = random.Random(step).sample(range(3), 3)
        places = [len(prompts[slot]) + step for slot in order]
        tokens = torch.stack([prompts[slot][step] for slot in order])[:, None]
        column = net(tokens, torch.tensor(places)[:, None], cache.rows(order, max(places) + 1))
        for row, slot in zip(column, order, strict=True):
            assert torch.equal(row, expected[slot][0][step])
    for slot, prompt in enumerate(prompts):
        found = memory(cache, slot, len(prompt))
        assert all(map(torch.equal, found, expected[slot][1]))
        measured("determinism", "beside other sequences", "alone", "bit for bit")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_cache_of_any_precision(net, dtype):
    tokens = some_tokens(40, seed=4)
    expected = read(net, tokens, [40], cache=net.new_cache(dtype=dtype))
    for sizes in chunkings(40, seed=5):
        assert_same(read(net, tokens, sizes, cache=net.new_cache(dtype=dtype)), expected)


@pytest.mark.parametrize(
    ("H", "Hk", "D"),
    [(8, 4, 8), (32, 4, 64), (32, 8, 128), (4, 4, 16), (32, 32, 128), (2, 1, 256), (1, 1, 4)],
)
def test_attention_alone_in_the_sizes_of_real_models(H, Hk, D):
    rng = torch.Generator().manual_seed(D)
    T, S = 2 * PIECE + 1, 4 * PIECE
    q = torch.randn(1, T, H, D, generator=rng)
    k, v = torch.randn(2, 1, Hk, S, D, generator=rng)
    visible = torch.arange(S) <= torch.arange(T)[:, None]
    expected = attend(q, k, v, visible[None])
    spans = [(0, 1), (5, 6), (3, 10), (1, 34), (0, 256), (256, 300), (511, 513), (512, 513)]
    for count in (1, 2):
        with threads(count):
            for a, b in spans:
                seen = -(-b // PIECE) * PIECE
                part = attend(q[:, a:b], k[:, :, :seen], v[:, :, :seen], visible[None, a:b, :seen])
                assert torch.equal(part, expected[:, a:b])


def test_a_real_model_however_its_prompt_is_cut(oracles):
    net = load_net(oracles / "stories260K.gguf")
    check_chunkings(net, some_tokens(LENGTH))


def test_whoever_multiplies_before_the_import_is_told(tmp_path):
    """MKL has made up its mind by then; the model still answers.  (On some processors rows are
    exact with enough company, whatever its mode: there is nothing to tell then.)"""
    code = (
        "import torch; torch.randn(8, 8) @ torch.randn(8, 8)\n"
        "import logging; logging.basicConfig()\n"
        "import refollama\n"
        f"llm = refollama.load({str(write_model(tmp_path / 'm.gguf'))!r})\n"
        "print(len(llm.generate('the', {'num_predict': 3}).record.context))\n"
        "from refollama.models.exact import rows_are_exact\n"
        "print(rows_are_exact())\n"
    )
    variables = {k: v for k, v in os.environ.items() if k != "MKL_CBWR"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=variables
    )
    assert done.returncode == 0
    length, alike = done.stdout.split()
    assert int(length) >= 2
    told = done.stderr.count("import refollama before anything else multiplies")
    assert told == (0 if alike == "True" else 1)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("multiply", [linear, lambda x, w: times(x, w.T)])
def test_a_row_by_a_matrix_of_any_width_is_the_same_in_any_company(count, multiply):
    """Several threads share out rows, or columns, by how many there are of both."""
    rng = torch.Generator().manual_seed(0)
    with threads(count):
        for width in (*range(1, 34), 37, 48, 64, 71, 100):
            x, w = torch.randn(40, 64, generator=rng), torch.randn(width, 64, generator=rng)
            together = multiply(x, w)
            for a, b in ((0, 1), (3, 5), (8, 11), (1, 9), (10, 22), (7, 24), (0, 33)):
                assert torch.equal(multiply(x[a:b], w), together[a:b]), (width, b - a)


def test_few_rows_are_computed_with_copies_of_themselves():
    """As by a library that adds backwards where there are fewer rows than four."""

    def by(x, w, b):
        if len(x) >= 4:
            return functional.linear(x, w, b)
        return functional.linear(x.flip(-1), w.flip(-1), b) + 1e-3

    x, w, b = torch.randn(9, 30), torch.randn(7, 30), torch.randn(7)
    assert fewest(by) in (4, 8)
    together = linear(x, w, b, by)
    for count in range(9):
        torch.testing.assert_close(linear(x[:count], w, b, by), together[:count])
    assert linear(x[0], w, b, by).shape == (7,)
    assert linear(x.view(3, 3, 30)[:, :1], w, b, by).shape == (3, 1, 7)


def test_whoever_is_never_exact_is_left_alone(monkeypatch, caplog):
    def by(x, w, b):
        return functional.linear(x, w, b) + len(x)

    x, w = torch.randn(2, 30), torch.randn(7, 30)
    assert fewest(by) == NONE
    assert torch.equal(linear(x, w, None, by), by(x, w, None))
    monkeypatch.setattr(exact, "rows_are_exact", lambda: False)
    exact.warn_if_not_exact.cache_clear()
    exact.warn_if_not_exact()
    exact.warn_if_not_exact()
    assert caplog.text.count("not exact by rows") == 1
