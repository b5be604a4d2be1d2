"""Who may talk to the server: a page from somewhere else may not drive it through the browser.

Two lies are possible. A page of another site sends requests here: its `Origin` gives it away. A
page makes its own name point to this machine (DNS rebinding): its `Host` gives it away.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from flask import Flask, Request, Response, abort, request

LOCAL_NAMES = ("localhost", "127.0.0.1", "0.0.0.0", "[::1]")
LOCAL_ENDINGS = (".localhost", ".local", ".internal")
METHODS = "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS"
HEADERS = "Authorization,Content-Type,User-Agent,Accept,X-Requested-With"


def install(app: Flask, *, loopback: bool) -> None:
    """Check every request of the app. On a loopback address the Host must be a local one, too."""
    allowed = origins(os.environ.get("OLLAMA_ORIGINS", ""))

    @app.before_request
    def check() -> Response | None:
        if loopback and not local_host(request.host):
            abort(403, "the Host header names another machine than this one")
        origin = request.headers.get("Origin")
        if origin is None or _same(request, origin):
            return None
        if not any(pattern.fullmatch(origin) for pattern in allowed):
            abort(403, "this origin is not allowed; OLLAMA_ORIGINS lists those that are")
        return Response(status=204) if request.method == "OPTIONS" else None

    @app.after_request
    def allow(response: Response) -> Response:
        origin = request.headers.get("Origin")
        if origin is not None and response.status_code != 403:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Allow-Methods"] = METHODS
            response.headers["Access-Control-Allow-Headers"] = HEADERS
            response.headers["Access-Control-Max-Age"] = "43200"
            response.headers.add("Vary", "Origin")
        return response


def origins(listed: str) -> list[re.Pattern[str]]:
    """Patterns for this machine's own pages at any port, and for those that are listed.

    A listed `*` alone stands for every origin; inside one it is any text without a slash or an @.
    """
    own = [rf"https?://{re.escape(name)}(:\d+)?" for name in LOCAL_NAMES]
    return [re.compile(pattern) for pattern in (*own, *_listed(listed.split(",")))]


def _listed(entries: Iterable[str]) -> Iterable[str]:
    for entry in entries:
        entry = entry.strip()
        if entry:
            yield ".*" if entry == "*" else re.escape(entry).replace(r"\*", "[^/@]*")


def local_host(host: str) -> bool:
    """Does this Host header name the machine itself, or an address that no public name has?"""
    try:
        name = (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return False
    if name in ("localhost", socket.gethostname().lower()) or name.endswith(LOCAL_ENDINGS):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or address.is_private or address.is_unspecified


def _same(request: Request, origin: str) -> bool:
    """A page that this very server sent."""
    return origin in (f"http://{request.host}", f"https://{request.host}")
