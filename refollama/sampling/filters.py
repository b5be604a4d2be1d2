"""What may be done to logits before a token is drawn: pure functions, (V,) → (V,).

A candidate that is dropped has the logit −inf. Nothing here remembers anything or draws anything.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

ROUNDING = 1e-6  # a sum of float32 probabilities that is this close to p has reached it
FLAT = 1e-6  # a curve that bends less than this in all has no tail to speak of


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
    most = torch.finfo(logits.dtype).max  # a penalty makes no infinity: that means "dropped"
    return logits.index_copy(0, ids, (seen - presence - frequency * counts).clamp(-most, most))


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep exactly the k best candidates, even among equals; k ≤ 0 keeps all.  (V,) → (V,)"""
    ids, _ = shortlist(logits, k)
    return logits if ids is None else only(logits, ids)


def shortlist(logits: Tensor, k: int) -> tuple[Tensor | None, Tensor]:
    """What `top_k` keeps, without the rest: later filters and the draw need not look at it.

    Shapes: (V,) → ids (k,), rising, so that of equals the lower still comes first; logits (k,).
    Where all are kept: None, and the logits as they are.
    """
    if not 0 < k < len(logits):
        return None, logits
    ids = logits.topk(k).indices.sort().values
    return ids, logits[ids]


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
    return only(logits, ids[: max(kept, 1)])


def min_p(logits: Tensor, p: float) -> Tensor:
    """Keep the candidates that are at least p times as likely as the best; p ≤ 0 keeps all.

    Shapes: (V,) → (V,).  Source: Nguyen et al. 2024, "Min-p Sampling", arXiv 2407.01082.
    """
    if p <= 0:
        return logits
    floor = logits.max() + math.log(p) - ROUNDING
    return logits.masked_fill(logits < floor, -math.inf)


def typical_p(logits: Tensor, p: float) -> Tensor:
    """Keep the candidates whose surprise is closest to the expected surprise, up to mass p.

    p ≥ 1 keeps all; the candidate that crosses p is kept.  Shapes: (V,) → (V,).
    Source: Meister et al. 2022, "Locally Typical Sampling", arXiv 2202.00666.
    Example: one likely token above a long flat tail may itself be dropped.
    """
    if p >= 1:
        return logits
    ids, probs = candidates(logits)
    surprise = -probs.log()
    expected = (probs * surprise).nansum()  # 0 · ∞ counts as 0
    order = (surprise - expected).abs().argsort(stable=True)
    before = probs[order].cumsum(0) - probs[order]
    kept = int((before <= p + ROUNDING).sum())
    return only(logits, ids[order[: max(kept, 1)]])


def tfs_z(logits: Tensor, z: float) -> Tensor:
    """Cut the tail where the curve of probabilities has flattened: z of its curvature lies before.

    z ≥ 1 keeps all, and so do two candidates or fewer.  Shapes: (V,) → (V,).
    Source: Phénix and Egan 2019, "Tail Free Sampling" (the second differences of sorted p).
    """
    if z >= 1:
        return logits
    ids, probs = candidates(logits)
    if len(ids) <= 2:
        return logits
    curvature = probs.diff().diff().abs()  # (n − 2,)
    flat = curvature.sum() <= FLAT
    weights = (
        torch.full_like(curvature, 1 / len(curvature)) if flat else curvature / curvature.sum()
    )
    crossed = weights.cumsum(0) > z
    crossed[0] = False  # at least one candidate stays
    kept = int(crossed.double().argmax()) if crossed.any() else len(ids)
    return only(logits, ids[:kept])


def temperature(logits: Tensor, t: float) -> Tensor:
    """Divide by t > 0: below 1 the likely become likelier, above 1 the unlikely do.  (V,) → (V,)

    Source: Ackley, Hinton and Sejnowski 1985, "A Learning Algorithm for Boltzmann Machines".
    """
    # Less the greatest, which changes no probability: however small t is, the best stays at 0.
    return ((logits - logits.max()).double() / t).float()


def candidates(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The ids that are not dropped, best first, and their probabilities in float64.

    Shapes: (V,) float32 → (n,), (n,). Of equals, the lower id comes first.
    """
    ids = torch.from_numpy(best_first(logits.detach().cpu().numpy())).to(logits.device)
    return ids, logits[ids].double().softmax(0)


def best_first(logits: Floats) -> Ids:
    """The ids that are not dropped, as `candidates` has them.

    A logit and its id make one number of 64 bits, and numbers without equals are sorted several
    times as fast as logits whose equals must keep their order.
    """
    ids = np.flatnonzero(logits > -np.inf)
    bits = (logits[ids] + np.float32(0)).view(np.int32)  # + 0: what is -0 counts as 0
    rising = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)  # as the logits do
    keys = (~rising).astype(np.int64) << 32 | ids
    keys.sort()
    return keys & 0xFFFFFFFF


def only(logits: Tensor, ids: Tensor | list[int]) -> Tensor:
    """Drop all candidates but these.  (V,) → (V,)"""
    out = torch.full_like(logits, -math.inf)
    out[ids] = logits[ids]
    return out
