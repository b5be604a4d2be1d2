"""A model in the making: blobs first, the manifest last, and nothing left behind on failure."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable
from pathlib import Path

from refollama.errors import FormatError, ModelNotFound, StoreError
from refollama.store.blobs import Blobs
from refollama.store.manifest import Manifest, Manifests
from refollama.store.name import Name
from refollama.store.parts import sweep

log = logging.getLogger(__name__)


class Draft:
    """Holds the blobs of one model until its manifest is written.

    with store.draft() as draft:
        digest = draft.add(b"...")
        draft.commit(name, manifest)      # without this line, the end removes what is new

    Raises: StoreError when the disk says no.
    """

    def __init__(self, blobs: Blobs, manifests: Manifests, prune: bool) -> None:
        self._blobs = blobs
        self._manifests = manifests
        self._prune = prune
        self._held: list[str] = []

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, *_: object) -> None:
        self._blobs.release(self._held, self._manifests.named)
        self._held = []

    def add(self, data: bytes) -> str:
        """Store a small blob; its digest."""
        return self._kept(self._blobs.add(data, hold=True))

    def add_file(self, source: Path) -> Generator[int, None, str]:
        """Copy a file into the store, yielding the bytes done so far; returns the digest."""
        return self._kept((yield from self._blobs.add_file(source, hold=True)))

    def add_pieces(self, pieces: Iterable[bytes | memoryview]) -> Generator[int, None, str]:
        """Store what is made piece by piece, yielding the bytes so far; returns the digest."""
        return self._kept((yield from self._blobs.add_pieces(pieces, hold=True)))

    def use(self, digest: str) -> str:
        """Rely on a blob that is there already."""
        self._blobs.hold(digest)
        return self._kept(digest)

    def is_new(self, digest: str) -> bool:
        """Did the blob come with this work, or with other work that still goes on?"""
        return self._blobs.is_new(digest)

    def commit(self, name: Name, manifest: Manifest, *, newline: bool = True) -> None:
        """Write the manifest; what the model of that name had, and nobody names now, is removed.

        `newline`: Ollama ends with one what it creates, but not what it pulls.
        Raises: StoreError when one of its blobs has vanished meanwhile.
        """
        with self._blobs.lock:
            name = self._manifests.match(name)
            missing = [digest for digest in manifest.digests if not self._blobs.has(digest)]
            if missing:
                raise StoreError(f"blob {missing[0]} is missing: pull or create its model again")
            replaced = digests_of(self._manifests, name)
            self._manifests.write(name, manifest.to_bytes(newline=newline))
            if self._prune:
                prune(self._blobs, self._manifests, replaced)

    def _kept(self, digest: str) -> str:
        self._held.append(digest)
        return digest


def digests_of(manifests: Manifests, name: Name) -> frozenset[str]:
    """Of a model that is about to be replaced; a broken manifest names nothing for sure."""
    try:
        return manifests.read(name).manifest.digests
    except (ModelNotFound, FormatError, StoreError):
        return frozenset()


def prune(blobs: Blobs, manifests: Manifests, digests: frozenset[str]) -> None:
    """Remove those of the blobs that no manifest names, with what is here of them in parts; none
    if a manifest cannot be read.
    """
    with blobs.lock:
        if not digests:
            return
        if not manifests.all_readable():
            log.warning("some manifest cannot be read: no blobs are removed, it may name them")
            return
        sweep(blobs, blobs.discard(digests - manifests.named()))
