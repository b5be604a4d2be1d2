"""The downloads that go on: each for everybody who wants its blob.

A download belongs to nobody: pulls join it and leave it. With the last one it ends, and what has
come stays on the disk for the next.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from refollama.errors import Abandoned, RegistryError
from refollama.store.blobs import Blobs
from refollama.store.manifest import Layer
from refollama.store.parts import PartFiles
from refollama.store.registry.incoming import Incoming
from refollama.store.registry.session import Registry

LOCK_EVERY = 0.1  # seconds; how often we look whether another process has left the blob
ENDING = 1.0  # seconds that a cancelled download of our own may take to leave it

# -------------------------------------------------------------------- who shares what


class Line:
    """Connections to a registry that a pull and its downloads share; the last one closes them."""

    def __init__(self, registry: Registry, source: str) -> None:
        self.registry = registry
        self.source = source  # the model in whose name the registry is asked
        self._users = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Line:
        with self._lock:
            self._users += 1
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            self.registry.close()


class Downloads:
    """The downloads of one store that are going on, for all pulls of this process."""

    def __init__(self, blobs: Blobs) -> None:
        self.blobs = blobs
        self._lock = threading.Lock()
        self._going_on: dict[tuple[str, int], Download] = {}

    @contextmanager
    def joined(self, line: Line, layer: Layer) -> Iterator[Download]:
        """The download of a blob: one that goes on, or a new one.  The last to leave ends it."""
        download = self._join(line, layer)
        try:
            yield download
        finally:
            self._leave(download)

    def _join(self, line: Line, layer: Layer) -> Download:
        key = layer.digest, layer.size
        with self._lock:
            download = self._going_on.get(key)
            if download is None:
                download = Download(self.blobs, line, layer, self._forget)
                download.start()
                self._going_on[key] = download
            download.users += 1
        return download

    def _leave(self, download: Download) -> None:
        with self._lock:
            download.users -= 1
            last = download.users == 0
            if last:  # at the same moment, so that nobody joins what is about to end
                self._drop(download)
        if last:
            download.cancel()

    def _forget(self, download: Download) -> None:
        """It has come to its end, good or bad: nobody joins it any more."""
        with self._lock:
            self._drop(download)

    def _drop(self, download: Download) -> None:
        if self._going_on.get(download.key) is download:
            del self._going_on[download.key]


# -------------------------------------------------------------------- one download


class Download:
    """One blob, fetched by threads of its own.

    `begun`: it has the part files to itself, and `resumed` says how many bytes lay in them.
    `ended`: well, or with a `failure`.  What has ended has begun.
    """

    def __init__(
        self, blobs: Blobs, line: Line, layer: Layer, forget: Callable[[Download], None]
    ) -> None:
        self.key = layer.digest, layer.size
        self.source = line.source
        self.users = 0
        self.begun, self.ended = threading.Event(), threading.Event()
        self.waits = False  # for another process that fetches the same blob
        self.resumed = 0
        self.failure: Exception | None = None
        self._blobs = blobs
        self._line = line
        self._layer = layer
        self._forget = forget
        self._files = PartFiles(blobs, layer.digest, layer.size)
        self._incoming = Incoming(self._files, line.registry)
        self._cancelled = threading.Event()

    @property
    def completed(self) -> int:
        """Bytes that are here."""
        return self._files.completed

    def start(self) -> None:
        self._line.__enter__()
        # A daemon: the parts lie safe at any moment, so nobody has to wait for it at the end.
        threading.Thread(target=self._run, name="download", daemon=True).start()

    def cancel(self) -> None:
        """Soon no more bytes come; those that have come stay."""
        self._cancelled.set()
        self._incoming.cancel()
        if not self.ended.is_set():
            self._line.registry.close()  # wakes who waits for bytes

    def _run(self) -> None:
        try:
            if self._alone():
                self._fetch()
        except Exception as error:
            self.failure = error
        finally:
            self._files.close()
            self._forget(self)
            self.ended.set()
            self.begun.set()
            self._line.__exit__()

    def _alone(self) -> bool:
        """Wait until nobody else writes to the files; False if the blob is there then."""
        start = time.monotonic()
        while not self._files.open():
            if self._cancelled.wait(LOCK_EVERY):
                raise Abandoned("the transfer was cancelled")
            self.waits = time.monotonic() - start > ENDING
        if is_here(self._blobs, self._layer):
            self._files.discard()
            return False
        return True

    def _fetch(self) -> None:
        """Fetch what is missing, and compare.  What an earlier try had left may be damaged, which
        nobody could see before it was whole: then all of it is fetched, once."""
        self._files.load()
        self.resumed = self._files.completed
        self.begun.set()
        found = self._incoming.fetch()
        if found != self._layer.digest and self.resumed:
            self._files.begin()
            self.resumed = 0
            found = self._incoming.fetch()
        if found != self._layer.digest:
            self._files.discard()
            raise RegistryError(
                "digest mismatch, file must be downloaded again: "
                f"want {self._layer.digest}, got {found}"
            )
        self._files.finish()


def is_here(blobs: Blobs, layer: Layer) -> bool:
    """A blob has its name only after its bytes were hashed: what can have gone wrong since then
    shows in its length, or costs as much to find out as to load the model."""
    return blobs.has(layer.digest) and blobs.size(layer.digest) == layer.size
