"""Who may talk to the server: a page from somewhere else may not drive it through the browser.

Two lies are possible. A page of another site sends requests here: its `Origin` gives it away. A
page makes its own name point to this machine (DNS rebinding): its `Host` gives it away.

Where OLLAMA_API_KEY is set, on a machine that others share, a request must carry it, too.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import re
import socket
from functools import partial
from urllib.parse import urlsplit

from flask import Flask, Response, abort, g, request
from werkzeug.datastructures import WWWAuthenticate

from refollama.errors import BadRequest
from refollama.host import api_key

LOCAL_NAMES = ("localhost", "127.0.0.1", "0.0.0.0", "[::1]")
LOCAL_ENDINGS = (".localhost", ".local", ".internal")
APPS = ("app", "file", "tauri", "vscode-webview", "vscode-file")  # programs, not pages of a site
METHODS = "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS"
# What a page may send: the list of 2023, and what today's libraries send from a browser.
HEADERS = (
    "Origin,Content-Length,Content-Type,Authorization,User-Agent,Accept,X-Requested-With,"
    "OpenAI-Beta,x-stainless-arch,x-stainless-async,x-stainless-custom-poll-interval,"
    "x-stainless-helper-method,x-stainless-lang,x-stainless-os,x-stainless-package-version,"
    "x-stainless-poll-helper,x-stainless-retry-count,x-stainless-runtime,"
    "x-stainless-runtime-version,x-stainless-timeout"
)
FOR_ANYBODY = "/"  # says no more than that a server runs
NO_KEY = "this server wants a key: send the one in its OLLAMA_API_KEY as a bearer token"
PREFLIGHT_HOLDS = "43200"  # seconds that a browser may remember the answer


def install(app: Flask, *, loopback: bool) -> None:
    """Check every request of the app. On a loopback address the Host must be a local one, too.

    Raises: BadRequest if OLLAMA_ORIGINS lists what can be no origin, or OLLAMA_API_KEY is no key.
    """
    rules = Rules(loopback=loopback)
    everybody = "*" in _entries(_listed())

    @app.before_request
    def check() -> Response | None:
        origin = request.headers.get("Origin")
        if (refusal := rules.refusal(request.host, origin)) is not None:
            abort(403, refusal)
        if origin is None or not _foreign(origin, request.host):
            return None
        g.allowed_origin = "*" if everybody else origin
        return Response(status=204) if request.method == "OPTIONS" else None

    app.before_request(partial(_check_key, rules))  # behind preflights: browsers send none there

    @app.after_request
    def allow(response: Response) -> Response:
        if "allowed_origin" in g:
            response.headers["Access-Control-Allow-Origin"] = g.allowed_origin
            response.headers.add("Vary", "Origin")
            if request.method == "OPTIONS":
                response.headers["Access-Control-Allow-Methods"] = METHODS
                response.headers["Access-Control-Allow-Headers"] = HEADERS
                response.headers["Access-Control-Max-Age"] = PREFLIGHT_HOLDS
        return response


def _check_key(rules: Rules) -> None:
    if request.path != FOR_ANYBODY and not rules.knows(request.headers.get("Authorization")):
        abort(401, NO_KEY, www_authenticate=WWWAuthenticate("bearer"))


class Rules:
    """Whom the server hears, told from the headers of a request alone.

    Raises: BadRequest if OLLAMA_ORIGINS lists what can be no origin, or OLLAMA_API_KEY is no key.
    """

    def __init__(self, *, loopback: bool) -> None:
        self._loopback = loopback
        self._allowed = origins(_listed())
        self._key = api_key(os.environ)

    @property
    def wants_key(self) -> bool:
        """Must a request carry the key?"""
        return bool(self._key)

    def knows(self, authorization: str | None) -> bool:
        """Does this header carry the key, or is there none?  In a time that tells nothing of it."""
        scheme, _, given = (authorization or "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), self._key.encode())
        return not self._key or (right and scheme.lower() == "bearer")

    def refusal(self, host: str, origin: str | None) -> str | None:
        """Why a request with these headers is not heard; None: it is."""
        if self._loopback and not local_host(host):
            return "the Host header names another machine than this one"
        if origin is None or not _foreign(origin, host):
            return None
        if not any(pattern.fullmatch(origin) for pattern in self._allowed):
            return "this origin is not allowed; OLLAMA_ORIGINS lists those that are"
        return None


def origins(listed: str) -> list[re.Pattern[str]]:
    """Patterns for this machine's own pages at any port, for apps, and for those that are listed.

    A listed `*` alone stands for every origin; inside one it is any text without a slash or an @,
    at its beginning any scheme too.  Raises: BadRequest for two stars, and for a bare name.
    """
    own = [rf"https?://{re.escape(name)}(:\d+)?" for name in LOCAL_NAMES]
    apps = [rf"{scheme}://[^@]*" for scheme in APPS]
    patterns = (*own, *apps, *map(_pattern, _entries(listed)))
    return [re.compile(pattern, re.IGNORECASE) for pattern in patterns]


def _listed() -> str:
    return os.environ.get("OLLAMA_ORIGINS", "")


def _entries(listed: str) -> list[str]:
    return [entry for part in listed.split(",") if (entry := part.strip().strip("\"'").strip())]


def _pattern(entry: str) -> str:
    """One entry of OLLAMA_ORIGINS as a pattern."""
    before, star, behind = entry.partition("*")
    if "*" in behind:
        raise BadRequest(f"OLLAMA_ORIGINS '{entry}': only one * is allowed")
    if not star and not re.match(r"[\w+.-]+://.", entry):
        raise BadRequest(
            f"OLLAMA_ORIGINS '{entry}': an origin must contain '*', "
            "or begin as http:// and https:// do"
        )
    if entry == "*":
        return ".*"
    anything = "[^/@]*" if before else "([a-z][a-z0-9+.-]*:/?/?)?[^/@]*"
    return re.escape(before) + (anything if star else "") + re.escape(behind)


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


def _foreign(origin: str, host: str) -> bool:
    """Does another page send this request than one that this very server sent?"""
    return origin not in (f"http://{host}", f"https://{host}")
