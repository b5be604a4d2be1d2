"""What may be done to logits before a token is drawn: pure functions, (V,) → (V,).

A candidate that is dropped has the logit −inf. Nothing here remembers anything or draws anything.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDING = 1e-6  # a sum of float32 probabilities that is this close to p has reached it


def penalize(
    logits: Tensor, window: Sequence[int], repeat: float, presence: float, frequency: float
) -> Tensor:
    """Make the tokens of the window less likely.

    A positive logit is divided by `repeat`, another multiplied by it, once however often the token
    occurred; then `presence` is subtracted once and `frequency` for every occurrence.
    Source: Keskar et al. 2019, arXiv 1909.05858, section 4.1 (repeat); OpenAI's API (the others).
    """
    if not window or (repeat, presence, frequency) == (1, 0, 0):
        return logits
    counted = Counter(window)
    ids, counts = torch.tensor(list(counted)), torch.tensor(list(counted.values()))
    seen = logits[ids]
    seen = torch.where(seen > 0, seen / repeat, seen * repeat)
    return logits.index_copy(0, ids, seen - presence - frequency * counts)


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep exactly the k best candidates, even among equals; k ≤ 0 keeps all.  (V,) → (V,)"""
    if not 0 < k < len(logits):
        return logits
    return _keep(logits, logits.topk(k).indices)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of best candidates whose probabilities reach p; at least one.

    p ≥ 1 keeps all.  Shapes: (V,) → (V,).
    Source: Holtzman et al. 2019, "The Curious Case of Neural Text Degeneration", arXiv 1904.09751.
    """
    if p >= 1:
        return logits
    ids, probs = candidates(logits)
    before = probs.cumsum(0) - probs  # the mass of those that are better
    kept = int((before < p - ROUNDING).sum())
    return _keep(logits, ids[: max(kept, 1)])


def temperature(logits: Tensor, t: float) -> Tensor:
    """Divide by t > 0: below 1 the likely become likelier, above 1 the unlikely do.  (V,) → (V,)

    Source: Ackley, Hinton and Sejnowski 1985, "A Learning Algorithm for Boltzmann Machines".
    """
    # Less the greatest, which changes no probability: however small t is, the best stays at 0.
    return ((logits - logits.max()).double() / t).float()


def candidates(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The ids that are not dropped, best first, and their probabilities in float64.

    Shapes: (V,) → (n,), (n,). Of equals, the lower id comes first.
    """
    alive = (logits > -math.inf).nonzero().flatten()
    order = logits[alive].argsort(descending=True, stable=True)
    ids = alive[order]
    return ids, logits[ids].double().softmax(0)


def _keep(logits: Tensor, ids: Tensor) -> Tensor:
    out = torch.full_like(logits, -math.inf)
    out[ids] = logits[ids]
    return out
