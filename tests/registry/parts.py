"""What is there of a blob that is being fetched, read from its files alone.

Source: section 7.3 of the notes on Ollama: `<blob>-partial` has the bytes at their offsets, and
`<blob>-partial-<N>` says of each part {"N":0,"Offset":0,"Size":100000000,"Completed":0}.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

Piece = tuple[int, int]  # offset, end


def whole(root: Path, digest: str) -> bool:
    return _path(root, digest).exists()


def claimed(root: Path, digest: str) -> Iterator[Piece]:
    """What the part files say is on the disk."""
    path = _path(root, digest)
    for part in path.parent.glob(f"{path.name}-partial-*"):
        record = json.loads(part.read_bytes())
        if record["Completed"]:
            yield record["Offset"], record["Offset"] + record["Completed"]


def true_claims(root: Path, digest: str, truth: bytes | Path) -> bool:
    """Is every byte that is claimed the right one?"""
    path = _path(root, digest)
    partial = path.with_name(f"{path.name}-partial")
    return all(
        _bytes(partial, first, end) == _bytes(truth, first, end)
        for first, end in claimed(root, digest)
    )


def overlap(pieces: Iterable[Piece], others: Iterable[Piece]) -> int:
    """Bytes that are in both."""
    others = list(others)
    return sum(
        max(0, min(end, other_end) - max(first, other))
        for first, end in pieces
        for other, other_end in others
    )


def size_of(pieces: Iterable[Piece]) -> int:
    return sum(end - first for first, end in pieces)


def _path(root: Path, digest: str) -> Path:
    return root / "blobs" / digest.replace(":", "-")


def _bytes(data: bytes | Path, first: int, end: int) -> bytes:
    if isinstance(data, bytes):
        return data[first:end]
    with data.open("rb") as file:
        file.seek(first)
        return file.read(end - first)
