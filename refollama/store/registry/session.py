"""One registry as one pull or push sees it: addresses, redirects, authorisation, errors.

base      https://<host>/v2/<namespace>/<model>/         every short address starts here
401       a token is fetched (auth.py), and the request is sent once more
3xx       GET and HEAD go on there; what proves who we are stays behind
broken    Passing, with the host's name: it may go better next time
"""

from __future__ import annotations

import os
import platform
import re
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import httpx

from refollama.errors import Abandoned, BadRequest, Passing, RegistryError, Unauthorized
from refollama.host import on_this_machine
from refollama.store.name import Name
from refollama.store.registry.auth import Authorisation
from refollama.store.registry.failures import SHOWN, explained, place, refusal
from refollama.store.registry.logins import Login
from refollama.store.registry.peers import Peers
from refollama.version import __version__

T = TypeVar("T")
Content = bytes | Callable[[], Iterable[bytes]]

STALL = 30.0  # seconds without a byte after which a request has failed
MAX_REDIRECTS = 10
LONGEST_WAIT = 60.0  # seconds; a registry may ask for more, and is not heard
SMALL = 64 << 10  # bytes; more than a token service has to say
SMALL_ANSWER = 120.0  # seconds for an answer that is read whole: a slow drip never stalls

# Registries look at the beginning, a release of Ollama: models that are newer than it they refuse
# (412). This one knows all kinds of models that we can run. Who really asks stands behind it.
RELEASE = "0.9.0"
_MACHINES = {"x86_64": "amd64", "AMD64": "amd64", "aarch64": "arm64"}
_REDIRECTS = (301, 302, 303, 307, 308)


@dataclass(frozen=True)
class _Ask:
    """One request, as it can be sent several times."""

    method: str
    url: httpx.URL
    headers: httpx.Headers
    content: Content
    follow: bool


class Registry:
    """The registry of one model.  Safe for several threads; a context manager.

    `insecure`: speak http.  `home`: the folder of the key and the logins, else ~/.ollama.
    `login`: in place of the one that is kept there.
    Raises: BadRequest for an http:// name without `insecure`, before anything is sent.
    """

    def __init__(
        self,
        name: Name,
        *,
        scheme: str = "https",
        insecure: bool = False,
        home: Path | None = None,
        login: Login | None = None,
    ) -> None:
        if scheme == "http" and not insecure:
            raise BadRequest("insecure protocol http")
        self.stall = STALL
        self._base = _base("http" if insecure else "https", name)
        self._peers = Peers(self._base.host)
        self._http = _client(self._base)
        self._reached = False
        folder = home or Path.home() / ".ollama"
        self._authorisation = Authorisation(self._base, folder, self._ask_for_token, login)

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all connections; a thread that waits for one of them fails at once."""
        self._peers.hang_up()
        self._http.close()

    # ---------------------------------------------------------------- requests

    @contextmanager
    def send(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        content: Content = b"",
        follow: bool = True,
        authorised: bool = True,
    ) -> Iterator[httpx.Response]:
        """The answer of any status, not read yet; `url` is short, or absolute.

        A callable `content` is called anew for each time that the request is sent.
        Raises: Passing for what breaks, also while the answer is read; Unauthorized for a second
        401; RegistryError for a senseless redirect, and for a registry that was never reached.
        """
        ask = _Ask(method, self._absolute(url), httpx.Headers(headers), content, follow)
        response = self._reply(ask, self._authorisation.current() if authorised else None)
        try:
            if authorised and self._asks_who_we_are(response):
                _let_go(response)
                response = self._reply_again(ask, response)
            with explained(response.url, self._reached):
                yield response
        finally:
            response.close()

    def read(
        self, method: str, url: str, *, limit: int, **as_send: Any
    ) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and bytes of a small answer.  Raises: RegistryError beyond `limit`."""
        with self.send(method, url, **as_send) as response:
            data = _bounded(response, limit)
            if len(data) > limit:
                raise RegistryError(f"{place(response.url)} answers with more than {limit} bytes")
            return response.status_code, response.headers, data

    def knock(self) -> None:
        """Are we let in at all?  (`GET /v2/`)

        Raises: Unauthorized if not; RegistryError and its kin if that cannot be found out.
        """
        url = str(self._base.join("/v2/"))
        status, headers, data = self.read("GET", url, limit=SMALL, follow=False)
        if status != httpx.codes.OK:
            raise refusal(status, headers, data)

    def refuse(self, response: httpx.Response) -> NoReturn:
        """An answer from 400 on, or a senseless one, as the error that it is."""
        raise refusal(response.status_code, response.headers, _complaint(response))

    def location(self, response: httpx.Response, *, redirect: bool = False) -> str:
        """Where an upload goes on, or where a `redirect` leads, which may say both; absolute.

        Raises: RegistryError if the answer does not say, or names no place to go to.
        """
        names = ["Location"] if redirect else ["Docker-Upload-Location", "Location"]
        given = next(filter(None, map(response.headers.get, names)), None)
        if not given:
            raise RegistryError(f"{place(response.url)} does not say where to go on")
        return str(self._joined(response.url, given))

    # ---------------------------------------------------------------- one request, step by step

    def _reply_again(self, ask: _Ask, refused: httpx.Response) -> httpx.Response:
        """The same request, now that we know whom the registry wants to see."""
        used = refused.request.headers.get("Authorization")
        challenges = refused.headers.get_list("WWW-Authenticate")
        response = self._reply(ask, self._authorisation.renewed(challenges, used))
        if self._asks_who_we_are(response):
            response.close()
            raise Unauthorized(self._authorisation.refused())
        return response

    def _asks_who_we_are(self, response: httpx.Response) -> bool:
        """A 401 of another host is that host's own affair."""
        return response.status_code == httpx.codes.UNAUTHORIZED and self._is_ours(response.url)

    def _reply(self, ask: _Ask, authorization: str | None) -> httpx.Response:
        """The first answer that is no redirect, or that shall not be followed."""
        for _ in range(MAX_REDIRECTS + 1):
            response = self._once(ask, authorization)
            if not (ask.follow and _leads_on(ask.method, response)):
                return response
            _let_go(response)
            ask = self._next(ask, response)
        raise RegistryError(f"{place(self._base)} redirects more than {MAX_REDIRECTS} times")

    def _next(self, ask: _Ask, response: httpx.Response) -> _Ask:
        """The request that a redirect leads to; another host is not told who we are."""
        url = self._joined(response.url, response.headers["Location"])
        headers = ask.headers.copy()
        if not self._is_ours(url):
            headers.pop("Authorization", None)
        return replace(ask, url=url, headers=headers)

    def _once(self, ask: _Ask, authorization: str | None) -> httpx.Response:
        """Send one request.  Only the registry itself learns who we are."""
        if self._http.is_closed:
            raise Abandoned("the transfer has ended")
        self._peers.check(ask.url.host)
        headers = ask.headers.copy()
        if authorization is not None and self._is_ours(ask.url):
            headers["Authorization"] = authorization
        with explained(ask.url, self._reached):
            request = self._http.build_request(
                ask.method,
                ask.url,
                headers=headers,
                content=ask.content() if callable(ask.content) else ask.content,
                timeout=self.stall,
                extensions={"trace": self._peers.watch(ask.url)},
            )
            # A plain Auth adds nothing: what stands before the @ of a URL is not for us to use.
            response = self._http.send(request, stream=True, auth=httpx.Auth())
        self._reached = True
        return _plain(response)

    def _ask_for_token(self, url: str, authorization: str) -> tuple[int, httpx.Headers, bytes]:
        """What the token service answers: a small thing, from one place."""
        headers = {"Authorization": authorization}
        return self.read("GET", url, limit=SMALL, headers=headers, follow=False, authorised=False)

    # ---------------------------------------------------------------- addresses

    def _absolute(self, url: str) -> httpx.URL:
        if re.match("https?://", url, re.IGNORECASE):
            return self._joined(self._base, url)
        return self._joined(self._base, f"{self._base}{url}")

    def _joined(self, base: httpx.URL, url: str) -> httpx.URL:
        """An address that came from outside, seen from `base`; never from https down to http."""
        try:
            joined = _checked(base.join(url))
        except (httpx.InvalidURL, ValueError):
            raise RegistryError(f"{place(base)} names a senseless address: {url[:200]!r}") from None
        if "https" in (base.scheme, self._base.scheme) and joined.scheme == "http":
            raise RegistryError(f"{place(base)} leads from https down to http: {place(joined)}")
        return joined

    def _is_ours(self, url: httpx.URL) -> bool:
        """Is this the registry itself: the same host and port, or its safer door?"""
        ports = (place(self._base), place(url))
        upgraded = ports == (f"{self._base.host}:80", f"{self._base.host}:443")
        return upgraded or (ports[0] == ports[1] and url.scheme == self._base.scheme)


# -------------------------------------------------------------------- again, later


def _pause(attempt: int) -> float:
    return 2.0**attempt  # seconds: 1, 2, 4, 8, 16


def retried(
    work: Callable[[], T],
    *,
    cancelled: threading.Event,
    tries: int = 6,
    wait: Callable[[int], float] = _pause,
) -> T:
    """Do it again while it fails in a way that may pass.

    `wait`: seconds after the nth failure, counted from 0; a registry's Retry-After goes first.
    Raises: RegistryError with the last cause; Abandoned as soon as it is `cancelled`.
    """
    for attempt in range(tries):
        if cancelled.is_set():
            raise Abandoned("the transfer was cancelled")
        try:
            return work()
        except Passing as error:
            failure = error
        if attempt + 1 < tries:
            asked = failure.retry_after
            cancelled.wait(wait(attempt) if asked is None else min(asked, LONGEST_WAIT))
    raise RegistryError(f"max retries exceeded: {failure}") from failure


# -------------------------------------------------------------------- answers


def _complaint(response: httpx.Response) -> bytes:
    """The body of a refusal, as much as can be shown; its status matters more than its end."""
    try:
        return _bounded(response, SHOWN)
    except (httpx.TransportError, Passing):
        return b""


def _bounded(response: httpx.Response, limit: int) -> bytes:
    """All bytes, or the first few more than `limit`."""
    data, end = bytearray(), time.monotonic() + SMALL_ANSWER
    for chunk in response.iter_raw():
        data += chunk
        if len(data) > limit:
            break
        if time.monotonic() > end:
            raise Passing(f"{place(response.url)} answers too slowly")
    return bytes(data)


def _let_go(response: httpx.Response) -> None:
    """Be done with an answer; once it is read, its connection can be used again."""
    _complaint(response)
    response.close()


def _plain(response: httpx.Response) -> httpx.Response:
    """Sizes and ranges count plain bytes, so an answer that was compressed all the same is none."""
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if response.is_success and encoding not in ("", "identity"):
        response.close()
        raise RegistryError(f"{place(response.url)} compressed its answer: {encoding[:40]!r}")
    return response


def _leads_on(method: str, response: httpx.Response) -> bool:
    redirect = response.status_code in _REDIRECTS and "Location" in response.headers
    return redirect and method in ("GET", "HEAD")


# -------------------------------------------------------------------- connections


def _base(scheme: str, name: Name) -> httpx.URL:
    try:
        return _checked(httpx.URL(f"{scheme}://{name.host}/v2/{name.namespace}/{name.model}/"))
    except (httpx.InvalidURL, ValueError):
        raise BadRequest(f"{name.host!r} is no address of a registry") from None


def _checked(url: httpx.URL) -> httpx.URL:
    """An address that can be asked.  Raises: ValueError, UnicodeError being one."""
    if url.scheme not in ("http", "https") or not url.host or url.userinfo:
        raise ValueError("not an address of the web")
    if url.port is not None and not 0 < url.port < 1 << 16:
        raise ValueError("not a port")
    url.raw_host.decode("ascii").encode("idna")  # looking the name up would do the same
    return url


def _client(base: httpx.URL) -> httpx.Client:
    """Connections without limit of number (the callers have theirs), without cookies."""
    near = on_this_machine(str(base))
    trusted = _trusted(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))
    try:
        return httpx.Client(
            headers={"User-Agent": user_agent(), "Accept-Encoding": "identity"},
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            trust_env=not near,  # a proxy's "localhost" is another machine
            verify=trusted,
        )
    except (httpx.InvalidURL, ValueError, ImportError) as error:  # ImportError: SOCKS
        raise BadRequest(f"the proxy that the environment names cannot be used: {error}") from None


@lru_cache(maxsize=4)
def _trusted(_file: str | None, _folder: str | None) -> ssl.SSLContext:
    """Whose certificates count: reading them takes longer than a small pull."""
    try:
        return httpx.create_ssl_context()
    except OSError as error:
        raise BadRequest(f"SSL_CERT_FILE or SSL_CERT_DIR: {error.strerror or error}") from None


def user_agent() -> str:
    """In Ollama's shape: `ollama/0.9.0 (amd64 linux) refollama/0.1.0`."""
    machine = _MACHINES.get(platform.machine(), platform.machine())
    return f"ollama/{RELEASE} ({machine} {sys.platform}) refollama/{__version__}"
