"""What lies on the disk of a blob that is on its way: Ollama's form, and never a false claim."""

import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refollama.errors import BadRequest, FormatError, StoreError
from refollama.store import parts as module
from refollama.store.blobs import Blobs
from refollama.store.parts import Part, PartFiles, left_over, parsed, planned
from tests.registry.fake import digest_of
from tests.registry.models import some_bytes
from tests.registry.parts import claimed, true_claims

MB = 1_000_000
DATA = some_bytes(1000)
DIGEST = digest_of(DATA)
NAME = DIGEST.replace(":", "-")


@pytest.fixture
def blobs(tmp_path):
    return Blobs(tmp_path)


@pytest.fixture
def small(monkeypatch):
    """Parts of three hundred bytes."""
    monkeypatch.setattr(module, "SMALLEST", 300)


@pytest.fixture
def files(blobs, small):
    """The part files of DATA: 300, 300, 300 and 100 bytes."""
    found = PartFiles(blobs, DIGEST, len(DATA))
    assert found.open()
    found.load()
    yield found
    found.close()


def on_disk(blobs):
    return sorted(path.name for path in blobs.folder.iterdir())


def fill(files, part, size):
    """The right bytes of a part, in two pieces."""
    data = DATA[part.position : part.position + size]
    files.write(part, [data[: size // 3], data[size // 3 :]])


# -------------------------------------------------------------------- how a blob is cut


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        (0, []),
        (1, [1]),
        (100 * MB, [100 * MB]),
        (250 * MB, [100 * MB, 100 * MB, 50 * MB]),
        (6400 * MB, [100 * MB] * 64),
        (12_800 * MB, [200 * MB] * 64),
        (65_500 * MB, [1000 * MB] * 65 + [500 * MB]),
    ],
)
def test_parts_are_a_64th_within_bounds(size, sizes):
    """Source: the notes on Ollama, 7.3."""
    assert [part.size for part in planned(size)] == sizes


@given(st.integers(0, 1 << 45))
def test_the_parts_are_the_whole(size):
    end = 0
    for number, part in enumerate(planned(size)):
        assert (part.number, part.offset, part.completed) == (number, end, 0)
        assert 0 < part.size <= 10**9 or size // 64 > 10**9
        end = part.end
    assert end == size


# -------------------------------------------------------------------- records


def test_a_record_has_ollamas_names_in_ollamas_order():
    record = Part(3, 300 * MB, 100 * MB, 25).record()
    text = b'{"N":3,"Offset":300000000,"Size":100000000,"Completed":25}'
    assert record.rstrip() == text and record.endswith(b"\n")
    assert list(json.loads(record)) == ["N", "Offset", "Size", "Completed"]


@given(st.integers(0, 99), st.integers(0, 1 << 40), st.integers(1, 1 << 40), st.data())
def test_a_record_can_be_read_again_and_never_changes_its_length(number, offset, size, data):
    """So it is overwritten in place: no moment at which it is cut, or gone."""
    completed = data.draw(st.integers(0, size))
    part = Part(number, offset, size, completed)
    assert parsed(part.record()) == part
    assert len(part.record()) == len(Part(number, offset, size).record())


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", "[]", "null", "7", '{"N":0', '{"N":0,"Offset":0,"Size":5}', "\0" * 60),
        '{"N":0,"Offset":0,"Size":5,"Completed":6}',
        '{"N":0,"Offset":0,"Size":0,"Completed":0}',
        '{"N":0,"Offset":-1,"Size":5,"Completed":1}',
        '{"N":0,"Offset":0,"Size":5,"Completed":-1}',
        '{"N":0,"Offset":0,"Size":5,"Completed":1.0}',
        '{"N":0,"Offset":0,"Size":5,"Completed":true}',
        '{"N":0,"Offset":0,"Size":5,"Completed":"1"}',
        '{"N":0,"Offset":0,"Size":9223372036854775808,"Completed":1}',
    ],
)
def test_records_that_make_no_sense(text):
    with pytest.raises(FormatError):
        parsed(text.encode())


# -------------------------------------------------------------------- on the disk


def test_the_files_are_called_as_ollama_calls_them(files, blobs):
    names = [f"{NAME}-partial", *(f"{NAME}-partial-{number}" for number in range(4))]
    assert on_disk(blobs) == names
    assert (blobs.folder / names[0]).stat().st_size == len(DATA)
    assert {(blobs.folder / name).stat().st_mode & 0o777 for name in names} <= {0o644, 0o600}


def test_whole_it_gets_its_name_and_nothing_else_stays(files, blobs):
    for part in reversed(files.parts):
        fill(files, part, part.size)
    assert files.prefix == files.completed == len(DATA)
    files.finish()
    assert on_disk(blobs) == [NAME]
    assert blobs.read(DIGEST, 2000) == DATA


def test_what_was_left_is_gone_on_with(files, blobs):
    for part, size in zip(files.parts, (300, 10, 0, 99), strict=True):
        fill(files, part, size)
    files.close()
    assert left_over(blobs, DIGEST, len(DATA)) == 409
    again = PartFiles(blobs, DIGEST, len(DATA))
    assert again.open()
    again.load()
    assert [part.completed for part in again.parts] == [300, 10, 0, 99]
    assert again.prefix == 310
    for part in again.parts:
        fill(again, part, part.left)
    again.finish()
    again.close()
    assert blobs.verify(DIGEST)


def test_what_ollama_left_is_gone_on_with(blobs):
    """Its parts, its line, its colon: written by hand."""
    blobs.folder.mkdir()
    name = f"{DIGEST}-partial"
    (blobs.folder / name).write_bytes(DATA[:400] + bytes(200) + DATA[600:700] + bytes(300))
    (blobs.folder / f"{name}-0").write_text('{"N":0,"Offset":0,"Size":600,"Completed":400}\n')
    (blobs.folder / f"{name}-1").write_text('{"N":1,"Offset":600,"Size":400,"Completed":100}\n')
    files = PartFiles(blobs, DIGEST, len(DATA))
    assert files.open()
    files.load()
    assert files.parts == [Part(0, 0, 600, 400), Part(1, 600, 400, 100)]
    for part in files.parts:
        fill(files, part, part.left)
    files.finish()
    files.close()
    assert blobs.verify(DIGEST)
    assert len(on_disk(blobs)) == 1


@pytest.mark.parametrize("harm", ["a record less", "a strange record", "shorter", "gone", "gap"])
def test_what_is_damaged_is_begun_anew(files, blobs, harm):
    for part in files.parts:
        fill(files, part, part.size)
    files.close()
    data, second = blobs.folder / f"{NAME}-partial", blobs.folder / f"{NAME}-partial-1"
    {
        "a record less": second.unlink,
        "a strange record": lambda: second.write_text("{}"),
        "shorter": lambda: os.truncate(data, 999),
        "gone": data.unlink,
        "gap": lambda: second.write_text('{"N":1,"Offset":301,"Size":299,"Completed":1}'),
    }[harm]()
    assert left_over(blobs, DIGEST, len(DATA)) == 0
    again = PartFiles(blobs, DIGEST, len(DATA))
    assert again.open()
    again.load()
    assert again.completed == 0 and len(again.parts) == 4
    assert data.read_bytes() == bytes(len(DATA))
    again.close()


def test_a_blob_that_is_being_created_is_no_part(files, blobs):
    """Our temporary files are called alike, but never so."""

    def chunks():
        yield DATA
        assert len(module._records_of(blobs.folder / f"{NAME}-partial")) == 4
        assert len(on_disk(blobs)) == 6

    assert blobs.add(chunks()) == DIGEST


@pytest.mark.parametrize("digest", ["../x", "sha256:" + "0" * 63, "sha256:" + "../" * 21 + "x"])
def test_nothing_else_than_a_digest_becomes_a_path(blobs, digest):
    for make in (PartFiles, left_over):
        with pytest.raises(BadRequest, match="invalid digest format"):
            make(blobs, digest, 5)


def test_a_link_is_not_followed(blobs, tmp_path):
    blobs.folder.mkdir()
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (blobs.folder / f"{NAME}-partial").symlink_to(victim)
    with pytest.raises(StoreError):
        PartFiles(blobs, DIGEST, len(DATA)).open()
    assert victim.read_bytes() == b"precious"


# -------------------------------------------------------------------- claims


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 300)), max_size=12))
def test_after_any_writes_the_claims_are_true(tmp_path_factory, steps):
    """Judge: the parts' files, read by other code; the prefix, counted byte by byte."""
    blobs = Blobs(tmp_path_factory.mktemp("blobs"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SMALLEST", 300)
        files = PartFiles(blobs, DIGEST, len(DATA))
        assert files.open()
        files.load()
    for number, size in steps:
        part = files.parts[number]
        if part.left:
            fill(files, part, min(size, part.left))
        assert true_claims(blobs.folder.parent, DIGEST, DATA)
    pieces = list(claimed(blobs.folder.parent, DIGEST))
    here = [any(first <= at < end for first, end in pieces) for at in range(len(DATA) + 1)]
    assert files.completed == sum(here)
    assert files.prefix == here.index(False)
    files.close()


def test_a_full_disk_claims_nothing_more(files, blobs, monkeypatch):
    fill(files, files.parts[0], 100)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(StoreError, match="the disk is full"):
        fill(files, files.parts[0], 100)
    assert files.parts[0].completed == 100
    assert left_over(blobs, DIGEST, len(DATA)) == 100


def test_a_record_that_cannot_be_written_loses_only_itself(files, blobs, monkeypatch):
    """Killed between the data and the record: the record tells of less, not of more."""
    monkeypatch.setattr(Part, "record", lambda part: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fill(files, files.parts[0], 100)
    assert left_over(blobs, DIGEST, len(DATA)) == 0
    assert true_claims(blobs.folder.parent, DIGEST, DATA)


def test_the_system_may_take_less_than_it_is_given(files, monkeypatch):
    whole = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda handle, chunks, at: whole(handle, chunks[:1], at))
    some = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at: some(handle, bytes(data)[:70], at))
    for part in files.parts:
        fill(files, part, part.size)
    buffer = memoryview(bytearray(len(DATA)))
    assert files.read(buffer, 0) == len(DATA)
    assert hashlib.sha256(buffer).hexdigest() == DIGEST[7:]


# -------------------------------------------------------------------- one at a time


def test_nobody_else_has_the_files_meanwhile(files, blobs):
    other = PartFiles(blobs, DIGEST, len(DATA))
    assert not other.open()
    files.close()
    assert other.open()
    other.close()


def test_not_even_another_process(files, blobs):
    path = blobs.folder / f"{NAME}-partial"
    code = f"import fcntl; fcntl.flock(open({str(path)!r}), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-I", "-S", "-c", code]
    assert b"BlockingIOError" in subprocess.run(command, capture_output=True).stderr
    files.close()
    assert subprocess.run(command).returncode == 0


def test_who_waited_does_not_write_into_the_finished_blob(files, blobs):
    """The file that it saw has another name by now."""
    for part in files.parts:
        fill(files, part, part.size)
    files.finish()
    late = PartFiles(blobs, DIGEST, len(DATA))
    assert late.open()
    late.load()
    assert blobs.read(DIGEST, 2000) == DATA
    late.discard()
    late.close()
    files.close()
    assert on_disk(blobs) == [NAME]


def test_who_was_about_to_lock_it_does_not_either(files, blobs, monkeypatch):
    """The blob gets its name between the opening and the locking of the file."""
    for part in files.parts:
        fill(files, part, part.size)
    lock = module._locked

    def late(handle):
        files.finish()
        files.close()
        return lock(handle)

    monkeypatch.setattr(module, "_locked", late)
    assert not PartFiles(blobs, DIGEST, len(DATA)).open()
    assert blobs.read(DIGEST, 2000) == DATA


def test_a_disk_without_locks_is_used_without_them(blobs, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    files = PartFiles(blobs, DIGEST, len(DATA))
    assert files.open()
    files.close()
