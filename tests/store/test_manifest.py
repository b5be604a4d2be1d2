"""Manifests, configs and parameters are read with distrust and written to the byte."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import stat
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refollama.errors import FormatError, ModelNotFound, StoreError
from refollama.store import manifest as module
from refollama.store.manifest import (
    CONFIG,
    MODEL,
    Config,
    Layer,
    Manifest,
    Manifests,
    as_float32,
    params_from_bytes,
    params_to_bytes,
    to_json,
)
from refollama.store.name import Name
from tests.store.helpers import snapshot

D0, D1 = "sha256:" + "0" * 64, "sha256:" + "1" * 64
MANIFEST = Manifest(Layer(CONFIG, D0, 10), (Layer(MODEL, D1, 20, "llama2:latest"),))
BYTES = (
    '{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.manifest.v2+json",'
    '"config":{"mediaType":"application/vnd.docker.container.image.v1+json",'
    f'"digest":"{D0}","size":10}},'
    '"layers":[{"mediaType":"application/vnd.ollama.image.model",'
    f'"digest":"{D1}","size":20,"from":"llama2:latest"}}]}}\n'
).encode()


# -------------------------------------------------------------------- bytes


def test_a_manifest_to_the_byte():
    assert MANIFEST.to_bytes() == BYTES
    assert MANIFEST.to_bytes(newline=False) == BYTES[:-1]
    assert Manifest.parse(BYTES) == Manifest.parse(BYTES[:-1]) == MANIFEST
    assert MANIFEST.size == 30 and MANIFEST.digests == {D0, D1}


def test_a_config_to_the_byte():
    config = Config("gguf", "llama", ("llama", "clip"), "7B", "Q4_0")
    expected = (
        '{"model_format":"gguf","model_family":"llama","model_families":["llama","clip"],'
        '"model_type":"7B","file_type":"Q4_0","architecture":"amd64","os":"linux",'
        f'"rootfs":{{"type":"layers","diff_ids":["{D1}"]}}}}\n'
    ).encode()
    assert config.to_bytes([D1]) == expected
    assert Config.parse(expected) == config
    assert b'"model_families":null' in Config().to_bytes([])
    assert Config.parse(b"{}") == Config.parse(b'{"model_families":null}') == Config()


def test_parameters_to_the_byte():
    """The vector of the specification."""
    parameters = {"temperature": as_float32(1.0), "stop": ["<|im_end|>"], "num_ctx": 4096}
    expected = b'{"num_ctx":4096,"stop":["\\u003c|im_end|\\u003e"],"temperature":1}\n'
    assert params_to_bytes(parameters) == expected
    assert params_from_bytes(expected) == parameters


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((1.0, "1"), (0.7, "0.7"), (-0.5, "-0.5"), (0.0, "0"), (-0.0, "-0"), (100000.0, "100000")),
        *((1e-6, "0.000001"), (1e-7, "1e-7"), (1.5e-7, "1.5e-7"), (1e-10, "1e-10")),
        *((1e20, "100000000000000000000"), (1e21, "1e+21"), (1.25e21, "1.25e+21")),
        *((4096, "4096"), (True, "true"), (None, "null"), ([], "[]"), ({}, "{}")),
        *(("<&>", r'"\u003c\u0026\u003e"'), ("\u2028\u2029", r'"\u2028\u2029"'), ("ä🙂", '"ä🙂"')),
        *(("\b\f\n\r\t\x01\x7f", '"\\u0008\\u000c\\n\\r\\t\\u0001\x7f"'), ('"\\', r'"\"\\"')),
        *(("\\b\\\\<", r'"\\b\\\\\u003c"'),),
    ],
)
def test_json_as_go_prints_it(value, text):
    assert to_json(value) == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("ab<\\", max_size=3), inner),
    max_leaves=10,
)  # fmt: skip


@given(JSON)
def test_what_is_printed_is_the_same_json(value):
    # A float of 17 digits is printed without its point; as a float again it is the same.
    assert json.loads(to_json(value), parse_int=float) == value


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_32_bit_numbers_have_at_most_nine_digits(value):
    shown = repr(as_float32(value)).split("e")[0].replace(".", "").strip("-0")
    assert len(shown) <= 9
    assert struct.pack("<f", as_float32(value)) == struct.pack("<f", value)


def test_32_bit_numbers():
    assert as_float32(0.7) == 0.7
    assert as_float32(0.123456789) == 0.12345679
    with pytest.raises(OverflowError):
        as_float32(1e39)


# -------------------------------------------------------------------- hostile shapes


def _with(**changes):
    return json.dumps(json.loads(BYTES) | changes).encode()


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"{", b"[]", b"null", b"1", b"\xff", b'"x"', b"[" * 100_000, b"9" * 10_000),
        *(_with(layers={}), _with(layers="x"), _with(layers=[1]), _with(layers=[None])),
        *(_with(layers=[[]]), _with(layers=[{}]), _with(config=None), _with(config=[])),
        *(_with(schemaVersion=1), _with(schemaVersion=None), _with(config={"digest": D0})),
        *(
            _with(config={"mediaType": "m", "digest": D0, "size": size})
            for size in (-1, 1.5, True, "1", None, 1 << 63)
        ),
        *(
            _with(config={"mediaType": "m", "digest": digest, "size": 1})
            for digest in ("../../etc/passwd", "sha256:1", 5, None, D0 + "/..")
        ),
        _with(config={"mediaType": 3, "digest": D0, "size": 1}),
        _with(config={"mediaType": "m", "digest": D0, "size": 1, "from": ["x"]}),
        _with(config={"mediaType": "\ud800", "digest": D0, "size": 1}),
    ],
)
def test_hostile_manifests(data):
    with pytest.raises(FormatError):
        Manifest.parse(data)


@pytest.mark.parametrize(
    "data",
    [b"[]", b'{"model_families":"x"}', b'{"model_families":[1]}', b'{"model_type":7}', b"\xff{}"],
)
def test_hostile_configs(data):
    with pytest.raises(FormatError):
        Config.parse(data)


@pytest.mark.parametrize(
    "data",
    [
        b"[]",
        b'{"a":{}}',
        b'{"a":[1,"x"]}',
        b'{"a":[NaN]}',
        b'{"a":NaN}',
        b'{"a":1e999}',
        b'{"a":[["x"]]}',
        b"{'a':1}",
    ],
)
def test_hostile_parameters(data):
    with pytest.raises(FormatError):
        params_from_bytes(data)


@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_read_or_refused(data):
    for read in (Manifest.parse, Config.parse, params_from_bytes):
        with contextlib.suppress(FormatError):
            read(data)


# -------------------------------------------------------------------- files


@pytest.fixture
def manifests(tmp_path):
    return Manifests(tmp_path / "models")


def test_written_is_read(manifests):
    name = Name.parse("me/x:7b")
    manifests.write(name, BYTES)
    stored = manifests.read(name)
    assert stored.manifest == MANIFEST
    assert stored.digest == hashlib.sha256(BYTES).hexdigest()
    path = manifests.folder / "registry.ollama.ai/me/x/7b"
    assert path.read_bytes() == BYTES and stat.S_IMODE(path.stat().st_mode) == 0o644


def test_case_is_ignored_when_a_model_is_there(manifests):
    manifests.write(Name.parse("Me/Llama2:7B"), BYTES)
    assert str(manifests.match(Name.parse("me/llama2:7b"))) == "Me/Llama2:7B"
    assert str(manifests.read(Name.parse("ME/LLAMA2:7b")).name) == "Me/Llama2:7B"
    assert str(manifests.match(Name.parse("me/other"))) == "me/other:latest"


def test_names_come_in_the_order_of_a_lexical_walk(manifests):
    for text in ("b", "a:z", "a:b", "me/c", "host:80/x/y", "a.b"):
        manifests.write(Name.parse(text), BYTES)
    shown = [str(name) for name in manifests.names()]
    assert shown == ["host:80/x/y:latest", "a:b", "a:z", "a.b:latest", "b:latest", "me/c:latest"]


def test_what_cannot_be_read_is_skipped_with_a_warning(manifests, caplog):
    manifests.write(Name.parse("good"), BYTES)
    folder = manifests.folder / "registry.ollama.ai/library"
    (folder / "bad").mkdir()
    (folder / "bad/latest").write_bytes(b"{")
    (folder / "bad/.DS_Store").write_bytes(b"")
    (folder / "long").mkdir()
    (folder / "long/latest").write_bytes(b" " * (module.READ_LIMIT + 1))
    os.mkfifo(folder / "long/pipe")
    (folder / "out").mkdir()
    (folder / "out/latest").symlink_to("/etc/passwd")
    with caplog.at_level(logging.WARNING):
        assert [str(stored.name) for stored in manifests.read_all()] == ["good:latest"]
    assert "bad:latest" in caplog.text and "long:latest" in caplog.text
    assert not manifests.all_readable()
    with pytest.raises(StoreError, match="leaves the store"):
        manifests.read(Name.parse("out"))


def test_a_missing_model_is_told_by_name(manifests):
    with pytest.raises(ModelNotFound, match="model 'x:latest' not found"):
        manifests.read(Name.parse("x"))
    assert manifests.names() == [] and manifests.named() == set()


def test_removing_takes_the_empty_folders_too(manifests):
    manifests.write(Name.parse("x:1"), BYTES)
    manifests.write(Name.parse("x:2"), BYTES)
    before = snapshot(manifests.folder)
    manifests.write(Name.parse("host/ns/y"), BYTES)
    assert manifests.remove(Name.parse("HOST/ns/y")).manifest == MANIFEST
    assert snapshot(manifests.folder) == before


@pytest.mark.parametrize("step", ["fsync", "replace", "fchmod"])
def test_a_full_disk_leaves_the_old_manifest_and_no_folder(manifests, monkeypatch, step):
    manifests.write(Name.parse("old"), BYTES)
    before = snapshot(manifests.folder)

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    for text in ("old", "host/new/model"):
        with pytest.raises(StoreError, match="the disk is full"):
            manifests.write(Name.parse(text), MANIFEST.to_bytes(newline=False))
    assert snapshot(manifests.folder) == before


def test_broken_bytes_are_never_written(manifests):
    with pytest.raises(FormatError):
        manifests.write(Name.parse("x"), b"{}")
    assert not manifests.folder.exists()
