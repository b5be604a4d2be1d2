"""One lock for a store: for the threads of this process, and for other processes with it."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path


class StoreLock:
    """Re-entrant.  Between processes it lies on the folder itself, so it leaves no file behind,
    and goes with its process.

    A folder that is not there yet, or a disk that knows no locks, leaves the lock of the threads.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._threads = threading.RLock()
        self._depth = 0
        self._handle: int | None = None

    def __enter__(self) -> None:
        self._threads.acquire()
        try:
            if self._depth == 0:
                self._handle = _locked(self._folder)
        except BaseException:  # Ctrl-C while we wait
            self._threads.release()
            raise
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0 and self._handle is not None:
            os.close(self._handle)
            self._handle = None
        self._threads.release()


def _locked(folder: Path) -> int | None:
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except BaseException as error:
        os.close(handle)
        if isinstance(error, OSError):
            return None
        raise
    return handle
