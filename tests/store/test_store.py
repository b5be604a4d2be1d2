"""A name becomes files; what is in the making, replaced or removed leaves nothing behind."""

import errno
import fcntl
import hashlib
import json
import logging
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest

from refollama.errors import FormatError, ModelNotFound, StoreError, UnsupportedModel
from refollama.store import Store
from refollama.store import manifest as kinds
from refollama.store.manifest import Config, Layer, Manifest
from refollama.store.name import Name
from tests.store.helpers import snapshot

LLAMA = Config("gguf", "llama", ("llama",), "7B", "Q4_0")
WEIGHTS = (kinds.MODEL, b"weights")
X = Name.parse("x")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "models")


def make(store, text, *blobs, config=LLAMA):
    """A model of (media type, bytes) layers."""
    with store.draft() as draft:
        layers = tuple(Layer(kind, draft.add(data), len(data)) for kind, data in blobs)
        data = config.to_bytes(layer.digest for layer in layers)
        manifest = Manifest(Layer(kinds.CONFIG, draft.add(data), len(data)), layers)
        draft.commit(Name.parse(text), manifest)
    return manifest


def blob_of(store, data):
    return store.blobs.path("sha256:" + hashlib.sha256(data).hexdigest())


# -------------------------------------------------------------------- where


def test_the_root_is_ollamas(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    assert Store.default().root == tmp_path / ".ollama" / "models"
    monkeypatch.setenv("OLLAMA_MODELS", "")
    assert Store.default().root == tmp_path / ".ollama" / "models"
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "other"))
    assert Store.default().root == tmp_path / "other"
    assert list(Store.default().list()) == []
    assert snapshot(tmp_path) == {}  # looking makes no folders


def test_the_list_answers_at_once_and_without_torch(tmp_path):
    """An import, a store of twenty models, and the list.  The whole command may take 0.5 s."""
    store = Store(tmp_path / "models")
    for number in range(20):
        make(store, f"m{number}", WEIGHTS, (kinds.SYSTEM, b"%d" % number))
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from refollama.store import Store\n"
        "assert len(Store.default().list()) == 20\n"
        "assert not {'torch', 'numpy', 'httpx', 'flask'} & set(sys.modules)\n"
        "print(time.perf_counter() - start)"
    )
    env = {"OLLAMA_MODELS": str(store.root), "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 0.5


# -------------------------------------------------------------------- resolve


def test_a_name_becomes_files(store):
    manifest = make(
        store,
        "Me/X:7b",
        (kinds.MODEL, b"old weights"),
        (kinds.LICENSE, b"MIT"),
        (kinds.PROMPT, b"{{ .Old }}"),
        (kinds.PARAMS, b'{"top_k":1,"stop":["a"]}'),
        (kinds.TEMPLATE, "{{ .Prompt }} ä".encode()),
        (kinds.SYSTEM, b"first"),
        (kinds.SYSTEM, b"second"),
        (kinds.PROJECTOR, b"clip"),
        (kinds.ADAPTER, b"lora"),
        (kinds.LICENSE, b"Apache"),
        (kinds.PARAMS, b'{"top_k":2,"seed":null}'),
        ("application/vnd.other", b"ignored"),
        WEIGHTS,
    )
    files = store.resolve(Name.parse("me/x:7B"))
    assert str(files.name) == "Me/X:7b"
    assert files.digest == hashlib.sha256(manifest.to_bytes()).hexdigest()
    assert files.weights == blob_of(store, b"weights")
    assert (files.template, files.system) == ("{{ .Prompt }} ä", "second")
    assert files.parameters == {"top_k": 2, "stop": ["a"]}
    assert files.licenses == ("MIT", "Apache")
    assert files.projectors == (blob_of(store, b"clip"),)
    assert files.adapters == (blob_of(store, b"lora"),)
    assert files.config == Config("gguf", "llama", ("llama",), "7B", "Q4_0")
    assert files.parent == "" and files.size == manifest.size


def test_a_model_without_texts(store):
    make(store, "x", WEIGHTS)
    files = store.resolve(X)
    assert (files.template, files.system, files.parameters, files.licenses) == (None, None, {}, ())


def test_what_is_missing_is_told(store):
    with pytest.raises(ModelNotFound):
        store.resolve(X)
    make(store, "x", WEIGHTS, (kinds.SYSTEM, b"hi"))
    blob_of(store, b"hi").unlink()
    with pytest.raises(StoreError, match="is missing: pull or create it again"):
        store.resolve(X)
    blob_of(store, b"weights").unlink()
    with pytest.raises(ModelNotFound):
        store.resolve(X)
    make(store, "none", (kinds.SYSTEM, b"hi"))
    with pytest.raises(UnsupportedModel, match="no weights"):
        store.resolve(Name.parse("none"))


@pytest.mark.parametrize(("kind", "data"), [(kinds.SYSTEM, b"\xff"), (kinds.PARAMS, b"[]")])
def test_broken_blobs_are_told(store, kind, data):
    make(store, "x", WEIGHTS, (kind, data))
    with pytest.raises(FormatError):
        store.resolve(X)


def test_a_store_of_an_older_ollama_is_read(store):
    """Colons in the names of blobs, a manifest without newline, a config with holes."""
    config = b'{"model_format":"gguf","architecture":"amd64"}'
    layers = []
    for kind, data in ((kinds.CONFIG, config), WEIGHTS):
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        store.blobs.folder.mkdir(parents=True, exist_ok=True)
        (store.blobs.folder / digest).write_bytes(data)
        layers.append(Layer(kind, digest, len(data)))
    store.manifests.write(X, Manifest(layers[0], (layers[1],)).to_bytes(newline=False))
    assert store.resolve(X).weights.name == layers[1].digest
    assert store.list()[0].details["families"] is None


# -------------------------------------------------------------------- list


def test_the_list(store):
    manifest = make(store, "x", WEIGHTS)
    make(store, "a/b:c", WEIGHTS)
    first, second = store.list()
    assert [str(first.name), str(second.name)] == ["a/b:c", "x:latest"]
    assert second.size == manifest.size
    assert second.digest == store.resolve(X).digest
    assert second.modified_at.utcoffset() is not None
    assert abs((datetime.now().astimezone() - second.modified_at).total_seconds()) < 60
    assert second.details == {
        "format": "gguf",
        "family": "llama",
        "families": ["llama"],
        "parameter_size": "7B",
        "quantization_level": "Q4_0",
    }
    assert json.dumps(second.details)


def test_the_list_survives_broken_models(store, caplog):
    make(store, "x", WEIGHTS)
    make(store, "y", WEIGHTS, config=Config("other"))
    make(store, "z", (kinds.MODEL, b"other weights"))
    store.blobs.path(store.manifests.read(Name.parse("y")).manifest.config.digest).write_bytes(b"[")
    (store.manifests.folder / "registry.ollama.ai/library/x/latest").write_bytes(b"")
    blob_of(store, b"other weights").unlink()
    with caplog.at_level(logging.WARNING):
        assert [str(entry.name) for entry in store.list()] == ["z:latest"]
    assert "x:latest" in caplog.text and "y:latest" in caplog.text


# -------------------------------------------------------------------- drafts


def test_a_draft_that_is_not_committed_leaves_nothing(store):
    make(store, "x", WEIGHTS)
    before = snapshot(store.root)
    with pytest.raises(RuntimeError), store.draft() as draft:
        draft.add(b"weights")
        draft.add(b"new")
        assert draft.is_new("sha256:" + hashlib.sha256(b"new").hexdigest())
        raise RuntimeError
    assert snapshot(store.root) == before


def test_a_manifest_never_names_what_is_not_there(store):
    with store.draft() as draft:
        manifest = Manifest(Layer(kinds.CONFIG, "sha256:" + "0" * 64, 1), ())
        with pytest.raises(StoreError, match="is missing"):
            draft.commit(X, manifest)
    assert not store.manifests.folder.exists()


def test_two_drafts_share_a_blob_until_the_last_has_ended(store):
    with store.draft() as one:
        digest = one.add(b"shared")
        with store.draft() as two:
            two.add(b"shared")
        assert store.blobs.has(digest)
    assert not store.blobs.has(digest)


def test_replacing_removes_what_nobody_names_any_more(store):
    make(store, "x", WEIGHTS, (kinds.SYSTEM, b"old"), (kinds.LICENSE, b"shared"))
    make(store, "y", (kinds.LICENSE, b"shared"))
    stray = store.blobs.add(b"uploaded by a client, not named yet")
    make(store, "X", WEIGHTS, (kinds.SYSTEM, b"new"))
    assert [str(name) for name in store.manifests.names()] == ["x:latest", "y:latest"]
    assert not blob_of(store, b"old").exists()
    assert store.blobs.has(stray)
    assert all(blob_of(store, data).exists() for data in (b"weights", b"new", b"shared"))


def test_noprune_keeps_replaced_blobs(tmp_path, monkeypatch):
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    monkeypatch.setenv("OLLAMA_NOPRUNE", "1")
    store = Store.default()
    make(store, "x", WEIGHTS, (kinds.SYSTEM, b"old"))
    make(store, "x", WEIGHTS)
    assert blob_of(store, b"old").exists()


def test_nothing_is_pruned_while_a_manifest_cannot_be_read(store):
    make(store, "x", WEIGHTS, (kinds.SYSTEM, b"old"))
    make(store, "y", WEIGHTS)
    (store.manifests.folder / "registry.ollama.ai/library/y/latest").write_bytes(b"{")
    make(store, "x", WEIGHTS)
    assert blob_of(store, b"old").exists()


def test_a_broken_manifest_can_be_replaced(store):
    make(store, "x", WEIGHTS)
    (store.manifests.folder / "registry.ollama.ai/library/x/latest").write_bytes(b"{")
    make(store, "x", WEIGHTS)
    assert store.resolve(X).weights.exists()


def test_copy_keeps_the_id_and_remove_keeps_what_is_shared(store):
    make(store, "x", WEIGHTS, (kinds.SYSTEM, b"hi"))
    alone = snapshot(store.root)
    store.copy(X, Name.parse("me/copy"))
    assert store.resolve(Name.parse("me/copy")).digest == store.resolve(X).digest
    store.remove(Name.parse("ME/copy"))
    assert snapshot(store.root) == alone
    store.remove(X)
    assert all(what == "folder" for what in snapshot(store.root).values())
    with pytest.raises(ModelNotFound):
        store.remove(X)
    with pytest.raises(ModelNotFound):
        store.copy(X, Name.parse("y"))


def test_readers_never_see_half_a_model(store):
    """While a model is replaced over and over, each reading is one whole version."""
    make(store, "x", WEIGHTS, (kinds.SYSTEM, b"0"), (kinds.LICENSE, b"0"))
    ended = threading.Event()

    def replace():
        for number in range(1, 20):
            data = b"%d" % number
            make(store, "x", WEIGHTS, (kinds.SYSTEM, data), (kinds.LICENSE, b"l" + data))
        ended.set()

    thread = threading.Thread(target=replace)
    thread.start()
    while not ended.is_set():
        files = store.resolve(X)
        assert files.licenses[0].removeprefix("l") == files.system
        assert len(store.list()) == 1
        time.sleep(0.002)  # let the writer have the lock
    thread.join()


# -------------------------------------------------------------------- two processes, one store


def test_two_processes_never_make_a_model_without_its_blobs(store, monkeypatch):
    """The other one removes a model, in the moment between our last look and our manifest.

    It does not know what we hold. Two stores in one process stand for two processes: what is
    between them is a lock on the disk.
    """
    make(store, "x", WEIGHTS)
    other, write = Store(store.root), store.manifests.write
    remover = threading.Thread(target=other.remove, args=(X,))

    def late(name, data):
        remover.start()
        remover.join(0.3)
        write(name, data)

    monkeypatch.setattr(store.manifests, "write", late)
    made = make(store, "y", WEIGHTS)
    remover.join(10)
    assert [str(entry.name) for entry in store.list()] == ["y:latest"]
    assert all(store.blobs.has(digest) for digest in made.digests)


def test_without_locks_on_the_disk_threads_still_wait(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", none)
    store = Store(tmp_path)
    make(store, "x", WEIGHTS)
    with store.blobs.lock, store.blobs.lock:
        thread = threading.Thread(target=store.remove, args=(X,))
        thread.start()
        thread.join(0.1)
        assert len(store.list()) == 1
    thread.join(10)
    assert len(store.list()) == 0
