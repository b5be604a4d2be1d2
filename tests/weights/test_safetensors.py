"""Safetensors files, as their own library writes them, are read exactly and never believed."""

import json
import struct

import numpy as np
import pytest
from safetensors.numpy import load, save_file

from refollama.errors import FormatError, StoreError
from refollama.weights import safetensors as module
from refollama.weights.safetensors import Made, encoded, open_safetensors

TENSORS: dict[str, np.ndarray] = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(10, dtype=np.float16).reshape(5, 2, 1),
    "c": np.array(7.0),
    "d": np.zeros((0, 3), np.int64),
}


@pytest.mark.parametrize("piece", [1, 20, 1 << 20])
def test_what_the_library_wrote_is_what_is_read(piece, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE", piece)
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = open_safetensors(tmp_path / "x.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        pieces = list(found[name].pieces())
        whole = np.concatenate(pieces) if pieces else np.zeros(0)
        assert np.array_equal(whole.reshape(expected.shape), expected)


def test_the_library_reads_what_we_write():
    made = {
        "a": Made("F32", (3, 4), [TENSORS["a"][:1], TENSORS["a"][1:]]),
        "b": Made("F16", (5, 2, 1), [TENSORS["b"]]),
    }
    found = load(b"".join(encoded(made)))
    assert {name: x.tolist() for name, x in found.items()} == {
        name: TENSORS[name].tolist() for name in made
    }


def test_rows_that_belong_together_come_together(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 1)
    save_file({"x": np.arange(24.0).reshape(12, 2)}, tmp_path / "x.safetensors")
    (x,) = open_safetensors(tmp_path / "x.safetensors").values()
    assert [len(piece) for piece in x.pieces(4)] == [4, 4, 4]


def file(header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def row(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"", "no header begins"),
        (b"\0" * 8, "no header begins"),
        (struct.pack("<Q", 2**60) + b"{}", "no header begins"),
        (b"\x80\x04\x95" + bytes(30), "is a pickle, which may run code"),
        (b"PK\x03\x04" + bytes(30), "is a pickle, which may run code"),
        (file(b"{"), "no JSON that makes sense"),
        (file(b"{" + b'"a":[' * 100_000), "no JSON that makes sense"),
        (file(b'{"a":{},"a":{}}'), "given twice"),
        (file({"a": {"dtype": "F32"}}), "'a' has no dtype, shape and data_offsets"),
        (file({"a": row("F33")}), "of the type 'F33', which is unknown"),
        (file({"a": row(shape=[-1])}), "no list of up to 8 sizes"),
        (file({"a": row(shape=[True])}), "no list of up to 8 sizes"),
        (file({"a": row(shape=[1] * 9)}), "no list of up to 8 sizes"),
        (file({"a": row(offsets=[0])}), "no two numbers"),
        (file({"a": row(offsets=[8, 0])}), "takes 8 bytes, but its data has -8"),
        (file({"a": row(shape=[3])}, bytes(8)), "F32 of the shape 3 takes 12 bytes"),
        (file({"a": row()}, bytes(7)), "'a' would end at byte"),
        (file({"a": row(), "b": row(offsets=[4, 12])}, bytes(12)), "'a' and 'b' overlap"),
    ],
)
def test_what_does_not_fit_is_found_out(raw, sentence, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(raw)
    with pytest.raises(FormatError, match=sentence):
        open_safetensors(tmp_path / "x.safetensors")


def test_a_file_that_shrinks_is_found_out(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": np.zeros(100)}, path)
    (x,) = open_safetensors(path).values()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match="changed while it was read"):
        list(x.pieces())
