"""Engines over one net: requests that want another kind of cache have an engine of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

from torch import Tensor

from refollama.engine.engine import Engine, Stream
from refollama.engine.sequence import Extras
from refollama.errors import ServerBusy, Stopping
from refollama.options import Options

MOST = 4  # engines at a time: each has a thread and a cache
Kind = TypeVar("Kind", bound=Hashable)


class Pool(Generic[Kind]):
    """One engine for each kind of cache that is asked for, made by `make` when first needed.

    When there are too many, an idle one makes room; if all are busy, the newcomer is refused.
    """

    def __init__(self, make: Callable[[Kind], Engine], most: int = MOST) -> None:
        self._make = make
        self._most = most
        self._engines: dict[Kind, Engine] = {}  # the one used last comes last
        self._lock = threading.Lock()
        self._closed = False

    def stream(self, kind: Kind, tokens: Iterable[int], options: Options, extras: Extras) -> Stream:
        """`Engine.stream` of the engine of this kind.

        Raises: ServerBusy, Stopping once the pool is closed, and all that `Engine.stream` raises.
        """
        with self._lock:  # nobody may close it between being found and being asked
            if self._closed:
                raise Stopping("the model has been unloaded")
            engine = self._engines.pop(kind, None) or self._new(kind)
            self._engines[kind] = engine
            return engine.stream(tokens, options, extras)

    def forget(self) -> None:
        """Let no later prompt find its beginning in a cache."""
        for engine in self.engines:
            engine.forget()

    def close(self) -> None:
        """End all answers and let go of the caches. Safe to call twice, and from any thread."""
        with self._lock:
            self._closed = True
            engines = list(self._engines.values())
            self._engines.clear()
        for engine in engines:  # waits for their steps, which may ask this pool something
            engine.close()

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def engines(self) -> list[Engine]:
        """Those that there are now, the one used last at the end."""
        with self._lock:
            return list(self._engines.values())

    @property
    def active(self) -> int:
        """Answers that are being written, or wait."""
        return sum(engine.active for engine in self.engines)

    def memory(self) -> list[Tensor]:
        """The tensors of all caches."""
        return [tensor for engine in self.engines for tensor in engine.memory()]

    def _new(self, kind: Kind) -> Engine:
        while len(self._engines) >= self._most:
            idle = next((k for k, engine in self._engines.items() if not engine.active), None)
            if idle is None:
                raise ServerBusy(
                    f"the server is busy: answers with {self._most} other choices of f16_kv, "
                    "low_vram, adapters and rope options are being written"
                )
            self._engines.pop(idle).close()
        return self._make(kind)
