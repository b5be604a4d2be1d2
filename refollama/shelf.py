"""The shelf: which models are in memory, who waits for a place, and who has to make room."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from refollama.engine.engine import LOOK_AROUND
from refollama.engine.sequence import never
from refollama.errors import Abandoned, NotFound, RefollamaError, Stopping
from refollama.loaded import DEFAULTS, LoadedModel, load_file
from refollama.models.memory import Placement
from refollama.options import Options


class LoadedModels:
    """The models that are in memory, so that the next request need not load again.

    At most `limit` at a time: the one that was idle longest makes room; if all are busy, the
    newcomer waits. Who waits longest is served first. Two names that share weights share the model,
    unless their options place it differently in memory (`num_gpu`, `use_mmap`, …).
    """

    def __init__(self, *, limit: int = 1, slots: int = 1) -> None:
        self.limit = limit
        self.slots = slots
        self._entries: dict[object, _Entry] = {}
        self._queue: deque[object] = deque()  # a ticket for each request that is not yet admitted
        self._closed = False
        self._changed = threading.Condition()  # guards all of the above; never held while closing

    @contextmanager
    def lease(
        self, path: Path, options: Options = DEFAULTS, gone: Callable[[], bool] = never
    ) -> Iterator[LoadedModel]:
        """The model of this file, placed as the options say; while the lease lasts it stays.

        gone: asked now and then while waiting.  Raises: Abandoned if it says yes, Stopping, and
        all that `load_file` raises.
        """
        key = (_identity(path), Placement.of(options))
        entry = self._admitted(key, gone)
        try:
            yield self._loaded(key, entry, path, options)
        finally:
            self._release(key, entry)

    def close(self) -> None:
        """Unload everything; running answers end with an error, and nothing is loaded any more."""
        with self._changed:
            self._closed = True
            entries = list(self._entries.values())
            self._entries.clear()
            self._changed.notify_all()
        for entry in entries:
            entry.close()

    def _admitted(self, key: object, gone: Callable[[], bool]) -> _Entry:
        """A place on the shelf, in the order of asking."""
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                while not (self._queue[0] is ticket and self._room(key)):
                    self._check(gone)
                    self._changed.wait(LOOK_AROUND)
                self._check(gone)
                entry = self._place(key)
                entry.users += 1
                return entry
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()

    def _check(self, gone: Callable[[], bool]) -> None:
        if self._closed:
            raise Stopping("the server is stopping")
        if gone():
            raise Abandoned("whoever asked has gone")

    def _room(self, key: object) -> bool:
        """Is this model here already, or could it be?"""
        return key in self._entries or len(self._entries) < self.limit or bool(self._idle())

    def _idle(self) -> list[object]:
        return [key for key, entry in self._entries.items() if entry.users == 0]

    def _place(self, key: object) -> _Entry:
        """The model's place; a new one may take that of the model that was idle longest."""
        if key not in self._entries:
            evicted = None
            if len(self._entries) >= self.limit:
                oldest = min(self._idle(), key=lambda k: self._entries[k].last_used)
                evicted = self._entries.pop(oldest)
            self._entries[key] = _Entry(evicted)
        return self._entries[key]

    def _loaded(self, key: object, entry: _Entry, path: Path, options: Options) -> LoadedModel:
        with entry.loading:  # the second request for a model waits for the first to load it
            entry.evict()
            if entry.failure is not None:
                raise _again(entry.failure)
            if entry.model is None:
                try:
                    entry.model = load_file(path, options, slots=self.slots)
                except Exception as failure:
                    entry.failure = failure
                    raise
                finally:
                    self._settle(key, entry)
        if self._closed:
            raise Stopping("the server is stopping")
        return entry.model

    def _settle(self, key: object, entry: _Entry) -> None:
        """After loading: what failed leaves the shelf."""
        with self._changed:
            if entry.model is None and self._entries.get(key) is entry:
                del self._entries[key]

    def _release(self, key: object, entry: _Entry) -> None:
        with self._changed:
            entry.users -= 1
            entry.last_used = time.monotonic()
            orphan = entry.users == 0 and self._entries.get(key) is not entry
            self._changed.notify_all()
        if orphan:  # taken off the shelf meanwhile
            entry.close()


class _Entry:
    """One place on the shelf."""

    def __init__(self, evicted: _Entry | None) -> None:
        self.evicted = evicted  # whose place this was; closed before the new model is loaded
        self.model: LoadedModel | None = None
        self.failure: Exception | None = None
        self.users = 0
        self.last_used = 0.0
        self.loading = threading.Lock()

    def evict(self) -> None:
        """Let go of the one before. It may have to wait for a step of its model."""
        evicted, self.evicted = self.evicted, None
        if evicted is not None:
            evicted.close()

    def close(self) -> None:
        """Unload the model, if there is one."""
        self.evict()
        if self.model is not None:
            self.model.close()


def _again(failure: Exception) -> RefollamaError:
    """The same failure for another thread, as an error of its own."""
    told = isinstance(failure, RefollamaError)
    again = RefollamaError(str(failure) if told else f"loading failed: {type(failure).__name__}")
    again.status = failure.status if isinstance(failure, RefollamaError) else again.status
    again.__cause__ = failure
    return again


def _identity(path: Path) -> object:
    """A file that was replaced is another file, though its name is the same."""
    try:
        stat = os.stat(path)
    except OSError:
        raise NotFound(f"{path.name}: there is no such file") from None
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
