"""Which columns of a matrix matter?  Importance matrices: the files in which that is written down.

    y = W x, so an error in column i of W is as bad as xᵢ is large. While a text is read, xᵢ² is
    summed up for each matrix, and Σ xᵢ² / count is what an error in column i is multiplied by.

    GGUF    general.type = "imatrix", imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size;
            for each tensor, of m matrices that lie in it (experts, else one):
            NAME.in_sum2 (m, in) and NAME.counts (m, 1), float32
    .dat    of 2024, little-endian: int32 entries; for each: int32 length, name, int32 calls,
            int32 values, float32 × values, to be divided by calls; then perhaps int32 chunks,
            int32 length, name of the text

Source: llama.cpp's imatrix tool writes both; the second until 2025. Both are read here, and the
first is written. (Without torch.)
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from refollama.errors import FormatError, NotFound, StoreError
from refollama.weights.blocks import TYPE_ID
from refollama.weights.gguf import GGUF, is_gguf, open_gguf, write_gguf
from refollama.weights.mixes import word

Floats = npt.NDArray[np.float32]

F32 = TYPE_ID["F32"]
SQUARES, COUNTS = ".in_sum2", ".counts"
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
MOST_ENTRIES = 2**20
_APART = re.compile(
    r"(blk\.\d+\.ffn_(?:gate|up|down))\.(\d+)\.weight"
)  # an expert, in files of 2023


@dataclass(frozen=True)
class Sums:
    """Of what came into m matrices of one tensor: squares (m, in); how many rows, counts (m,)."""

    squares: Floats
    counts: Floats

    def means(self) -> Floats:
        """(m, in); all ones for a matrix that met nothing: of it nothing is known."""
        counts = self.counts[:, None]
        return np.where(counts > 0, self.squares / np.maximum(counts, 1), 1).astype(np.float32)


@dataclass(frozen=True)
class Importance:
    """What one text told of a model: sums by the names of its tensors."""

    sums: Mapping[str, Sums]
    datasets: tuple[str, ...] = ()  # the names of texts that were read
    chunks: int = 0  # windows of them
    chunk_size: int = 0  # tokens of a window; 0 where a file does not say
    file: str = "this importance matrix"

    def of(self, name: str, shape: tuple[int, ...], tied: bool = False) -> Floats | None:
        """How much each column of a tensor matters: (in,), or (E, in) for E experts in one tensor.

        shape: outermost first. tied: the embedding is the output, too, under whose name its sums
        are noted. None: nothing is known of this tensor.
        Raises: FormatError if the sums are those of another shape.
        """
        if tied and name == EMBEDDING and name not in self.sums:
            name = OUTPUT
        match = None if name in self.sums else _APART.fullmatch(name)
        found = self.sums.get(f"{match[1]}_exps.weight" if match else name)
        if found is None:
            return None
        expert, width, means = int(match[2]) if match else 0, shape[-1], found.means().reshape(-1)
        many = len(means) // width if match else math.prod(shape[:-2])
        if len(means) != many * width or expert >= many:
            raise FormatError(
                f"{self.file}: its {len(means)} sums for {name} do not belong to a tensor of "
                f"{' × '.join(map(str, shape))}: is it that of another model?"
            )
        rows = means.reshape(many, width)
        return rows if len(shape) > 2 else rows[expert]


# ── writing ──────────────────────────────────────────────────────────────────────────────────────


def write_importance(path: str | os.PathLike[str], found: Importance) -> None:
    """As a GGUF file; it appears under its name entirely or not at all.  Raises: StoreError."""
    tensors: dict[str, tuple[int, tuple[int, ...], Floats]] = {}
    for name, sums in sorted(found.sums.items()):
        m = len(sums.counts)
        many = (m,) if m > 1 else ()
        tensors[name + SQUARES] = (F32, (*many, sums.squares.shape[1]), sums.squares)
        tensors[name + COUNTS] = (F32, (*many, 1), sums.counts)
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": list(found.datasets),
        "imatrix.chunk_count": found.chunks,
        "imatrix.chunk_size": found.chunk_size,
    }
    write_gguf(path, metadata, tensors)


# ── reading ──────────────────────────────────────────────────────────────────────────────────────


def read_importance(path: str | os.PathLike[str]) -> Importance:
    """An importance matrix, from a file of either form.

    Raises: NotFound, StoreError, FormatError.
    """
    found = _from_gguf(open_gguf(path)) if is_gguf(path) else _from_dat(Path(path))
    if not found.sums:
        raise FormatError(f"{found.file}: this importance matrix is empty")
    for name, sums in found.sums.items():
        both = np.concatenate((sums.squares.reshape(-1), sums.counts))
        if not (np.isfinite(both).all() and (both >= 0).all()):
            raise FormatError(
                f"{found.file}: {name} has sums or counts that are no sums of squares"
            )
    return found


def _from_gguf(file: GGUF) -> Importance:
    name, metadata = file.path.name, file.metadata
    kind = word(metadata, "general.type", "model")
    if kind != "imatrix":
        raise FormatError(f"{name}: its general.type is {kind!r}; expected 'imatrix'")
    names = [key.removesuffix(SQUARES) for key in file.tensors if key.endswith(SQUARES)]
    return Importance(
        {tensor: _pair(file, tensor) for tensor in names},
        _texts(metadata.get("imatrix.datasets")),
        _count(metadata.get("imatrix.chunk_count")),
        _count(metadata.get("imatrix.chunk_size")),
        name,
    )


def _pair(file: GGUF, tensor: str) -> Sums:
    squares, counts = (_numbers(file, tensor + ending) for ending in (SQUARES, COUNTS))
    if len(squares) % len(counts):
        raise FormatError(
            f"{file.path.name}: {tensor} has {len(squares)} sums for {len(counts)} counts"
        )
    return Sums(squares.reshape(len(counts), -1), counts)


def _numbers(file: GGUF, name: str) -> Floats:
    if name not in file.tensors or file.tensors[name].type != F32:
        raise FormatError(f"{file.path.name}: tensor {name} is missing; expected, of F32")
    numbers = np.frombuffer(file.bytes_of(name), f"{file.byteorder}f4").astype(np.float32)
    if not len(numbers):
        raise FormatError(f"{file.path.name}: tensor {name} is empty")
    return numbers


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else ()


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0


# ── the older form ───────────────────────────────────────────────────────────────────────────────


def _from_dat(path: Path) -> Importance:
    try:
        reader = _Reader(path.read_bytes(), path.name)
    except FileNotFoundError:
        raise NotFound(f"{path}: there is no such file") from None
    except OSError as problem:
        raise StoreError(f"{path}: {problem.strerror}") from problem
    entries = reader.number("number of entries", most=MOST_ENTRIES)
    sums = dict(reader.entry() for _ in range(entries))
    chunks, text = 0, ""
    if reader.left:
        chunks = reader.number("number of chunks")
        text = reader.text("name of the text") if reader.left else ""
    return Importance(sums, (text,) if text else (), chunks, file=path.name)


class _Reader:
    """Bytes from front to back; nothing in them is believed before it has been held to the rest."""

    def __init__(self, data: bytes, file: str) -> None:
        self._data, self._at, self._file = data, 0, file

    @property
    def left(self) -> int:
        """Bytes that have not been read."""
        return len(self._data) - self._at

    def number(self, field: str, *, most: int = 2**31) -> int:
        """An int32, from 0 to `most`."""
        at = self._at
        (found,) = struct.unpack("<i", self._take(4, field))
        if not 0 <= found <= most:
            raise FormatError(
                f"{self._file}: no importance matrix: {field} is {found}, at byte {at}"
            )
        return int(found)

    def text(self, field: str) -> str:
        """A length, and as many bytes."""
        return self._take(self.number(f"length of the {field}"), field).decode(errors="replace")

    def entry(self) -> tuple[str, Sums]:
        """What stands of one tensor: all its matrices in one row, as their number is not told."""
        name = self.text("name of a tensor")
        calls = self.number("number of calls")
        raw = self._take(4 * self.number("number of values"), f"values of {name}")
        squares = np.frombuffer(raw, "<f4").astype(np.float32)[None]
        return name, Sums(squares, np.array([max(1, calls)], np.float32))

    def _take(self, count: int, field: str) -> bytes:
        if count > self.left:
            raise FormatError(
                f"{self._file}: no importance matrix: {field} at byte {self._at} needs {count} "
                f"bytes, and {self.left} are left"
            )
        self._at += count
        return self._data[self._at - count : self._at]
