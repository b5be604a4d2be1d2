"""One line in the log for each request, when its answer has been sent: who asked what, how it went.

    request method=POST path=/api/generate status=200 duration=1.234s client=127.0.0.1

Nothing of what was said is in it. A path is shown as it was sent, percent signs and all, so that
no request can write a line of its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from flask import Flask, Response, g, request

log = logging.getLogger(__name__)

HUNG_UP = 499  # the client closed the connection before the answer was complete; nginx's number
LONGEST_PATH = 200  # characters of a path that are shown


def install(app: Flask) -> None:
    """Write the line for every request of the app."""

    @app.before_request
    def begin() -> None:
        g.line = _Line(request.method, _shown(request.path), request.remote_addr or "-")

    @app.after_request
    def finish(response: Response) -> Response:
        line: _Line = g.line
        line.status = response.status_code
        if response.is_streamed:
            response.response = line.passed_on(response.response)
        response.call_on_close(line.write)
        return response


@dataclass
class _Line:
    """What is known of a request."""

    method: str
    path: str
    client: str
    start: float = 0.0
    status: int = 0
    cut: bool = False  # an answer began that has not come to its end

    def __post_init__(self) -> None:
        self.start = time.monotonic()

    def passed_on(self, parts: Iterable[Any]) -> Iterator[Any]:
        """The same parts, watched: whoever stops to ask for more has hung up."""
        self.cut = True
        yield from parts
        self.cut = False

    def write(self) -> None:
        log.info(
            "request method=%s path=%s status=%d duration=%.3fs client=%s",
            self.method,
            self.path,
            HUNG_UP if self.cut else self.status,
            time.monotonic() - self.start,
            self.client,
        )


def _shown(path: str) -> str:
    """In ASCII, without spaces and line breaks, and not endless."""
    return quote(path, safe="/:@")[:LONGEST_PATH]
