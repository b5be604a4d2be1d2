"""Filters against enumeration and against published tables."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refollama.sampling import filters

TENTHS = [0.1, 0.2, 0.3, 0.4]

logit_lists = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12)


def logits_of(probs):
    return torch.tensor(probs).log()


def kept(logits):
    return {i for i, x in enumerate(logits.tolist()) if x > -math.inf}


@pytest.mark.parametrize(
    ("k", "expected"), [(1, {3}), (3, {1, 2, 3}), (4, {0, 1, 2, 3}), (0, {0, 1, 2, 3})]
)
def test_top_k_table(k, expected, measured):
    assert kept(filters.top_k(logits_of(TENTHS), k)) == expected
    measured("sampling", "top_k", "published table", "equal")


@pytest.mark.parametrize(
    ("p", "expected"), [(0, {3}), (0.7, {2, 3}), (0.8, {1, 2, 3}), (1, {0, 1, 2, 3})]
)
def test_top_p_table(p, expected, measured):
    assert kept(filters.top_p(logits_of(TENTHS), p)) == expected
    measured("sampling", "top_p", "published table", "equal")


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0, {0, 1, 2, 3}),
        (0.24, {0, 1, 2, 3}),
        (0.26, {1, 2, 3}),
        (0.49, {1, 2, 3}),
        (0.51, {2, 3}),
        (0.74, {2, 3}),
        (0.76, {3}),
        (1, {3}),
    ],
)
def test_min_p_table(p, expected, measured):
    assert kept(filters.min_p(logits_of(TENTHS), p)) == expected
    measured("sampling", "min_p", "published table", "equal")


@pytest.mark.parametrize(("z", "expected"), [(0.25, {4}), (0.75, {3, 4}), (0.99, {3, 4})])
def test_tfs_z_table(z, expected, measured):
    assert kept(filters.tfs_z(logits_of([0.1, 0.15, 0.2, 0.25, 0.3]), z)) == expected
    measured("sampling", "tfs_z", "published table", "equal")


@pytest.mark.parametrize(
    ("probs", "expected"), [([0.97, 0.01, 0.01, 0.01], {0}), ([0.4, 0.2, 0.2, 0.2], {1, 2, 3})]
)
def test_typical_p_table(probs, expected, measured):
    assert kept(filters.typical_p(logits_of(probs), 0.5)) == expected
    measured("sampling", "typical_p", "published table", "equal")


@pytest.mark.parametrize(
    ("window", "repeat", "frequency", "presence", "expected"),
    [
        ([0], 50, 0, 0, [0.25, 0.25, 0.25, 0.25, 0]),
        ([0, 1, 2], 50, 0, 0, [0.5, 0.5, 0, 0, 0]),
        ([0, 1, 2, 0, 0], 50, 0, 0, [0.5, 0.5, 0, 0, 0]),
        ([0], 1, 5, 5, [0.249997] * 4 + [0.000011]),
        ([0, 1, 2], 1, 5, 5, [0.499966] * 2 + [0.000023] * 3),
        ([0, 1, 2, 0, 0], 1, 5, 5, [0.499977] * 2 + [0.000023] * 2 + [0]),
    ],
)
def test_penalties_table(window, repeat, frequency, presence, expected, measured):
    """The values that llama.cpp's own sampler test states, for five equal candidates."""
    out = filters.penalize(logits_of([0.2] * 5), window, repeat, presence, frequency)
    probs = out.softmax(0).sort(descending=True).values
    torch.testing.assert_close(probs, torch.tensor(expected), atol=1e-5, rtol=0)
    for name in ["repeat_penalty"] if repeat > 1 else ["presence_penalty", "frequency_penalty"]:
        off = (probs - torch.tensor(expected)).abs().max()
        measured("sampling", name, "published table", off)


@given(logit_lists, st.integers(-1, 14))
def test_top_k_keeps_exactly_k_and_none_better_is_dropped(measured, values, k):
    logits = torch.tensor(values)
    keep = kept(filters.top_k(logits, k))
    assert len(keep) == (k if 0 < k < len(values) else len(values))
    worst = min(values[i] for i in keep)
    assert all(values[i] <= worst for i in range(len(values)) if i not in keep)
    measured("sampling", "top_k", "enumeration", "equal")


@settings(max_examples=500)
@given(logit_lists, st.floats(0, 1))
def test_top_p_is_the_shortest_prefix_that_reaches_p(measured, values, p):
    """Enumerated in plain Python, best first, lower id first among equals."""
    total = math.fsum(math.exp(x) for x in values)
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    sums = [math.fsum(math.exp(values[i]) / total for i in order[:n]) for n in range(len(order))]
    if any(abs(s - p) < 1e-5 for s in sums):
        return  # a tie that rounding decides
    wanted = {order[n] for n in range(len(order)) if n == 0 or sums[n] < p or p == 1}
    assert kept(filters.top_p(torch.tensor(values), p)) == wanted
    measured("sampling", "top_p", "enumeration", "equal")


def sorted_probs(values):
    total = math.fsum(math.exp(x) for x in values)
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    return order, [math.exp(values[i]) / total for i in order]


@given(logit_lists, st.floats(0.001, 1))
def test_min_p_by_enumeration(measured, values, p):
    order, probs = sorted_probs(values)
    if any(abs(q / probs[0] / p - 1) < 1e-5 for q in probs):
        return  # a tie that rounding decides
    wanted = {i for i, q in zip(order, probs, strict=True) if q >= p * probs[0]}
    assert kept(filters.min_p(torch.tensor(values), p)) == wanted
    measured("sampling", "min_p", "enumeration", "equal")


@settings(max_examples=500)
@given(logit_lists, st.floats(0, 0.999))
def test_typical_p_by_enumeration(measured, values, p):
    order, probs = sorted_probs(values)
    expected = -math.fsum(q * math.log(q) for q in probs)
    by_score = sorted(range(len(order)), key=lambda i: abs(-math.log(probs[i]) - expected))
    scores = sorted(abs(-math.log(q) - expected) for q in probs)
    wanted, mass = set(), 0.0
    for i in by_score:
        wanted.add(order[i])
        mass += probs[i]
        if abs(mass - p) < 1e-5:
            return  # a tie that rounding decides
        if mass > p:
            break
    if any(0 < b - a < 1e-5 or a == b for a, b in pairwise(scores)):
        assert len(kept(filters.typical_p(torch.tensor(values), p))) >= 1
    else:
        assert kept(filters.typical_p(torch.tensor(values), p)) == wanted
        measured("sampling", "typical_p", "enumeration", "equal")


@given(logit_lists, st.floats(0, 0.999))
def test_tfs_z_by_enumeration(measured, values, z):
    order, probs = sorted_probs(values)
    n = len(order)
    wanted = n
    if n > 2:
        first = [probs[i] - probs[i + 1] for i in range(n - 1)]
        second = [abs(first[i] - first[i + 1]) for i in range(n - 2)]
        total = math.fsum(second)
        weights = [x / total if total > 1e-6 else 1 / (n - 2) for x in second]
        sums = [math.fsum(weights[: i + 1]) for i in range(n - 2)]
        if any(abs(s - z) < 1e-4 for s in sums) or abs(total - 1e-6) < 1e-7:
            return  # a tie that rounding decides
        wanted = next((i for i, s in enumerate(sums) if s > z and i >= 1), n)
    assert len(kept(filters.tfs_z(torch.tensor(values), z))) == wanted
    measured("sampling", "tfs_z", "enumeration", "equal")


@given(logit_lists)
def test_filters_change_nothing_but_what_they_drop_and_never_their_input(values):
    logits = torch.tensor(values)
    before = logits.clone()
    for out in (
        filters.top_k(logits, 3),
        filters.top_p(logits, 0.5),
        filters.min_p(logits, 0.5),
        filters.typical_p(logits, 0.5),
        filters.tfs_z(logits, 0.5),
    ):
        same = out == before
        assert (same | (out == -math.inf)).all()
    filters.penalize(logits, [0], 1.3, 0.5, 0.5)
    assert torch.equal(logits, before)


@given(logit_lists)
def test_candidates_come_best_first_with_probabilities(values):
    ids, probs = filters.candidates(torch.tensor(values))
    assert sorted(ids.tolist()) == list(range(len(values)))
    assert all(a >= b for a, b in pairwise(probs.tolist()))
    assert math.isclose(float(probs.sum()), 1, abs_tol=1e-9)


@given(st.lists(st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 3.5, -3.5, 3e38, -3e38, -math.inf])))
def test_candidates_are_those_of_a_sort_that_keeps_equals_in_order(values):
    logits = torch.tensor(values)
    order = logits.argsort(descending=True, stable=True)
    expected = [id for id in order.tolist() if values[id] > -math.inf]
    assert filters.candidates(logits)[0].tolist() == expected


def test_repeat_penalty_counts_once_and_respects_the_sign(measured):
    out = filters.penalize(torch.tensor([2.0, -2.0, 1.0]), [0, 0, 1], 2.0, 0.0, 0.0)
    assert out.tolist() == [1.0, -4.0, 1.0]
    measured("sampling", "repeat_penalty", "definition", "equal")
