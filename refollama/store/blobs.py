"""Blobs: files that are called by the SHA-256 of their bytes.

    blobs/sha256-2af3…           64 hex digits; `sha256:2af3…`, Ollama's older form, is read too
    blobs/sha256-k2x9…-partial   being written; renamed when whole, removed when not
    blobs/sha256-2af3…-partial*  on its way from a registry (see parts.py); stays

A blob exists entirely or not at all. Who works with blobs that no manifest names yet *holds* them;
a blob that came with such work and was never named by a manifest goes when its last holder does.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from refollama.errors import BadRequest, FormatError, StoreError
from refollama.store.lock import StoreLock

log = logging.getLogger(__name__)

CHUNK = 1 << 20  # bytes read or written in one step: large for the disk, small for the memory

_DIGEST = re.compile(r"sha256[:-]([0-9a-fA-F]{64})")
_SENTENCES = {
    errno.ENOSPC: "the disk is full: free some space or set OLLAMA_MODELS to another disk",
    errno.EDQUOT: "the disk quota is used up: free some space or set OLLAMA_MODELS elsewhere",
    errno.EACCES: "permission denied: check the owner of the models folder or set OLLAMA_MODELS",
    errno.EROFS: "the disk is read-only: set OLLAMA_MODELS to a folder that can be written",
}


def checked_digest(text: str) -> str:
    """`sha256:` and 64 lower-case hex digits.  The one gate through which digests become paths.

    Raises: BadRequest for anything else.
    """
    match = _DIGEST.fullmatch(text)
    if match is None:
        raise BadRequest(f"invalid digest format: {text[:80]!r} is not sha256: and 64 hex digits")
    return f"sha256:{match[1].lower()}"


class Blobs:
    """The blobs of one store.  Safe to use from several threads of one process.

    Raises: BadRequest for a digest that is none; StoreError when the disk says no.
    """

    def __init__(self, root: Path) -> None:
        self.folder = root / "blobs"
        # Taken for moments: to name a file, to write a manifest, to see what nobody names.
        self.lock = StoreLock(self.folder)
        self._held: Counter[str] = Counter()
        self._loose: set[str] = set()  # to be removed with their last holder, unless named by then

    # ---------------------------------------------------------------- reading

    def path(self, digest: str) -> Path:
        """Where the blob lies, or would lie."""
        hex_digits = checked_digest(digest).removeprefix("sha256:")
        dash, colon = (self.folder / f"sha256{sign}{hex_digits}" for sign in "-:")
        with disk("looking for a blob"):
            found = colon if colon.exists() and not dash.exists() else dash
            inside = os.path.dirname(os.path.realpath(found)) == os.path.realpath(self.folder)
        if not inside:
            raise StoreError(f"blob {digest[:19]}… is a link that leaves the store")
        return found

    def has(self, digest: str) -> bool:
        path = self.path(digest)
        with disk("looking for a blob"):
            return path.is_file()

    def size(self, digest: str) -> int:
        """In bytes.  Raises: StoreError when the blob is missing."""
        if not self.has(digest):
            raise StoreError(f"blob {checked_digest(digest)} is missing: pull or create it again")
        with disk("looking at a blob"):
            return self.path(digest).stat().st_size

    def read(self, digest: str, limit: int) -> bytes:
        """The whole of a small blob.  Raises: StoreError if missing, FormatError beyond `limit`."""
        self.size(digest)
        return read_small(self.path(digest), limit)

    def verify(self, digest: str) -> bool:
        """Do the bytes still hash to their name?  Reads all of them."""
        self.size(digest)
        found = hashlib.sha256()
        with disk("reading a blob"), self.path(digest).open("rb") as file:
            while chunk := file.read(CHUNK):
                found.update(chunk)
        return found.hexdigest() == checked_digest(digest).removeprefix("sha256:")

    # ---------------------------------------------------------------- writing

    def add(self, data: bytes | Iterable[bytes], *, expected: str = "", hold: bool = False) -> str:
        """Store bytes, whole or in chunks; their digest.  A blob that is there already is kept.

        Raises: BadRequest when they do not hash to the `expected` digest.
        """
        chunks = [data] if isinstance(data, bytes) else data
        writing = self._write(chunks, checked_digest(expected) if expected else "", hold)
        return _returned(writing)

    def add_file(self, source: Path, *, hold: bool = False) -> Generator[int, None, str]:
        """Copy a file, yielding the bytes done so far; returns the digest.  Closing undoes it.

        Raises: BadRequest unless it is a regular file that keeps still while it is read.
        """
        with regular(source) as file:
            before = _state(file)
            chunks = iter(lambda: _read_chunk(file), b"")
            return (yield from self._write(chunks, "", hold, lambda: _still(file, before, source)))

    def add_pieces(
        self, pieces: Iterable[bytes | memoryview], *, hold: bool = False
    ) -> Generator[int, None, str]:
        """Store bytes as they are made, yielding the count so far; returns the digest."""
        return (yield from self._write(pieces, "", hold))

    def adopt(self, written: Path, digest: str) -> None:
        """Name a file in the folder of blobs, whose bytes are on the disk and have this digest.

        If the blob is there already, the file stays what it is.
        """
        self._settle(written, checked_digest(digest), hold=False)

    def _write(
        self,
        chunks: Iterable[bytes | memoryview],
        expected: str,
        hold: bool,
        check: Callable[[], None] = lambda: None,
    ) -> Generator[int, None, str]:
        """Write, hash, check, rename: in this order."""
        found, done = hashlib.sha256(), 0
        with temporary(self.folder, prefix="sha256-", suffix="-partial") as file:
            for chunk in chunks:
                with disk("writing a blob"):
                    file.write(chunk)
                found.update(chunk)
                done += len(chunk)
                yield done
            check()
            digest = f"sha256:{found.hexdigest()}"
            if expected not in ("", digest):
                raise BadRequest(f'digest mismatch, expected "{expected}", got "{digest}"')
            sync(file)
            self._settle(Path(file.name), digest, hold)
        return digest

    def _settle(self, written: Path, digest: str, hold: bool) -> None:
        """Give a finished file its name, unless the same bytes have it already."""
        with self.lock, disk("naming a blob"):
            path = self.path(digest)
            new = not path.is_file()
            # A blob of another length is a damaged one: replaced by what was just hashed.
            if new or path.stat().st_size != written.stat().st_size:
                os.replace(written, path)
            if hold:
                self._held[digest] += 1
                self._loose |= {digest} if new else set()
            else:
                self._loose.discard(digest)

    # ---------------------------------------------------------------- holding and removing

    def hold(self, digest: str) -> None:
        """Keep a blob from being removed until it is released."""
        with self.lock:
            self._held[checked_digest(digest)] += 1

    def is_new(self, digest: str) -> bool:
        """Is it here only because of work that is still going on?"""
        return checked_digest(digest) in self._loose

    def release(self, digests: Iterable[str], named: Callable[[], Collection[str]]) -> None:
        """End a hold; loose blobs that nobody else holds and no manifest names are removed."""
        with self.lock:
            ended = Counter(digests)
            self._held -= ended  # Counter drops what reaches zero
            free = {digest for digest in ended if digest in self._loose - self._held.keys()}
            self._loose -= free
            try:
                self._remove(free - set(named()) if free else free)
            except StoreError as error:  # the manifests cannot be seen: only a loss of space
                log.warning("blobs are kept: %s", error)

    def discard(self, digests: Collection[str]) -> set[str]:
        """Remove blobs, each at once or as soon as nobody holds it any more; which went at once."""
        with self.lock:
            held = {digest for digest in digests if digest in self._held}
            self._loose |= held
            free = set(digests) - held
            self._remove(free)
        return free

    def _remove(self, digests: Iterable[str]) -> None:
        """What cannot be removed is only a loss of space: a warning, never a failure."""
        for digest in digests:
            try:
                self.path(digest).unlink(missing_ok=True)
            except (OSError, StoreError) as error:
                log.warning("blob %s could not be removed: %s", digest, error)


# -------------------------------------------------------------------- files, entirely or not at all


@contextmanager
def disk(doing: str) -> Iterator[None]:
    """Turns the system's errors into sentences; paths go to the log alone."""
    try:
        yield
    except OSError as error:
        log.warning("%s: %s", doing, error)
        reason = _SENTENCES.get(error.errno or 0, error.strerror or "unknown error")
        raise StoreError(f"{doing}: {reason}") from error


def free_space(folder: Path) -> int:
    """Bytes that may be written to the disk on which a folder lies, or will lie."""
    with disk("looking for free space"):
        there = next((each for each in (folder, *folder.parents) if each.exists()), Path("/"))
        return shutil.disk_usage(there).free


@contextmanager
def temporary(folder: Path, *, prefix: str, suffix: str) -> Iterator[BinaryIO]:
    """A new file (0600) in `folder`, which is made (0755); gone at the end unless renamed."""
    with disk("making a file in the models folder"):
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        file = tempfile.NamedTemporaryFile(  # noqa: SIM115
            prefix=prefix, suffix=suffix, dir=folder, delete=False
        )
    try:
        yield cast(BinaryIO, file)
    finally:
        _close_and_remove(cast(BinaryIO, file))


def _close_and_remove(file: BinaryIO) -> None:
    """Closing writes what is buffered, so a full disk may speak up here once more: too late."""
    for step in (file.close, lambda: Path(file.name).unlink(missing_ok=True)):
        try:
            step()
        except OSError as error:
            log.warning("a temporary file: %s", error)


def sync(file: BinaryIO) -> None:
    """All bytes on the disk: only then may the file take its name."""
    with disk("writing to the models folder"):
        file.flush()
        os.fsync(file.fileno())


def read_small(path: Path, limit: int) -> bytes:
    """All bytes of a regular file.  Raises: FormatError if there are more than `limit`."""
    try:
        with regular(path) as file, disk("reading from the models folder"):
            data = file.read(limit + 1)
    except BadRequest as error:  # the user named no file: the store is at fault
        raise StoreError(f"the models folder is damaged: {error}") from None
    if len(data) > limit:
        raise FormatError(f"{path.name} is longer than {limit} bytes")
    return data


@contextmanager
def regular(path: Path) -> Iterator[BinaryIO]:
    """Open for reading; nothing that could block or never end.

    Raises: BadRequest, in one sentence for all reasons: it does not tell what exists.
    """
    try:
        # O_NONBLOCK: opening a pipe would otherwise wait for its writer.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError):  # ValueError: a NUL in the path
        raise _not_regular(path) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _not_regular(path)
    with open(handle, "rb") as file:
        yield file


def _not_regular(path: Path) -> BadRequest:
    return BadRequest(f"{path.name[:80]!r} is not a regular file that can be read")


def _read_chunk(file: BinaryIO) -> bytes:
    with disk("reading a file"):
        return file.read(CHUNK)


def _state(file: BinaryIO) -> tuple[int, int]:
    """Length in bytes and time of the last change in nanoseconds."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def _still(file: BinaryIO, before: tuple[int, int], source: Path) -> None:
    if _state(file) != before:
        raise BadRequest(f"{source.name!r} was changed while it was read: try again")


def _returned(steps: Generator[int, None, str]) -> str:
    """Run to the end; what the generator returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return str(end.value)
