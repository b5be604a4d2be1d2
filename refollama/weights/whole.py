"""A file is there entirely, or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from pathlib import Path


def write_whole(target: Path, pieces: Iterable[bytes | memoryview], mode: int = 0o666) -> None:
    """A file that appears under its name entirely or not at all.  Raises: OSError.

    mode: who may do what with it, as far as the user's umask lets them.
    """
    partial = target.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
