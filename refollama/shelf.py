"""The shelf: which models are in memory, who waits for a place, and who has to make room.

leased ──► idle ──► leased …           the model stays where it is
             ├──► closed               `keep` seconds after its last use: a timer
             └──► closed               another model needs the place
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from refollama.engine import limits
from refollama.engine.engine import LOOK_AROUND
from refollama.engine.sequence import never
from refollama.errors import Abandoned, RefollamaError, Stopping
from refollama.keep_alive import FOR_EVER
from refollama.loaded import DEFAULTS, LoadedModel, load_file
from refollama.models.memory import Placement
from refollama.models.meter import Told, unheard
from refollama.options import Options
from refollama.paths import file_state

_Key = tuple[object, Placement]  # which files, and where their weights lie


class Files(NamedTuple):
    """What a model is loaded from."""

    weights: Path
    projector: Path | None = None  # of a vision model: what it sees with
    adapters: tuple[Path, ...] = ()  # changes that stand beside the weights

    @classmethod
    def of(cls, given: Path | Files) -> Files:
        return given if isinstance(given, Files) else cls(given)

    @property
    def state(self) -> object:
        """Equal as long as these are the same files; the same weights with other eyes are not."""
        eyes = None if self.projector is None else file_state(self.projector)
        return file_state(self.weights), eyes, tuple(map(file_state, self.adapters))


class Use(NamedTuple):
    """What the last lease of a model was for."""

    name: str = ""
    options: Options = DEFAULTS
    keep: float = FOR_EVER  # seconds that the model stays afterwards


class Running(NamedTuple):
    """A model in memory."""

    use: Use
    left: float  # seconds until it is unloaded, if nobody uses it until then
    nbytes: int  # of its weights and caches
    nbytes_gpu: int  # of those, on a GPU
    n_ctx: int  # tokens that its context holds


class LoadedModels:
    """The models that are in memory, so that the next request need not load again.

    At most `limit` at a time: the one that was idle longest makes room; if all are busy, the
    newcomer waits. Who waits longest is served first. Two names that share weights share the model,
    unless their options place it differently in memory (`num_gpu`, `use_mmap`, …).
    """

    def __init__(self, *, limit: int = 1, slots: int = 1, vision_blocks: int | None = None) -> None:
        self.limit = limit
        self.slots = slots
        self.vision_blocks = vision_blocks  # as in `load`
        self._entries: dict[_Key, _Entry] = {}
        self._leaving: set[_Entry] = set()  # off the shelf, but still in memory: they take a place
        self._queue: deque[object] = deque()  # a ticket for each request that is not yet admitted
        self._closed = False
        self._timer: threading.Thread | None = None
        self._changed = threading.Condition()  # guards all of the above; never held while closing

    @contextmanager
    def lease(
        self,
        source: Path | Files,
        options: Options = DEFAULTS,
        gone: Callable[[], bool] = never,
        *,
        keep: float = FOR_EVER,
        name: str = "",
        told: Told = unheard,
    ) -> Iterator[LoadedModel]:
        """The model of these files, placed as the options say; while the lease lasts it stays.

        gone: asked now and then while waiting.  keep: seconds that the model stays afterwards,
        unless a later lease says otherwise.  name: for `running`.  told: as in `load`, if it is
        loaded now, by whomever.
        Raises: Abandoned if `gone` says yes, Stopping, and all that `load_file` raises.
        """
        files = Files.of(source)
        key = (files.state, Placement.of(options))
        load = partial(
            load_file,
            files.weights,
            options,
            projector=files.projector,
            adapters=files.adapters,
            vision_blocks=self.vision_blocks,
        )
        entry = self._admitted(key, gone)
        entry.use = Use(name or files.weights.name, options, keep)
        try:
            with entry.watched(told):
                model = self._loaded(key, entry, load)
            yield model
        finally:
            self._release(key, entry)

    def unload(self, source: Path | Files) -> None:
        """Let go of the model of these files, as soon as nobody uses it; it need not be loaded."""
        identity = Files.of(source).state
        with self._changed:
            found = {key: entry for key, entry in self._entries.items() if key[0] == identity}
            for entry in found.values():
                entry.use = entry.use._replace(keep=0)
            idle = [self._off(key) for key, entry in found.items() if entry.users == 0]
            self._changed.notify_all()
        for entry in idle:
            self._let_go(entry)

    def running(self) -> Sequence[Running]:
        """The models in memory; those that stay longest come first."""
        with self._changed:
            loaded = [entry for entry in self._entries.values() if entry.model is not None]
            return sorted((e.running() for e in loaded), key=lambda one: one.left, reverse=True)

    def close(self) -> None:
        """Unload everything; running answers end with an error, and nothing is loaded any more."""
        with self._changed:
            self._closed = True
            entries = list(self._entries.values())
            self._entries.clear()
            timer = self._timer
            self._changed.notify_all()
        for entry in entries:
            entry.close()
        if timer is not None:
            timer.join()

    def _admitted(self, key: _Key, gone: Callable[[], bool]) -> _Entry:
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

    def _room(self, key: _Key) -> bool:
        """Is this model here already, or could it be?  While one leaves, no other has to."""
        if key in self._entries or len(self._entries) + len(self._leaving) < self.limit:
            return True
        return bool(self._idle()) and not self._leaving

    def _idle(self) -> list[_Key]:
        return [key for key, entry in self._entries.items() if entry.users == 0]

    def _place(self, key: _Key) -> _Entry:
        """The model's place; a new one may take that of the model that was idle longest."""
        if key not in self._entries:
            evicted = None
            if len(self._entries) + len(self._leaving) >= self.limit:
                oldest = min(self._idle(), key=lambda k: self._entries[k].last_used)
                evicted = self._entries.pop(oldest)
            self._entries[key] = _Entry(evicted)
        return self._entries[key]

    def _loaded(self, key: _Key, entry: _Entry, load: Callable[..., LoadedModel]) -> LoadedModel:
        with entry.loading:  # the second request for a model waits for the first to load it
            entry.evict()
            if entry.failure is not None:
                raise _again(entry.failure)
            if entry.model is None:
                try:
                    entry.model = load(slots=self.slots, told=entry.tell)
                except Exception as failure:
                    entry.failure = failure
                    raise
                finally:
                    self._settle(key, entry)
        if self._closed:
            raise Stopping("the server is stopping")
        return entry.model

    def _settle(self, key: _Key, entry: _Entry) -> None:
        """After loading: what failed leaves the shelf."""
        with self._changed:
            if entry.model is None and self._entries.get(key) is entry:
                del self._entries[key]

    def _release(self, key: _Key, entry: _Entry) -> None:
        with self._changed:
            entry.users -= 1
            entry.last_used = time.monotonic()
            if entry.due <= entry.last_used and self._entries.get(key) is entry:
                self._off(key)
            orphan = entry.users == 0 and self._entries.get(key) is not entry
            self._wind()
            self._changed.notify_all()
        if orphan:  # taken off the shelf, just now or meanwhile
            self._let_go(entry)

    def _off(self, key: _Key) -> _Entry:
        """Take a model off the shelf; its place is free once it is closed.  The lock is held."""
        entry = self._entries.pop(key)
        self._leaving.add(entry)
        return entry

    def _let_go(self, entry: _Entry) -> None:
        """Close what nobody uses any more; only then may another model come into memory."""
        try:
            entry.close()
        finally:
            entry.model = None  # whoever still holds the entry does not hold the memory
            with self._changed:
                self._leaving.discard(entry)
                self._changed.notify_all()

    # ── the timer: it sleeps until a model is due, and ends when there is none to wait for ────────

    def _wind(self) -> None:
        """See to it that the timer runs, if a model has a time to go.  The lock is held."""
        timed = any(0 < entry.use.keep < FOR_EVER for entry in self._entries.values())
        if timed and self._timer is None and not self._closed:
            self._timer = threading.Thread(target=self._tick, name="keep_alive", daemon=True)
            self._timer.start()

    def _tick(self) -> None:
        while entries := self._expired():
            while entries:
                self._let_go(entries.pop())

    def _expired(self) -> list[_Entry]:
        """Waits for models whose time is over, and takes them off the shelf; none: it is empty."""
        with self._changed:
            while self._entries and not self._closed:
                now, dues = time.monotonic(), {key: e.due for key, e in self._entries.items()}
                over = [key for key, due in dues.items() if due <= now]
                if over:
                    self._changed.notify_all()
                    return [self._off(key) for key in over]
                self._changed.wait(_pause(min(dues.values()) - now))
            self._timer = None
            return []


class _Entry:
    """One place on the shelf."""

    def __init__(self, evicted: _Entry | None) -> None:
        self.evicted = evicted  # whose place this was; closed before the new model is loaded
        self.model: LoadedModel | None = None
        self.failure: Exception | None = None
        self.use = Use()
        self.users = 0
        self.last_used = 0.0
        self.loading = threading.Lock()
        self._watchers: list[Told] = []

    @contextmanager
    def watched(self, told: Told) -> Iterator[None]:
        """Whoever loads the model meanwhile, tells this one too."""
        self._watchers.append(told)
        try:
            yield
        finally:
            self._watchers.remove(told)

    def tell(self, done: int, total: int) -> None:
        """To all who wait for it."""
        for told in list(self._watchers):
            told(done, total)

    def evict(self) -> None:
        """Let go of the one before. It may have to wait for a step of its model."""
        evicted, self.evicted = self.evicted, None
        if evicted is not None:
            evicted.close()

    @property
    def due(self) -> float:
        """When it is to go, on the clock of `time.monotonic`; not while somebody uses it."""
        return math.inf if self.users else self.last_used + self.use.keep

    def running(self) -> Running:
        """As `LoadedModels.running` tells of it; while it is in use its time does not run."""
        assert self.model is not None
        since = 0.0 if self.users else time.monotonic() - self.last_used
        left = max(0.0, self.use.keep - since)
        n_ctx = limits.context(self.use.options, self.model.net.n_ctx)
        return Running(self.use, left, *self.model.nbytes(), n_ctx)

    def close(self) -> None:
        """Unload the model, if there is one."""
        self.evict()
        model = self.model  # another thread may let go of it at the same time
        if model is not None:
            model.close()


def _again(failure: Exception) -> RefollamaError:
    """The same failure for another thread, as an error of its own."""
    told = isinstance(failure, RefollamaError)
    again = RefollamaError(str(failure) if told else f"loading failed: {type(failure).__name__}")
    again.status = failure.status if isinstance(failure, RefollamaError) else again.status
    again.__cause__ = failure
    return again


def _pause(seconds: float) -> float | None:
    """How long a condition may be waited for; None: until it is told."""
    return None if math.isinf(seconds) else min(seconds, threading.TIMEOUT_MAX)
