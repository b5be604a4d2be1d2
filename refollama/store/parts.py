"""A blob that is on its way: cut into parts; and how they lie on the disk as they come in, each
with a record of how far it came.

    blobs/sha256-2af3…-partial       the data, of its final length, written in several places
    blobs/sha256-2af3…-partial-0     {"N":0,"Offset":0,"Size":100000000,"Completed":2097152}
    blobs/sha256-2af3…-partial-1     {"N":1,"Offset":100000000,"Size":100000000,"Completed":0}

This is Ollama's form: what one of us left, the other goes on with.

A record is written after its data, so it never claims what is not there. That holds for a process
that is killed: what it wrote, the system keeps. It does not hold for a machine that loses power,
since waiting for the disk at every step would cost more than it saves: the hash of the whole tells,
and the blob is fetched anew. Before it takes its name, everything is on the disk.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from refollama.errors import FormatError, StoreError
from refollama.store.blobs import Blobs, checked_digest, disk, log, read_small
from refollama.store.manifest import read_object, to_json

# A blob is cut into 64 parts, but no part is smaller or larger than this.  Units: bytes.
PARTS = 64
SMALLEST = 100_000_000
LARGEST = 1_000_000_000

RECORD_LIMIT = 4096  # bytes of a record that are read; it has about eighty
_KEYS = ("N", "Offset", "Size", "Completed")


@dataclass(slots=True)
class Part:
    """A range of a blob, and how many of its bytes have come, or gone.  Units: bytes."""

    number: int
    offset: int
    size: int
    completed: int = 0

    @property
    def end(self) -> int:
        return self.offset + self.size

    @property
    def position(self) -> int:
        """Where its next byte goes."""
        return self.offset + self.completed

    @property
    def left(self) -> int:
        return self.size - self.completed

    def record(self) -> bytes:
        """One line, as long as it will be at the end: it can be overwritten in place."""
        line = self._line(self.completed)
        return line.ljust(len(self._line(self.size))) + b"\n"

    def _line(self, completed: int) -> bytes:
        values = (self.number, self.offset, self.size, completed)
        return to_json(dict(zip(_KEYS, values, strict=True))).encode()


def planned(size: int) -> list[Part]:
    """A blob of so many bytes, cut into parts; the last one is shorter.

    Example: 250 MB → 100 MB, 100 MB, 50 MB
    """
    step = min(max(size // PARTS, SMALLEST), LARGEST)
    return [
        Part(number, offset, min(step, size - offset))
        for number, offset in enumerate(range(0, size, step))
    ]


def parsed(data: bytes) -> Part:
    """Raises: FormatError for a record that makes no sense."""
    found = read_object(data, "part")
    number, offset, size, completed = (_natural(found.get(key)) for key in _KEYS)
    if not 0 <= completed <= size or size == 0:
        raise FormatError("part: more is completed than there is")
    return Part(number, offset, size, completed)


def _natural(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise FormatError("part: its numbers must be whole")
    return value


def left_over(blobs: Blobs, digest: str, size: int) -> int:
    """How many bytes of a blob an earlier try has left here."""
    with disk("reading the parts of a blob"):
        found = _recorded(_place(blobs, digest), size)
    return sum(part.completed for part in found or ())


def sweep(blobs: Blobs, digests: Iterable[str]) -> None:
    """Remove what earlier tries have left of some blobs, unless somebody is writing there.

    What cannot be removed is only a loss of space: a warning, never a failure.
    """
    for digest in digests:
        try:
            _sweep(blobs, digest)
        except StoreError as error:
            log.warning("parts are kept: %s", error)


def _sweep(blobs: Blobs, digest: str) -> None:
    path = _place(blobs, digest)
    with disk("looking for parts"):
        if not path.exists() and not _records_of(path):
            return
    files = PartFiles(blobs, digest, 0)
    if files.open():
        try:
            files.discard()
        finally:
            files.close()


class PartFiles:
    """The files of one blob that is on its way; who has them open has them alone.

    Raises: StoreError when the disk says no.
    """

    def __init__(self, blobs: Blobs, digest: str, size: int) -> None:
        self.digest = checked_digest(digest)
        self.size = size
        self.parts: Sequence[Part] = ()
        self._blobs = blobs
        self._path = _place(blobs, digest)
        self._handle: int | None = None

    # ---------------------------------------------------------------- opening and closing

    def open(self) -> bool:
        """False if somebody else is writing there, be it another process."""
        with disk("opening a blob in parts"):
            self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | _SAFELY, 0o644)
            if _locked(handle) and _is_at(handle, self._path):
                self._handle = handle
                return True
            os.close(handle)
        return False

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)

    def load(self) -> None:
        """Go on with the parts that are there; without any that make sense, begin with new ones."""
        with disk("reading the parts of a blob"):
            found = _recorded(self._path, self.size)
        if found is None:
            self.begin()
        else:
            self.parts = found

    def begin(self) -> None:
        """With nothing, whatever is there."""
        with disk("making the parts of a blob"):
            self._remove_records()
            for size in (0, self.size):
                os.ftruncate(self._open_handle, size)
            self.parts = planned(self.size)
            for part in self.parts:
                self._record(part)

    # ---------------------------------------------------------------- data

    @property
    def completed(self) -> int:
        """Bytes that are here."""
        return sum(part.completed for part in self.parts)

    @property
    def prefix(self) -> int:
        """Bytes that are here from the start on, without a gap."""
        end = 0
        for part in self.parts:
            end = part.position
            if part.left:
                break
        return end

    def write(self, part: Part, chunks: Sequence[bytes]) -> None:
        """The next bytes of a part.  Several threads may write, each a part of its own."""
        with disk("writing a blob"):
            _write_all(self._open_handle, chunks, part.position)
            part.completed += sum(map(len, chunks))
            self._record(part)

    def read(self, into: memoryview, at: int) -> int:
        """Fill `into` with what was written at an offset; how many bytes that were."""
        with disk("reading a blob"):
            size = os.preadv(self._open_handle, [into], at)
        if size == 0:
            raise StoreError("reading a blob: the file became shorter while it was written")
        return size

    # ---------------------------------------------------------------- the end

    def finish(self) -> None:
        """All bytes are here and have the right hash: the blob gets its name."""
        with disk("writing to the models folder"):
            os.fsync(self._open_handle)
        self._blobs.adopt(self._path, self.digest)
        self.discard()

    def discard(self) -> None:
        """Nothing stays."""
        with disk("removing the parts of a blob"):
            self._remove_records()  # first: as long as the data lies there, it is ours alone
            self._path.unlink(missing_ok=True)

    def _remove_records(self) -> None:
        for path in _records_of(self._path):
            path.unlink(missing_ok=True)

    def _record(self, part: Part) -> None:
        """One small write over the old record: a reader sees the one or the other."""
        path = _numbered(self._path, part.number)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | _SAFELY, 0o644)
        try:
            os.pwrite(handle, part.record(), 0)
        finally:
            os.close(handle)

    @property
    def _open_handle(self) -> int:
        assert self._handle is not None, "open() comes first"
        return self._handle


# -------------------------------------------------------------------- files

_SAFELY = os.O_CLOEXEC | os.O_NOFOLLOW
_WITHOUT_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)


def _place(blobs: Blobs, digest: str) -> Path:
    """Where the data lies: with a dash, unless Ollama began it with its older colon."""
    hex_digits = checked_digest(digest).removeprefix("sha256:")
    dash, colon = (blobs.folder / f"sha256{sign}{hex_digits}-partial" for sign in "-:")
    with disk("looking for a blob"):
        return colon if colon.exists() and not dash.exists() else dash


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}-{number}")


def _records_of(path: Path) -> list[Path]:
    return list(path.parent.glob(f"{path.name}-*"))


def _recorded(path: Path, size: int) -> list[Part] | None:
    """The parts as they were left; None unless they make up the whole of the file."""
    try:
        found = [(parsed(read_small(one, RECORD_LIMIT)), one) for one in _records_of(path)]
        whole = path.stat().st_size == size
    except (FormatError, StoreError, FileNotFoundError):
        return None
    named = all(_numbered(path, part.number) == one for part, one in found)
    parts = sorted((part for part, _ in found), key=lambda part: part.offset)
    return parts if whole and named and _covered(parts) == size else None


def _covered(parts: Iterable[Part]) -> int | None:
    """Where the last part ends, if each begins where the one before has ended."""
    end = 0
    for part in parts:
        if part.offset != end:
            return None
        end = part.end
    return end


def _locked(handle: int) -> bool:
    """Is it ours?  On a disk that knows no locks everything is."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _WITHOUT_LOCKS
    return True


def _is_at(handle: int, path: Path) -> bool:
    """Not if the file was given another name after it had been opened."""
    return path.exists() and os.path.samestat(os.fstat(handle), os.stat(path))


def _write_all(handle: int, chunks: Sequence[bytes], at: int) -> None:
    """The system may take less than it is given."""
    written = os.pwritev(handle, chunks, at)
    if written == sum(map(len, chunks)):
        return
    data = b"".join(chunks)
    while written < len(data):
        written += os.pwrite(handle, data[written:], at + written)
