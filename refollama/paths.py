"""Is it a path or a model's name, and is the file still the same? One answer for everybody."""

from __future__ import annotations

import os
from pathlib import Path

from refollama.errors import NotFound

PATH_STARTS = ("/", ".", "~")  # no name begins so: names begin with a letter, a digit or _


def is_path(text: str) -> bool:
    """Could this be nothing but a path?"""
    return text.startswith(PATH_STARTS)


def lies_here(text: str) -> bool:
    """Is it a GGUF file, seen from where we stand?  Then it is not taken for a name."""
    return text.endswith(".gguf") and os.path.isfile(text)


def file_state(path: Path) -> tuple[int, ...]:
    """What is another once the file was replaced or changed.  Raises: NotFound."""
    try:
        stat = os.stat(path)
    except OSError:
        raise NotFound(f"{path.name}: there is no such file") from None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
