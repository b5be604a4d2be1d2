"""A GGUF file is read exactly, written exactly, and never believed."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refollama.errors import FormatError, NotFound, StoreError
from refollama.weights import open_gguf, write_gguf
from refollama.weights.blocks import TYPE_ID, nbytes
from refollama.weights.gguf import ByteOrder, Typed, ValueType

U32, STRING, ARRAY = 4, 8, 9
MIB = 2**20
ORDERS = pytest.mark.parametrize("byteorder", ["<", ">"])

METADATA = {
    "uint8": Typed(255, ValueType.UINT8),
    "int8": Typed(-128, ValueType.INT8),
    "uint16": Typed(65535, ValueType.UINT16),
    "int16": Typed(-32768, ValueType.INT16),
    "uint32": Typed(2**32 - 1, ValueType.UINT32),
    "int32": Typed(-(2**31), ValueType.INT32),
    "float32": Typed(0.5, ValueType.FLOAT32),
    "bool": Typed(True, ValueType.BOOL),
    "string": Typed("ein Grüßchen ▁🦙", ValueType.STRING),
    "uint64": Typed(2**64 - 1, ValueType.UINT64),
    "int64": Typed(-(2**63), ValueType.INT64),
    "float64": Typed(0.1, ValueType.FLOAT64),
}
TENSORS = {
    "a": (TYPE_ID["F32"], (3, 5), bytes(range(60))),
    "b.weight": (TYPE_ID["Q4_0"], (2, 2, 64), bytes(144)),
    "c": (TYPE_ID["F16"], (1,), b"\x01\x02"),
}


def plain(value: object) -> object:
    """A value that can be compared with `==`."""
    return value.tolist() if isinstance(value, np.ndarray) else value


# ── what was written is what is read ─────────────────────────────────────────────────────────────


@ORDERS
@pytest.mark.parametrize("version", [2, 3])
def test_every_type_of_value_survives(tmp_path, byteorder, version):
    path = tmp_path / "m.gguf"
    arrays = {f"{key}s": Typed([value] * 3, type) for key, (value, type) in METADATA.items()}
    empty = {f"no {key}": Typed([], type) for key, (_, type) in METADATA.items()}
    metadata = METADATA | arrays | empty
    write_gguf(path, metadata, TENSORS, byteorder=byteorder, version=version)
    file = open_gguf(path)
    assert (file.version, file.byteorder, file.alignment) == (version, byteorder, 32)
    assert list(file.metadata) == list(metadata)
    for key, typed in metadata.items():
        assert plain(file.metadata[key]) == typed.value
        assert file.typed(key).type == typed.type
    for key, typed in METADATA.items():
        assert type(file.metadata[key]) is type(typed.value)


@ORDERS
@pytest.mark.parametrize("alignment", [1, 8, 32, 4096])
def test_tensors_survive(tmp_path, byteorder, alignment):
    path = tmp_path / "m.gguf"
    write_gguf(path, {}, TENSORS, byteorder=byteorder, alignment=alignment)
    file = open_gguf(path)
    assert file.alignment == alignment
    assert list(file.tensors) == list(TENSORS)
    for name, (type, shape, data) in TENSORS.items():
        info = file.tensors[name]
        assert (info.name, info.type, info.shape, info.nbytes) == (name, type, shape, len(data))
        assert info.offset % alignment == 0
        assert path.read_bytes()[info.offset :][: info.nbytes] == data
        assert file.bytes_of(name).tobytes() == data


@ORDERS
def test_a_copy_is_the_same_file(tmp_path, byteorder):
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    metadata = METADATA | {"list": Typed(["x", "y"], ValueType.STRING)}
    write_gguf(first, metadata, TENSORS, byteorder=byteorder, version=2, alignment=64)
    copy(first, second)
    assert first.read_bytes() == second.read_bytes()


def copy(source: Path, target: Path) -> None:
    with open_gguf(source) as file:
        tensors = {name: (t.type, t.shape, file.bytes_of(name)) for name, t in file.tensors.items()}
        write_gguf(
            target,
            {key: file.typed(key) for key in file.metadata},
            tensors,
            byteorder=file.byteorder,
            version=file.version,
            alignment=file.alignment,
        )


@pytest.mark.skipif("REFOLLAMA_ORACLES" not in os.environ, reason="needs the recorded files")
def test_copies_of_real_files_are_the_same_files(tmp_path):
    real = sorted(Path(os.environ["REFOLLAMA_ORACLES"]).rglob("*.gguf"))
    assert real
    for source in real:
        copy(source, tmp_path / "copy.gguf")
        ours, theirs = (tmp_path / "copy.gguf").read_bytes(), source.read_bytes()
        assert ours == theirs, source.name


@pytest.mark.parametrize(
    ("value", "type"),
    [
        (True, ValueType.BOOL),
        (7, ValueType.UINT32),
        (-7, ValueType.INT32),
        (2**32, ValueType.UINT64),
        (-(2**32), ValueType.INT64),
        (1.5, ValueType.FLOAT32),
        ("x", ValueType.STRING),
        ([1, 2], ValueType.UINT32),
        ([1, -2], ValueType.INT32),
        ([1, 2.5], ValueType.FLOAT32),
        ([True, False], ValueType.BOOL),
        (["x", ""], ValueType.STRING),
        (np.array([1, 2], np.int8), ValueType.INT8),
        (np.array([1.5], np.float64), ValueType.FLOAT64),
        (np.array([True]), ValueType.BOOL),
    ],
)
def test_plain_values_find_their_type(tmp_path, value, type):
    write_gguf(tmp_path / "m.gguf", {"key": value}, {})
    file = open_gguf(tmp_path / "m.gguf")
    assert file.typed("key").type == type
    assert plain(file.metadata["key"]) == plain(value)


@pytest.mark.parametrize("value", [[], None, {}, [1, "x"], [[1]], 2**64, [-1, 2**63]])
def test_values_of_no_type_are_refused(tmp_path, value):
    with pytest.raises(TypeError, match="no GGUF type"):
        write_gguf(tmp_path / "m.gguf", {"key": value}, {})
    assert list(tmp_path.iterdir()) == []


def test_bytes_that_are_no_text_are_not_lost(tmp_path):
    tokens = [b"\xff".decode("utf-8", "surrogateescape"), "ok", "\x00"]
    write_gguf(tmp_path / "m.gguf", {"tokens": tokens}, {})
    read = open_gguf(tmp_path / "m.gguf").metadata["tokens"]
    assert read == tokens
    assert read[0].encode("utf-8", "surrogateescape") == b"\xff"


@given(
    metadata=st.dictionaries(
        st.text(min_size=1, max_size=20).filter(lambda key: key != "general.alignment"),
        st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.text()
        | st.floats(width=32, allow_nan=False)
        | st.lists(st.text(), min_size=1)
        | st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1),
        max_size=5,
    ),
    byteorder=st.sampled_from("<>"),
)
@settings(max_examples=200, deadline=None)
def test_any_metadata_survives(tmp_path_factory, metadata, byteorder):
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    write_gguf(path, metadata, {}, byteorder=byteorder)
    assert {key: plain(value) for key, value in open_gguf(path).metadata.items()} == metadata


# ── the independent judge ────────────────────────────────────────────────────────────────────────


@ORDERS
@pytest.mark.parametrize("alignment", [32, 64])
def test_the_judge_reads_what_we_write(tmp_path, byteorder, alignment):
    path = tmp_path / "m.gguf"
    metadata = METADATA | {"names": ["x", "yy"], "numbers": [1, 2, 3]}
    floats = np.arange(15, dtype=byteorder + "f4").reshape(3, 5)
    tensors = TENSORS | {"d": (TYPE_ID["F32"], (3, 5), floats)}
    write_gguf(path, metadata, tensors, byteorder=byteorder, alignment=alignment)
    judge = gguf.GGUFReader(path)
    for key, value in metadata.items():
        expected = value.value if isinstance(value, Typed) else value
        assert judge.fields[key].contents() == expected
    read = {tensor.name: tensor for tensor in judge.tensors}
    assert list(read) == list(tensors)
    for name, (type, shape, _) in tensors.items():
        assert int(read[name].tensor_type) == type
        assert tuple(reversed(read[name].shape.tolist())) == shape
        assert read[name].data_offset == open_gguf(path).tensors[name].offset
    assert np.array_equal(read["d"].data, floats)


@ORDERS
def test_we_read_what_the_judge_writes(tmp_path, byteorder):
    path, floats = tmp_path / "m.gguf", np.arange(6, dtype=np.float32).reshape(2, 3)
    endian = gguf.GGUFEndian.BIG if byteorder == ">" else gguf.GGUFEndian.LITTLE
    writer = gguf.GGUFWriter(path, "llama", endianess=endian)
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_token_list([b"<s>", b"\xff", "▁a".encode()])
    writer.add_token_scores([0.0, -1.0, -2.5])
    writer.add_token_types([3, 6, 1])
    writer.add_tensor("floats", floats.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(path)
    assert file.byteorder == byteorder
    assert {key: plain(value) for key, value in file.metadata.items()} == {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.rope.freq_base": 1e4,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.tokens": ["<s>", "\udcff", "▁a"],
        "tokenizer.ggml.scores": [0.0, -1.0, -2.5],
        "tokenizer.ggml.token_type": [3, 6, 1],
    }
    assert file.tensors["floats"].shape == (2, 3)
    read = file.bytes_of("floats").view(byteorder + "f4").reshape(2, 3)
    assert np.array_equal(read, floats)


# ── files that are not what they claim ───────────────────────────────────────────────────────────


def text(raw: bytes | str, length: int | None = None) -> bytes:
    raw = raw.encode() if isinstance(raw, str) else raw
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def entry(key: str = "key", type: int = U32, value: bytes = bytes(4)) -> bytes:
    return text(key) + struct.pack("<I", type) + value


def tensor(
    name: str = "t", dims: tuple[int, ...] = (8,), type: int = 0, offset: int = 0, n_dims: int = -1
) -> bytes:
    n_dims = len(dims) if n_dims < 0 else n_dims
    head = text(name) + struct.pack("<I", n_dims)
    return head + struct.pack(f"<{len(dims)}QIQ", *dims, type, offset)


def file(
    entries: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_entries: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    n_entries = len(entries) if n_entries is None else n_entries
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    head = magic + struct.pack("<IQQ", version, n_tensors, n_entries)
    head += b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def aligned_to(value: int) -> bytes:
    return entry("general.alignment", U32, struct.pack("<I", value))


HUGE = struct.pack("<Q", 2**64 - 1)
KEY_END = 24 + 8 + 3  # the type of the first entry, whose key is "key"
TENSOR = 24 + 8 + 1  # the number of dims of the first tensor, whose name is "t"

# what is wrong: the file, the field that the message names, the byte that it names
BAD = {
    "nothing at all": (b"", "magic", 0),
    "two tensors in one place": (
        file((), (tensor("t"), tensor("u")), bytes(64)),
        "tensor 'u', offset",
        24 + len(tensor("t")) + 8 + 1 + 4 + 8 + 4,
    ),
    "half a magic": (b"GG", "magic", 0),
    "another magic": (file(magic=b"GGML"), "magic", 0),
    "no version": (b"GGUF\x03\x00", "version", 4),
    "version 0": (file(version=0), "version", 4),
    "version 1": (file(version=1), "version", 4),
    "version 4": (file(version=4), "version", 4),
    "version 1, big-endian": (file(version=1 << 24), "version", 4),
    "no counts": (b"GGUF" + struct.pack("<I", 3), "tensor count", 8),
    "tensor count negative": (file(n_tensors=2**64 - 1), "tensor count", 8),
    "tensor count too large": (file(n_tensors=9), "tensor count", 8),
    "metadata count negative": (file(n_entries=2**63), "metadata count", 16),
    "metadata count too large": (file(n_entries=9), "metadata count", 16),
    "key of 2^64 - 1 bytes": (file((HUGE + bytes(99),)), "key 0", 24),
    "key longer than allowed": (file((text("k" * 65536) + bytes(99),)), "key 0", 24),
    "key beyond the end": (file((text("k", 999),)), "key 0", 32),
    "empty key": (file((entry(""),)), "key 0", 24),
    "key that is no text": (file((text(b"\xff") + bytes(8),)), "key 0", 24),
    "key twice": (file((entry(), entry())), "metadata 'key'", KEY_END + 8),
    "unknown value type": (file((entry(type=13),)), "metadata 'key', type", KEY_END),
    "huge value type": (file((entry(type=2**32 - 1),)), "metadata 'key', type", KEY_END),
    "value beyond the end": (
        file((entry(type=10, value=b"1234"),), alignment=1),
        "metadata 'key'",
        KEY_END + 4,
    ),
    "string of 2^64 - 1 bytes": (
        file((entry(type=STRING, value=HUGE),)),
        "metadata 'key', string 0",
        KEY_END + 4,
    ),
    "array in an array": (
        file((entry(type=ARRAY, value=struct.pack("<IQ", ARRAY, 1)),)),
        "metadata 'key', element type",
        KEY_END + 4,
    ),
    "unknown element type": (
        file((entry(type=ARRAY, value=struct.pack("<IQ", 99, 1)),)),
        "metadata 'key', element type",
        KEY_END + 4,
    ),
    "array of 2^64 - 1 numbers": (
        file((entry(type=ARRAY, value=struct.pack("<I", U32) + HUGE),)),
        "metadata 'key'",
        KEY_END + 16,
    ),
    "array of 2^64 - 1 strings": (
        file((entry(type=ARRAY, value=struct.pack("<I", STRING) + HUGE),)),
        "metadata 'key'",
        KEY_END + 16,
    ),
    "array whose second string is too long": (
        file((entry(type=ARRAY, value=struct.pack("<IQ", STRING, 2) + text("a") + HUGE),)),
        "metadata 'key', string 1",
        KEY_END + 16 + 9,
    ),
    "array whose strings leave no room for the last": (
        file(
            (entry(type=ARRAY, value=struct.pack("<IQ", STRING, 2) + text("abcdefghi")),),
            alignment=1,
        ),
        "metadata 'key', string 1",
        KEY_END + 16 + 17,
    ),
    "alignment 0": (file((aligned_to(0),)), "metadata 'general.alignment'", 53),
    "alignment 13": (file((aligned_to(13),)), "metadata 'general.alignment'", 53),
    "alignment that is no uint32": (
        file((entry("general.alignment", 5, struct.pack("<i", 32)),)),
        "metadata 'general.alignment'",
        53,
    ),
    "alignment that is an array": (
        file((entry("general.alignment", ARRAY, struct.pack("<IQI", U32, 1, 32)),)),
        "metadata 'general.alignment'",
        65,
    ),
    "empty tensor name": (file((), (tensor(""),)), "tensor 0, name", 24),
    "tensor name of 64 bytes": (file((), (tensor("n" * 64),)), "tensor 0, name", 24),
    "tensor name of 2^64 - 1 bytes": (file((), (HUGE + bytes(99),)), "tensor 0, name", 24),
    "tensor name that is no text": (
        file((), (text(b"\xc0") + bytes(32),)),
        "tensor 0, name",
        24,
    ),
    "tensor name twice": (file((), (tensor(), tensor()), bytes(64)), "tensor 't'", 57),
    "five dims": (file((), (tensor(dims=(1,) * 5),)), "tensor 't', number of dims", TENSOR),
    "2^32 - 1 dims": (
        file((), (tensor(n_dims=2**32 - 1),)),
        "tensor 't', number of dims",
        TENSOR,
    ),
    "dim 0": (file((), (tensor(dims=(8, 0)),)), "tensor 't', dim 1", TENSOR + 12),
    "dim negative": (file((), (tensor(dims=(2**63,)),)), "tensor 't', dim 0", TENSOR + 4),
    "dims whose product overflows": (
        file((), (tensor(dims=(4 * (2**31 - 1),) * 2),)),
        "tensor 't', offset",
        TENSOR + 24,
    ),
    "unknown block type": (file((), (tensor(type=99),)), "tensor 't', type", TENSOR + 12),
    "removed block type": (file((), (tensor(type=4),)), "tensor 't', type", TENSOR + 12),
    "rows of half a block": (
        file((), (tensor(dims=(48,), type=2),)),
        "tensor 't', type",
        TENSOR + 12,
    ),
    "offset between the steps": (
        file((), (tensor(offset=16),), bytes(99)),
        "tensor 't', offset",
        TENSOR + 16,
    ),
    "offset of 2^64 - 32": (
        file((), (tensor(offset=2**64 - 32),), bytes(99)),
        "tensor 't', offset",
        TENSOR + 16,
    ),
    "laid out for alignment 1, read with 32": (
        file((), (tensor(),), bytes(32), alignment=1),
        "tensor 't', offset",
        TENSOR + 16,
    ),
    "one byte short": (file((), (tensor(),), bytes(31)), "tensor 't', offset", TENSOR + 16),
    "no data": (file((), (tensor(),)), "tensor 't', offset", TENSOR + 16),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_by_file_field_and_byte(tmp_path, name):
    raw, field, at = BAD[name]
    (tmp_path / "bad.gguf").write_bytes(raw)
    with pytest.raises(FormatError) as error:
        open_gguf(tmp_path / "bad.gguf")
    message = str(error.value)
    assert message.startswith(f"bad.gguf: {field}")
    assert f" at byte {at}: " in message
    assert str(tmp_path) not in message
    assert len(message) < 300


GOOD = {
    "no tensors, no entries": file(),
    "no padding where no data": file(alignment=1),
    "bytes after the end": file((), (tensor(),), bytes(99)),
    "unpadded last tensor": file((), (tensor(dims=(1,)),), bytes(4)),
    "alignment 1": file((aligned_to(1),), (tensor(),), bytes(32), alignment=1),
    "a gap between tensors": file((), (tensor("a"), tensor("b", offset=64)), bytes(96)),
    "tensors not in the order of their data": file(
        (), (tensor("a", offset=32), tensor("b")), bytes(64)
    ),
    "no dims: one number": file((), (tensor(dims=()),), bytes(4)),
    "a name of 63 bytes": file((), (tensor("n" * 63),), bytes(32)),
    "a true of 255": file((entry(type=7, value=b"\xff"),)),
}


@pytest.mark.parametrize("name", GOOD)
def test_an_unusual_file_is_accepted(tmp_path, name):
    (tmp_path / "good.gguf").write_bytes(GOOD[name])
    opened = open_gguf(tmp_path / "good.gguf")
    for key in opened.metadata:
        assert opened.metadata[key] is not None
    for name, info in opened.tensors.items():
        assert opened.bytes_of(name).shape == (info.nbytes,)


def test_long_names_do_not_flood_the_message(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(file((entry("k" * 60_000, type=99),)))
    with pytest.raises(FormatError) as error:
        open_gguf(tmp_path / "bad.gguf")
    assert len(str(error.value)) < 200


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs fifos")
@pytest.mark.parametrize("make", [os.mkdir, getattr(os, "mkfifo", None)])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, make):
    make(tmp_path / "m.gguf")
    with pytest.raises(FormatError, match=r"^m\.gguf: not a regular file"):
        open_gguf(tmp_path / "m.gguf")


def test_devices_are_refused():
    with pytest.raises(FormatError, match=r"^zero: not a regular file"):
        open_gguf("/dev/zero")


@pytest.mark.parametrize("name", ["missing.gguf", "nul\0.gguf", "file/below.gguf"])
def test_a_missing_file_is_not_found(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(NotFound, match="no such file"):
        open_gguf(tmp_path / name)


def test_an_unreadable_file_says_so(tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    write_gguf(path, {}, {})

    def forbidden(*args, **keywords):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)  # root may read everything, so it is played
    with pytest.raises(StoreError, match=r"^m\.gguf: Permission denied"):
        open_gguf(path)


# ── hostile files ────────────────────────────────────────────────────────────────────────────────


def victims(directory: Path) -> list[bytes]:
    """Sound files, small enough that most random changes hit the header."""
    raws = []
    orders: tuple[ByteOrder, ...] = ("<", ">")
    for byteorder in orders:
        metadata = METADATA | {"names": ["a", "bb", ""], "numbers": [1, 2], "general.alignment": 8}
        write_gguf(directory / "v.gguf", metadata, TENSORS, byteorder=byteorder, alignment=8)
        raws.append((directory / "v.gguf").read_bytes())
        write_gguf(directory / "v.gguf", {"k": ["x"] * 3}, TENSORS, byteorder=byteorder)
        raws.append((directory / "v.gguf").read_bytes())
    return raws


def try_all_of(path: Path) -> bool:
    """Open a file and read everything in it; whether it opened.  Only FormatError may come out."""
    try:
        with open_gguf(path) as opened:
            for value in opened.metadata.values():
                assert value is not None
            for name, info in opened.tensors.items():
                assert opened.bytes_of(name).size == info.nbytes
    except FormatError as error:
        assert " at byte " in str(error)
        return False
    return True


def test_every_prefix_of_a_file_is_refused_or_read(tmp_path):
    path = tmp_path / "cut.gguf"
    for raw in victims(tmp_path):
        opened = []
        for length in range(len(raw)):
            path.write_bytes(raw[:length])
            opened.append(try_all_of(path))
        assert sum(opened) < 32  # only the padding after the last tensor may be missing


def test_every_byte_changed_alone_is_refused_or_read(tmp_path):
    path = tmp_path / "changed.gguf"
    raw = victims(tmp_path)[1]
    header = min(info.offset for info in open_gguf_of(path, raw).tensors.values())
    for at in range(header):
        for change in (0x01, 0x80, 0xFF):
            path.write_bytes(raw[:at] + bytes([raw[at] ^ change]) + raw[at + 1 :])
            try_all_of(path)


def open_gguf_of(path: Path, raw: bytes):
    path.write_bytes(raw)
    return open_gguf(path)


@pytest.mark.slow
def test_thousands_of_damaged_files_in_bounded_memory_and_time(tmp_path):
    chance, raws, path = random.Random(1), victims(tmp_path), tmp_path / "damaged.gguf"
    numbers = [0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 2**40, 13]
    tracemalloc.start()
    slowest = 0.0
    for _ in range(4000):
        raw = bytearray(chance.choice(raws))
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(4, len(raw))
            if chance.random() < 0.5:
                raw[at] = chance.randrange(256)
            else:
                raw[at : at + 8] = struct.pack(chance.choice("<>") + "Q", chance.choice(numbers))
        path.write_bytes(raw)
        start = time.process_time()
        try_all_of(path)
        slowest = max(slowest, time.process_time() - start)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MIB
    assert slowest < 0.5  # seconds


@given(data=st.data())
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_cut_flipped_and_spliced_files_are_refused_or_read(tmp_path, data):
    raw = bytearray(data.draw(st.sampled_from(victims(tmp_path))))
    for at, byte in data.draw(
        st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255)))
    ):
        raw[at] = byte
    at = data.draw(st.integers(0, len(raw)))
    raw[at : at + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=40))
    (tmp_path / "x.gguf").write_bytes(raw or b"\0")
    try_all_of(tmp_path / "x.gguf")


# ── size ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_large_file_opens_at_once_and_no_tensor_is_read(tmp_path):
    """150,000 tokens, 500 tensors, 20 GB of them: sparse, so that the disk does not mind."""
    path, tokens = tmp_path / "large.gguf", [f"token {i}" for i in range(150_000)]
    entries = (
        entry("tokens", ARRAY, struct.pack("<IQ", STRING, 150_000) + b"".join(map(text, tokens))),
        entry("scores", ARRAY, struct.pack("<IQ", 6, 150_000) + bytes(600_000)),
    )
    shape = (10_240, 1024)
    size = nbytes(0, shape)
    table = tuple(tensor(f"blk.{i}", (1024, 10_240), 0, i * size) for i in range(500))
    raw = file(entries, table)
    path.write_bytes(raw)
    os.truncate(path, len(raw) + 500 * size)
    seconds = []
    for _ in range(5):  # once may meet a collection of all that a long run of tests has made
        start = time.process_time()  # of this process alone: the machine may have more to do
        open_gguf(path)
        seconds.append(time.process_time() - start)
    tracemalloc.start()
    opened = open_gguf(path)
    views = [opened.bytes_of(name) for name in opened.tensors]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert min(seconds) < 0.5
    assert peak < 2 * MIB
    assert sum(view.nbytes for view in views) == 500 * size > 20e9
    assert opened.metadata["tokens"] == tokens
    assert plain(opened.metadata["scores"]) == [0.0] * 150_000


def test_a_file_larger_than_memory_opens(tmp_path):
    """A private map reserves no memory."""
    path, size = tmp_path / "huge.gguf", 2**40
    raw = file((), (tensor(dims=(1024, size // 4096)),))
    path.write_bytes(raw)
    try:
        os.truncate(path, len(raw) + size)
    except OSError:
        pytest.skip("this file system has no files of 1 TiB")
    opened = open_gguf(path)
    assert opened.bytes_of("t")[-1] == 0


# ── lifetimes ────────────────────────────────────────────────────────────────────────────────────


def test_views_outlive_the_closed_file(tmp_path):
    write_gguf(tmp_path / "m.gguf", {"a": 1, "b": 2}, TENSORS)
    with open_gguf(tmp_path / "m.gguf") as opened:
        view = opened.bytes_of("a")
        assert opened.metadata["a"] == 1
    opened.close()
    assert view.tobytes() == TENSORS["a"][2]
    assert opened.metadata["a"] == 1
    with pytest.raises(ValueError, match=r"m\.gguf is closed"):
        opened.bytes_of("a")
    with pytest.raises(ValueError, match=r"m\.gguf is closed"):
        opened.metadata["b"]


def test_opening_many_files_leaves_no_file_open(tmp_path):
    write_gguf(tmp_path / "m.gguf", {"a": 1}, TENSORS)
    (tmp_path / "bad.gguf").write_bytes(BAD["one byte short"][0])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        open_gguf(tmp_path / "m.gguf").bytes_of("a")
        try_all_of(tmp_path / "bad.gguf")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_may_replace_itself(tmp_path):
    """The old bytes stay readable while the new file takes the name."""
    path = tmp_path / "m.gguf"
    write_gguf(path, {"a": 1}, TENSORS)
    opened = open_gguf(path)
    tensors = {n: (t.type, t.shape, opened.bytes_of(n)) for n, t in opened.tensors.items()}
    write_gguf(path, {"a": 2}, tensors)
    assert open_gguf(path).metadata["a"] == 2
    assert open_gguf(path).bytes_of("a").tobytes() == TENSORS["a"][2]


@pytest.mark.parametrize(
    "tensors",
    [
        {"t": (0, (2,), bytes(7))},
        {"t": (2, (2, 16), bytes(18))},
        {"t": (0, (1, 1, 1, 1, 1), bytes(4))},
        {"t": (0, (0,), b"")},
        {"": (0, (1,), bytes(4))},
        {"n" * 64: (0, (1,), bytes(4))},
    ],
)
def test_what_no_reader_would_accept_is_not_written(tmp_path, tensors):
    with pytest.raises(ValueError, match=r"tensor|name"):
        write_gguf(tmp_path / "m.gguf", {}, tensors)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    write_gguf(path, {"old": True}, {})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"^m\.gguf: No space left on device"):
        write_gguf(path, {"old": False}, TENSORS)
    assert open_gguf(path).metadata["old"] is True
    assert list(tmp_path.iterdir()) == [path]


def test_the_format_is_read_without_torch():
    program = "import sys, refollama.weights.gguf; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_tensors_may_come_in_pieces(tmp_path):
    """The same file as from whole ones; pieces that are too few or too many are no file."""

    def pieces(count):
        return (np.full(2, at, np.float32) for at in range(count))

    whole = np.concatenate(list(pieces(4)))
    write_gguf(tmp_path / "whole.gguf", {}, {"x": (0, (4, 2), whole)})
    write_gguf(tmp_path / "pieces.gguf", {}, {"x": (0, (4, 2), pieces(4))})
    expected = (tmp_path / "whole.gguf").read_bytes()
    assert (tmp_path / "pieces.gguf").read_bytes() == expected
    for count in (3, 5):
        with pytest.raises(ValueError, match=f"32 bytes expected, not {8 * count}"):
            write_gguf(tmp_path / "no.gguf", {}, {"x": (0, (4, 2), pieces(count))})
    assert {path.name for path in tmp_path.iterdir()} == {"whole.gguf", "pieces.gguf"}
