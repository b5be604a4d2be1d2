"""Where do a model's weights lie?  Mapped from the file, read into memory, locked there, on a GPU.

A net comes from `load.py` with its weights mapped: the system reads a page when it is first
touched, and may drop it again. These are transformations of the finished net; the model itself
never asks where it lies.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import logging
import mmap
import os
import sys
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from refollama.errors import BadOption
from refollama.models.llama import Llama
from refollama.models.llava import Llava
from refollama.models.meter import Count, unheard
from refollama.options import Options

log = logging.getLogger(__name__)

FOR_WEIGHTS = 0.8  # of a GPU's free memory


class Placement(NamedTuple):
    """The options that decide it, and what it is made of; for others a model is loaded anew."""

    num_gpu: int
    main_gpu: int
    use_mmap: bool
    use_mlock: bool
    numa: bool
    fast: bool
    prompt_bits: int

    @classmethod
    def of(cls, options: Options) -> Placement:
        wanted = cls(*(getattr(options, name) for name in cls._fields))
        if not torch.cuda.is_available() or not wanted.num_gpu:
            return wanted._replace(num_gpu=0, main_gpu=0)
        return wanted


def passes(wanted: Placement) -> int:
    """How often `place` and `hasten` go through the weights."""
    return int(wanted.numa or not wanted.use_mmap) + bool(wanted.num_gpu) + wanted.fast


def place(
    net: Llama,
    path: Path,
    wanted: Placement,
    count: Count = unheard,
    projector: Path | None = None,
) -> None:
    """Put the weights of a net, which are mapped from the file at `path`, where they are wanted.

    projector: the file that its eyes are mapped from, if it has some.
    count: is told the bytes of what was put somewhere.
    What this machine cannot do is said in the log, with the reason, and left undone.
    """
    if wanted.numa or not wanted.use_mmap:
        with interleaved() if wanted.numa else contextlib.nullcontext():
            read_in(net, count)
    if wanted.num_gpu:
        to_gpu(net, chosen_gpu(wanted.main_gpu), wanted.num_gpu, count)
    if wanted.use_mlock:
        paths = [path] if projector is None else [path, projector]
        lock(net, paths, mapped=wanted.use_mmap and not wanted.numa)


# ── on a GPU ──────────────────────────────────────────────────────────────────────────────────


def to_gpu(net: Llama, device: torch.device, layers: int, count: Count = unheard) -> None:
    """Move the last so many layers to a GPU; one more than there are takes the output along.

    −1: as many as fit. The embedding stays: it is a table in which a few rows are looked up. Eyes
    go along with any layer.
    """
    if layers < 0:
        layers = fitting([nbytes(block) for block in net.blk], *room(net, device))
    for block in list(net.blk)[max(0, len(net.blk) - layers) :]:
        block.to(device)
        count(nbytes(block))
    if layers > len(net.blk):
        net.output_norm.to(device)
        net.output.to(device)
    if layers and isinstance(net, Llava):
        net.v.to(device)
        net.mm.to(device)


def fitting(blocks: Sequence[int], output: int, free: int) -> int:
    """How many layers fit into the free bytes, counted from the last; with the output, one more.

    Example: three blocks of 10 and an output of 5: 25 bytes hold two, 40 hold all four.
    """
    if sum(blocks) + output <= free:
        return len(blocks) + 1
    count, left = 0, free
    for size in reversed(blocks):
        left -= size
        if left < 0:
            break
        count += 1
    return count


def room(net: Llama, device: torch.device) -> tuple[int, int]:
    """Bytes of the output's parts, and those that weights may fill on this GPU.

    The rest is for caches, and for the largest matrix, which is unpacked while it is used.
    """
    free, _ = torch.cuda.mem_get_info(device)
    config = net.config
    rows = (max(layer.d_ff, layer.n_heads * config.d_head) for layer in config.layers)
    widest = max(net.n_vocab, *rows)
    unpacked = torch.float32.itemsize * config.d_model * widest
    eyes = nbytes(net.v) + nbytes(net.mm) if isinstance(net, Llava) else 0
    left = int(free * FOR_WEIGHTS) - 2 * unpacked - eyes
    return nbytes(net.output) + nbytes(net.output_norm), left


def nbytes(module: torch.nn.Module) -> int:
    """Bytes of a module's weights, as they are packed."""
    return sum(tensor.nbytes for tensor in module.buffers())


def chosen_gpu(number: int) -> torch.device:
    """The GPU of this number.  Raises: BadOption, with the numbers that there are."""
    count = torch.cuda.device_count()
    if number >= count:
        raise BadOption(f"option 'main_gpu' is {number}, but the GPUs are 0 … {count - 1}")
    return torch.device("cuda", number)


# ── in main memory ────────────────────────────────────────────────────────────────────────────


def read_in(net: torch.nn.Module, count: Count = unheard) -> None:
    """Read all weights now, into memory of our own; what shares a tensor goes on sharing it."""
    copies: dict[int, Tensor] = {}
    for module in net.modules():
        for name, tensor in module._buffers.items():
            if tensor is not None and id(tensor) not in copies:
                copies[id(tensor)] = tensor.clone()
                count(tensor.nbytes)
            module._buffers[name] = copies.get(id(tensor))


@contextlib.contextmanager
def interleaved() -> Iterator[None]:
    """What is allocated meanwhile is spread over the memory of all processors (NUMA nodes).

    With one node there is nothing to spread. Source: numa(3).
    """
    numa = _libnuma()
    if numa is None:
        yield
        return
    everywhere = ctypes.c_void_p.in_dll(numa, "numa_all_nodes_ptr")
    nowhere = ctypes.c_void_p.in_dll(numa, "numa_no_nodes_ptr")
    numa.numa_set_interleave_mask(everywhere)
    try:
        yield
    finally:
        numa.numa_set_interleave_mask(nowhere)


def _libnuma() -> Any:
    """The system's library, or None, with the reason in the log."""
    name = ctypes.util.find_library("numa")
    if name is None:
        log.warning("option 'numa' has no effect: it needs the library libnuma")
        return None
    numa = ctypes.CDLL(name)
    if numa.numa_available() < 0:
        log.warning("option 'numa' has no effect: this system has no NUMA")
        return None
    return numa


def lock(net: torch.nn.Module, paths: Sequence[Path], *, mapped: bool) -> None:
    """Keep the weights from being swapped out, for as long as the net lives.

    A mapped file is locked through a second, shared map of it: locking the net's own, which may be
    written to, would copy every page.
    """
    here = (tensor for tensor in net.buffers() if not tensor.is_cuda)
    for area in map(_shared_map, paths) if mapped else map(_bytes, here):
        if not _mlock(area):
            break
        weakref.finalize(net, _munlock, area)


def _shared_map(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _bytes(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()


def _mlock(area: np.ndarray[Any, np.dtype[np.uint8]]) -> bool:
    """Lock these bytes' pages; if the system says no, the log says why."""
    if sys.platform == "win32":
        log.warning("option 'use_mlock' has no effect on Windows")
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlock(ctypes.c_void_p(area.ctypes.data), ctypes.c_size_t(area.nbytes)) == 0:
        return True
    reason = os.strerror(ctypes.get_errno())
    log.warning("weights are not locked in memory: %s (`ulimit -l` says how much may be)", reason)
    return False


def _munlock(area: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    libc = ctypes.CDLL(None)
    libc.munlock(ctypes.c_void_p(area.ctypes.data), ctypes.c_size_t(area.nbytes))
