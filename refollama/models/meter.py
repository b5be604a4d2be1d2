"""How far has loading come?"""

from __future__ import annotations

from collections.abc import Callable

Count = Callable[[int], None]  # so many bytes more are done
Told = Callable[[int, int], object]  # bytes that are done, of so many


def unheard(*numbers: int) -> None:
    """What loading tells, where nobody listens."""


class Meter:
    """Adds up what is done, and tells it; all of it only when that is sure.  Units: bytes."""

    def __init__(self, total: int, told: Told) -> None:
        self._done, self._total, self._told = 0, total, told
        self.add(0)

    def add(self, count: int) -> None:
        """So much more is done; the sum may be off by what has another size in memory."""
        self._done += count
        if self._done < self._total:
            self._told(self._done, self._total)

    def finish(self) -> None:
        """That was all."""
        self._told(self._total, self._total)
