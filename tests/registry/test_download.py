"""One blob on its way: whatever a registry answers, its bytes are right or it is not there."""

import errno
import itertools
import os
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refollama.errors import RefollamaError, RegistryError, StoreError
from refollama.store import parts
from refollama.store.blobs import Blobs
from refollama.store.manifest import MODEL, Layer
from refollama.store.name import Name
from refollama.store.parts import PartFiles
from refollama.store.registry import download as download_module
from refollama.store.registry import incoming
from refollama.store.registry.download import Downloads, Line
from refollama.store.registry.session import Registry
from tests.registry.fake import FakeRegistry, digest_of
from tests.registry.models import is_sound, some_bytes
from tests.registry.parts import claimed, overlap, true_claims

pytestmark = pytest.mark.usefixtures("hurry")
DATA = some_bytes(1_000_000)
DIGEST = digest_of(DATA)
PART = 300_000  # bytes; the last part of DATA has 100,000
OURS = ("download", "part")  # threads


@pytest.fixture(autouse=True)
def tiny_parts(monkeypatch):
    monkeypatch.setattr(parts, "SMALLEST", PART)
    monkeypatch.setattr(incoming, "PROGRESS", 50_000)
    monkeypatch.setattr(incoming, "GATHERED", 20_000)


@pytest.fixture
def blobs(tmp_path):
    return Blobs(tmp_path)


@pytest.fixture
def downloads(blobs):
    return Downloads(blobs)


def line_to(registry, model="library/tale"):
    name = Name.parse(f"{registry.host}/{model}")
    return Line(Registry(name, insecure=True), name.full)


def layer_of(registry, data=DATA, model="library/tale"):
    digest, size = registry.add_blob(model, data)
    return Layer(MODEL, digest, size)


def fetch(downloads, registry, layer, *, enough=lambda download: False):
    """Until its end, or until it is enough; the download, once all its threads have ended."""
    with line_to(registry) as line, downloads.joined(line, layer) as download:
        while not download.ended.wait(0.002) and not enough(download):
            pass
    assert download.ended.wait(5)
    return download


def fetched(downloads, registry, layer):
    """The bytes of a blob.  Raises: why there are none."""
    download = fetch(downloads, registry, layer)
    if download.failure is not None:
        raise download.failure
    return downloads.blobs.read(layer.digest, layer.size)


def answering(registry, answer, method="GET"):
    """Requests for blobs are answered so, unless it returns False."""

    def hook(exchange):
        return exchange.command == method and "/blobs/" in exchange.path and answer(exchange)

    registry.hook = hook


def asked_range(exchange):
    """Offset and end of what is asked for."""
    first, _, last = exchange.headers["Range"].removeprefix("bytes=").partition("-")
    return int(first), int(last) + 1


def send(exchange, body, first, last):
    exchange.answer(206, body, Content_Range=f"bytes {first}-{last}/{len(DATA)}")
    return True


# -------------------------------------------------------------------- all is well


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 10 * PART])
def test_a_blob_comes_once_and_to_the_byte(registry, downloads, size):
    layer = layer_of(registry, some_bytes(size))
    assert fetched(downloads, registry, layer) == some_bytes(size)
    assert registry.sent() == size and registry.twice(layer.digest) == 0
    assert registry.count("GET") == -(-size // PART) and registry.count("HEAD") == 0
    assert [path.name for path in downloads.blobs.folder.iterdir()] == [
        layer.digest.replace(":", "-")
    ]


def test_as_many_parts_at_a_time_as_are_allowed(registry, downloads, monkeypatch):
    monkeypatch.setattr(incoming, "CONNECTIONS", 3)
    data = some_bytes(9 * PART)
    meet, now, most = threading.Barrier(3), itertools.count(), []

    def answer(exchange):
        if next(now) < 3:
            meet.wait(5)  # three are here at once, or this breaks
        most.append(sum(asked.status == 0 for asked in registry.asked))
        return False

    answering(registry, answer)
    assert fetched(downloads, registry, layer_of(registry, data)) == data
    assert max(most) <= 3


def test_blobs_are_read_back_once_to_be_hashed(registry, downloads, monkeypatch):
    read, sizes = PartFiles.read, []

    def counted(*given):
        sizes.append(read(*given))
        return sizes[-1]

    monkeypatch.setattr(PartFiles, "read", counted)
    fetched(downloads, registry, layer_of(registry))
    assert sum(sizes) == len(DATA)


def test_the_hash_follows_while_bytes_come(registry, downloads):
    """Half is here, and half is hashed: the end needs no second reading of all."""
    stop = threading.Event()

    def answer(exchange):
        if asked_range(exchange)[0] >= 2 * PART:
            stop.wait(5)
        return False

    answering(registry, answer)
    layer = layer_of(registry)
    with line_to(registry) as line, downloads.joined(line, layer) as download:
        until(lambda: download.completed >= 2 * PART)
        until(lambda: download._incoming._hashed == 2 * PART)
        stop.set()
        assert download.ended.wait(5)
    assert is_sound(downloads.blobs.folder.parent)


def until(true, seconds=5.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


# -------------------------------------------------------------------- odd answers


def once(odd):
    """Odd the first time that a range is asked for, as it should be from then on."""
    seen = set()

    def answer(exchange):
        if exchange.path in seen:
            return False
        seen.add(exchange.path)
        return odd(exchange, *asked_range(exchange))

    return answer


ODD = {
    "another place": lambda e, a, b: send(e, DATA[a + 1 : b + 1], a + 1, b),
    "another place, as if it were ours": lambda e, a, b: send(e, DATA[a:b], a + 1, b),
    "too much": lambda e, a, b: send(e, DATA[a:b] + b"more", a, b - 1),
    "a range too much": lambda e, a, b: send(e, DATA[a:b] + b"more", a, b + 3),
    "too little": lambda e, a, b: send(e, DATA[a : b - 5], a, b - 1),
    "no range": lambda e, a, b: e.answer(206, DATA[a:b]) or True,
    "a strange range": lambda e, a, b: e.answer(206, DATA[a:b], Content_Range="x") or True,
    "an endless range": lambda e, a, b: send(e, DATA[a:b], a, "9" * 5000),
    "backwards": lambda e, a, b: send(e, b"", b, a),
    "an error": lambda e, a, b: e.error(503, "BUSY") or True,
    "a wait": lambda e, a, b: e.error(429, "SLOW", Retry_After=0) or True,
    "it ends earlier": lambda e, a, b: e.answer(416, Content_Range=f"bytes */{len(DATA)}") or True,
}


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_answer_is_not_believed_and_asked_for_again(registry, downloads, odd):
    answering(registry, once(ODD[odd]))
    assert fetched(downloads, registry, layer_of(registry)) == DATA


@pytest.mark.parametrize("odd", ODD)
def test_a_registry_that_is_always_odd_is_given_up(registry, downloads, odd):
    answering(registry, lambda exchange: ODD[odd](exchange, *asked_range(exchange)))
    with pytest.raises(RegistryError, match="max retries exceeded"):
        fetched(downloads, registry, layer_of(registry))
    assert not downloads.blobs.has(DIGEST)
    assert registry.count("GET") <= 6 * 4


def test_a_shorter_range_is_a_beginning(registry, downloads):
    """It is what it says: the rest is asked for."""

    def answer(exchange):
        first, end = asked_range(exchange)
        end = min(end, first + 100_000)
        return send(exchange, DATA[first:end], first, end - 1)

    answering(registry, answer)
    assert fetched(downloads, registry, layer_of(registry)) == DATA
    assert registry.count("GET") == 3 + 3 + 3 + 1


def test_a_few_bytes_at_a_time_are_not_enough(registry, downloads):
    def answer(exchange):
        first, _ = asked_range(exchange)
        return send(exchange, DATA[first : first + 1], first, first)

    answering(registry, answer)
    with pytest.raises(RegistryError, match="a few bytes at a time"):
        fetched(downloads, registry, layer_of(registry))
    assert registry.count("GET") <= 6 * 4


@pytest.mark.parametrize("length", [True, False])
def test_a_registry_without_ranges_sends_all_of_it_in_one(registry, downloads, length):
    """200 for 206: never taken for the range, and taken once."""

    def answer(exchange):
        exchange.send_response(200)
        if length:
            exchange.send_header("Content-Length", str(len(DATA)))
        else:
            exchange.send_header("Connection", "close")
            exchange.close_connection = True
        exchange.end_headers()
        exchange.send_bytes(DIGEST, 0, len(DATA))
        return True

    answering(registry, answer)
    assert fetched(downloads, registry, layer_of(registry)) == DATA
    assert sum("range" not in asked.headers for asked in registry.asked) == 1


def test_without_ranges_what_is_here_is_passed_over(registry, downloads, monkeypatch):
    """The stream breaks twice; each time it begins at the start, and the count never falls."""
    fetch(downloads, registry, layer_of(registry), enough=slowly(registry, 150_000))
    registry.rate = None
    cuts = iter([400_000, 700_000])
    counts, write = [], PartFiles.write

    def counted(files, part, chunks):
        write(files, part, chunks)
        counts.append(files.completed)

    def answer(exchange):
        exchange.send_response(200)
        exchange.send_header("Content-Length", str(len(DATA)))
        exchange.end_headers()
        whole = "Range" in exchange.headers
        exchange.send_bytes(DIGEST, 0, len(DATA) if whole else next(cuts, len(DATA)))
        exchange.close_connection = True
        return True

    monkeypatch.setattr(PartFiles, "write", counted)
    answering(registry, answer)
    assert fetched(downloads, registry, layer_of(registry)) == DATA
    assert counts == sorted(counts) and counts[0] > 150_000


def slowly(registry, size):
    """Until so many bytes are here, of a registry that is not fast."""
    registry.rate = 2_000_000
    return lambda download: download.completed >= size


def test_a_part_that_breaks_often_but_comes_on_is_no_failure(registry, downloads):
    """Ten breaks of one part, more than there are tries."""
    data = some_bytes(PART)

    def answer(exchange):
        first, end = asked_range(exchange)
        exchange.send_response(206)
        exchange.send_header("Content-Length", str(end - first))
        exchange.send_header("Content-Range", f"bytes {first}-{end - 1}/{len(data)}")
        exchange.end_headers()
        exchange.wfile.write(data[first : min(end, first + 50_000)])
        exchange.close_connection = True
        return True

    answering(registry, answer)
    assert fetched(downloads, registry, layer_of(registry, data)) == data


@pytest.mark.parametrize("total", [len(DATA) - 1, len(DATA) + 1])
def test_another_size_than_the_manifest_says(registry, downloads, total):
    layer = Layer(MODEL, layer_of(registry).digest, total)
    with pytest.raises(RegistryError, match=rf"{len(DATA)} bytes.*manifest says {total}"):
        fetched(downloads, registry, layer)
    assert not downloads.blobs.has(DIGEST)


def test_a_blob_that_is_not_there(registry, downloads):
    with pytest.raises(RegistryError, match=f"blob {DIGEST}: file does not exist"):
        fetched(downloads, registry, Layer(MODEL, DIGEST, len(DATA)))
    assert registry.count("GET") <= 4


@pytest.mark.parametrize("size", [0, len(DATA)])
def test_bytes_with_another_hash_are_not_kept(registry, downloads, size):
    layer = layer_of(registry)
    registry.blobs[DIGEST] = bytes(size)
    with pytest.raises(RegistryError, match=f"digest mismatch.*want {DIGEST}, got sha256:"):
        fetched(downloads, registry, Layer(MODEL, layer.digest, size))
    assert list(downloads.blobs.folder.iterdir()) == []


def test_a_damaged_beginning_is_fetched_anew(registry, downloads):
    """An earlier try left a wrong byte, or the machine lost its power: who pulls need not know."""
    fetch(downloads, registry, layer_of(registry), enough=slowly(registry, 300_000))
    registry.rate = None
    path = downloads.blobs.folder / f"{DIGEST.replace(':', '-')}-partial"
    with path.open("r+b") as file:
        file.write(bytes([DATA[0] ^ 1]))
    assert fetched(downloads, registry, layer_of(registry)) == DATA


# -------------------------------------------------------------------- cut, and gone on with


@given(
    cuts=st.lists(st.integers(0, 120_000), max_size=12),
    leaves=st.lists(st.integers(0, 900_000), max_size=4),
)
@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_cuts_and_resumes_end_with_equal_bytes(tmp_path_factory, cuts, leaves):
    """Connections that break anywhere, pulls that end anywhere; nothing that was claimed comes
    again, and an error leaves no blob."""
    root = tmp_path_factory.mktemp("store")
    downloads, left = Downloads(Blobs(root)), iter(cuts)
    with FakeRegistry() as registry:

        def cut(exchange):
            first, end = asked_range(exchange)
            exchange.send_response(206)
            exchange.send_header("Content-Length", str(end - first))
            exchange.send_header("Content-Range", f"bytes {first}-{end - 1}/{len(DATA)}")
            exchange.end_headers()
            exchange.send_bytes(DIGEST, first, min(end, first + next(left, end)))
            exchange.close_connection = True
            return True

        answering(registry, cut)
        layer = layer_of(registry)
        for size in [*leaves, *[1 << 60] * 6]:
            before = list(claimed(root, DIGEST))
            registry.asked.clear()
            download = fetch(downloads, registry, layer, enough=lambda d, n=size: d.completed >= n)
            assert overlap(registry.pieces(DIGEST), before) == 0
            assert true_claims(root, DIGEST, DATA)
            assert download.failure is None or not downloads.blobs.has(DIGEST)
        assert downloads.blobs.read(DIGEST, len(DATA)) == DATA


def test_what_was_left_is_told_and_not_fetched_again(registry, downloads):
    layer = layer_of(registry)
    first = fetch(downloads, registry, layer, enough=slowly(registry, 400_000))
    before = list(claimed(downloads.blobs.folder.parent, DIGEST))
    registry.rate = None
    registry.asked.clear()
    again = fetch(downloads, registry, layer)
    assert first.resumed == 0 and again.failure is None
    assert again.resumed == sum(end - begin for begin, end in before) >= 400_000
    assert registry.sent() == len(DATA) - again.resumed
    assert overlap(registry.pieces(DIGEST), before) == 0


def test_a_download_that_was_killed_at_its_very_end_asks_nothing(registry, downloads):
    """All bytes are here, only the name is missing: they are hashed, no more."""
    layer = layer_of(registry)
    files = PartFiles(downloads.blobs, DIGEST, len(DATA))
    assert files.open()
    files.load()
    for part in files.parts:
        files.write(part, [DATA[part.offset : part.end]])
    files.close()
    assert fetched(downloads, registry, layer) == DATA
    assert registry.asked == []


def test_a_stall_is_tried_again(registry, downloads):
    """Silence for longer than we are patient; what came before it stays."""

    def stall(exchange, first, end):
        exchange.send_response(206)
        exchange.send_header("Content-Length", str(end - first))
        exchange.send_header("Content-Range", f"bytes {first}-{end - 1}/{len(DATA)}")
        exchange.end_headers()
        exchange.send_bytes(DIGEST, first, first + 30_000)
        registry.stopped.wait(3)
        exchange.close_connection = True
        return True

    answering(registry, once(stall))
    assert fetched(downloads, registry, layer_of(registry)) == DATA
    assert registry.sent() <= len(DATA) + 1000


def test_a_full_disk_keeps_what_came(registry, downloads, monkeypatch):
    layer, whole = layer_of(registry), os.pwritev
    room = iter(range(6))

    def pwritev(handle, chunks, at):
        if next(room, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(handle, chunks, at)

    monkeypatch.setattr(os, "pwritev", pwritev)
    with pytest.raises(StoreError, match="the disk is full"):
        fetched(downloads, registry, layer)
    before = list(claimed(downloads.blobs.folder.parent, DIGEST))
    assert before and true_claims(downloads.blobs.folder.parent, DIGEST, DATA)
    monkeypatch.undo()
    registry.asked.clear()
    assert fetched(downloads, registry, layer) == DATA
    assert overlap(registry.pieces(DIGEST), before) == 0


# -------------------------------------------------------------------- shared


def test_those_who_want_the_same_share_one_download(registry, downloads):
    registry.rate = 2_000_000
    layer = layer_of(registry)
    found = []

    def join():
        with line_to(registry) as line, downloads.joined(line, layer) as download:
            found.append(download)
            assert download.ended.wait(10)

    threads = [threading.Thread(target=join) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 8
    assert registry.sent() == len(DATA)
    assert is_sound(downloads.blobs.folder.parent)


def test_it_ends_with_the_last_who_leaves(registry, downloads):
    """The one who began it may leave; the others' bytes still come, by his connections."""
    registry.rate = 500_000
    layer = layer_of(registry)
    with line_to(registry) as other, downloads.joined(other, layer) as second:
        pass
    assert second.ended.wait(2)
    with line_to(registry) as mine:
        with line_to(registry) as first, downloads.joined(first, layer) as download:
            last = downloads.joined(mine, layer)
            assert last.__enter__() is download is not second
            until(lambda: download.completed > 0)
        before = download.completed
        until(lambda: download.completed > before)
        start = time.monotonic()
        last.__exit__(None, None, None)
        assert download.ended.wait(2) and time.monotonic() - start < 1
    assert not downloads.blobs.has(DIGEST)
    assert list(claimed(downloads.blobs.folder.parent, DIGEST))
    until(lambda: not [one for one in threading.enumerate() if one.name in OURS])


def test_coming_and_leaving_at_once_meets_no_download_that_ends(registry, downloads):
    """Whoever joins gets the blob: never one that the last before him has just given up."""
    layer, failures = layer_of(registry), []

    def stay():
        with line_to(registry) as line, downloads.joined(line, layer) as download:
            assert download.ended.wait(10)
            failures.append(download.failure)

    def pass_by():
        for _ in range(20):
            with line_to(registry) as line, downloads.joined(line, layer):
                pass

    threads = [threading.Thread(target=run) for run in (pass_by, stay) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [None] * 3


def test_a_failure_is_not_handed_to_the_next(registry, downloads):
    layer = layer_of(registry)
    answering(registry, lambda exchange: exchange.error(403, "DENIED") or True)
    with pytest.raises(RegistryError, match="403"):
        fetched(downloads, registry, layer)
    registry.hook = lambda exchange: False
    assert fetched(downloads, registry, layer) == DATA


def test_leaving_wakes_who_waits_for_a_silent_registry(registry, downloads, monkeypatch):
    answering(registry, lambda exchange: registry.stopped.wait(8) or True)
    layer = layer_of(registry)
    with line_to(registry) as line:
        line.registry.stall = 30
        with downloads.joined(line, layer) as download:
            until(lambda: registry.count("GET") == 4)
    assert download.ended.wait(2)
    assert isinstance(download.failure, RefollamaError)


# -------------------------------------------------------------------- other processes

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "wb")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_another_process_is_waited_for(registry, downloads, monkeypatch):
    """It dies; ours goes on."""
    monkeypatch.setattr(download_module, "ENDING", 0.2)
    layer = layer_of(registry)
    downloads.blobs.folder.mkdir()
    path = downloads.blobs.folder / f"{DIGEST.replace(':', '-')}-partial"
    command = [sys.executable, "-I", "-S", "-c", HOLD, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"held\n"
            with line_to(registry) as line, downloads.joined(line, layer) as download:
                until(lambda: download.waits)
                assert not download.begun.is_set() and registry.sent() == 0
                process.kill()
                assert download.ended.wait(5)
        finally:
            process.kill()
    assert download.failure is None
    assert downloads.blobs.read(DIGEST, len(DATA)) == DATA


def test_what_another_process_has_finished_is_not_fetched(registry, downloads):
    """It held the files while it wrote, and then the blob was there."""
    layer, blobs = layer_of(registry), downloads.blobs
    files = PartFiles(blobs, DIGEST, len(DATA))
    assert files.open()
    files.load()
    with line_to(registry) as line, downloads.joined(line, layer) as download:
        for part in files.parts:
            files.write(part, [DATA[part.offset : part.end]])
        assert not download.ended.wait(0.3)
        files.finish()
        files.close()
        assert download.ended.wait(5)
    assert download.failure is None and registry.asked == []
    assert blobs.read(DIGEST, len(DATA)) == DATA
    assert len(list(blobs.folder.iterdir())) == 1
