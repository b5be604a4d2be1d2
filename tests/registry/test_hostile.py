"""Registries that mean harm: each is refused with one sentence, in little time and memory.

None of them may write a file outside the store, or leave one in it that is not what it claims.
"""

import gzip
import itertools
import json
import threading
import time
import tracemalloc

import pytest

from refollama.errors import RefollamaError
from refollama.store import Store
from refollama.store.registry import Downloads, pull, push
from tests.registry.fake import CONFIG, MANIFEST, MODEL, FakeRegistry, digest_of
from tests.registry.models import contents, fill, is_sound

pytestmark = pytest.mark.usefixtures("hurry")
QUICK = 5  # seconds
SMALL = 64 << 20  # bytes: far more than a pull needs, far less than any of them sends
DATA = b"weights" * 100
DIGEST, SIZE = digest_of(DATA), len(DATA)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "place" / "models")


@pytest.fixture
def refused(registry, store, tmp_path):
    """Pull from the registry; the sentence with which it is refused."""

    def refuse(model="library/tale"):
        start = time.monotonic()
        tracemalloc.start()
        with pytest.raises(RefollamaError) as caught:
            list(
                pull(
                    store,
                    f"{registry.host}/{model}",
                    insecure=True,
                    downloads=Downloads(store.blobs),
                )
            )
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert time.monotonic() - start < QUICK
        assert peak < SMALL
        sentence = str(caught.value)
        assert sentence.isprintable() and 0 < len(sentence) < 2000
        outside = [p for p in tmp_path.rglob("*") if p.is_file() and store.root not in p.parents]
        assert outside == []
        assert not list(store.root.glob("manifests/**/latest"))
        assert is_sound(store.root)
        return sentence

    return refuse


def layer(digest=DIGEST, size=SIZE, kind=MODEL):
    return {"mediaType": kind, "digest": digest, "size": size}


def manifest(layers, **changes):
    config = layer(digest_of(b"{}"), 2, CONFIG)
    top = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config}
    return top | {"layers": layers} | changes


def serve(registry, top, **headers):
    """This is the manifest, whatever it is; its blobs are there."""
    registry.add_blob("library/tale", b"{}")
    registry.add_blob("library/tale", DATA)
    data = top if isinstance(top, bytes) else json.dumps(top).encode()

    def hook(exchange):
        if "/manifests/" not in exchange.path:
            return False
        exchange.answer(200, data, Content_Type=MANIFEST, **headers)
        return True

    registry.hook = hook


# -------------------------------------------------------------------- manifests


@pytest.mark.parametrize(
    "digest",
    [
        "../../../../etc/passwd",
        "sha256:../../../../../escaped",
        "sha256-" + "../" * 21 + "x",
        "sha256:" + "0" * 63 + "/",
        "sha256:" + "0" * 63,
        "sha256:" + "0" * 65,
        "sha256:" + "0" * 64 + "\n",
        "sha256:" + "0" * 62 + "\u0660\u0661",
        "sha512:" + "0" * 64,
        "/etc/passwd",
        "",
        None,
        7,
        ["sha256:" + "0" * 64],
    ],
)
def test_a_digest_that_is_none(registry, refused, digest):
    for top in (manifest([layer(digest)]), manifest([layer()], config=layer(digest))):
        serve(registry, top)
        refused()
    assert registry.count("GET", "/blobs/") + registry.count("HEAD", "/blobs/") == 0


@pytest.mark.parametrize("size", [-1, -(2**63), 2**63, 2**70, 1e300, 0.5, "7", None, True, [7]])
def test_a_size_that_is_none(registry, refused, size):
    serve(registry, manifest([layer(size=size)]))
    refused()


@pytest.mark.parametrize("sizes", [(1 << 60,), (1 << 62, 1 << 62, 1 << 62)])
def test_more_than_any_disk_holds(registry, refused, sizes):
    digests = [f"sha256:{number:064x}" for number in range(len(sizes))]
    both = zip(digests, sizes, strict=True)
    serve(registry, manifest([layer(digest, size) for digest, size in both]))
    refused()
    assert registry.count("GET", "/blobs/") == 0


def test_a_size_that_the_blob_does_not_have(registry, refused):
    for size in (len(DATA) - 1, len(DATA) + 1, 1):
        serve(registry, manifest([layer(size=size)]))
        refused()


def test_another_blob_than_the_one_named(registry, refused, store):
    digest = digest_of(b"something else entirely")
    serve(registry, manifest([layer(digest, len(DATA))]))
    registry.blobs[digest] = DATA
    registry.links.add(("library/tale", digest))
    assert "digest mismatch" in refused()
    assert not store.blobs.has(digest)


@pytest.mark.parametrize(
    "top",
    [
        b"",
        b"null",
        b"[]",
        b"7",
        b"not json",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        {},
        {"schemaVersion": 1},
        {"schemaVersion": 2},
        manifest("layers"),
        manifest({}),
        manifest([None]),
        manifest([7]),
        manifest([[]]),
        manifest([{}]),
        manifest([layer(kind=None)]),
        manifest([layer(kind=7)]),
        manifest([layer()], config=None),
        manifest([layer()], config=[]),
        manifest([layer()], config={}),
        manifest([layer() | {"from": 7}]),
        b'{"schemaVersion":2,"config":' + b"9" * 5000 + b',"layers":[]}',
    ],
    ids=lambda top: (top if isinstance(top, bytes) else json.dumps(top).encode())[-30:].decode(
        "ascii", "replace"
    ),
)
def test_a_manifest_of_odd_shape(registry, refused, top):
    serve(registry, top)
    refused()


def test_layers_may_be_null(registry, store):
    """Go writes an empty list so; a model without weights is odd, but no crash."""
    serve(registry, manifest(None))
    name = f"{registry.host}/library/tale"
    got = list(pull(store, name, insecure=True, downloads=Downloads(store.blobs)))
    assert got[-1].status == "success"
    assert is_sound(store.root)


def test_thousands_of_layers(registry, refused):
    serve(registry, manifest([layer(f"sha256:{number:064x}") for number in range(5000)]))
    refused()
    assert registry.count("GET", "/blobs/") == 0


def endless(exchange, *, length_told=True):
    """Ten gigabytes, or chunks without end, for as long as anybody reads them."""
    chunk = b"" if length_told else b"10000\r\n"
    exchange.send_response(200)
    if length_told:
        exchange.send_header("Content-Length", str(10**10))
    else:
        exchange.send_header("Transfer-Encoding", "chunked")
    exchange.end_headers()
    while not exchange.registry.stopped.is_set():
        exchange.wfile.write(chunk + b" " * (1 << 16) + (b"\r\n" if chunk else b""))
        exchange.asked.sent += 1 << 16


@pytest.mark.parametrize("length_told", [True, False])
def test_a_manifest_of_ten_gigabytes(registry, refused, length_told):
    """Hardly more than the limit is read."""

    def hook(exchange):
        endless(exchange, length_told=length_told)
        return True

    registry.hook = hook
    refused()
    assert sum(asked.sent for asked in registry.asked) < 32 << 20


def test_a_config_of_ten_gigabytes(registry, refused):
    serve(registry, manifest([layer()], config=layer(f"sha256:{1:064x}", 10**10)))
    refused()


@pytest.fixture(scope="module")
def bomb():
    """Half a megabyte that would be a hundred megabytes."""
    return gzip.compress(b"\0" * 10**8, 1)


@pytest.mark.parametrize("where", ["manifest", "blob", "token"])
def test_a_gzip_bomb_is_never_unpacked(registry, refused, bomb, where):
    serve(registry, manifest([layer()]))
    before = registry.hook

    def hook(exchange):
        wanted = {"manifest": "/manifests/", "blob": "/blobs/", "token": "/token"}[where]
        if where == "token" and "/token" not in exchange.path:
            realm = f'Bearer realm="http://{registry.host}/token"'
            exchange.answer(401, WWW_Authenticate=realm)
        elif wanted in exchange.path:
            exchange.answer(200, bomb, Content_Encoding="gzip")
        else:
            return before(exchange)
        return True

    registry.hook = hook
    refused()


# -------------------------------------------------------------------- who we are


def test_a_realm_on_another_host_learns_nothing(registry, refused):
    with FakeRegistry() as thief:
        realm = f"http://localhost:{thief.server.port}/token"

        def hook(exchange):
            exchange.answer(401, WWW_Authenticate=f'Bearer realm="{realm}",service="x",scope="y"')
            return True

        registry.hook = hook
        assert "localhost" in refused()
        assert thief.asked == []


@pytest.mark.parametrize(
    "realm",
    [
        "file:///etc/passwd",
        "http://",
        "http://[",
        "//",
        "",
        "gopher://127.0.0.1/x",
        "http://127.0.0.1:99999/x",
        "http://127.0.0.1@localhost/x",
        "http://127.0.0.1.evil.example/x",
    ],
)
def test_a_realm_that_is_none(registry, refused, realm):
    def hook(exchange):
        exchange.answer(401, WWW_Authenticate=f'Bearer realm="{realm}",service="x"')
        return True

    registry.hook = hook
    refused()


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"null", b'{"token":7}', b'{"token":"a\\r\\nX-Evil: b"}', b'{"token":""}']
)
def test_a_token_that_is_none(registry, refused, body):
    def hook(exchange):
        if exchange.path.startswith("/token"):
            exchange.answer(200, body)
        else:
            realm = f'Bearer realm="http://{registry.host}/token"'
            exchange.answer(401, WWW_Authenticate=realm)
        return True

    registry.hook = hook
    refused()


def test_an_endless_token(registry, refused):
    def hook(exchange):
        if exchange.path.startswith("/token"):
            endless(exchange)
        else:
            realm = f'Bearer realm="http://{registry.host}/token"'
            exchange.answer(401, WWW_Authenticate=realm)
        return True

    registry.hook = hook
    refused()
    assert sum(asked.sent for asked in registry.asked) < 16 << 20


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Basic", "Digest realm=x", "Bearer " + "a=b," * 9999]
)
def test_a_challenge_that_is_none(registry, refused, header):
    def hook(exchange):
        exchange.answer(401, WWW_Authenticate=header)
        return True

    registry.hook = hook
    refused()


# -------------------------------------------------------------------- redirects


def redirecting(registry, target):
    """Every request for a blob leads to `target`."""
    serve(registry, manifest([layer()]))
    before = registry.hook

    def hook(exchange):
        if "/blobs/" in exchange.path:
            exchange.answer(307, Location=target(exchange))
            return True
        return before(exchange)

    registry.hook = hook


def test_redirects_in_a_circle(registry, refused):
    redirecting(registry, lambda exchange: exchange.path)
    refused()
    assert registry.count(inside="/blobs/") < 200


def test_redirects_that_never_end(registry, refused):
    numbers = itertools.count()
    there = f"http://{registry.host}/v2/library/tale/blobs/sha256:{{}}"
    redirecting(registry, lambda _: there.format(next(numbers)))
    refused()
    assert registry.count(inside="/blobs/") < 200


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://", "http://[::1", "", "\x01"]
)
def test_redirects_to_what_is_no_registry(registry, refused, target):
    redirecting(registry, lambda _: target)
    refused()


def test_headers_that_never_end(registry, refused):
    def hook(exchange):
        exchange.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while not registry.stopped.is_set():
            exchange.wfile.write(b"X-More: " + b"x" * 60_000 + b"\r\n")
            exchange.asked.sent += 60_000
        return True

    registry.hook = hook
    refused()


def test_an_error_of_ten_gigabytes(registry, refused):
    def hook(exchange):
        exchange.send_response(418)
        exchange.send_header("Content-Length", str(10**10))
        exchange.end_headers()
        while not registry.stopped.is_set():
            exchange.wfile.write(b"\x1b[31mred\r\n" * 1000)
        return True

    registry.hook = hook
    refused()


# -------------------------------------------------------------------- pushes


@pytest.fixture
def refused_push(registry, store):
    """Push to the registry; the sentence with which it ends.  The store stays as it is."""
    name = f"{registry.host}/library/tale"
    fill(store, name, DATA)
    before = contents(store.root)

    def refuse():
        start = time.monotonic()
        with pytest.raises(RefollamaError) as caught:
            list(push(store, name, insecure=True))
        assert time.monotonic() - start < QUICK
        assert contents(store.root) == before
        assert str(caught.value).isprintable()
        return str(caught.value)

    return refuse


def uploading(registry, answer):
    """Uploads are begun, and their parts answered by `answer`."""

    def hook(exchange):
        if exchange.command != "PATCH":
            return False
        exchange.body()
        answer(exchange)
        return True

    registry.hook = hook


@pytest.mark.parametrize("got", ["0-0", "0-99999999", "9-3", "0--1", "x", "", "0-" + "9" * 5000])
def test_an_upload_that_never_grows(registry, refused_push, got):
    """The registry takes each part, and says that it has something else."""

    def answer(exchange):
        exchange.answer(202, Location=exchange.path, Range=got)

    uploading(registry, answer)
    refused_push()
    assert registry.count("PATCH") < 200


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "http://", "http://[::1", "", None, "https://127.0.0.1:1/x"]
)
def test_uploads_that_go_on_nowhere(registry, refused_push, target):
    def answer(exchange):
        headers = {} if target is None else {"Location": target}
        exchange.answer(202, Range=f"0-{exchange.asked.received - 1}", **headers)

    uploading(registry, answer)
    refused_push()


def test_parts_that_are_redirected_in_a_circle(registry, refused_push):
    def hook(exchange):
        if exchange.command in ("PATCH", "PUT"):
            exchange.body()
            exchange.answer(307, Location=exchange.path, Docker_Upload_Location=exchange.path)
            return True
        return False

    registry.hook = hook
    refused_push()
    assert registry.count() < 500


def test_a_registry_that_has_a_blob_of_another_size(registry, refused_push):
    def hook(exchange):
        if exchange.command == "HEAD":
            exchange.answer(200, b"another")
            return True
        return False

    registry.hook = hook
    refused_push()
    assert registry.count("PUT", "/manifests/") == 0


def test_a_slow_drip_can_be_left(registry, store):
    """Whoever has gone does not wait for a registry that sends a byte each second."""
    serve(registry, manifest([layer()]))
    registry.rate = 100
    gone = threading.Event()
    name = f"{registry.host}/library/tale"
    downloads = Downloads(store.blobs)
    start = time.monotonic()
    work = pull(store, name, insecure=True, downloads=downloads, gone=gone.is_set)
    threading.Timer(0.3, gone.set).start()
    with pytest.raises(RefollamaError):
        for _ in work:
            pass
    assert time.monotonic() - start < 3
