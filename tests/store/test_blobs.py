"""A blob is whole or absent, and its name is the hash of its bytes."""

import errno
import hashlib
import os
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refollama.errors import BadRequest, FormatError, StoreError
from refollama.store import blobs as module
from refollama.store.blobs import Blobs, checked_digest
from tests.store.helpers import snapshot

HEX = hashlib.sha256(b"hello").hexdigest()
DIGEST = f"sha256:{HEX}"


@pytest.fixture
def blobs(tmp_path):
    return Blobs(tmp_path / "models")


def run(steps):
    """All that a generator yields, and what it returns."""
    seen = []
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as end:
            return seen, end.value


# -------------------------------------------------------------------- digests


def test_both_signs_and_both_cases_are_one_digest():
    for text in (DIGEST, f"sha256-{HEX}", f"sha256:{HEX.upper()}"):
        assert checked_digest(text) == DIGEST


@pytest.mark.parametrize(
    "text",
    [
        *("", HEX, "sha256:", f"sha256:{HEX}\n", f"sha256:{HEX}0", f"sha256:{HEX[1:]}"),
        *(f"sha256/{HEX}", f"sha512:{HEX}", f"../sha256:{HEX}", "sha256:" + "../" * 21 + "x"),
        *(f"sha256:{HEX[:-1]}٣", f"sha256:{HEX[:-1]}g", f"SHA256:{HEX}", f"sha256:{HEX}\0"),
    ],
)
def test_no_other_text_ever_becomes_a_path(blobs, text):
    for use in (blobs.path, blobs.has, blobs.hold, blobs.size, blobs.verify):
        with pytest.raises(BadRequest, match="invalid digest format"):
            use(text)


# -------------------------------------------------------------------- adding


def test_bytes_chunks_and_files_give_the_same_blob(blobs, tmp_path):
    (tmp_path / "file").write_bytes(b"hello")
    assert blobs.add(b"hello") == DIGEST
    assert blobs.add(iter([b"he", b"", b"llo"])) == DIGEST
    assert run(blobs.add_file(tmp_path / "file")) == ([5], DIGEST)
    assert snapshot(blobs.folder) == {f"sha256-{HEX}": HEX}
    assert blobs.has(DIGEST) and blobs.size(DIGEST) == 5 and blobs.verify(DIGEST)
    assert blobs.read(DIGEST, 5) == b"hello"


def test_modes(blobs):
    blobs.add(b"hello")
    assert stat.S_IMODE(blobs.path(DIGEST).stat().st_mode) == 0o600
    assert stat.S_IMODE(blobs.folder.stat().st_mode) & 0o700 == 0o700


@given(st.lists(st.binary(max_size=50), max_size=10))
def test_any_chunks_hash_to_their_name(tmp_path_factory, chunks):
    blobs = Blobs(tmp_path_factory.mktemp("models"))
    digest = blobs.add(chunks)
    assert digest == f"sha256:{hashlib.sha256(b''.join(chunks)).hexdigest()}"
    assert blobs.verify(digest)


def test_a_file_is_read_in_steps_and_never_whole(blobs, tmp_path):
    size = 3 * module.CHUNK + 7
    (tmp_path / "big").write_bytes(os.urandom(size))
    done, _ = run(blobs.add_file(tmp_path / "big"))
    assert done == [module.CHUNK, 2 * module.CHUNK, 3 * module.CHUNK, size]


def test_the_older_colon_form_is_found_and_not_written_twice(blobs):
    blobs.folder.mkdir(parents=True)
    (blobs.folder / DIGEST).write_bytes(b"hello")
    assert blobs.has(DIGEST) and blobs.path(DIGEST).name == DIGEST
    blobs.add(b"hello")
    assert list(snapshot(blobs.folder)) == [DIGEST]


def test_a_blob_that_was_cut_is_mended(blobs):
    blobs.folder.mkdir(parents=True)
    blobs.path(DIGEST).write_bytes(b"hel")
    assert not blobs.verify(DIGEST)
    blobs.add(b"hello")
    assert blobs.verify(DIGEST)


def test_a_wrong_digest_is_refused_and_nothing_stays(blobs):
    with pytest.raises(BadRequest, match=f'digest mismatch, expected "{DIGEST}", got "sha256:'):
        blobs.add(b"hallo", expected=DIGEST)
    assert snapshot(blobs.folder) == {}


# -------------------------------------------------------------------- failing


def _fail(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_is_told_in_a_sentence_and_leaves_nothing(blobs, monkeypatch, step):
    blobs.add(b"other")
    before = snapshot(blobs.folder)
    monkeypatch.setattr(os, step, _fail)
    with pytest.raises(StoreError, match="the disk is full: free some space"):
        blobs.add(b"hello")
    assert snapshot(blobs.folder) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_forbidden_folder_is_told_without_its_path(blobs, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="permission denied") as problem:
        blobs.add(b"hello")
    assert str(tmp_path) not in str(problem.value)


def test_a_source_that_breaks_off_leaves_nothing(blobs):
    def chunks():
        yield b"he"
        raise RuntimeError("the client hung up")

    with pytest.raises(RuntimeError):
        blobs.add(chunks())
    assert snapshot(blobs.folder) == {}


def test_closing_is_cancelling(blobs, tmp_path):
    (tmp_path / "big").write_bytes(bytes(3 * module.CHUNK))
    steps = blobs.add_file(tmp_path / "big")
    next(steps)
    assert len(snapshot(blobs.folder)) == 1
    steps.close()
    assert snapshot(blobs.folder) == {}


def test_a_file_that_changes_under_way_is_refused(blobs, tmp_path):
    source = tmp_path / "big"
    source.write_bytes(bytes(2 * module.CHUNK))
    steps = blobs.add_file(source)
    next(steps)
    with source.open("ab") as file:
        file.write(b"more")
    with pytest.raises(BadRequest, match="was changed while it was read"):
        run(steps)
    assert snapshot(blobs.folder) == {}


def test_only_regular_files_are_read(blobs, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    paths = [tmp_path / "pipe", tmp_path, tmp_path / "nothing", Path("/dev/zero"), Path("a\0b")]
    for path in paths:
        with pytest.raises(BadRequest, match="is not a regular file that can be read"):
            run(blobs.add_file(path))
    assert not blobs.folder.exists()


def test_links_that_leave_the_store_are_refused(blobs, tmp_path):
    (tmp_path / "secret").write_bytes(b"hello")
    blobs.folder.mkdir(parents=True)
    (blobs.folder / f"sha256-{HEX}").symlink_to(tmp_path / "secret")
    with pytest.raises(StoreError, match="leaves the store"):
        blobs.read(DIGEST, 100)
    with pytest.raises(StoreError, match="leaves the store"):
        blobs.add(b"hello")
    (blobs.folder / f"sha256-{HEX}").unlink()
    (blobs.folder / f"sha256-{HEX}").symlink_to(blobs.folder / f"sha256-{HEX}")
    assert not blobs.has(DIGEST)


def test_small_blobs_are_read_up_to_a_limit(blobs):
    blobs.add(b"hello")
    with pytest.raises(FormatError, match="longer than 4 bytes"):
        blobs.read(DIGEST, 4)
    with pytest.raises(StoreError, match="is missing"):
        blobs.read("sha256:" + "0" * 64, 4)


# -------------------------------------------------------------------- holding


def none_named():
    return ()


def test_a_held_blob_goes_with_its_last_holder(blobs):
    blobs.add(b"hello", hold=True)
    blobs.add(b"hello", hold=True)
    blobs.release([DIGEST], none_named)
    assert blobs.has(DIGEST) and blobs.is_new(DIGEST)
    blobs.release([DIGEST], none_named)
    assert not blobs.has(DIGEST) and not blobs.is_new(DIGEST)


def test_a_blob_that_was_named_or_uploaded_meanwhile_stays(blobs):
    blobs.add(b"hello", hold=True)
    blobs.release([DIGEST], lambda: {DIGEST})
    assert blobs.has(DIGEST)
    other = blobs.add(b"other", hold=True)
    blobs.add(b"other")
    blobs.release([other], none_named)
    assert blobs.has(other)


def test_a_blob_that_was_there_before_stays(blobs):
    blobs.add(b"hello")
    blobs.add(b"hello", hold=True)
    assert not blobs.is_new(DIGEST)
    blobs.release([DIGEST], none_named)
    assert blobs.has(DIGEST)


def test_discarding_waits_for_the_last_holder(blobs):
    blobs.add(b"hello")
    blobs.hold(DIGEST)
    blobs.discard({DIGEST})
    assert blobs.has(DIGEST)
    blobs.release([DIGEST], none_named)
    assert not blobs.has(DIGEST)


def test_many_threads_add_the_same_bytes(blobs):
    threads = [threading.Thread(target=blobs.add, args=(b"hello",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert snapshot(blobs.folder) == {f"sha256-{HEX}": HEX}
