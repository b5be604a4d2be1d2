"""Mirostat: a thermostat for surprise.

It cuts the tail so that each token surprises by about tau bits, and learns from every draw: after a
token that surprised too much it cuts more, after a dull one less. `mu` is the thermostat's setting,
the most surprise (in bits) that a candidate may have. Surprise is −log2 p.

Source: Basu et al. 2020, "Mirostat: A Neural Text Decoding Algorithm That Directly Controls
Perplexity", arXiv 2007.14966: algorithm 1 is version 1, its simplification in the authors' code is
version 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from refollama.sampling.filters import candidates, only

ESTIMATED_FROM = 100  # the best so many candidates tell how steep the distribution is


class Mirostat:
    """The setting of one sequence; `tau` and `eta` (how fast it learns) are Ollama's options."""

    def __init__(self, version: int, tau: float, eta: float) -> None:
        self.version = version
        self.tau = tau
        self.eta = eta
        self.mu = 2 * tau

    def cut(self, logits: Tensor) -> Tensor:
        """Keep the candidates that mu allows, at least the best one.  (V,) → (V,)"""
        ids, probs = candidates(logits)
        kept = self._by_surprise(probs) if self.version == 2 else self._by_zipf(probs, len(logits))
        return only(logits, ids[:kept])

    def learn(self, probability: float) -> None:
        """A token of this probability, among those that were kept, has been drawn."""
        surprise = -math.log2(probability)
        self.mu -= self.eta * (surprise - self.tau)

    def _by_surprise(self, probs: Tensor) -> int:
        """Version 2: as many as surprise by no more than mu."""
        return max(1, int((-probs.log2() <= self.mu).sum()))

    def _by_zipf(self, probs: Tensor, n_vocab: int) -> int:
        """Version 1: if p falls like 1 / rank^s, so many candidates have a mean surprise of mu.

        Source: the paper's equations 30 (s) and 32 (k).
        """
        if len(probs) < 2:
            return 1
        s = _zipf_exponent(probs[:ESTIMATED_FROM])
        epsilon = s - 1
        try:
            k = (epsilon * 2**self.mu / (1 - n_vocab**-epsilon)) ** (1 / s)
        except (OverflowError, ZeroDivisionError):
            return len(probs)
        return _clamped(k, len(probs))


def _zipf_exponent(probs: Tensor) -> float:
    """The least-squares fit of log p against log rank, from neighbours.  (m,) → s"""
    ranks = torch.arange(1, len(probs) + 1, dtype=torch.float64)
    t = (ranks[1:] / ranks[:-1]).log()
    b = (probs[:-1] / probs[1:]).log()
    return float((t * b).sum() / t.square().sum())


def _clamped(k: complex | float, most: int) -> int:
    """k as a count from 1 to `most`; what is no number keeps all."""
    if isinstance(k, complex) or not math.isfinite(k):
        return most
    return max(1, min(most, int(k)))
