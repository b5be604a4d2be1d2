"""A small registry of our own, over a real socket, that counts what it serves.

    with FakeRegistry() as registry:
        registry.add("library/tale", "latest", [b"weights"], config=b"{}")
        …pull f"http://{registry.host}/library/tale"…
        registry.sent(digest)           bytes of a blob that have left it
        registry.count("GET", "/blobs/")  requests of one kind

It speaks as Distribution does: each repository has its own blobs; uploads by POST, PATCH and PUT.
`registry.elsewhere` is the same server by another name: to a client, another host.
Written from Distribution's documentation of its HTTP API and from section 7 of the notes on Ollama.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import parse_qs, unquote, urlsplit

from tests.registry.serving import Handler, Server

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
MODEL = "application/vnd.ollama.image.model"
CONFIG = "application/vnd.docker.container.image.v1+json"
PIECE = 1 << 16  # bytes that are sent and counted at once, at the most


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class Guard(Protocol):
    """Who may come in."""

    def challenge(self, authorization: str, repository: str, action: str) -> str | None:
        """None for who may; else the WWW-Authenticate of a 401."""


@dataclass
class Asked:
    """One request, and what became of it."""

    method: str
    target: str  # path and query
    host: str
    headers: dict[str, str]  # names in lower case
    status: int = 0
    first: int = 0  # of a blob: offset of the first byte that was sent
    sent: int = 0  # of a blob: bytes, counted as they go
    received: int = 0  # bytes of the request's body

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    def header(self, name: str) -> str:
        return self.headers.get(name.lower(), "")


@dataclass
class Upload:
    """A blob that is on its way in, in one line of bytes or in parts by offset."""

    repository: str
    data: bytearray = field(default_factory=bytearray)
    parts: dict[int, bytes] = field(default_factory=dict)  # redirected: offset → bytes

    def whole(self) -> bytes:
        return bytes(self.data) + b"".join(self.parts[at] for at in sorted(self.parts))

    def etag(self) -> str:
        """As storage services reckon it for parts."""
        sums = [hashlib.md5(self.parts[at]).digest() for at in sorted(self.parts)]
        return f"{hashlib.md5(b''.join(sums)).hexdigest()}-{len(sums)}"


class FakeRegistry:
    """A registry that does as it is told.  Its fields may be changed while it runs.

    hook              looks at each request first; what it answers itself (True) goes no further
    redirect          blobs are fetched at `elsewhere`
    redirect_uploads  parts are sent to `elsewhere` (307), if the client says that it can
    relative          uploads go on at addresses without a host
    mounts            a blob of another repository may be taken over
    patches           blobs may come in pieces
    rate              bytes per second of each answer with a blob
    """

    def __init__(self, *, guard: Guard | None = None, rate: float | None = None) -> None:
        self.guard = guard
        self.rate = rate
        self.hook: Callable[[Exchange], bool] = lambda exchange: False
        self.redirect = self.redirect_uploads = self.relative = False
        self.mounts = self.patches = True
        self.blobs: dict[str, bytes | Path] = {}
        self.links: set[tuple[str, str]] = set()  # repository, digest
        self.manifests: dict[tuple[str, str], bytes] = {}
        self.uploads: dict[str, Upload] = {}
        self.numbers = itertools.count()
        self.asked: list[Asked] = []
        self.lock = threading.Lock()
        self.server = Server(Exchange, self)
        self.stopped = self.server.stopped
        self.host = f"127.0.0.1:{self.server.port}"
        self.elsewhere = f"localhost:{self.server.port}"

    def __enter__(self) -> FakeRegistry:
        self.server.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.__exit__(*error)

    # ---------------------------------------------------------------- contents

    def add_blob(self, repository: str, data: bytes | Path) -> tuple[str, int]:
        """Its digest and size.  A file stays where it is, and is hashed once."""
        digest = digest_of(data) if isinstance(data, bytes) else _digest_of_file(data)
        with self.lock:
            self.blobs[digest] = data
            self.links.add((repository, digest))
        return digest, self.size(digest)

    def add(
        self,
        repository: str,
        tag: str,
        layers: Sequence[bytes | Path],
        *,
        config: bytes = b"{}",
        kinds: Iterable[str] = (),
    ) -> list[str]:
        """A model, its manifest written by hand; the digests of its layers, then its config's."""
        kinds = [*kinds, *[MODEL] * len(layers)][: len(layers)]
        records = [
            self._layer(repository, data, kind)
            for kind, data in zip([*kinds, CONFIG], [*layers, config], strict=True)
        ]
        top = {"schemaVersion": 2, "mediaType": MANIFEST}
        top |= {"config": records[-1], "layers": records[:-1]}
        self.manifests[repository, tag] = json.dumps(top, separators=(",", ":")).encode()
        return [str(record["digest"]) for record in records]

    def _layer(self, repository: str, data: bytes | Path, kind: str) -> dict[str, object]:
        digest, size = self.add_blob(repository, data)
        return {"mediaType": kind, "digest": digest, "size": size}

    def add_from(self, root: Path, name: str, tag: str = "latest", *, like: str = "") -> None:
        """What a store at `root` has for `like` (as a path: host/namespace/model/tag)."""
        data = (root / "manifests" / like).read_bytes()
        top = json.loads(data)
        for layer in [*top["layers"], top["config"]]:
            path = root / "blobs" / layer["digest"].replace(":", "-")
            assert self.add_blob(name, path.read_bytes())[0] == layer["digest"]
        self.manifests[name, tag] = data

    def size(self, digest: str) -> int:
        data = self.blobs[digest]
        return len(data) if isinstance(data, bytes) else data.stat().st_size

    def bytes_of(self, digest: str, first: int, size: int) -> bytes:
        data = self.blobs[digest]
        if isinstance(data, bytes):
            return data[first : first + size]
        with data.open("rb") as file:
            file.seek(first)
            return file.read(size)

    # ---------------------------------------------------------------- what it has seen

    def requests(self, method: str = "", inside: str = "") -> list[Asked]:
        """Those of one method, with a text in their path or query."""
        asked = [a for a in list(self.asked) if method in ("", a.method)]
        return [a for a in asked if inside in unquote(a.target)]

    def count(self, method: str = "", inside: str = "") -> int:
        return len(self.requests(method, inside))

    def pieces(self, digest: str) -> list[tuple[int, int]]:
        """What of a blob has left: (offset, end) of each answer to a GET that had any bytes."""
        asked = self.requests("GET", digest)
        return sorted((a.first, a.first + a.sent) for a in asked if a.sent)

    def sent(self, digest: str = "") -> int:
        """Bytes of a blob, or of all blobs, that have left the registry."""
        return sum(asked.sent for asked in self.requests("GET", f"/{digest}"))

    def twice(self, digest: str) -> int:
        """Bytes of a blob that left more than once."""
        end = again = 0
        for first, last in self.pieces(digest):
            again += max(0, min(end, last) - first)
            end = max(end, last)
        return again


def _digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        found = hashlib.sha256()
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return f"sha256:{found.hexdigest()}"


# -------------------------------------------------------------------- one connection


_REPOSITORY = r"/v2/(?P<repository>[a-z0-9A-Z_./-]+?)"
_ROUTES = [
    (re.compile(_REPOSITORY + r"/manifests/(?P<tag>[^/]+)"), "manifest"),
    (re.compile(_REPOSITORY + r"/blobs/uploads/?"), "uploads"),
    (re.compile(_REPOSITORY + r"/blobs/uploads/(?P<upload>[^/]+)"), "upload"),
    (re.compile(_REPOSITORY + r"/blobs/(?P<digest>[^/]+)"), "blob"),
    (re.compile(r"/storage/(?P<digest>sha256:[^/]+)"), "stored"),
    (re.compile(r"/storage/(?P<upload>[^/]+)/(?P<first>\d+)"), "part"),
    (re.compile(r"/v2/?"), "base"),
]


class Exchange(Handler):
    """One request after another of one connection."""

    asked: Asked
    query: dict[str, str]

    @property
    def registry(self) -> FakeRegistry:
        owner: FakeRegistry = self.server.owner
        return owner

    def send_response(self, code: int, message: str | None = None) -> None:
        if hasattr(self, "asked"):  # what is no HTTP at all, such as TLS, was no request
            self.asked.status = code
        super().send_response(code, message)

    def _do(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        headers = {key.lower(): value for key, value in self.headers.items()}
        self.asked = Asked(self.command, self.path, headers.get("host", ""), headers)
        with self.registry.lock:
            self.registry.asked.append(self.asked)
        if not self.registry.hook(self):
            self._route(unquote(url.path))
        self._drain()

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _do  # noqa: N815

    def _route(self, path: str) -> None:
        for pattern, what in _ROUTES:
            if match := pattern.fullmatch(path):
                found = match.groupdict()
                method = getattr(self, f"{self.command.lower()}_{what}", None)
                if method is None:
                    return self.error(405, "UNSUPPORTED")
                if not self._challenged(found):
                    method(**found)
                return None
        return self.error(404, "NOT_FOUND")

    def _challenged(self, found: dict[str, str]) -> bool:
        if self.registry.guard is None or self.path.startswith("/storage/"):
            return False
        action = "pull" if self.command in ("GET", "HEAD") else "push"
        given = self.headers.get("Authorization", "")
        problem = self.registry.guard.challenge(given, found.get("repository", ""), action)
        if problem is not None:
            self.error(401, "UNAUTHORIZED", WWW_Authenticate=problem)
        return problem is not None

    def error(self, status: int, code: str, **headers: object) -> None:
        problem = json.dumps({"errors": [{"code": code, "message": code.lower(), "detail": None}]})
        self.answer(status, problem.encode(), Content_Type="application/json", **headers)

    def body(self) -> bytes:
        return b"".join(self.counted())

    def counted(self) -> Iterable[bytes]:
        for piece in self.pieces():
            self.asked.received += len(piece)
            yield piece

    def _drain(self) -> None:
        """A body that nobody read would be taken for the next request."""
        if not self.asked.received and not self.close_connection:
            self.body()

    # ---------------------------------------------------------------- manifests

    def get_base(self) -> None:
        self.answer(200, b"{}", Docker_Distribution_Api_Version="registry/2.0")

    def get_manifest(self, repository: str, tag: str) -> None:
        data = self.registry.manifests.get((repository, tag))
        if data is None:
            return self.error(404, "MANIFEST_UNKNOWN")
        return self.answer(200, data, Content_Type=MANIFEST, Docker_Content_Digest=digest_of(data))

    head_manifest = get_manifest

    def put_manifest(self, repository: str, tag: str) -> None:
        data = self.body()
        if self.headers.get("Content-Type") != MANIFEST:
            return self.error(400, "MANIFEST_INVALID")
        top = json.loads(data)
        missing = [
            layer["digest"]
            for layer in [top["config"], *(top["layers"] or [])]
            if (repository, layer["digest"]) not in self.registry.links
        ]
        if missing:
            return self.error(400, "MANIFEST_BLOB_UNKNOWN")
        self.registry.manifests[repository, tag] = data
        where = f"http://{self.asked.host}/v2/{repository}/manifests/{digest_of(data)}"
        return self.answer(201, Location=where, Docker_Content_Digest=digest_of(data))

    # ---------------------------------------------------------------- blobs, outwards

    def get_blob(self, repository: str, digest: str) -> None:
        if (repository, digest) not in self.registry.links:
            return self.error(404, "BLOB_UNKNOWN")
        if self.registry.redirect:
            target = f"http://{self.registry.elsewhere}/storage/{digest}"
            return self.answer(307, Location=target)
        return self.send_blob(digest)

    head_blob = get_blob

    def get_stored(self, digest: str) -> None:
        """Where blobs are redirected to; storage services refuse who brings two proofs."""
        if "Authorization" in self.headers:
            return self.error(400, "ONLY_ONE_AUTH_MECHANISM_ALLOWED")
        return self.send_blob(digest)

    head_stored = get_stored

    def send_blob(self, digest: str, *, ranges: bool = True) -> None:
        """A blob, or the range of it that was asked for."""
        size = self.registry.size(digest)
        first, last = self._range(size) if ranges else (0, size - 1)
        partly = ranges and "Range" in self.headers
        if partly and first >= size:
            return self.answer(416, Content_Range=f"bytes */{size}")
        self.send_response(206 if partly else 200)
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("Docker-Content-Digest", digest)
        if partly:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        if self.command == "GET":
            self.send_bytes(digest, first, last + 1)
        return None

    def _range(self, size: int) -> tuple[int, int]:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            return 0, size - 1
        return int(match[1]), min(int(match[2] or size), size - 1)

    def send_bytes(self, digest: str, first: int, end: int) -> None:
        """Some bytes of a blob, counted, no faster than `rate`."""
        self.asked.first = first
        rate = self.registry.rate
        size = min(PIECE, max(1, int(rate / 20))) if rate else PIECE
        for at in range(first, end, size):
            piece = self.registry.bytes_of(digest, at, min(size, end - at))
            self.wfile.write(piece)
            self.asked.sent += len(piece)
            if rate and self.registry.stopped.wait(len(piece) / rate):
                raise ConnectionError("the registry stops")

    # ---------------------------------------------------------------- blobs, inwards

    def post_uploads(self, repository: str) -> None:
        mount, source = self.query.get("mount", ""), self.query.get("from", "")
        if self.registry.mounts and (source, mount) in self.registry.links:
            self.registry.links.add((repository, mount))
            where = f"http://{self.asked.host}/v2/{repository}/blobs/{mount}"
            return self.answer(201, Location=where, Docker_Content_Digest=mount)
        upload = f"u{next(self.registry.numbers)}"
        self.registry.uploads[upload] = Upload(repository)
        return self._here(202, upload)

    def _here(self, status: int, upload: str) -> None:
        """How far an upload has come, and where it goes on.  Nothing yet is `0-0`, as ever."""
        found = self.registry.uploads[upload]
        size = len(found.whole())
        where = f"/v2/{found.repository}/blobs/uploads/{upload}?_state={size}"
        where = where if self.registry.relative else f"http://{self.asked.host}{where}"
        got = f"0-{max(0, size - 1)}"
        self.answer(status, Location=where, Docker_Upload_UUID=upload, Range=got)

    def patch_upload(self, repository: str, upload: str) -> None:
        found = self._upload(repository, upload)
        if found is None:
            return None
        if not self.registry.patches:
            return self.error(405, "UNSUPPORTED")
        if self.registry.redirect_uploads and self.headers.get("X-Redirect-Uploads") == "1":
            return self._redirect_part(upload, found)
        first = int(self.headers.get("Content-Range", f"{len(found.data)}-").partition("-")[0])
        if first != len(found.data):
            return self._here(416, upload)
        for piece in self.counted():
            found.data += piece
        return self._here(202, upload)

    def _redirect_part(self, upload: str, found: Upload) -> None:
        """The part shall go elsewhere; its body is not wanted here, though it may come."""
        first = self.headers["Content-Range"].partition("-")[0]
        found.parts.setdefault(int(first), b"")
        where = f"http://{self.registry.elsewhere}/storage/{upload}/{first}"
        on = f"http://{self.asked.host}/v2/{found.repository}/blobs/uploads/{upload}?_state={first}"
        self.answer(307, Location=where, Docker_Upload_Location=on)

    def put_part(self, upload: str, first: str) -> None:
        if "Authorization" in self.headers or "Content-Range" in self.headers:
            return self.error(400, "ONLY_ONE_AUTH_MECHANISM_ALLOWED")
        self.registry.uploads[upload].parts[int(first)] = data = self.body()
        return self.answer(200, Etag=hashlib.md5(data).hexdigest())

    def get_upload(self, repository: str, upload: str) -> None:
        if self._upload(repository, upload) is not None:
            self._here(204, upload)

    def delete_upload(self, repository: str, upload: str) -> None:
        if self._upload(repository, upload) is not None:
            del self.registry.uploads[upload]
            self.answer(204)

    def put_upload(self, repository: str, upload: str) -> None:
        """The end of an upload, perhaps with its last bytes, perhaps with all of them."""
        found = self._upload(repository, upload)
        if found is None:
            return None
        for piece in self.counted():
            found.data += piece
        data, digest = found.whole(), self.query.get("digest", "")
        wrong_sum = found.parts and self.query.get("etag") != found.etag()
        if digest_of(data) != digest or wrong_sum:
            return self.error(400, "DIGEST_INVALID")
        self.registry.add_blob(repository, data)
        self.registry.uploads.pop(upload, None)
        where = f"http://{self.asked.host}/v2/{repository}/blobs/{digest}"
        return self.answer(201, Location=where, Docker_Content_Digest=digest)

    def _upload(self, repository: str, upload: str) -> Upload | None:
        found = self.registry.uploads.get(upload)
        if found is None or found.repository != repository:
            self.error(404, "BLOB_UPLOAD_UNKNOWN")
            return None
        return found


def wait_until(condition: Callable[[], object], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
