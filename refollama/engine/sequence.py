"""One prompt on its way to an answer: what it asked for, how far it has come, why it ended."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from refollama.options import Options
from refollama.pictures import Seen
from refollama.sampling.chain import Grammar, Sampler, Watch


def never() -> bool:
    """Nobody ever goes: what `gone` is where nobody can."""
    return False


@dataclass(frozen=True, slots=True)
class Marks:
    """The tokens that mean something to the engine itself."""

    eos: frozenset[int] = frozenset()  # each of them ends an answer
    bos: int | None = None  # is kept when the context is full
    newline: int | None = None  # is spared by `penalize_newline` false


@dataclass(frozen=True, slots=True)
class Extras:
    """What may be asked of an answer besides its options."""

    gone: Callable[[], bool] = never  # asked now and then: is nobody there to hear it?
    truncate: bool = True  # a prompt that does not fit is cut; else it is an error
    shift: bool = True  # when the context is full, forget part of it and go on
    logprobs: int | None = None  # note each token's log-probability, and that of the best so many
    named: tuple[int, ...] = ()  # and, in each place, that of these tokens
    grammar: Grammar | None = None  # what the answer may be; it ends when it is complete
    on_stage: Watch | None = None  # is shown what each stage of the sampler does
    spelled: frozenset[int] = frozenset()  # control tokens whose spelling is shown: marks of calls
    progress: bool = False  # tell how much of the prompt has been read
    bell: threading.Event | None = None  # rings when there is something to hear; nobody waits then
    pictures: tuple[Seen, ...] = ()  # what ids behind the vocabulary stand for, while it runs

    def words(self, ids: list[int]) -> list[int]:
        """The ids of text alone, without those of pictures, which lie behind the vocabulary."""
        first = min((picture.ids.start for picture in self.pictures), default=None)
        return ids if first is None else [id for id in ids if id < first]


NO_MARKS, NO_EXTRAS = Marks(), Extras()


@dataclass(frozen=True, slots=True)
class Logprob:
    """How likely the model thought a token, before any stage of the sampler.  Units: nats."""

    id: int
    logprob: float
    best: tuple[tuple[int, float], ...] = ()  # ids and log-probabilities, the likeliest first
    named: tuple[tuple[int, float], ...] = ()  # of the tokens that were asked for, in that order


@dataclass(frozen=True, slots=True)
class Read:
    """So many tokens of the prompt have been read."""

    tokens: int


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
    n_ctx: int  # tokens that its context holds
    keep: int = 0  # of those, so many stay when the context is full
    dropped: int = 0  # tokens by which the prompt was cut
    extras: Extras = NO_EXTRAS

    read: int = 0  # tokens of the prompt that the model has seen
    length: int = 0  # places of the cache that are taken
    cached: int = 0  # tokens of the prompt that were there already
    shifted: bool = False  # has part of its context been forgotten?
    broken: bool = False  # did a step with it fail?  What it left in the cache may be anything
    answer: list[int] = field(default_factory=list)
    likely: list[Logprob] = field(default_factory=list)  # of each token drawn, the end token too
    slot: int | None = None
    cancelled: bool = False
    done_reason: str = ""  # "stop": the model ended; "length": the limit did; "" while running

    outbox: queue.SimpleQueue[int | Read | End] = field(default_factory=queue.SimpleQueue)
    started: int = 0  # when its prompt began to be read
    prompt_read: int = 0  # when its first token was drawn
    ended: int = 0

    @property
    def reading(self) -> bool:
        """Is its prompt still being read?"""
        return self.read < len(self.prompt)

    @property
    def full(self) -> bool:
        """Is there no place left for the token that was just drawn?"""
        return not self.reading and self.length == self.n_ctx

    @property
    def done(self) -> bool:
        """Has it ended, or is it not wanted any more?"""
        return bool(self.done_reason) or self.cancelled

    @property
    def held(self) -> list[int]:
        """The tokens whose keys and values are what a fresh reading would give.

        After a shift only the kept ones are: the others have met tokens that are gone.
        """
        if self.broken:
            return []
        if self.shifted:
            return self.prompt[: self.keep]
        return (self.prompt + self.answer)[: self.length]

    def next_tokens(self, most: int) -> list[int]:
        """What the model must see next: some of the prompt, or the token just drawn."""
        if self.reading:
            return self.prompt[self.read : self.read + most]
        return self.answer[-1:]

    def seen(self, count: int) -> None:
        """The model has seen so many more tokens."""
        reads = self.reading
        self.length += count
        self.read = min(self.read + count, len(self.prompt))
        if reads and self.extras.progress:
            self.tell(Read(self.read))

    def choose(self, logits: Tensor, eos: frozenset[int]) -> None:
        """Draw the next token, hand it out, and see whether it was the last.  (V,) →"""
        token = self.sampler(logits)
        now = time.perf_counter_ns()
        self.prompt_read = self.prompt_read or now
        if self.extras.logprobs is not None:
            self.likely.append(logprob(logits, token, self.extras.logprobs, self.extras.named))
        if token in eos:
            self.done_reason = "stop"
            return
        self.answer.append(token)
        self.tell(token)
        if self.sampler.complete:
            self.done_reason = "stop"
        elif len(self.answer) >= self.limit:
            self.done_reason = "length"

    def tell(self, item: int | Read | End) -> None:
        """Hand something out."""
        self.outbox.put(item)
        if self.extras.bell is not None:
            self.extras.bell.set()

    def fail(self, error: BaseException) -> None:
        """It cannot go on, for a reason of its own."""
        self.broken = True
        self.done_reason = "error"
        self.finish(error)

    def finish(self, error: BaseException | None = None) -> None:
        """Nothing more will come."""
        self.ended = time.perf_counter_ns()
        self.tell(End(error))


def logprob(logits: Tensor, token: int, count: int, named: tuple[int, ...] = ()) -> Logprob:
    """The log-probability of a token, the `count` best ones, and those of some others.  (V,) →"""
    values = logits.to("cpu").double().log_softmax(0)
    best = values.topk(min(count, len(values)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    asked = zip(named, values[list(named)].tolist(), strict=True)
    return Logprob(token, float(values[token]), tuple(pairs), tuple(asked))
