"""The bytes of one blob on their way in: several parts at a time, hashed as they come.

GET blobs/<digest>                 206: exactly the bytes that were asked for
Range: bytes=<first>-<last>        200: all of them, from the start
                                   else: tried again, or an error
PartFiles   ←  workers, each with a part of its own
    ↓
SHA-256     ←  follows what is here from the start on, and so has read the last byte soon after
               it came; it reads what lies on the disk, not what was meant to lie there
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NoReturn

import httpx

from refollama.errors import Abandoned, Passing, RegistryError
from refollama.store.blobs import CHUNK
from refollama.store.parts import Part, PartFiles
from refollama.store.registry.session import Registry, retried

# Parts that come at the same time: enough to fill a line whose single connections are slow. With
# each further one the hash is a part further behind, and where the line is no limit, one connection
# is as fast as many.
CONNECTIONS = 8

# What comes is gathered to so many bytes, for so many seconds or in so many pieces, before it is
# written and recorded: a process that is killed loses no more than that of each part.
GATHERED = CHUNK
GATHERED_FOR = 0.25
MOST_PIECES = 256

PROGRESS = 1 << 20  # bytes; a try that brings fewer of a part counts as a failed one
SENSELESS = 3  # ranges that are ignored one after another: this is no accident
IDLE = 0.5  # seconds; nobody waits for ever, even if nobody wakes him

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
_NONE_OF = re.compile(r"bytes \*/(\d{1,19})")
_LENGTH = re.compile(r"\d{1,19}")


class _NoRanges(Exception):
    """The registry sends all of a blob, whatever is asked for."""


class Incoming:
    """Fetches what is missing of a blob; `cancel` ends it from another thread."""

    def __init__(self, files: PartFiles, registry: Registry) -> None:
        self._files = files
        self._registry = registry
        self._url = f"blobs/{files.digest}"
        self._found = hashlib.sha256()
        self._hashed = 0  # bytes from the start on
        self._cancelled = False
        self._halt = threading.Event()  # the workers shall end
        self._news = threading.Event()  # something was written
        self._problem: Exception | None = None
        self._ignored = 0  # ranges, one after another

    def fetch(self) -> str:
        """The digest of all bytes, once they are here.

        Raises: RegistryError and its kin, StoreError; Abandoned when it was cancelled.
        """
        self._found, self._hashed = hashlib.sha256(), 0
        try:
            self._work([partial(self._get, part) for part in self._files.parts if part.left])
        except _NoRanges:
            self._work([self._get_all])
        return f"sha256:{self._found.hexdigest()}"

    def cancel(self) -> None:
        """Who waits for the registry is not woken by this: closing the registry does that."""
        self._cancelled = True
        self._stop_workers()

    # ---------------------------------------------------------------- workers, and the hash

    def _work(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Do all jobs, some at a time, and hash meanwhile.  Raises: the first problem of them."""
        self._problem = None
        self._halt.clear()
        if self._cancelled:
            raise Abandoned("the transfer was cancelled")
        waiting, crew = deque(jobs), list[threading.Thread]()
        try:
            for _ in range(min(CONNECTIONS, len(jobs))):
                worker = threading.Thread(
                    target=self._do, args=(waiting,), name="part", daemon=True
                )
                worker.start()
                crew.append(worker)
            self._follow()
        except BaseException:
            self._halt.set()
            raise
        finally:
            for worker in crew:
                worker.join()
        if self._problem is not None:
            raise self._problem

    def _do(self, waiting: deque[Callable[[], None]]) -> None:
        """One worker: a job after another, until there is none, or one of them fails."""
        while not self._halt.is_set():
            try:
                job = waiting.popleft()
            except IndexError:
                return
            try:
                job()
            except Exception as error:
                self._problem = self._problem or error
                self._stop_workers()

    def _stop_workers(self) -> None:
        self._halt.set()
        self._news.set()

    def _follow(self) -> None:
        """Hash what is here from the start on, until that is all, or the workers have to end."""
        buffer = memoryview(bytearray(CHUNK))
        while self._hashed < self._files.size and not self._halt.is_set():
            ready = self._files.prefix - self._hashed
            if ready == 0:
                self._news.wait(IDLE)
                self._news.clear()
                continue
            size = self._files.read(buffer[:ready], self._hashed)
            self._found.update(buffer[:size])
            self._hashed += size

    # ---------------------------------------------------------------- what is asked for

    def _get(self, part: Part) -> None:
        self._insist(lambda: self._ask(part), lambda: part.left)

    def _get_all(self) -> None:
        size = self._files.size
        self._insist(self._ask_for_all, lambda: size - self._files.completed)

    def _insist(self, ask: Callable[[], None], left: Callable[[], int]) -> None:
        """Ask until nothing is left.  What breaks after it has come some way is no failure."""

        def once() -> None:
            before = left()
            try:
                ask()
            except Passing:
                if before - left() < PROGRESS:
                    raise
            else:
                if left() and before - left() < PROGRESS:
                    raise Passing("the registry sends a few bytes at a time")

        while left():
            retried(once, cancelled=self._halt)

    def _ask(self, part: Part) -> None:
        """Ask for what is missing of a part, and take what comes."""
        first, last = part.position, part.end - 1
        headers = {"Range": f"bytes={first}-{last}"}
        with self._registry.send("GET", self._url, headers=headers) as response:
            size = self._promised(response, first, last)
            stream = _Stream(response)
            self._take(stream, part, size)
            stream.end()

    def _ask_for_all(self) -> None:
        """From the start to the end; what is here already is passed over."""
        with self._registry.send("GET", self._url) as response:
            if response.status_code != httpx.codes.OK:
                self._refuse(response)
            self._check_length(response, self._files.size)
            stream = _Stream(response)
            for part in self._files.parts:
                for _ in stream.take(part.completed):
                    self._check_halt()
                self._take(stream, part, part.left)
            stream.end()

    def _take(self, stream: _Stream, part: Part, size: int) -> None:
        """The next bytes of a part.  If it breaks, those that came before stay."""
        gathered = _Gathered(self._files, part)
        try:
            for piece in stream.take(size):
                self._check_halt()
                if gathered.add(piece):
                    self._news.set()
        finally:
            gathered.write()
            self._news.set()

    def _check_halt(self) -> None:
        if self._halt.is_set():
            raise Abandoned("the transfer was cancelled")

    # ---------------------------------------------------------------- what is answered

    def _promised(self, response: httpx.Response, first: int, last: int) -> int:
        """How many of the wanted bytes this answer brings, from `first` on."""
        if response.status_code == httpx.codes.PARTIAL_CONTENT:
            self._ignored = 0
            return self._range(response, first, last)
        if response.status_code != httpx.codes.OK:
            self._refuse(response)
        self._check_length(response, self._files.size)
        if first > 0:
            self._ignored += 1
            raise _NoRanges if self._ignored >= SENSELESS else Passing("a range was ignored")
        return last + 1

    def _range(self, response: httpx.Response, first: int, last: int) -> int:
        """Of an answer with a part: it may be shorter than was asked for, but nothing else."""
        said = response.headers.get("Content-Range", "")
        match = _CONTENT_RANGE.fullmatch(said)
        if match is None:
            raise Passing(f"the registry sends a senseless range: {said[:80]!r}")
        if match[3] != "*":
            self._check_total(int(match[3]))
        if int(match[1]) != first or not first <= int(match[2]) <= last:
            raise Passing(f"the registry sends {said!r}, but bytes {first}-{last} were wanted")
        size = int(match[2]) + 1 - first
        self._check_length(response, size)
        return size

    def _check_length(self, response: httpx.Response, size: int) -> None:
        """Raises: Passing if the answer says that it has another length."""
        said = _length(response)
        if said not in (None, size):
            raise Passing(f"the registry sends {said} bytes where {size} were due")

    def _check_total(self, total: int) -> None:
        if total != self._files.size:
            raise RegistryError(
                f"the registry's blob {self._files.digest} has {total} bytes, "
                f"but its manifest says {self._files.size}"
            )

    def _refuse(self, response: httpx.Response) -> NoReturn:
        """An answer without any bytes of the blob, as the error that it is."""
        status = response.status_code
        if status == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            if match := _NONE_OF.fullmatch(response.headers.get("Content-Range", "")):
                self._check_total(int(match[1]))
            raise Passing("the registry says that the blob ends earlier")
        if status == httpx.codes.NOT_FOUND:
            raise RegistryError(f"blob {self._files.digest}: file does not exist")
        if status >= httpx.codes.BAD_REQUEST:
            self._registry.refuse(response)
        raise RegistryError(f"blob {self._files.digest}: a senseless answer, {status}")


class _Stream:
    """The bytes of an answer, taken in portions."""

    def __init__(self, response: httpx.Response) -> None:
        self._chunks = response.iter_raw()
        self._rest = b""
        self._ends = _length(response) is not None

    def take(self, size: int) -> Iterator[bytes]:
        """The next so many bytes, in pieces.  Raises: Passing if there are fewer."""
        while size:
            chunk = self._rest or next(self._chunks, b"")
            if not chunk:
                raise Passing("the registry sent fewer bytes than it said")
            piece, self._rest = chunk[:size], chunk[size:]
            size -= len(piece)
            yield piece

    def end(self) -> None:
        """Nothing more is wanted. A connection whose answer was read to its end is used again."""
        if self._ends and not self._rest:
            next(self._chunks, b"")


def _length(response: httpx.Response) -> int | None:
    """The bytes that an answer has, if it says so."""
    said = response.headers.get("Content-Length", "")
    return int(said) if _LENGTH.fullmatch(said) else None


class _Gathered:
    """Small pieces of one part, until they are worth a write."""

    def __init__(self, files: PartFiles, part: Part) -> None:
        self._files = files
        self._part = part
        self._clear()

    def _clear(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0
        self._since = time.monotonic()

    def add(self, piece: bytes) -> bool:
        """Was it time to write?"""
        self._pieces.append(piece)
        self._size += len(piece)
        late = time.monotonic() - self._since > GATHERED_FOR
        if self._size < GATHERED and len(self._pieces) < MOST_PIECES and not late:
            return False
        self.write()
        return True

    def write(self) -> None:
        pieces = self._pieces
        self._clear()
        if pieces:
            self._files.write(self._part, pieces)
