"""The bytes of a blob on their way out: in parts, hashed and counted as they go.

A part may be asked for again, from its beginning or from somewhere inside: what has arrived is not
sent twice, but it is read again, since the hash of a part covers all of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from refollama.errors import BadRequest, StoreError
from refollama.store.blobs import CHUNK, disk, regular
from refollama.store.parts import Part, planned

PIECE = 1 << 16  # bytes that are handed to the network at once: a slow line still shows movement


class Outgoing:
    """One blob, as it goes to a registry.  Its parts may go out from several threads.

    `wanted` is called before each piece is handed out, and raises if nobody wants more.
    """

    def __init__(self, path: Path, size: int, wanted: Callable[[], None]) -> None:
        self.parts = planned(size)
        self.reached = 0  # the offset up to which bytes were handed out, at the most
        self._path = path
        self._wanted = wanted
        self._sums = [b""] * len(self.parts)  # MD5 of each part

    @property
    def completed(self) -> int:
        """Bytes that are out."""
        return sum(part.completed for part in self.parts)

    def part_at(self, offset: int) -> Part:
        return next(part for part in self.parts if part.offset <= offset < part.end)

    def rewind(self, offset: int) -> None:
        """So much has arrived, and nothing behind it."""
        for part in self.parts:
            part.completed = min(max(offset - part.offset, 0), part.size)

    def body(self, part: Part, offset: int, *, counted: bool = True) -> Iterator[bytes]:
        """The bytes of a part from an offset in the blob on, in pieces.

        Raises: StoreError if the disk has fewer; whatever `wanted` raises.
        """
        found = hashlib.md5(usedforsecurity=False)
        at = part.offset
        for piece in _pieces(self._path, part):
            self._wanted()
            found.update(piece)
            at += len(piece)
            if at > offset:
                self.reached = max(self.reached, at)
                yield piece[max(0, offset - at + len(piece)) :]
            if counted:
                part.completed = at - part.offset
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
    with _opened(path) as file:
        file.seek(part.offset)
        for at in range(part.offset, part.end, CHUNK):
            with disk("reading a blob"):
                chunk = file.read(min(CHUNK, part.end - at))
            if len(chunk) < min(CHUNK, part.end - at):
                raise StoreError(f"blob {path.name[:19]}… became shorter while it was sent")
            yield from (chunk[i : i + PIECE] for i in range(0, len(chunk), PIECE))


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Another process, which does not know that we hold it, may have removed it."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(regular(path))
        except BadRequest:
            raise StoreError(f"blob {path.name[:19]}… has gone: pull or create it again") from None
        yield file
