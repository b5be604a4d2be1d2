"""Memory in large pages, where the system has them.

All weights of a model are read for each token. In pages of 4 kB a processor has to look up where
the next one lies, and begins anew to read ahead; in pages of 2 MB memory gives a seventh to a third
more. Nobody closes what is made here: it goes with the last tensor that lies in it.
"""

from __future__ import annotations

import mmap
import sys
from contextlib import suppress
from typing import BinaryIO

LARGE = 1 << 21  # bytes; of less, no large page can be made


def copy_on_write(file: BinaryIO) -> mmap.mmap:
    """All of a file as memory; what is written into it stays ours. (torch warns at every tensor
    that is made from memory that it may not write.)  Raises: OSError."""
    if sys.platform != "linux":
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    # Linux counts a writable private map as memory that may be needed, and refuses a file larger
    # than RAM. Nobody writes here, so nothing need be reserved. Python named the flag late.
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    access = mmap.PROT_READ | mmap.PROT_WRITE
    flags = mmap.MAP_PRIVATE | no_reserve
    return _advised(mmap.mmap(file.fileno(), 0, flags=flags, prot=access))


def fresh(nbytes: int) -> mmap.mmap:
    """Memory of our own, with zeros in it."""
    if sys.platform != "linux":
        return mmap.mmap(-1, nbytes)
    return _advised(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def _advised(memory: mmap.mmap) -> mmap.mmap:
    with suppress(OSError, AttributeError):  # a system without large pages does as well
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
