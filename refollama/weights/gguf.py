"""How does a GGUF file become names, settings and raw tensor bytes?  (Without torch.)

    "GGUF" · version · number of tensors · number of entries
    entry  × n    key · value type · value
    tensor × n    name · number of dims · dims, innermost first · block type · offset
    padding       up to a multiple of `general.alignment` (32 if absent)
    data          one blob per tensor, each offset a multiple of the alignment

The file is mapped, not read: opening touches the header only. Nothing in it is believed: every
length, count and offset is held against the bytes that are left before it is used, and what does
not fit is a FormatError that names the file, the field and the byte where it stands.

Source: the GGUF specification of ggml, versions 2 and 3. Version 1 had died by December 2023.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from refollama.errors import FormatError, NotFound, StoreError
from refollama.weights.blocks import BLOCKS, nbytes
from refollama.weights.pages import copy_on_write
from refollama.weights.whole import write_whole

Bytes = npt.NDArray[np.uint8]
ByteOrder = Literal["<", ">"]
Value = bool | int | float | str | list[str] | npt.NDArray[Any]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32  # bytes
MAX_KEY = 65_535  # bytes, as the specification says
MAX_NAME = 63  # bytes; ggml keeps tensor names in 64 with a terminator
MAX_DIMS = 4
MAX_NUMBER = 2**63 - 1  # ggml counts elements in a signed 64-bit integer
MAX_ENTRIES = 2**20  # of each kind; a large model has some thousand tensors, a hostile one more
MIN_ENTRY = 8 + 1 + 4 + 1  # bytes: a key of one letter, a type, a value of one byte
MIN_TENSOR = 8 + 1 + 4 + 4 + 8  # bytes: a name of one letter, no dims, a type, an offset


class ValueType(IntEnum):
    """The type numbers of metadata values."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


# numpy's letters; a bool is one byte, and any byte but zero is true.
DTYPES: Mapping[ValueType, str] = {
    ValueType.UINT8: "u1",
    ValueType.INT8: "i1",
    ValueType.UINT16: "u2",
    ValueType.INT16: "i2",
    ValueType.UINT32: "u4",
    ValueType.INT32: "i4",
    ValueType.FLOAT32: "f4",
    ValueType.BOOL: "u1",
    ValueType.UINT64: "u8",
    ValueType.INT64: "i8",
    ValueType.FLOAT64: "f8",
}


class Typed(NamedTuple):
    """A metadata value with its type spelled out; the type of an array is that of its elements."""

    value: Any
    type: ValueType


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies.  `shape` is outermost first, as in torch; `offset` is from byte 0."""

    name: str
    shape: tuple[int, ...]
    type: int  # a key of BLOCKS
    offset: int
    nbytes: int


# ── an open file ─────────────────────────────────────────────────────────────────────────────────


class GGUF:
    """An open file: its metadata, its tensors, and their bytes.  Made by `open_gguf`.

    Closing lets go of the file; tensors and values that were handed out stay valid, because the
    map itself lives as long as anything points into it.
    """

    def __init__(
        self, path: Path, map: mmap.mmap, header: _Header, tensors: Mapping[str, TensorInfo]
    ) -> None:
        self.path = path
        self.version = header.version
        self.byteorder: ByteOrder = header.byteorder
        self.alignment = header.alignment
        self.metadata: Mapping[str, Value] = header.metadata
        self.tensors = tensors
        self._metadata = header.metadata
        self._map = map
        self._bytes: Bytes | None = np.frombuffer(map, np.uint8)

    def bytes_of(self, name: str) -> Bytes:
        """The tensor's bytes as they stand in the file: (nbytes,) uint8, not copied.

        They may be written to, but what is written never reaches the file.
        """
        if self._bytes is None:
            raise ValueError(f"{self.path.name} is closed")
        info = self.tensors[name]
        return self._bytes[info.offset : info.offset + info.nbytes]

    def typed(self, key: str) -> Typed:
        """A metadata value with the type that it has in the file, as `write_gguf` takes it."""
        return Typed(self.metadata[key], self._metadata.entries[key].type)

    def is_array(self, key: str) -> bool:
        """Is this metadata value a list?  Told without decoding it."""
        return self._metadata.entries[key].is_array

    def close(self) -> None:
        """Let go of the file; what was not read until now can no longer be."""
        self._bytes = None
        self._metadata.data = None
        # Where views are still in use, the map closes with the last of them instead.
        with contextlib.suppress(BufferError):
            self._map.close()

    def __enter__(self) -> GGUF:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Entry(NamedTuple):
    """Where a metadata value lies: `n` values of `type` from byte `at` on."""

    type: ValueType
    is_array: bool
    n: int
    at: int


class _Metadata(Mapping[str, Value]):
    """Values by key, decoded when first asked for: nobody pays for a vocabulary unread.

    Arrays of strings are lists; arrays of numbers are numpy arrays, copied into native byte order.
    Bytes that are no UTF-8 become lone surrogates (PEP 383), so that none is lost.
    """

    def __init__(self, file: str, data: mmap.mmap, byteorder: ByteOrder) -> None:
        self.file = file
        self.data: mmap.mmap | None = data
        self.byteorder = byteorder
        self.entries: dict[str, _Entry] = {}
        self._decoded: dict[str, Value] = {}

    def __getitem__(self, key: str) -> Value:
        if key not in self._decoded:
            self._decoded[key] = self._decode(self.entries[key])
        return self._decoded[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def _decode(self, entry: _Entry) -> Value:
        if self.data is None:
            raise ValueError(f"{self.file} is closed")
        if entry.type is ValueType.STRING:
            strings = list(_strings(self.data, self.byteorder, entry))
            return strings if entry.is_array else strings[0]
        numbers = self._numbers(self.data, entry)
        value: Value = numbers if entry.is_array else numbers[0].item()
        return value

    def _numbers(self, data: mmap.mmap, entry: _Entry) -> npt.NDArray[Any]:
        """(n,), in native byte order."""
        dtype = np.dtype(self.byteorder + DTYPES[entry.type])
        raw = data[entry.at : entry.at + entry.n * dtype.itemsize]
        numbers = np.frombuffer(raw, dtype)
        if entry.type is ValueType.BOOL:
            return numbers != 0
        return numbers.astype(dtype.newbyteorder("="))


def _strings(data: mmap.mmap, byteorder: ByteOrder, entry: _Entry) -> Iterator[str]:
    """The strings of an entry whose lengths have been checked."""
    length_at = struct.Struct(byteorder + "Q").unpack_from
    at = entry.at
    for _ in range(entry.n):
        start, at = at + 8, at + 8 + length_at(data, at)[0]
        yield data[start:at].decode("utf-8", "surrogateescape")


# ── reading ──────────────────────────────────────────────────────────────────────────────────────


def open_gguf(path: str | os.PathLike[str]) -> GGUF:
    """Open a GGUF file without reading its tensors.

    Raises: NotFound, StoreError if the disk says no, FormatError for anything that is no sound
    GGUF file of version 2 or 3, of either byte order.
    """
    path = Path(path)
    data = _map(path)
    cursor = _Cursor(path.name, data)
    header = _read_header(cursor)
    table = _read_table(cursor, header.n_tensors)
    return GGUF(path, data, header, _placed(cursor, header.alignment, table))


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Is this a regular file that can be read and that begins as a GGUF file does?

    One answer for all reasons, for those who may not learn what else lies on the disk.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return False


def _map(path: Path) -> mmap.mmap:
    """The whole file as a private, copy-on-write map."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a fifo or a device may block
            raise FormatError(f"{path.name}: not a regular file")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise FormatError(f"{path.name}: magic at byte 0: the file is empty")
            return copy_on_write(file)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the path
        raise NotFound(f"{path.name}: no such file") from None
    except OSError as problem:
        raise StoreError(f"{path.name}: {problem.strerror}") from problem


class _Cursor:
    """A place in the file that refuses to leave it."""

    def __init__(self, file: str, data: mmap.mmap) -> None:
        self.file = file
        self.data = data
        self.size = len(data)
        self.at = 0
        self.byteorder: ByteOrder = "<"

    def fault(self, field: str, problem: str, at: int | None = None) -> FormatError:
        at = self.at if at is None else at
        return FormatError(f"{self.file}: {field} at byte {at}: {problem}")

    def need(self, count: int, field: str) -> None:
        if count > self.size - self.at:
            left = self.size - self.at
            raise self.fault(field, f"needs {count} bytes, but only {left} are left")

    def u32(self, field: str) -> int:
        return self._number("I", 4, field)

    def u64(self, field: str) -> int:
        return self._number("Q", 8, field)

    def _number(self, letter: str, width: int, field: str) -> int:
        self.need(width, field)
        number: int = struct.unpack_from(self.byteorder + letter, self.data, self.at)[0]
        self.at += width
        return number

    def name(self, longest: int, field: str) -> str:
        """A key or a tensor's name: 1 to `longest` bytes of strict UTF-8."""
        at = self.at
        length = self.u64(field + ", length")
        if not 1 <= length <= longest:
            raise self.fault(field, f"must have 1 to {longest} bytes, not {length}", at)
        self.need(length, field)
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.fault(field, "is not valid UTF-8", at) from None

    def value_type(self, field: str) -> ValueType:
        at = self.at
        number = self.u32(field)
        try:
            return ValueType(number)
        except ValueError:
            raise self.fault(field, f"unknown type {number}", at) from None

    def skip(self, type: ValueType, count: int, field: str) -> None:
        """Pass over `count` values."""
        if type is ValueType.STRING:
            self._skip_strings(count, field)
            return
        size = count * int(DTYPES[type][1])
        self.need(size, field)
        self.at += size

    def _skip_strings(self, count: int, field: str) -> None:
        """One step per string: a vocabulary has some hundred thousand."""
        self.need(count * 8, field)
        length_at = struct.Struct(self.byteorder + "Q").unpack_from
        at, last = self.at, self.size - 8
        for number in range(count):
            if at > last:
                raise self.fault(f"{field}, string {number}", "needs 8 bytes for its length", at)
            length: int = length_at(self.data, at)[0]
            if length > last - at:
                problem = f"needs {length} bytes, but only {last - at} are left"
                raise self.fault(f"{field}, string {number}", problem, at)
            at += 8 + length
        self.at = at


class _Header(NamedTuple):
    """All that stands before the table of tensors."""

    version: int
    byteorder: ByteOrder
    n_tensors: int
    metadata: _Metadata
    alignment: int


def _read_header(cursor: _Cursor) -> _Header:
    cursor.need(len(MAGIC), "magic")
    if cursor.data[: len(MAGIC)] != MAGIC:
        raise cursor.fault("magic", f"must be {MAGIC!r}, not {cursor.data[:4]!r}")
    cursor.at = len(MAGIC)
    version = _read_version(cursor)
    n_tensors = _read_count(cursor, "tensor count", MIN_TENSOR)
    n_entries = _read_count(cursor, "metadata count", MIN_ENTRY)
    metadata = _Metadata(cursor.file, cursor.data, cursor.byteorder)
    for number in range(n_entries):
        _read_entry(cursor, number, metadata.entries)
    return _Header(version, cursor.byteorder, n_tensors, metadata, _alignment(cursor, metadata))


def _read_version(cursor: _Cursor) -> int:
    """The version; sets the byte order.  A small number read in the wrong order has zeros below."""
    at = cursor.at
    version = cursor.u32("version")
    if version & 0xFFFF == 0:
        cursor.byteorder, cursor.at = ">", at
        version = cursor.u32("version")
    if version not in VERSIONS:
        raise cursor.fault("version", f"must be 2 or 3, not {version}; convert the model anew", at)
    return version


def _read_count(cursor: _Cursor, field: str, least: int) -> int:
    """A count of things that have `least` bytes or more each."""
    at = cursor.at
    count = cursor.u64(field)
    most = min(MAX_ENTRIES, (cursor.size - cursor.at) // least)
    if count > most:
        raise cursor.fault(field, f"must be {most} or less in a file of this size, not {count}", at)
    return count


def _read_entry(cursor: _Cursor, number: int, entries: dict[str, _Entry]) -> None:
    """One key and its value's place, added to `entries`."""
    at = cursor.at
    key = cursor.name(MAX_KEY, f"key {number}")
    field = f"metadata {_shown(key)}"
    if key in entries:
        raise cursor.fault(field, "is given twice", at)
    type = cursor.value_type(f"{field}, type")
    is_array = type is ValueType.ARRAY
    count = 1
    if is_array:
        at = cursor.at
        type = cursor.value_type(f"{field}, element type")
        if type is ValueType.ARRAY:
            raise cursor.fault(f"{field}, element type", "arrays of arrays are not allowed", at)
        count = cursor.u64(f"{field}, count")
    entries[key] = _Entry(type, is_array, count, cursor.at)
    cursor.skip(type, count, field)


def _alignment(cursor: _Cursor, metadata: _Metadata) -> int:
    """general.alignment: a power of two."""
    key = "general.alignment"
    if key not in metadata:
        return DEFAULT_ALIGNMENT
    entry, value = metadata.entries[key], metadata[key]
    if entry.type is not ValueType.UINT32 or not isinstance(value, int):
        raise cursor.fault(f"metadata '{key}'", "must be one uint32", entry.at)
    if value.bit_count() != 1:
        raise cursor.fault(f"metadata '{key}'", f"must be a power of two, not {value}", entry.at)
    return value


class _Unplaced(NamedTuple):
    """A row of the table of tensors, before the start of the data is known."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int  # from the start of the data
    at: int  # where the offset stands, for messages


def _read_table(cursor: _Cursor, n_tensors: int) -> Sequence[_Unplaced]:
    names: set[str] = set()
    table = []
    for number in range(n_tensors):
        at = cursor.at
        row = _read_tensor(cursor, number)
        if row.name in names:
            raise cursor.fault(f"tensor {_shown(row.name)}", "is given twice", at)
        names.add(row.name)
        table.append(row)
    return table


def _read_tensor(cursor: _Cursor, number: int) -> _Unplaced:
    name = cursor.name(MAX_NAME, f"tensor {number}, name")
    field = f"tensor {_shown(name)}"
    at = cursor.at
    n_dims = cursor.u32(f"{field}, number of dims")
    if n_dims > MAX_DIMS:
        raise cursor.fault(f"{field}, number of dims", f"must be 4 or less, not {n_dims}", at)
    dims = [_read_dim(cursor, f"{field}, dim {dim}") for dim in range(n_dims)]
    type = _read_block_type(cursor, field, dims)
    at = cursor.at
    return _Unplaced(name, tuple(reversed(dims)), type, cursor.u64(f"{field}, offset"), at)


def _read_dim(cursor: _Cursor, field: str) -> int:
    at = cursor.at
    size = cursor.u64(field)
    if not 1 <= size <= MAX_NUMBER:
        raise cursor.fault(field, f"must be between 1 and 2^63 - 1, not {size}", at)
    return size


def _read_block_type(cursor: _Cursor, field: str, dims: Sequence[int]) -> int:
    """A type whose blocks fill the rows of these dims."""
    at = cursor.at
    type = cursor.u32(f"{field}, type")
    if type not in BLOCKS:
        raise cursor.fault(f"{field}, type", f"unknown or removed type {type}", at)
    block, row = BLOCKS[type], dims[0] if dims else 1
    if row % block.values:
        problem = f"rows of {row} values are no whole number of {block.name} blocks"
        raise cursor.fault(f"{field}, type", f"{problem} ({block.values} values each)", at)
    return type


def _placed(
    cursor: _Cursor, alignment: int, table: Sequence[_Unplaced]
) -> Mapping[str, TensorInfo]:
    """The tensors by name, each entirely inside the file.  `cursor` stands after the table."""
    start = cursor.at + -cursor.at % alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, type, offset, at in table:
        field = f"tensor {_shown(name)}, offset"
        if offset % alignment:
            raise cursor.fault(field, f"must be a multiple of {alignment}, not {offset}", at)
        info = TensorInfo(name, shape, type, start + offset, nbytes(type, shape))
        end = info.offset + info.nbytes
        if end > cursor.size:
            problem = f"its data would end at byte {end}, but the file has {cursor.size}"
            raise cursor.fault(field, problem, at)
        tensors[name] = info
    _check_apart(cursor, tensors, {row.name: row.at for row in table})
    return MappingProxyType(tensors)


def _check_apart(cursor: _Cursor, tensors: Mapping[str, TensorInfo], at: Mapping[str, int]) -> None:
    """No two tensors share a byte: else a small file could ask for any amount of memory."""
    for one, next in pairwise(
        sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes))
    ):
        if one.offset + one.nbytes > next.offset:
            field = f"tensor {_shown(next.name)}, offset"
            raise cursor.fault(
                field, f"its data overlaps that of {_shown(one.name)}", at[next.name]
            )


def _shown(name: str) -> str:
    """A name as a message may repeat it: on one line, and never pages of it."""
    return repr(name) if len(name) <= 80 else repr(name[:77] + "...")


# ── writing ──────────────────────────────────────────────────────────────────────────────────────

Raw = bytes | npt.NDArray[Any]
Data = Raw | Iterable[Raw]  # pieces are asked for one after another, as they are written
Tensors = Mapping[str, tuple[int, Sequence[int], Data]]


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Tensors,
    *,
    byteorder: ByteOrder = "<",
    version: int = 3,
    alignment: int = DEFAULT_ALIGNMENT,
) -> None:
    """Write a GGUF file; it appears under its name entirely or not at all.

    metadata   key → value or Typed. Untyped, an int is uint32 if that holds it, a float is
               float32; a list has the type that holds all its items; `alignment` is added.
    tensors    name → (type number, shape outermost first, bytes or pieces of them in file order).
    Raises: ValueError for what no reader would accept, TypeError for a value of no known type,
    StoreError if the disk says no.
    """
    target = Path(path)
    try:
        write_whole(target, encoded(metadata, tensors, byteorder, version, alignment))
    except OSError as problem:
        raise StoreError(f"{target.name}: {problem.strerror}") from problem


def encoded(
    metadata: Mapping[str, Any],
    tensors: Tensors,
    byteorder: ByteOrder = "<",
    version: int = 3,
    alignment: int = DEFAULT_ALIGNMENT,
) -> Iterator[bytes | memoryview]:
    """The bytes of a GGUF file in pieces; arguments and errors are those of `write_gguf`."""
    if alignment != DEFAULT_ALIGNMENT or "general.alignment" in metadata:
        metadata = {**metadata, "general.alignment": Typed(alignment, ValueType.UINT32)}
    head = _encode_header(version, byteorder, metadata, tensors, alignment)
    yield head + bytes(-len(head) % alignment if tensors else 0)  # no data: nothing to align
    for name, (type, shape, data) in tensors.items():
        size = 0
        for piece in [data] if isinstance(data, bytes | np.ndarray) else data:
            size += _plain(piece).nbytes
            yield _plain(piece)
        _check_size(name, type, shape, size)
        yield bytes(-size % alignment)


def _plain(data: Raw) -> memoryview:
    """The bytes, in order, without a copy where they are in order already."""
    raw = data if isinstance(data, bytes) else np.ascontiguousarray(data)
    return np.frombuffer(raw, np.uint8).data


def _encode_header(
    version: int,
    byteorder: ByteOrder,
    metadata: Mapping[str, Any],
    tensors: Tensors,
    alignment: int,
) -> bytes:
    """Everything before the padding."""
    if version not in VERSIONS or alignment.bit_count() != 1:
        raise ValueError(f"no GGUF file has version {version} and alignment {alignment}")
    parts = [MAGIC, struct.pack(byteorder + "IQQ", version, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts.append(_encode_name(byteorder, key, MAX_KEY))
        parts.append(_encode_value(byteorder, value if isinstance(value, Typed) else _typed(value)))
    offset = 0
    for name, (type, shape, data) in tensors.items():
        size = _checked_size(name, type, shape, data)
        parts.append(_encode_name(byteorder, name, MAX_NAME))
        numbers = (len(shape), *reversed(shape), type, offset)
        parts.append(struct.pack(f"{byteorder}I{len(shape)}QIQ", *numbers))
        offset += size + -size % alignment
    return b"".join(parts)


def _checked_size(name: str, type: int, shape: Sequence[int], data: Data) -> int:
    """The tensor's size in bytes, after the checks that a reader makes."""
    block, row = BLOCKS[type], shape[-1] if shape else 1
    if len(shape) > MAX_DIMS or any(dim < 1 for dim in shape) or row % block.values:
        raise ValueError(f"tensor '{name}': {block.name} cannot have the shape {tuple(shape)}")
    if isinstance(data, bytes | np.ndarray):
        _check_size(name, type, shape, _plain(data).nbytes)
    return nbytes(type, shape)


def _check_size(name: str, type: int, shape: Sequence[int], size: int) -> None:
    if size != nbytes(type, shape):
        raise ValueError(f"tensor '{name}': {nbytes(type, shape)} bytes expected, not {size}")


def _encode_name(byteorder: ByteOrder, name: str, longest: int) -> bytes:
    raw = name.encode()
    if not 1 <= len(raw) <= longest:
        raise ValueError(f"name {_shown(name)} must have 1 to {longest} bytes, not {len(raw)}")
    return struct.pack(byteorder + "Q", len(raw)) + raw


def _encode_value(byteorder: ByteOrder, typed: Typed) -> bytes:
    """Type and value."""
    value, type = typed
    if not isinstance(value, list | tuple | np.ndarray):
        return struct.pack(byteorder + "I", type) + _encode_items(byteorder, [value], type)
    head = struct.pack(byteorder + "IIQ", ValueType.ARRAY, type, len(value))
    return head + _encode_items(byteorder, value, type)


def _encode_items(
    byteorder: ByteOrder, items: Sequence[Any] | npt.NDArray[Any], type: ValueType
) -> bytes:
    if type is not ValueType.STRING:
        return np.asarray(items, byteorder + DTYPES[type]).tobytes()
    raws = [item.encode("utf-8", "surrogateescape") for item in items]
    return b"".join(struct.pack(byteorder + "Q", len(raw)) + raw for raw in raws)


def _typed(value: Any) -> Typed:
    """A plain value with the type that suits it."""
    if isinstance(value, np.ndarray):
        return Typed(value, _array_type(value.dtype))
    items = value if isinstance(value, list | tuple) else [value]
    kinds = {type(item) for item in items}
    if kinds == {bool}:
        return Typed(value, ValueType.BOOL)
    if kinds == {str}:
        return Typed(value, ValueType.STRING)
    if kinds == {int}:
        return Typed(value, _integer_type(min(items), max(items)))
    if kinds and kinds <= {int, float}:
        return Typed(value, ValueType.FLOAT32)
    raise TypeError(f"no GGUF type fits {_shown(repr(value))}; give it as Typed")


def _array_type(dtype: np.dtype[Any]) -> ValueType:
    if dtype == np.bool_:
        return ValueType.BOOL
    for type, letters in DTYPES.items():
        if dtype.newbyteorder("=") == np.dtype(letters):
            return type
    raise TypeError(f"no GGUF type fits an array of {dtype}")


def _integer_type(low: int, high: int) -> ValueType:
    """The first type that holds both."""
    for type in (ValueType.UINT32, ValueType.INT32, ValueType.UINT64, ValueType.INT64):
        limits = np.iinfo(DTYPES[type])
        if limits.min <= low and high <= limits.max:
            return type
    raise TypeError(f"no GGUF type holds both {low} and {high}")
