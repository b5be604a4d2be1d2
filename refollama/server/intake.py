"""What waitress may take in before the app is asked, and how it says no: in JSON, as the app does.

Waitress keeps a body in a temporary file until it is complete. A JSON request has a limit; what is
uploaded as a blob may be of any size that the disk has room for. As the body comes before the app
is asked, who may upload is decided here, by the header.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.utilities import Error

from refollama.errors import BadRequest, StoreError
from refollama.server.guard import Rules
from refollama.store.blobs import checked_digest, free_space

UPLOADS = "/api/blobs/"


class Uploads(NamedTuple):
    """Who may upload, and the folders that must have room for it."""

    rules: Rules
    folders: Sequence[Path]  # where waitress keeps a body, and where the blob is to lie

    def room(self) -> int:
        """Free bytes of the fuller disk."""
        return min(map(_free, self.folders))


class Channel(HTTPChannel):  # type: ignore[misc]
    """A connection whose requests are read by the parser below."""

    def __init__(self, uploads: Uploads, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parser_class = partial(Parser, uploads)


class Parser(HTTPRequestParser):  # type: ignore[misc]
    """One request on its way in."""

    adj: Any
    error: Any

    def __init__(self, uploads: Uploads, adj: object) -> None:
        super().__init__(adj)
        self._uploads = uploads

    def parse_header(self, header_plus: bytes) -> None:
        super().parse_header(header_plus)
        if not self._is_upload():
            return
        self.adj = copy.copy(self.adj)
        self.adj.max_request_body_size = sys.maxsize
        if self.content_length and self.content_length > (room := self._uploads.room()):
            self.error = NoRoom(f"the blob has {self.content_length} bytes, the disk {room} free")
            self.completed = True

    def received(self, data: bytes) -> int:
        consumed: int = super().received(data)
        if self.error is not None and not isinstance(self.error, Refusal):
            self.error = Refusal(self.error)
            self.expect_continue = False  # or waitress would ask for the body all the same
        return consumed

    def _is_upload(self) -> bool:
        """Will the app take this for a blob, and its sender for one whom it hears?"""
        if self.command != "POST" or not self.path.startswith(UPLOADS):
            return False
        try:
            checked_digest(self.path.removeprefix(UPLOADS))
        except BadRequest:
            return False
        host, origin = self.headers.get("HOST", ""), self.headers.get("ORIGIN")
        rules = self._uploads.rules
        return rules.refusal(host, origin) is None and rules.knows(
            self.headers.get("AUTHORIZATION")
        )


class NoRoom(Error):  # type: ignore[misc]
    """More is announced than the disk can hold."""

    code = 507
    reason = "Insufficient Storage"


class Refusal(Error):  # type: ignore[misc]
    """Waitress's own error, told as ours are."""

    def __init__(self, error: Error) -> None:
        super().__init__(error.body)
        self.code, self.reason = error.code, error.reason

    def to_response(self, ident: str | None = None) -> tuple[str, list[tuple[str, str]], bytes]:
        body = json.dumps({"error": f"{self.reason}: {self.body}"}).encode()
        headers = [("Content-Type", "application/json; charset=utf-8")]
        return f"{self.code} {self.reason}", headers, body


def _free(folder: Path) -> int:
    """Bytes that may be written there."""
    try:
        return free_space(folder)
    except StoreError:  # nobody knows; a full disk will say so itself
        return sys.maxsize
