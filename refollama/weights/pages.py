"""Memory in large pages, where the system has them.

All weights of a model are read for each token. In pages of 4 kB a processor has to look up where
the next one lies, and begins anew to read ahead; in pages of 2 MB memory gives a seventh to a third
more. Nobody closes what is made here: it goes with the last tensor that lies in it.

Pages of a file count as memory of whoever has read them, until they are let go of.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

LARGE = 1 << 21  # bytes; of less, no large page can be made
PAGES, ENTRY = Path("/proc/self/pagemap"), 8  # bytes for each; Linux, admin-guide/mm/pagemap.rst
IN_MEMORY, SWAPPED, OF_A_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))


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


def let_go(start: int, nbytes: int) -> None:
    """What lies between these addresses takes no memory of this process, until it is read again,
    as far as it is pages of a mapped file. If something was written there, all of it stays."""
    first, last = -(-start // mmap.PAGESIZE), (start + nbytes) // mmap.PAGESIZE
    if sys.platform != "linux" or last <= first:
        return
    with suppress(OSError):  # a system that does not tell of its pages keeps them
        with PAGES.open("rb") as told:
            told.seek(first * ENTRY)
            pages = np.frombuffer(told.read((last - first) * ENTRY), np.uint64)
        there = pages[pages & (IN_MEMORY | SWAPPED) > 0]
        if len(there) and (there & OF_A_FILE).all():  # none, although they were read: no telling
            size = len(pages) * mmap.PAGESIZE
            _libc().madvise(first * mmap.PAGESIZE, size, mmap.MADV_DONTNEED)


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return libc


def _advised(memory: mmap.mmap) -> mmap.mmap:
    with suppress(OSError, AttributeError):  # a system without large pages does as well
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
