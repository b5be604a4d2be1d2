"""The bytes of a blob on their way out: in parts, hashed and counted as they go.

A part may be asked for again, from its beginning or from somewhere inside: what has arrived is not
sent twice, but it is read again, since the hash of a part covers all of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from refollama.errors import StoreError
from refollama.store.blobs import CHUNK, disk, regular

# A part is a 64th of the blob, within these bounds, as Ollama cuts it.
SMALLEST = 100_000_000
LARGEST = 1_000_000_000

PIECE = 1 << 16  # bytes that are handed to the network at once: a slow line still shows movement


@dataclass(frozen=True, slots=True)
class Part:
    """Some bytes of a blob, counted from 0."""

    number: int
    first: int  # offset in the blob
    end: int  # offset of the first byte behind it

    @property
    def size(self) -> int:
        return self.end - self.first


def cut(size: int) -> list[Part]:
    """The parts of a blob of so many bytes; none if it is empty."""
    step = min(max(size // 64, SMALLEST), LARGEST)
    firsts = range(0, size, step)
    return [Part(n, first, min(first + step, size)) for n, first in enumerate(firsts)]


class Outgoing:
    """One blob, as it goes to a registry.  Its parts may go out from several threads.

    `wanted` is called before each piece is handed out, and raises if nobody wants more.
    """

    def __init__(self, path: Path, size: int, wanted: Callable[[], None]) -> None:
        self.parts = cut(size)
        self.reached = 0  # the offset up to which bytes were handed out, at the most
        self._path = path
        self._wanted = wanted
        self._moved = [0] * len(self.parts)  # bytes of each part that are out
        self._sums = [b""] * len(self.parts)  # MD5 of each part

    @property
    def completed(self) -> int:
        return sum(self._moved)

    def part_at(self, offset: int) -> Part:
        return next(part for part in self.parts if part.first <= offset < part.end)

    def forget(self, part: Part) -> None:
        """It was not taken: count it anew."""
        self._moved[part.number] = 0

    def rewind(self, offset: int) -> None:
        """So much has arrived, and nothing behind it."""
        for part in self.parts:
            self._moved[part.number] = min(max(offset - part.first, 0), part.size)

    def body(self, part: Part, offset: int, *, counted: bool = True) -> Iterator[bytes]:
        """The bytes of a part from an offset in the blob on, in pieces.

        Raises: StoreError if the disk has fewer; whatever `wanted` raises.
        """
        found = hashlib.md5(usedforsecurity=False)
        at = part.first
        for piece in _pieces(self._path, part):
            self._wanted()
            found.update(piece)
            at += len(piece)
            if at > offset:
                self.reached = max(self.reached, at)
                yield piece[max(0, offset - at + len(piece)) :]
            if counted:
                self._moved[part.number] = at - part.first
        self._sums[part.number] = found.digest()

    def etag(self) -> str:
        """Hash of the hashes of the parts, and their number, as storage services reckon it."""
        sums = [self._sums[part.number] or self._sum(part) for part in self.parts]
        return f"{hashlib.md5(b''.join(sums), usedforsecurity=False).hexdigest()}-{len(sums)}"

    def _sum(self, part: Part) -> bytes:
        """Of a part whose last piece arrived, though the connection broke meanwhile."""
        for _ in self.body(part, part.end, counted=False):
            pass
        return self._sums[part.number]


def _pieces(path: Path, part: Part) -> Iterator[bytes]:
    """A part of a file; large steps on the disk, small ones for the network."""
    with regular(path) as file:
        file.seek(part.first)
        for at in range(part.first, part.end, CHUNK):
            with disk("reading a blob"):
                chunk = file.read(min(CHUNK, part.end - at))
            if len(chunk) < min(CHUNK, part.end - at):
                raise StoreError(f"blob {path.name[:19]}… became shorter while it was sent")
            yield from (chunk[i : i + PIECE] for i in range(0, len(chunk), PIECE))
