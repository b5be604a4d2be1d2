"""Several answers to one prompt, from one reading of it.

    prompt ──┬── seed ──────► answer 0       each is exactly what a request of its own
             ├── seed + 1 ──► answer 1       with this seed would get
             └── seed + 2 ──► answer 2

The engine reads no prompt twice (see `slots`), so nothing but the order of asking is decided here:
all answers stand in its queue from the beginning. Where there are slots they are written side by
side, else one after another. One thread hears all of them, so closing is cancelling here too.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace

from refollama.engine.engine import LOOK_AROUND
from refollama.engine.sequence import Extras
from refollama.errors import BadRequest
from refollama.messages import IDLE, Chunk, Stats
from refollama.options import Options

MOST_ANSWERS = 16
SEEDS = 2**63  # there are so many; the one behind the last is 0

Chunks = Generator[Chunk, None, None]
Start = Callable[[Options, Extras], Chunks]  # one answer, begun when its first piece is asked for


def check_count(count: int) -> None:
    """Raises: BadRequest for a number of answers that nobody can ask for."""
    if not 1 <= count <= MOST_ANSWERS:
        raise BadRequest(f"n must be between 1 and {MOST_ANSWERS}, not {count}")


def several(start: Start, options: Options, extras: Extras, count: int) -> Chunks:
    """So many answers, with the seeds `seed`, `seed` + 1, …; −1 draws the first one.

    One answer is told as it is. Of more, each piece has its `index`; the last piece of all is the
    only one that is `done`: it has the first answer's reason and context, and counts of them all.
    Raises: all that `start` raises; what goes wrong with one answer ends all.
    """
    if count == 1:
        return start(options, extras)
    seed = options.seed if options.seed >= 0 else random.getrandbits(63)
    own = [replace(options, seed=(seed + index) % SEEDS) for index in range(count)]
    return _told(start, own, replace(extras, bell=threading.Event()))


def _told(start: Start, options: Sequence[Options], extras: Extras) -> Chunks:
    assert extras.bell is not None
    ends: dict[int, Chunk] = {}
    began = 0
    with ExitStack() as opened:
        answers = [start(each, extras) for each in options]
        for chunks in answers:
            opened.enter_context(closing(chunks))
        for index, chunk in _as_they_come(answers, extras.bell):
            if chunk.progress is not None:
                if index == 0:  # the first one's is everybody's
                    yield chunk
                continue
            began = began or time.perf_counter_ns()
            if chunk.done:
                ends[index] = chunk
            yield replace(chunk, index=index, done=False)
    yield _end_of_all([ends[index] for index in range(len(ends))], began)


def _as_they_come(answers: Sequence[Chunks], bell: threading.Event) -> Iterator[tuple[int, Chunk]]:
    """Pieces and the numbers of their answers, in turn: nobody is waited for while others speak."""
    left = dict(enumerate(answers))
    while left:
        bell.clear()  # before listening: what comes meanwhile rings for the next round
        turn = [(index, next(chunks)) for index, chunks in left.items()]
        heard = [(index, chunk) for index, chunk in turn if chunk is not IDLE]
        yield from heard
        for index, chunk in heard:
            if chunk.done:
                del left[index]
        if not heard:
            bell.wait(LOOK_AROUND)  # then each stream looks who is still there


def _end_of_all(ends: Sequence[Chunk], began: int) -> Chunk:
    """The last record: the prompt counts once, the answers' tokens all; durations are of a clock.

    began: when the first piece came.  Units: nanoseconds.
    """
    counts = [end.stats or Stats() for end in ends]
    total = replace(
        counts[0],
        total_duration=max(one.total_duration for one in counts),
        prompt_cached_count=min(one.prompt_cached_count for one in counts),
        prompt_eval_duration=max(one.prompt_eval_duration for one in counts),
        eval_count=sum(one.eval_count for one in counts),
        eval_duration=time.perf_counter_ns() - began,
    )
    return Chunk(done=True, done_reason=ends[0].done_reason, stats=total, context=ends[0].context)
