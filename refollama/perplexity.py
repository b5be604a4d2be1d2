"""How well does a model foretell a text?

    text ── ids ── windows of num_ctx ── log-probabilities of each second half ── e^−mean

    ids      │<s> ·  ·  · │ x  x  x  x│<s> ·  ·  · │ x  x  x  x│ …        · is read, x is scored
    stride   │<s> ·  ·  ·  ·  · │ x  x│
             └ stride ┘│<s> ·  ·  ·  ·  · │ x  x│ …

Windows and stride are those of llama.cpp's tool of this name, so that numbers compare: each window
is read by itself, begins with BOS in the place of its first token (if the model wants BOS at all),
and is scored where there is a past to go by. A shorter window has less of that, so only numbers of
the same num_ctx and the same text compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from refollama.errors import BadRequest, RefollamaError
from refollama.loaded import LoadedModel
from refollama.text.tokenizer import Tokenizer

NUM_CTX = 512  # tokens; what published numbers were measured with
FEWEST = 4  # tokens of a window; with fewer there is no half to score


@dataclass(frozen=True)
class Estimate:
    """What some tokens say of a model.  Units: nats.

    tokens: that were scored; total and squares: the sums of their surprises, −log p, and of the
    squares of these.
    """

    tokens: int = 0
    total: float = 0.0
    squares: float = 0.0

    def plus(self, scores: Tensor) -> Estimate:
        """What these and more tokens say; their log-probabilities are (n,)."""
        scores = scores.double()
        more = float(scores.sum()), float(scores.square().sum())
        return Estimate(self.tokens + len(scores), self.total - more[0], self.squares + more[1])

    @property
    def loss(self) -> float:
        """The mean surprise of a token."""
        return self.total / self.tokens

    @property
    def error(self) -> float:
        """The standard error of `loss`; 0 for a single token, which says nothing of it."""
        variance = max(0.0, self.squares / self.tokens - self.loss**2)
        return float((variance / max(1, self.tokens - 1)) ** 0.5)

    @property
    def perplexity(self) -> float:
        """Among how many tokens, all alike, one would be as surprised."""
        return float(torch.tensor(self.loss, dtype=torch.float64).exp())  # ∞ where math.exp raises

    @property
    def plus_minus(self) -> float:
        """The standard error of `perplexity`."""
        return self.perplexity * self.error


class Window(NamedTuple):
    """One window that has been read; `scores` are (n,) log-probabilities of its last n tokens."""

    number: int  # 1 …
    of: int
    scores: Tensor
    so_far: Estimate


def perplexity(
    llm: LoadedModel,
    text: str | Sequence[int],
    num_ctx: int | None = None,
    *,
    stride: int = 0,
    chunks: int | None = None,
) -> Iterator[Window]:
    """How surprised the model is, window by window: `*_, last = perplexity(…)`, `last.so_far`.

    text: tokenised with BOS in front, where the model wants it; what spells a control token is
    text. Or ids, BOS included.
    num_ctx: tokens of a window; None: 512, or as many as the model can read.
    stride: 0 for windows side by side; else each begins so many tokens after the last one, is half
    a stride longer than num_ctx, and only its last `stride` tokens are scored.
    chunks: no more than so many windows.
    Raises: BadRequest (also for a text of less than two windows), RefollamaError if the weights led
    out of the numbers. What is wrong with the request is said at once.
    """
    cut = Cut.checked(num_ctx, stride, llm.net.n_ctx)
    parts = windows(llm.tokenizer, text, cut, fewest=2 * cut.length)
    return _scored(llm, parts[:chunks], cut.scored)


def _scored(llm: LoadedModel, parts: Sequence[list[int]], scored: int) -> Iterator[Window]:
    so_far = Estimate()
    for number, part in enumerate(parts, 1):
        scores = llm.score(part, len(part) - 1 - scored)
        if not scores.isfinite().all():
            raise RefollamaError(f"window {number} of {len(parts)}: NaN or Inf for a probability")
        so_far = so_far.plus(scores)
        yield Window(number, len(parts), scores, so_far)


# ── how a text is cut ─────────────────────────────────────────────────────────────────────────


class Cut(NamedTuple):
    """Windows of `length` ids, each `step` after the one before; the last `scored` are scored."""

    length: int
    step: int
    scored: int

    @classmethod
    def checked(cls, num_ctx: int | None, stride: int, most: int) -> Cut:
        """As `perplexity` explains it, for a model that was trained with `most` tokens.

        Example: 512 → 512, 512, 255; 512 with stride 128 → 576, 128, 128
        Raises: BadRequest for what the model cannot do.
        """
        if num_ctx is not None and not FEWEST <= num_ctx <= most:
            raise _outside(num_ctx, most, most)
        if num_ctx is None:  # what half a stride leaves; the widest one leaves as much as itself
            num_ctx, widest = min(NUM_CTX, most - stride // 2), min(NUM_CTX, (2 * most + 1) // 3)
        else:
            widest = num_ctx
        if not 0 <= stride <= widest:
            raise BadRequest(f"stride must be 0 … {widest}, no more than num_ctx, not {stride}")
        length = num_ctx + stride // 2
        if num_ctx < FEWEST or length > most:
            raise _outside(num_ctx, most - stride // 2, most)
        return cls(length, stride or num_ctx, stride or length - 1 - length // 2)


def _outside(num_ctx: int, largest: int, most: int) -> BadRequest:
    return BadRequest(
        f"num_ctx must be {FEWEST} … {largest}, as the model was trained with {most} tokens at "
        f"most, not {num_ctx}"
    )


def windows(
    words: Tokenizer, text: str | Sequence[int], cut: Cut, *, fewest: int
) -> list[list[int]]:
    """All whole windows of a text, BOS first in each.

    Raises: BadRequest if the text has fewer ids than `fewest`.
    """
    ids = words.encode(text, bos=True) if isinstance(text, str) else list(text)
    if len(ids) < fewest:
        raise BadRequest(
            f"the text is too short: it has {len(ids)} tokens, and windows of {cut.length} need "
            f"{fewest} at least"
        )
    last = len(ids) - cut.length
    # A stride's last window would end where the text ends; as in llama.cpp, it is left out.
    starts = range(0, last + (cut.step == cut.length), cut.step)
    first = _bos(words)
    return [first + ids[start + len(first) : start + cut.length] for start in starts]


def _bos(words: Tokenizer) -> list[int]:
    """BOS, if the model wants texts to begin with it."""
    around = words.around([])
    return [id for id in islice(around, 1) if id == words.bos_id]
