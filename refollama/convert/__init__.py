"""CHECKPOINTS → GGUF: folders with safetensors, as researchers have them. Without torch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from refollama.convert.checkpoint import Converted, convert
from refollama.convert.folder import Folder, is_checkpoint
from refollama.errors import StoreError

__all__ = ["Converted", "Folder", "as_files", "convert", "is_checkpoint"]


@contextmanager
def as_files(
    folder: Path, moved: Callable[[int, int], None] = lambda done, size: None
) -> Iterator[list[Path]]:
    """A checkpoint as GGUF files: the language model, and a projector behind it if it can see.

    They lie where temporary files do (TMPDIR) and are gone afterwards; who has mapped them by then
    may go on. `moved` is told the bytes that are written, and those that will be.
    Raises: FormatError, UnsupportedModel, NotFound, StoreError.
    """
    parts = convert(Folder.at(folder))
    size, done = sum(part.size for part in parts), 0
    with tempfile.TemporaryDirectory(prefix="refollama-") as place:
        paths = []
        for part in parts:
            path = Path(place, f"{part.kind}.gguf")
            for length in _written(path, part):
                moved(done := done + length, size)
            paths.append(path)
        yield paths


def _written(path: Path, part: Converted) -> Iterator[int]:
    """The bytes of each piece, when it is in the file.  Raises: StoreError if the disk says no."""
    try:
        with path.open("xb") as file:
            for piece in part.pieces():
                file.write(piece)
                yield len(piece)
    except OSError as problem:
        raise StoreError(f"{path}: {problem.strerror}") from problem
