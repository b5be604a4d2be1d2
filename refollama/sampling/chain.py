"""The sampler of one sequence: named stages in a fixed order, then one draw.

    penalties → grammar → temperature ≤ 0:  the best one
                        → mirostat 1 or 2:  temperature → mirostat → draw
                        → otherwise:        top_k → tfs_z → typical_p → top_p → min_p
                                            → temperature → draw

The grammar, if an answer must have a form, leaves what may come next. Temperature comes last, so
the filters see the model's own probabilities. The papers stand with the functions, in `filters.py`
and `mirostat.py`.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from refollama.errors import RefollamaError
from refollama.options import Options
from refollama.sampling import filters
from refollama.sampling.mirostat import Mirostat

Stage = tuple[str, Callable[[Tensor], Tensor]]
Watch = Callable[[str, "Candidates"], None]  # name of the stage, what it left


@dataclass(frozen=True, slots=True)
class Candidates:
    """What a stage left of the vocabulary.  Shapes: n candidates, m dropped ones."""

    ids: Tensor  # (n,), the likeliest first; of equals, the lower id
    logits: Tensor  # (n,) float32
    dropped: Tensor  # (m,), ids that were candidates before this stage

    @property
    def probs(self) -> Tensor:
        """Their probabilities, as if the draw came now: (n,) float64."""
        return self.logits.double().softmax(0)


class Walk(Protocol):
    """How far one answer has come through a grammar."""

    @property
    def complete(self) -> bool:
        """Is the answer whole, so that nothing may follow?"""

    def allowed(self, logits: Tensor) -> Tensor:
        """Drop all tokens that cannot come next.  (V,) → (V,)"""

    def step(self, token: int) -> None:
        """This token was drawn."""


class Grammar(Protocol):
    """What an answer may be: see `grammar.py`. Many answers may walk through it, each by itself."""

    def begin(self) -> Walk: ...


class Sampler:
    """Logits of one sequence → its next token id.

    It remembers the generator of its chances, the last tokens, for the penalties (`n_ctx` is how
    many if `repeat_last_n` is -1; None: all), what mirostat has learned, and its way through the
    grammar.
    `on_stage(name, candidates)`, if given, is shown the model's "logits", what each stage left of
    them, and the "draw"; it costs nothing when nobody watches.
    Raises: RefollamaError when the model's output is not a number.
    """

    def __init__(
        self,
        options: Options,
        prompt: Iterable[int] = (),
        *,
        n_ctx: int | None = None,
        newline: int | None = None,
        grammar: Grammar | None = None,
        on_stage: Watch | None = None,
    ) -> None:
        self.options = options
        self.newline = newline
        self.on_stage = on_stage
        looked_back = options.repeat_last_n if options.repeat_last_n >= 0 else n_ctx
        self.window = deque(prompt, maxlen=looked_back)
        self.mirostat = Mirostat(options.mirostat, options.mirostat_tau, options.mirostat_eta)
        self._walk = None if grammar is None else grammar.begin()
        self._stages = self.stages()
        self.rng = torch.Generator()
        self.rng.manual_seed(options.seed if options.seed >= 0 else random.getrandbits(63))

    def __call__(self, logits: Tensor) -> int:
        """(V,) → id. Chance is drawn on the CPU in float64, so the device cannot change it."""
        logits = logits.to("cpu", torch.float32)
        if not np.isfinite(logits.detach().numpy()).all():  # torch takes several times as long
            raise RefollamaError("the model's output is not a number: the weights may be damaged")
        self._show("logits", logits, logits)
        ids = None
        for name, stage in self._stages:
            if name == "top_k" and self.on_stage is None:  # who watches sees all candidates
                ids, logits = filters.shortlist(logits, self.options.top_k)
                continue
            before, logits = logits, stage(logits)
            self._show(name, before, logits)
        token = self._chosen(logits)
        token = token if ids is None else int(ids[token])
        if self.on_stage is not None:
            self._show("draw", logits, filters.only(logits, [token]))
        self.window.append(token)
        if self._walk is not None:
            self._walk.step(token)
        return token

    @property
    def complete(self) -> bool:
        """Has the grammar come to its end? Then nothing more may be drawn."""
        return self._walk is not None and self._walk.complete

    def _show(self, name: str, before: Tensor, after: Tensor) -> None:
        """Let the watcher see what a stage did, if there is one."""
        if self.on_stage is None:
            return
        ids, _ = filters.candidates(after)
        dropped = ((before > -math.inf) & (after == -math.inf)).nonzero().flatten()
        self.on_stage(name, Candidates(ids, after[ids], dropped))

    def _chosen(self, logits: Tensor) -> int:
        if self.options.temperature <= 0:
            return int(logits.argmax())
        token = draw(logits, self.rng)
        if self.options.mirostat:
            self.mirostat.learn(float(logits.double().softmax(0)[token]))
        return token

    def stages(self) -> list[Stage]:
        """What the options ask for, in order."""
        first: list[Stage] = [("penalties", self._penalize)]
        if self._walk is not None:
            first.append(("grammar", self._walk.allowed))
        return first + self._choosing()

    def _choosing(self) -> list[Stage]:
        """The stages that depend on how the token is chosen among those that are left."""
        options = self.options
        temperature: Stage = ("temperature", partial(filters.temperature, t=options.temperature))
        if options.temperature <= 0:
            return []
        if options.mirostat:
            return [temperature, ("mirostat", self.mirostat.cut)]
        return [
            ("top_k", partial(filters.top_k, k=options.top_k)),
            ("tfs_z", partial(filters.tfs_z, z=options.tfs_z)),
            ("typical_p", partial(filters.typical_p, p=options.typical_p)),
            ("top_p", partial(filters.top_p, p=options.top_p)),
            ("min_p", partial(filters.min_p, p=options.min_p)),
            temperature,
        ]

    def _penalize(self, logits: Tensor) -> Tensor:
        options = self.options
        out = filters.penalize(
            logits,
            list(self.window),
            options.repeat_penalty,
            options.presence_penalty,
            options.frequency_penalty,
        )
        if not options.penalize_newline and self.newline is not None:
            out = out.clone()
            out[self.newline] = logits[self.newline]
        return out


def draw(logits: Tensor, rng: torch.Generator) -> int:
    """One id by its probability: where a uniform number falls among the cumulated probabilities.

    Shapes: (V,) → int. One number of the generator is used for each token, whatever was dropped.
    """
    ids, probs = filters.candidates(logits)
    cumulated = probs.cumsum(0)
    chance = torch.rand((), generator=rng, dtype=torch.float64) * cumulated[-1]
    index = int(torch.searchsorted(cumulated, chance, right=True))
    return int(ids[min(index, len(ids) - 1)])
