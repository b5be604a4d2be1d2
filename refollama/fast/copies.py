"""Copies on disk: what a file's matrices were made into, mapped when that file is loaded again.

    refollama warm MODEL ── keep ──► ~/.cache/refollama/copies
    any load afterwards ─── kept ──► the same tensors, mapped: nothing is made, processes share them

To lay a thousand million weights in lanes takes seconds, and memory of each process for itself.
Copies belong to a file as it is: one that was changed or removed loses them with the next load.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from refollama.errors import FormatError, RefollamaError, StoreError
from refollama.fast import half, lanes, nibbles, pieces
from refollama.fast.experts import FastExperts
from refollama.fast.half import HalfLinear
from refollama.fast.laned import LaneLinear
from refollama.fast.nibbles import Int4Linear
from refollama.fast.prepared import PreparedLinear
from refollama.fast.routines import cache_folder, is_ours
from refollama.models.llama import Llama
from refollama.weights.pages import copy_on_write
from refollama.weights.safetensors import Array, Made, encoded, open_safetensors
from refollama.weights.whole import write_whole

SOURCES = "sources"  # the tensor that says, as JSON, of which files the others were made
DTYPES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}

log = logging.getLogger(__name__)


def folder() -> Path:
    """Where copies are kept."""
    return cache_folder("copies")


def path_of(sources: Sequence[Path]) -> Path:
    """Of these files as they are now, by this torch and this code, for such a processor.

    Raises: OSError if one is not there.
    """
    stats = [(str(path.resolve()), path.stat()) for path in sources]
    told = [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]
    name = hashlib.sha256(json.dumps([_maker(), told]).encode()).hexdigest()[:32]
    return folder() / f"{name}.safetensors"


@cache
def _maker() -> list[str]:
    code = map(inspect.getsource, (nibbles, half, lanes, pieces))
    return [torch.__version__, torch.backends.cpu.get_cpu_capability(), *code]


def copied(net: Llama) -> dict[str, PreparedLinear]:
    """The parts of a net that have copies to keep, by name; an expert's ends in its number."""
    found: dict[str, PreparedLinear] = {}
    for name, part in net.named_modules():
        each = {name: part}
        if isinstance(part, FastExperts):
            each = {f"{name}.{number}": one for number, one in enumerate(part.each)}
        for its, one in each.items():
            if isinstance(one, Int4Linear | HalfLinear | LaneLinear) and one.copied_bytes:
                found[its] = one
    return found


def keep(net: Llama, sources: Sequence[Path]) -> int:
    """Write the copies of a net that was loaded from these files: all of them, or nothing.

    → bytes; 0 if it has none.  Raises: RefollamaError if the disk says no.
    """
    made = [
        (f"{name}/{number}", one)
        for name, part in copied(net).items()
        for number, one in enumerate(part.prepared())
    ]
    tensors = {name: _as_stored(one) for name, one in sorted(made, key=_in_pieces)}
    if not tensors:
        return 0
    told = json.dumps([str(path.resolve()) for path in sources]).encode()
    tensors[SOURCES] = Made("U8", (len(told),), [np.frombuffer(told, np.uint8)])
    try:
        path = path_of(sources)
        folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(path, encoded(tensors), mode=0o600)
    except OSError as problem:
        raise RefollamaError(f"copies could not be kept: {problem.strerror}") from problem
    return path.stat().st_size


def _in_pieces(made: tuple[str, Tensor]) -> tuple[str, str]:
    """Sorted by it, numbers of one type and block follow each other, as in `pieces.gathered`."""
    name, one = made
    owner, _, _ = name.rpartition(".")
    return owner, str(one.dtype)


def are_kept(net: Llama, sources: Sequence[Path]) -> bool:
    """Are all copies of this net kept, in the form that it has them?"""
    there = kept(sources)
    return all(name in there and part.fits(there[name]) for name, part in copied(net).items())


def _as_stored(one: Tensor) -> Made:
    bits = one.view(torch.uint16) if one.dtype is torch.bfloat16 else one
    return Made(DTYPES[one.dtype], tuple(one.shape), [bits.numpy()])


def kept(sources: Sequence[Path]) -> dict[str, list[Tensor]]:
    """What was kept of these files, mapped, by name; nothing if it may not be trusted."""
    prune()
    path = path_of(sources)
    if not path.exists():
        return {}
    if not is_ours(path):
        log.warning("%s is left alone: others than its user may write it", path)
        return {}
    try:
        return _mapped(path)
    except (FormatError, StoreError, OSError) as problem:
        log.warning("copies are made anew: %s", problem)
        return {}


def _mapped(path: Path) -> dict[str, list[Tensor]]:
    stored = open_safetensors(path)
    with path.open("rb") as file:
        whole = torch.frombuffer(copy_on_write(file), dtype=torch.uint8)
    types = {name: dtype for dtype, name in DTYPES.items()}
    found: dict[str, list[Tensor]] = {}
    for name in sorted(stored, key=_by_number):
        one, (part, _, _) = stored[name], name.rpartition("/")
        if part and one.dtype in types:
            dtype = types[one.dtype]
            if one.offset % dtype.itemsize:
                raise FormatError(f"{path.name}: {name} begins at byte {one.offset}, in a number")
            data = whole[one.offset : one.offset + one.nbytes]
            found.setdefault(part, []).append(data.view(dtype).view(one.shape))
    return found


def _by_number(name: str) -> tuple[int, str]:
    """Sorted by it, what a part was made into stands in order: its ninth before its tenth."""
    return len(name), name


def prune() -> None:
    """Remove what was made of files that are gone, or were changed since, or by other versions."""
    for path in folder().glob("*.safetensors"):
        try:
            if path_of(_sources_of(path)) != path:
                path.unlink(missing_ok=True)
        except FileNotFoundError:
            path.unlink(missing_ok=True)
        except (OSError, ValueError, KeyError, FormatError, StoreError) as problem:
            log.debug("%s is left alone: %s", path, problem)


def _sources_of(path: Path) -> list[Path]:
    pieces: Iterator[Array] = open_safetensors(path)[SOURCES].pieces()
    told: list[str] = json.loads(b"".join(piece.tobytes() for piece in pieces))
    return [Path(one) for one in told]
