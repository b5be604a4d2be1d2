"""How far has the work come that goes before an answer?  Told now and then, among its pieces."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

from refollama.messages import Chunk, Reached
from refollama.models.meter import Told

EVERY = 0.1  # seconds; faster than a reader, slower than a terminal

T = TypeVar("T")
Chunks = Generator[Chunk, None, None]


def loading(work: Callable[[Told], T]) -> Generator[Chunk, None, T]:
    """What loading tells of itself, from a thread of its own; returns what `work` does.

    Loading cannot be stopped: closing this waits for its end.  Raises: all that `work` raises.
    """
    told: queue.SimpleQueue[Reached | None] = queue.SimpleQueue()
    with ThreadPoolExecutor(1, "load") as pool:
        future = pool.submit(work, lambda done, total: told.put(Reached("load", done, total)))
        future.add_done_callback(lambda _: told.put(None))
        for reached in iter(told.get, None):
            yield Chunk(progress=reached)
        return future.result()


def paced(chunks: Chunks) -> Chunks:
    """The same answer; of each stage the beginning, the end, and what is between now and then."""
    stage, last = "", 0.0
    with closing(chunks):
        for chunk in chunks:
            reached, now = chunk.progress, time.monotonic()
            if reached is not None:
                begins, ends = reached.stage != stage, reached.completed == reached.total
                if not begins and not ends and now - last < EVERY:
                    continue
                stage, last = reached.stage, now
            yield chunk
