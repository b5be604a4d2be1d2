"""One prompt on its way to an answer: what it asked for, how far it has come, why it ended."""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass, field

from refollama.options import Options
from refollama.sampling.chain import Sampler


class End:
    """The last thing in an outbox; carries the error, if that was the reason."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


@dataclass(eq=False)
class Sequence:
    """A prompt, its answer so far, and its place in the cache.  Units: nanoseconds."""

    prompt: list[int]
    options: Options
    sampler: Sampler
    limit: int  # tokens that may be drawn

    seen: int = 0  # tokens that are in the cache
    answer: list[int] = field(default_factory=list)
    slot: int | None = None
    cancelled: bool = False
    done_reason: str = ""  # "stop": the model ended; "length": the limit did; "" while running

    outbox: queue.SimpleQueue[int | End] = field(default_factory=queue.SimpleQueue)
    started: int = 0  # when its prompt began to be read
    prompt_read: int = 0  # when its first token was drawn
    ended: int = 0

    @property
    def reading(self) -> bool:
        """Is its prompt still being read?"""
        return self.seen < len(self.prompt)

    @property
    def done(self) -> bool:
        """Has it ended, or is it not wanted any more?"""
        return bool(self.done_reason) or self.cancelled

    def next_tokens(self, most: int) -> list[int]:
        """What the model must see next: some of the prompt, or the token just drawn."""
        if self.reading:
            return self.prompt[self.seen : self.seen + most]
        return self.answer[-1:]

    def take(self, token: int, eos: frozenset[int]) -> None:
        """The sampler drew this: hand it out, and see whether it was the last."""
        now = time.perf_counter_ns()
        self.prompt_read = self.prompt_read or now
        if token in eos:
            self.done_reason = "stop"
            return
        self.answer.append(token)
        self.outbox.put(token)
        if len(self.answer) >= self.limit:
            self.done_reason = "length"

    def fail(self, error: BaseException) -> None:
        """It cannot go on, for a reason of its own."""
        self.done_reason = "error"
        self.finish(error)

    def finish(self, error: BaseException | None = None) -> None:
        """Nothing more will come."""
        self.ended = time.perf_counter_ns()
        self.outbox.put(End(error))
