"""What is taken in before the app is asked: only what the app would take."""

import shutil
import socket
from urllib.parse import urlsplit

import pytest
from waitress.adjustments import Adjustments

from refollama.server.guard import Rules
from refollama.server.intake import Parser, Uploads
from tests.server.process import running

DIGEST = "sha256:" + "0" * 64
SMALL = 1000  # bytes that anybody may send
MUCH = 10_000


def header(method="POST", path=f"/api/blobs/{DIGEST}", host="localhost", size=MUCH, **more):
    fields = {"Host": host, "Content-Length": size, **more}
    lines = [f"{name}: {value}" for name, value in fields.items() if value is not None]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode()


def parsed(tmp_path, data, *, loopback=True, folders=()):
    uploads = Uploads(Rules(loopback=loopback), folders or (tmp_path,))
    parser = Parser(uploads, Adjustments(max_request_body_size=SMALL))
    parser.received(data)
    return parser


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"path": f"/api/blobs/{DIGEST.replace(':', '-')}"},
        {"host": "127.0.0.1:11434"},
        {"Origin": "http://localhost:3000"},
        {"host": "pc.local:1", "Origin": "http://pc.local:1"},
        {"Origin": "https://listed.example"},
    ],
)
def test_an_upload_may_be_large(tmp_path, monkeypatch, fields):
    monkeypatch.setenv("OLLAMA_ORIGINS", "https://listed.example")
    parser = parsed(tmp_path, header(**fields))
    assert parser.error is None and not parser.completed


FOREIGN = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"host": "localhost", "Origin": "http://localhost.evil.example"},
    {"host": None, "Origin": "http://evil.example"},
]
NO_UPLOADS = [
    *({"method": method} for method in ("PUT", "GET", "HEAD", "OPTIONS", "DELETE")),
    {"path": "/api/blobs/"},
    {"path": "/api/blobs/sha256:12"},
    {"path": f"/api/blobs/{DIGEST}0"},
    {"path": f"/api/blobs/{DIGEST}/x"},
    {"path": f"/api/blobs/../generate?{DIGEST}"},
    {"path": "/api/generate"},
]


@pytest.mark.parametrize("loopback", [True, False])
@pytest.mark.parametrize("fields", FOREIGN + NO_UPLOADS)
def test_all_else_keeps_the_small_limit(tmp_path, fields, loopback):
    parser = parsed(tmp_path, header(**fields), loopback=loopback)
    assert parser.completed and parser.error.code == 413


@pytest.mark.parametrize("fields", [*FOREIGN, {"host": "evil.example"}, {"host": None}])
def test_in_pieces_too(tmp_path, fields):
    """Without a length in the header, it ends where the limit is reached."""
    more = {"size": None, "Transfer-Encoding": "chunked", **fields}
    parser = parsed(tmp_path, header(**more))
    assert not parser.completed
    parser.received(b"%x\r\n" % MUCH + b"x" * MUCH)
    assert parser.completed and parser.error.code == 413


def test_another_name_is_heard_where_others_may_reach_the_server(tmp_path):
    assert parsed(tmp_path, header(host="evil.example"), loopback=False).error is None
    assert parsed(tmp_path, header(host="evil.example"), loopback=True).error.code == 413


def test_more_than_either_disk_can_hold_is_refused_at_once(tmp_path, monkeypatch):
    spool, store = tmp_path / "spool", tmp_path / "models" / "not" / "made"
    spool.mkdir()
    for full in (spool, tmp_path):  # the store's folder comes later: its disk is known already
        monkeypatch.setattr(
            shutil,
            "disk_usage",
            lambda path, full=full: shutil._ntuple_diskusage(
                0, 0, MUCH - 1 if path == full else MUCH
            ),
        )
        parser = parsed(tmp_path, header(), folders=(spool, store))
        status, _, body = parser.error.to_response()
        assert parser.completed and status == "507 Insufficient Storage"
        assert b"the blob has 10000 bytes, the disk 9999 free" in body
        assert parsed(tmp_path, header(size=MUCH - 1), folders=(spool, store)).error is None


def test_a_disk_that_cannot_be_asked_is_no_full_one(tmp_path, monkeypatch):
    def fails(path):
        raise OSError

    monkeypatch.setattr(shutil, "disk_usage", fails)
    assert parsed(tmp_path, header()).error is None


def answer(url, data):
    """The beginning of what a server says to these bytes."""
    host, port = urlsplit(url).netloc.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(data)
        return line.recv(4096)


def test_the_server_says_no_before_the_body_comes(tmp_path):
    """No byte of it is sent here; a client that asks whether to send it is told no, too."""
    with running(OLLAMA_MODELS=str(tmp_path / "none"), REFOLLAMA_MAX_BODY="1") as (url, _):
        for more in ({}, {"Expect": "100-continue"}):
            assert answer(url, header(size=1 << 60, **more)).startswith(b"HTTP/1.1 507 Insuff")
            evil = header(size=4 << 20, Origin="http://evil.example", **more)
            assert answer(url, evil).startswith(b"HTTP/1.1 413 Request")
        assert answer(url, header(Expect="100-continue")).startswith(b"HTTP/1.1 100 Continue")
