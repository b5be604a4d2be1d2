"""HTTP servers in threads of their own, that end with the test and tell what went wrong in them."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """On a free port of 127.0.0.1; `owner` is for its handlers to find.

    Closing it breaks every connection, wakes those who wait for `stopped`, and joins all threads.
    """

    daemon_threads = False  # so that server_close() waits for them
    request_queue_size = 256

    def __init__(self, handler: type[BaseHTTPRequestHandler], owner: Any) -> None:
        self.owner = owner
        self.stopped = threading.Event()
        self.problems: list[BaseException] = []
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.shutdown()
        self._thread.join()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self.server_close()
        if self.problems:
            raise self.problems[0]

    @property
    def port(self) -> int:
        return self.server_port

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error; whatever else is raised fails the test at its end."""
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, (ConnectionError, TimeoutError)):
            self.problems.append(error)


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.1 that keeps connections, reads bodies of both kinds, and is silent."""

    protocol_version = "HTTP/1.1"
    server: Server
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        pass

    def pieces(self, size: int = 1 << 16) -> Iterator[bytes]:
        """The body of the request as it comes in.  Raises: ConnectionError if it breaks off."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            yield from self._chunks()
            return
        left = int(self.headers.get("Content-Length", "0"))
        while left:
            piece = self.rfile.read1(min(left, size))
            if not piece:
                raise ConnectionError("the body broke off")
            left -= len(piece)
            yield piece

    def _chunks(self) -> Iterator[bytes]:
        while length := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            piece = self.rfile.read(length + 2)
            if len(piece) < length + 2:
                raise ConnectionError("the body broke off")
            yield piece[:-2]
        self.rfile.readline()

    def answer(self, status: int, body: bytes = b"", **headers: object) -> None:
        """A whole answer; `Content_Type` becomes Content-Type."""
        self.send_response(status)
        named = {key.replace("_", "-"): str(value) for key, value in headers.items()}
        if status >= 200 and status != 204:
            named.setdefault("Content-Length", str(len(body)))
        for key, value in named.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
