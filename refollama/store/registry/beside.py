"""Work in a thread of its own, for somebody who looks at it now and then, and may leave."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, wait
from typing import TypeVar, cast

from refollama.errors import Abandoned

T = TypeVar("T")
Gone = Callable[[], bool]  # is nobody there any more who asked?

PROGRESS_EVERY = 0.1  # seconds; also how often we ask whether anybody still listens
LEAVING = 0.5  # seconds that work which nobody wants gets to end, before it is left to end alone


def in_thread(work: Callable[[], T]) -> Future[T]:
    """Do it beside; what it raises is kept.  The process may end without waiting for it."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="transfer", daemon=True).start()
    return future


def beside(
    work: Callable[[], T], leave: Callable[[], None], gone: Gone
) -> Generator[None, None, T]:
    """Yields now and then until the work is done, and returns what it gives.

    `leave` ends the work; it is called for whoever leaves before: by closing, or by being `gone`.
    Raises: what the work raises; Abandoned as soon as `gone` says so.
    """
    done = in_thread(work)
    try:
        while not wait([done], PROGRESS_EVERY).done:
            check_gone(gone)
            yield
    finally:
        if not done.done():
            leave()
            wait([done], LEAVING)
    return done.result()


def waited(work: Callable[[], T], leave: Callable[[], None], gone: Gone) -> T:
    """The same, for whoever has nothing to tell meanwhile."""
    steps = beside(work, leave, gone)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return cast(T, end.value)


def check_gone(gone: Gone) -> None:
    """Raises: Abandoned."""
    if gone():
        raise Abandoned("whoever asked has gone")
