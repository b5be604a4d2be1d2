"""One blob to a registry: by parts, by one piece, elsewhere; broken, forgotten, lied about."""

import hashlib
import socket
import threading
import time

import pytest

from refollama.errors import Abandoned, RegistryError, StoreError
from refollama.store import Store
from refollama.store import parts as parts_of_blobs
from refollama.store.manifest import MODEL, Layer
from refollama.store.registry.upload import Upload
from tests.registry.desk import registry_at
from tests.registry.fake import Upload as Session
from tests.registry.fake import digest_of, wait_until
from tests.registry.models import some_bytes

pytestmark = pytest.mark.usefixtures("hurry", "small_parts")
DATA = some_bytes(220_000)  # five small parts
DIGEST = digest_of(DATA)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "models")


@pytest.fixture
def send(registry, store):
    """Store some bytes and send them; the upload, when the registry has them."""

    def go(data=DATA, *, source="", size=None):
        digest = store.blobs.add(data)
        layer = Layer(MODEL, digest, len(data) if size is None else size, source)
        with registry_at(registry.host) as session:
            upload = Upload(session, store.blobs, layer)
            upload.send()
        return upload

    return go


def cut_off(exchange, upload, number):
    """Take so many bytes of a body, then break the connection."""
    upload.data += exchange.rfile.read(number)
    exchange.close_connection = True
    exchange.connection.shutdown(socket.SHUT_RDWR)
    return True


def breaking(registry, *numbers):
    """The first PATCHes break after so many bytes, each."""
    left = list(numbers)

    def hook(exchange):
        if exchange.command != "PATCH" or not left:
            return False
        name = exchange.asked.path.rpartition("/")[2]
        return cut_off(exchange, registry.uploads[name], left.pop(0))

    registry.hook = hook


def answering(registry, method, status, body=b"", *, times=None, **headers):
    """Requests of one method get one answer, the first few of them or all."""
    left = [None] * (10**6 if times is None else times)

    def hook(exchange):
        if exchange.command != method or not left:
            return False
        left.pop()
        exchange.body()
        exchange.answer(status, body, **headers)
        return True

    registry.hook = hook


def test_a_blob_that_another_process_removes_meanwhile_is_told(registry, store):
    layer = Layer(MODEL, store.blobs.add(DATA), len(DATA))

    def hook(exchange):
        if exchange.command == "POST":
            store.blobs.path(DIGEST).unlink()
        return False

    registry.hook = hook
    with (
        registry_at(registry.host) as session,
        pytest.raises(StoreError, match="blob sha256-.* has gone"),
    ):
        Upload(session, store.blobs, layer).send()


# -------------------------------------------------------------------- the usual way


@pytest.mark.parametrize("size", [0, 1, 2, 49_999, 50_000, 50_001, 220_000])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_any_size_arrives_to_the_byte(registry, send, size, relative, elsewhere):
    registry.relative, registry.redirect_uploads = relative, elsewhere
    data = some_bytes(size)
    send(data)
    assert registry.blobs[digest_of(data)] == data


def test_parts_say_what_they_are(registry, send):
    """Offsets without a unit, lengths, and the hash of the hashes at the end."""
    send()
    parts = [DATA[at : at + 50_000] for at in range(0, len(DATA), 50_000)]
    asked = registry.requests("PATCH")
    ranges = ["0-49999", "50000-99999", "100000-149999", "150000-199999", "200000-219999"]
    assert [one.header("Content-Range") for one in asked] == ranges
    assert [one.header("Content-Length") for one in asked] == [str(len(p)) for p in parts]
    assert {one.header("Content-Type") for one in asked} == {"application/octet-stream"}
    assert {one.header("X-Redirect-Uploads") for one in asked} == {"1"}
    sums = hashlib.md5(b"".join(hashlib.md5(part).digest() for part in parts)).hexdigest()
    (end,) = registry.requests("PUT")
    assert f"etag={sums}-5" in end.target and f"digest={DIGEST}".replace(":", "%3A") in end.target
    assert "_state=220000" in end.target and end.received == 0


def test_parts_are_cut_as_ollama_cuts_them(monkeypatch):
    monkeypatch.setattr(parts_of_blobs, "SMALLEST", 100_000_000)
    for size, step in [(1, 10**8), (64 * 10**8, 10**8), (64 * 10**8 + 640, 10**8 + 10)]:
        assert parts_of_blobs.planned(size)[0].end == min(size, step)
    parts = parts_of_blobs.planned(200 * 10**9)
    assert parts[0].size == 10**9 and len(parts) == 200
    assert [part.offset for part in parts[1:]] == [part.end for part in parts[:-1]]


def test_what_is_there_is_not_sent(registry, send):
    registry.add_blob("me/tale", DATA)
    assert send().sending is False
    assert registry.count("POST") == 0


@pytest.mark.parametrize("known", [False, True])
def test_a_blob_of_the_parent_is_mounted(registry, send, known):
    registry.add_blob("library/parent" if known else "library/other", DATA)
    upload = send(source="parent:7b")
    assert registry.count("POST", f"mount={DIGEST}&from=library/parent") == 1
    assert upload.sending is not known and registry.count("PATCH") == (0 if known else 5)
    assert ("me/tale", DIGEST) in registry.links


@pytest.mark.parametrize("source", ["..", "a/b/c/d", "\n"])
def test_a_parent_with_no_name_is_nobody(registry, send, source):
    send(source=source)
    assert registry.count("POST", "mount") == 0


def test_who_may_not_read_the_parent_may_still_write(registry, send):
    def hook(exchange):
        if "mount=" in exchange.path:
            exchange.error(403, "DENIED")
            return True
        return False

    registry.hook = hook
    send(source="secret")
    assert registry.blobs[DIGEST] == DATA


def test_another_size_there_is_an_error(registry, send):
    answering(registry, "HEAD", 200, b"another")
    with pytest.raises(RegistryError, match="with 7 bytes, it must be 220000"):
        send()
    assert registry.count("POST") == 0


# -------------------------------------------------------------------- elsewhere


def test_parts_elsewhere_do_not_tell_who_we_are(registry, send):
    registry.redirect_uploads = True
    send()
    puts = registry.requests("PUT", "/storage/")
    assert len(puts) == 5
    for one in puts:
        assert one.host == registry.elsewhere
        assert not {"authorization", "content-range", "x-redirect-uploads"} & one.headers.keys()


def test_parts_elsewhere_go_beside_each_other_but_not_all_of_them(registry, send):
    registry.redirect_uploads = True
    there, most, lock = [], [], threading.Lock()

    def hook(exchange):
        if exchange.command == "PUT" and exchange.path.startswith("/storage/"):
            with lock:
                there.append(1)
                most.append(len(there))
            time.sleep(0.1)
            with lock:
                there.pop()
        return False

    registry.hook = hook
    send(some_bytes(500_000))
    assert 2 <= max(most) <= 4


def test_a_part_that_its_storage_drops_goes_there_again(registry, send):
    registry.redirect_uploads = True
    refusals = iter((500, 503))

    def hook(exchange):
        if not exchange.path.startswith("/storage/"):
            return False
        status = next(refusals, None)  # at once: parts come side by side
        if status is None:
            return False
        exchange.body()
        exchange.answer(status)
        return True

    registry.hook = hook
    send()
    assert registry.blobs[DIGEST] == DATA and registry.count("POST") == 1


def test_a_storage_that_refuses_is_forgiven_once(registry, send):
    registry.redirect_uploads = True

    def hook(exchange):
        if exchange.path.startswith("/storage/"):
            exchange.body()
            exchange.answer(403, b"expired")
            return True
        return False

    registry.hook = hook
    with pytest.raises(RegistryError, match="refused by its storage: 403: expired"):
        send()
    assert registry.count("POST") == 2


# -------------------------------------------------------------------- in one piece


@pytest.mark.parametrize("status", [405, 501, 400])
def test_a_registry_without_parts_gets_all_at_once(registry, send, status):
    body = b'{"errors":[{"code":"UNSUPPORTED"}]}' if status == 400 else b""
    answering(registry, "PATCH", status, body)
    send()
    assert registry.blobs[DIGEST] == DATA
    (end,) = registry.requests("PUT")
    assert end.received == len(DATA)


def test_other_refusals_of_a_part_are_final(registry, send):
    answering(registry, "PATCH", 413, b"too much")
    with pytest.raises(RegistryError, match="413: too much"):
        send()
    assert registry.count("PATCH") == 1


# -------------------------------------------------------------------- what breaks


def test_after_a_break_only_the_rest_is_sent(registry, send):
    """The registry got 30,000 bytes of the first part, then some of what followed."""
    breaking(registry, 30_000, 10_000)
    send()
    assert registry.blobs[DIGEST] == DATA
    firsts = [one.header("Content-Range").partition("-")[0] for one in registry.requests("PATCH")]
    assert firsts[:3] == ["0", "30000", "40000"] and registry.count("POST") == 1


def test_the_hash_of_a_part_covers_what_was_sent_before_the_break(registry, send):
    breaking(registry, 30_000)
    send()
    sums = [hashlib.md5(DATA[at : at + 50_000]).digest() for at in range(0, len(DATA), 50_000)]
    (end,) = registry.requests("PUT")
    assert f"etag={hashlib.md5(b''.join(sums)).hexdigest()}-5" in end.target


def test_a_lost_answer_to_a_whole_part_costs_nothing(registry, send):
    breaking(registry, 50_000)
    send()
    firsts = [one.header("Content-Range").partition("-")[0] for one in registry.requests("PATCH")]
    assert firsts == ["0", "50000", "100000", "150000", "200000"]
    assert registry.blobs[DIGEST] == DATA


@pytest.mark.parametrize("status", [500, 502, 429, 408])
def test_what_may_pass_is_tried_again(registry, send, status):
    answering(registry, "PATCH", status, times=2, Retry_After="0")
    send()
    assert registry.blobs[DIGEST] == DATA


def test_but_only_so_often_without_progress(registry, send):
    """Six times; here three."""
    answering(registry, "PATCH", 503)
    with pytest.raises(RegistryError, match="max retries exceeded: .*503"):
        send()
    assert registry.count("PATCH") == 3


def test_an_upload_that_is_forgotten_begins_anew(registry, send):
    def hook(exchange):
        if exchange.command == "PATCH" and registry.count("PATCH") == 3:
            registry.uploads.clear()
        return False

    registry.hook = hook
    send()
    assert registry.blobs[DIGEST] == DATA and registry.count("POST") == 2


def test_a_registry_that_always_forgets_is_left(registry, send):
    answering(registry, "PATCH", 404, b'{"errors":[{"code":"BLOB_UPLOAD_UNKNOWN"}]}')
    with pytest.raises(RegistryError, match="lost the upload"):
        send()
    assert registry.count("POST") == 3


def test_a_registry_that_knows_more_is_believed(registry, send):
    """416: it wants the part that follows on what it has."""
    seen: list[int] = []

    def hook(exchange):
        if exchange.command == "PATCH" and not seen:
            seen.append(1)
            name = exchange.asked.path.rpartition("/")[2]
            registry.uploads[name].data += exchange.body()[:20_000]
            exchange._here(416, name)
            return True
        return False

    registry.hook = hook
    send()
    assert registry.requests("PATCH")[1].header("Content-Range") == "20000-49999"


@pytest.mark.parametrize("got", ["0-99999999", "5-3", "0-0"])
def test_a_senseless_range_is_not_followed(registry, send, got):
    def hook(exchange):
        if exchange.command != "PATCH":
            return False
        exchange.body()
        exchange.answer(202, Location=exchange.path, Range=got)
        return True

    registry.hook = hook
    with pytest.raises(RegistryError):
        send()
    assert registry.count("POST") <= 2 and registry.count("PATCH") <= 12


def test_a_range_that_goes_backwards_is_forgiven_once(registry, send):
    def hook(exchange):
        if exchange.command != "PATCH" or exchange.headers["Content-Range"].startswith("0-"):
            return False
        exchange.body()
        exchange.answer(202, Location=exchange.path, Range="0-9999")
        return True

    registry.hook = hook
    with pytest.raises(RegistryError, match="claims to have 10000 bytes"):
        send()
    assert registry.count("POST") == 2


def test_a_stall_is_a_break(registry, send):
    stalled: list[int] = []

    def hook(exchange):
        if exchange.command == "PATCH" and not stalled:
            stalled.append(1)
            registry.stopped.wait(1)
            raise ConnectionError
        return False

    registry.hook = hook
    send()
    assert registry.blobs[DIGEST] == DATA and registry.count("PATCH") == 6


# -------------------------------------------------------------------- the end


def test_an_end_whose_answer_was_lost_is_an_end(registry, send):
    lost: list[int] = []

    def hook(exchange):
        if exchange.command != "PUT" or lost:
            return False
        lost.append(1)
        name = exchange.asked.path.rpartition("/")[2]
        registry.add_blob("me/tale", registry.uploads.pop(name).whole())
        exchange.answer(504)
        return True

    registry.hook = hook
    send()
    assert registry.count("PUT") == registry.count("POST") == 1


def test_wrong_bytes_on_the_way_are_sent_again_once(registry, send):
    flips: list[int] = []

    def hook(exchange):
        if exchange.command == "PUT" and not flips:
            flips.append(1)
            name = exchange.asked.path.rpartition("/")[2]
            registry.uploads[name] = Session("me/tale", bytearray(len(DATA)))
        return False

    registry.hook = hook
    send()
    assert registry.blobs[DIGEST] == DATA and registry.count("POST") == 2


def test_a_blob_that_is_damaged_here_is_our_fault(registry, send, store):
    store.blobs.add(DATA)
    path = store.blobs.path(DIGEST)
    path.write_bytes(bytes(len(DATA)))
    with pytest.raises(StoreError, match="damaged on this disk"):
        send()
    assert registry.count("POST") == 1 and DIGEST not in registry.blobs


def test_a_file_that_became_shorter_is_an_error(registry, send, store):
    store.blobs.add(DATA)
    store.blobs.path(DIGEST).write_bytes(DATA[:1000])

    def add(data):
        return DIGEST

    store.blobs.add = add
    with pytest.raises(StoreError, match="became shorter"):
        send()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_cancelling_ends_it_at_once(registry, store, elsewhere):
    """In the middle of a part that the registry does not take."""
    registry.redirect_uploads = elsewhere
    held = threading.Event()

    def hook(exchange):
        if exchange.command == ("PUT" if elsewhere else "PATCH"):
            held.set()
            registry.stopped.wait(5)
            raise ConnectionError
        return False

    registry.hook = hook
    layer = Layer(MODEL, store.blobs.add(DATA), len(DATA))
    with registry_at(registry.host) as session:
        session.stall = 5
        upload, ends = Upload(session, store.blobs, layer), []

        def work():
            with pytest.raises((Abandoned, RegistryError)):
                upload.send()
            ends.append(time.monotonic())

        thread = threading.Thread(target=work)
        thread.start()
        assert held.wait(5)
        start = time.monotonic()
        upload.cancel()
        session.close()
        wait_until(lambda: ends, 3)
        thread.join()
    assert ends[0] - start < 1
