"""How fast is a pull? A large blob over loopback, against `curl` and `sha256sum`.

    python -m benchmarks.registry [--megabytes 1000] [--repeat 5]

A server in a process of its own sends a file with a manifest around it. Both ways fetch it from
there in turn, into the same folder, and hash it; the table has the medians of the times.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path

from refollama.store import Store
from refollama.store.manifest import CONFIG, MODEL
from refollama.store.registry import Downloads, pull

CHUNK = 1 << 24  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", help="where to write: else the system's temporary folder")
    given = parser.parse_args()
    missing = [name for name in ("curl", "sha256sum") if shutil.which(name) is None]
    if missing:
        parser.exit(0, f"no comparison without {' and '.join(missing)}\n")
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        report(Path(folder), given.megabytes, given.repeat)


def report(folder: Path, megabytes: int, repeat: int) -> None:
    blob = folder / "blob"
    digest = write_blob(blob, megabytes)
    print(f"{megabytes} MB over loopback, {os.cpu_count()} cores; medians of {repeat} in turn\n")
    print("| | seconds (least – most) | MB/s |")
    print("|---|---|---|")
    with serving(blob, digest) as host:
        ways = {
            "curl, then sha256sum": partial(by_curl, folder, host, digest),
            "refollama pull": partial(by_pull, folder, host, digest),
        }
        times = interleaved(ways, repeat)
    for way, seconds in times.items():
        middle = statistics.median(seconds)
        spread = f"{middle:.2f} ({min(seconds):.2f} – {max(seconds):.2f})"
        print(f"| {way} | {spread} | {megabytes / middle:.0f} |")
    curl, ours = map(statistics.median, times.values())
    print(f"\nrefollama pull reaches {curl / ours:.2f} of the speed of curl, then sha256sum")


def interleaved(ways: Mapping[str, Callable[[], None]], repeat: int) -> dict[str, list[float]]:
    """Seconds that each way takes, by turns, so that a busy moment meets both; one to warm up."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeat + 1):
        for way, go in ways.items():
            start = time.perf_counter()
            go()
            times[way].append(time.perf_counter() - start)
    return {way: seconds[1:] for way, seconds in times.items()}


# -------------------------------------------------------------------- the two ways


def by_curl(folder: Path, host: str, digest: str) -> None:
    """Fetch, then hash."""
    target = folder / "fetched"
    url = f"http://{host}/v2/library/tale/blobs/{digest}"
    subprocess.run(["curl", "--silent", "--fail", "--output", target, url], check=True)
    told = subprocess.run(["sha256sum", target], check=True, capture_output=True, text=True)
    assert told.stdout.split()[0] == digest.removeprefix("sha256:")
    target.unlink()


def by_pull(folder: Path, host: str, digest: str) -> None:
    """The whole pull: manifest, blob, config, the store as it is left on the disk."""
    store = Store(folder / "models")
    name = f"{host}/library/tale"
    for _ in pull(store, name, insecure=True, downloads=Downloads(store.blobs)):
        pass
    assert store.blobs.has(digest)
    shutil.rmtree(store.root)


# -------------------------------------------------------------------- the server


def write_blob(path: Path, megabytes: int) -> str:
    """Random bytes; their digest."""
    found = hashlib.sha256()
    with path.open("wb") as file:
        for at in range(0, megabytes * 1_000_000, CHUNK):
            chunk = os.urandom(min(CHUNK, megabytes * 1_000_000 - at))
            file.write(chunk)
            found.update(chunk)
    return f"sha256:{found.hexdigest()}"


@contextlib.contextmanager
def serving(blob: Path, digest: str) -> Iterator[str]:
    """A registry with this one model, in another process; its address."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(blob, digest, theirs), daemon=True)
    process.start()
    try:
        yield f"127.0.0.1:{ours.recv()}"
    finally:
        process.kill()
        process.join()


def serve(blob: Path, digest: str, port: Connection) -> None:
    """Never returns."""
    config = b"{}"
    layers = [(digest, blob.stat().st_size), (f"sha256:{hashlib.sha256(config).hexdigest()}", 2)]
    model, made = (
        {"mediaType": kind, "digest": name, "size": size}
        for kind, (name, size) in zip((MODEL, CONFIG), layers, strict=True)
    )
    top = {"schemaVersion": 2, "config": made, "layers": [model]}
    small = {"manifests/latest": json.dumps(top).encode(), f"blobs/{layers[1][0]}": config}

    class Answers(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            """The blob straight from the file, or the range of it that is asked for."""
            asked = self.path.removeprefix("/v2/library/tale/")
            size = len(small[asked]) if asked in small else blob.stat().st_size
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            first, last = map(int, match.groups()) if match else (0, size - 1)
            self.send_response(206 if match else 200)
            self.send_header("Content-Length", str(last + 1 - first))
            if match:
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            self.end_headers()
            if self.command == "HEAD":
                return
            if asked in small:
                self.wfile.write(small[asked][first : last + 1])
                return
            with blob.open("rb") as file:
                self.connection.sendfile(file, first, last + 1 - first)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            """Silence: the table is all that is printed."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        port.send(server.server_port)
        server.serve_forever()


if __name__ == "__main__":
    main()
