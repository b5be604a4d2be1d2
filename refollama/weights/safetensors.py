"""How does a safetensors file become names, shapes and raw bytes?  (Without torch.)

    length     8 bytes: of the header
    header     JSON: name → {"dtype": "F16", "shape": [64, 64], "data_offsets": [0, 8192]}
    data       the tensors, one behind the other; offsets count from here

Only the header is read when a file is opened. As with GGUF nothing is believed: each length is
held against the file first, and what does not fit is a FormatError that names file and tensor.

Source: the format's own description at github.com/huggingface/safetensors.
"""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from refollama.errors import FormatError, StoreError

Array = npt.NDArray[Any]

LARGEST_HEADER = 100_000_000  # bytes, as the format's own library has it
MOST_DIMS = 8
LARGEST_SIDE = 2**40
PIECE = 16 << 20  # bytes that are read at once

# BF16 is the upper half of a float32: no type of numpy's, so its bits stand in for it.
DTYPES: Mapping[str, str] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "u1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1",
}  # fmt: skip

# What a pickle begins with, by itself or in a zip file, as torch writes it.
_PICKLES = (b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(1, 6)))
_NUMBERS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file: where it lies, and what its bytes mean."""

    path: Path
    name: str
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    offset: int  # from byte 0 of the file
    nbytes: int

    def pieces(self, rows: int = 1) -> Iterator[Array]:
        """The rows in order, some at a time: a multiple of `rows`, and of 16 MiB at most if that
        can be.  → (n, *shape[1:]), for a BF16 its bits.

        Raises: StoreError if the disk says no, or the file has become shorter.
        """
        shape = self.shape or (1,)
        row = self.nbytes // max(1, shape[0])
        step = max(1, PIECE // max(1, row * rows)) * rows
        with _opened(self.path) as file:
            file.seek(self.offset)
            for start in range(0, shape[0], step):
                count = min(step, shape[0] - start)
                yield self._read(file, count * row).reshape(count, *shape[1:])

    def _read(self, file: io.FileIO, size: int) -> Array:
        data = bytearray(size)
        try:
            found = file.readinto(data)
        except OSError as problem:
            raise StoreError(f"{self.path.name}: {problem.strerror}") from problem
        if found != size:
            raise StoreError(f"{self.path.name} was changed while it was read: try again")
        return np.frombuffer(data, DTYPES[self.dtype])


# ── reading ──────────────────────────────────────────────────────────────────────────────────────


def open_safetensors(path: Path, called: str = "") -> Mapping[str, Stored]:
    """The tensors of a file by name; none of them is read.  `called`: the file's name in messages.

    Raises: FormatError for anything that is no sound safetensors file, and for a pickle under that
    name; StoreError if the disk says no.
    """
    called = called or path.name
    with _opened(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        raw = file.read(length) if length <= min(LARGEST_HEADER, size - 8) else b""
    if not raw.startswith(b"{"):
        raise _no_header(called, head)
    header = _header(called, raw)
    start = 8 + length
    found = {name: _stored(path, called, name, row, start) for name, row in header.items()}
    _check_apart(called, found.values(), size)
    return found


def _opened(path: Path) -> io.FileIO:
    try:
        return io.FileIO(path)
    except OSError as problem:
        raise StoreError(f"{path.name}: {problem.strerror}") from problem


def _no_header(called: str, head: bytes) -> FormatError:
    if head.startswith(_PICKLES):
        return FormatError(
            f"{called} is a pickle, which may run code when it is opened: only safetensors files "
            "are read; let whoever made it save it as one"
        )
    return FormatError(f"{called} is no safetensors file: no header begins where one must")


def _header(called: str, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as problem:
        raise FormatError(f"{called}: its header is no JSON that makes sense: {problem}") from None
    if not isinstance(header, dict):
        raise FormatError(f"{called}: its header is no JSON object")
    header.pop("__metadata__", None)
    return header


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is given twice")
    return found


def _stored(path: Path, called: str, name: str, row: Any, start: int) -> Stored:
    """A row of the header, once its numbers agree with each other."""
    field = f"{called}: tensor {name[:80]!r}"
    if not isinstance(row, dict) or not row.keys() >= _NUMBERS:
        raise FormatError(f"{field} has no dtype, shape and data_offsets")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"{field} is of the type {str(dtype)[:40]!r}, which is unknown")
    if not _counts(shape) or len(shape) > MOST_DIMS:
        raise FormatError(f"{field}: its shape is no list of up to {MOST_DIMS} sizes")
    if not _counts(offsets) or len(offsets) != 2:
        raise FormatError(f"{field}: its data_offsets are no two numbers")
    size = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if offsets[1] - offsets[0] != size:
        sides = " × ".join(map(str, shape)) or "one number"
        raise FormatError(
            f"{field}: {dtype} of the shape {sides} takes {size} bytes, "
            f"but its data has {offsets[1] - offsets[0]}"
        )
    return Stored(path, name, dtype, tuple(shape), start + offsets[0], size)


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= LARGEST_SIDE for value in values
    )


def _check_apart(called: str, found: Iterable[Stored], size: int) -> None:
    """Each tensor lies inside the file, and no two share a byte."""
    placed = sorted(found, key=lambda one: (one.offset, one.nbytes))
    for one, following in pairwise(placed):
        if one.offset + one.nbytes > following.offset:
            raise FormatError(f"{called}: tensors {one.name!r} and {following.name!r} overlap")
    if placed and placed[-1].offset + placed[-1].nbytes > size:
        end = placed[-1].offset + placed[-1].nbytes
        raise FormatError(
            f"{called}: tensor {placed[-1].name!r} would end at byte {end}, but the file has {size}"
        )


# ── writing ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor that is to be written; its bytes are made when they are due."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Iterable[Array]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize


def encoded(tensors: Mapping[str, Made]) -> Iterator[bytes]:
    """The bytes of a safetensors file, piece by piece."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # who reads it may ask for that
    at = 0
    for name, one in tensors.items():
        offsets = [at, at := at + one.nbytes]
        header[name] = {"dtype": one.dtype, "shape": one.shape, "data_offsets": offsets}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % 64)  # so that the data begins where processors like to read
    yield struct.pack("<Q", len(raw)) + raw
    for one in tensors.values():
        yield from (np.ascontiguousarray(piece).tobytes() for piece in one.pieces)
