"""The sampler of one sequence: named stages in a fixed order, then one draw.

    penalties → temperature ≤ 0: the best one
              → otherwise top_k → top_p → temperature → draw

Temperature comes last, so top_p sees the model's own probabilities.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from refollama.errors import RefollamaError
from refollama.options import Options
from refollama.sampling import filters

Stage = tuple[str, Callable[[Tensor], Tensor]]
Watch = Callable[[str, Tensor], None]  # name of the stage, logits (V,) after it


class Sampler:
    """Logits of one sequence → its next token id.

    It remembers two things: the generator of its chances, and the last tokens, for the penalties
    (`n_ctx` is how many if `repeat_last_n` is -1; None: all).
    `on_stage`, if given, is shown what each stage made of the logits.
    Raises: RefollamaError when the model's output is not a number.
    """

    def __init__(
        self,
        options: Options,
        prompt: Iterable[int] = (),
        *,
        n_ctx: int | None = None,
        newline: int | None = None,
        on_stage: Watch | None = None,
    ) -> None:
        self.options = options
        self.newline = newline
        self.on_stage = on_stage
        looked_back = options.repeat_last_n if options.repeat_last_n >= 0 else n_ctx
        self.window = deque(prompt, maxlen=looked_back)
        self.rng = torch.Generator()
        self.rng.manual_seed(options.seed if options.seed >= 0 else random.getrandbits(63))

    def __call__(self, logits: Tensor) -> int:
        """(V,) → id. Chance is drawn on the CPU in float64, so the device cannot change it."""
        logits = logits.to("cpu", torch.float32)
        if not logits.isfinite().all():
            raise RefollamaError("the model's output is not a number: the weights may be damaged")
        for name, stage in self.stages():
            logits = stage(logits)
            if self.on_stage is not None:
                self.on_stage(name, logits)
        token = int(logits.argmax()) if self.options.temperature <= 0 else draw(logits, self.rng)
        self.window.append(token)
        return token

    def stages(self) -> list[Stage]:
        """What the options ask for, in order."""
        options = self.options
        stages: list[Stage] = [("penalties", self._penalize)]
        if options.temperature > 0:
            stages += [
                ("top_k", partial(filters.top_k, k=options.top_k)),
                ("top_p", partial(filters.top_p, p=options.top_p)),
                ("temperature", partial(filters.temperature, t=options.temperature)),
            ]
        return stages

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
