"""What waitress may take in before the app is asked, and how it says no: in JSON, as the app does.

Waitress keeps a body in a temporary file until it is complete. A JSON request has a limit; what is
uploaded as a blob may be of any size.
"""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.utilities import Error

UPLOADS = "/api/blobs/"


class Channel(HTTPChannel):  # type: ignore[misc]
    """A connection whose requests are read by the parser below."""

    @staticmethod
    def parser_class(adj: object) -> Parser:
        return Parser(adj)


class Parser(HTTPRequestParser):  # type: ignore[misc]
    """One request on its way in."""

    adj: Any
    error: Any

    def parse_header(self, header_plus: bytes) -> None:
        super().parse_header(header_plus)
        if self.path.startswith(UPLOADS):
            self.adj = copy.copy(self.adj)
            self.adj.max_request_body_size = sys.maxsize

    def received(self, data: bytes) -> int:
        consumed: int = super().received(data)
        if self.error is not None and not isinstance(self.error, Refusal):
            self.error = Refusal(self.error)
        return consumed


class Refusal(Error):  # type: ignore[misc]
    """Waitress's own error, told as ours are."""

    def __init__(self, error: Error) -> None:
        super().__init__(error.body)
        self.code, self.reason = error.code, error.reason

    def to_response(self, ident: str | None = None) -> tuple[str, list[tuple[str, str]], bytes]:
        body = json.dumps({"error": f"{self.reason}: {self.body}"}).encode()
        headers = [("Content-Type", "application/json; charset=utf-8")]
        return f"{self.code} {self.reason}", headers, body
