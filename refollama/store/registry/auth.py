"""401 Unauthorized: what a registry asks for, and how we show who we are.

    WWW-Authenticate: Bearer realm="https://registry.example/token",service="…",scope="…"
        → GET realm?nonce=…&scope=…&service=…&ts=…     signed with our key, or with a login
        ← {"token": "…"}
        → Authorization: Bearer …                      until it expires or is refused
    WWW-Authenticate: Basic realm="…"
        → Authorization: Basic …                       the login, if there is one

What is signed is `GET,<the whole address>,<hash of nothing>`: the token service knows our public
key and so knows that we, now, asked for this and nothing else.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, time
from urllib.parse import parse_qsl, urlencode

import httpx

from refollama.errors import Passing, RegistryError, Unauthorized
from refollama.store.registry import keys, logins
from refollama.store.registry.failures import place, refusal

# base64 of the lower-case hex SHA-256 of no bytes: a token request never has a body
NOTHING = "ZTNiMGM0NDI5OGZjMWMxNDlhZmJmNGM4OTk2ZmI5MjQyN2FlNDFlNDY0OWI5MzRjYTQ5NTk5MWI3ODUyYjg1NQ=="
EARLIER = 0.9  # of its life, after which a token is renewed: the clocks and the way take some
LONGEST_HEADER = 8192  # characters of challenges that are looked at

Ask = Callable[[str, str], tuple[int, httpx.Headers, bytes]]


# -------------------------------------------------------------------- challenges


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way to say who we are; scheme and names of parameters in lower case."""

    scheme: str
    parameters: dict[str, str] = field(default_factory=dict)


_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_SEPARATOR = re.compile(r"[\s,]*")
_PARAMETER = re.compile(rf'({_TOKEN})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|({_TOKEN}))(?=\s*(?:,|$))')
_SCHEME = re.compile(rf"({_TOKEN})(?=[\s,]|$)")
_CREDENTIALS = re.compile(r"[^\s,]+")  # of schemes like Negotiate: one long word


def challenges(headers: Sequence[str]) -> list[Challenge]:
    """What WWW-Authenticate headers ask for, in their order.  What makes no sense is skipped.

    Source: RFC 9110, 11.6.1: several challenges may share one header, and quotes hold commas.
    """
    found: list[Challenge] = []
    text, at = ", ".join(headers)[:LONGEST_HEADER], 0
    while (at := _end(_SEPARATOR.match(text, at), at)) < len(text):
        if found and (parameter := _PARAMETER.match(text, at)):
            name, quoted, plain = parameter.groups()
            value = plain if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
            found[-1].parameters.setdefault(name.lower(), value)
            at = parameter.end()
        elif scheme := _SCHEME.match(text, at):
            found.append(Challenge(scheme[1].lower()))
            at = scheme.end()
        else:
            at = max(at + 1, _end(_CREDENTIALS.match(text, at), at))
    return found


def _end(match: re.Match[str] | None, otherwise: int) -> int:
    return otherwise if match is None else match.end()


# -------------------------------------------------------------------- token requests


def token_url(realm: httpx.URL, challenge: Challenge, *, nonce: str, now: int) -> httpx.URL:
    """The address that is signed and asked, byte for byte: parameters sorted by name."""
    asked = challenge.parameters
    pairs = parse_qsl(realm.query.decode("ascii"), keep_blank_values=True)
    pairs += [("service", asked["service"])] if asked.get("service") else []
    pairs += [("scope", scope) for scope in asked.get("scope", "").split()]
    pairs += [("ts", str(now)), ("nonce", nonce)]
    query = urlencode(sorted(pairs, key=lambda pair: pair[0]))
    return realm.copy_with(query=query.encode("ascii"), fragment=None)


def signed_text(url: str) -> bytes:
    """What the key signs for one token request."""
    return f"GET,{url},{NOTHING}".encode()


def token_of(body: bytes) -> tuple[str, float | None]:
    """The token of an answer, and the seconds that it lives, if it says so.

    Raises: RegistryError if there is none that could stand in a header.
    """
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    record = answer if isinstance(answer, dict) else {}
    token, lives = record.get("token") or record.get("access_token"), record.get("expires_in")
    if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]+", token):
        raise RegistryError("the token service answers without a token")
    if not (isinstance(lives, (int, float)) and lives > 0):
        return token, None
    return token, float(min(lives, 1 << 30))


# -------------------------------------------------------------------- who we are


class Authorisation:
    """Who we are, for one registry: shared by the threads of one pull or push.

    `ask`: sends one GET with an Authorization header; status, headers and body of the answer.
    `login`: in place of the one that is kept.
    """

    def __init__(
        self, registry: httpx.URL, home: Path, ask: Ask, login: logins.Login | None = None
    ) -> None:
        self._registry = registry
        self._home = home
        self._ask = ask
        self._given = login
        self._lock = threading.Lock()  # one thread asks for a token, the others wait for it
        self._header: str | None = None
        self._challenge: Challenge | None = None
        self._renew_at = float("inf")  # by monotonic()

    def current(self) -> str | None:
        """The Authorization header of the next request; None as long as nobody asked for one."""
        with self._lock:
            if self._challenge is not None and monotonic() >= self._renew_at:
                self._fetch(self._challenge)
            return self._header

    def renewed(self, headers: Sequence[str], used: str | None) -> str:
        """The header that answers a 401 which a request with the header `used` has got.

        Raises: Unauthorized if we have nothing to show; RegistryError for a challenge that
        would carry our name to another host.
        """
        challenge = self._chosen(challenges(headers))
        with self._lock:
            # Meanwhile another thread may have been told the same, and have a new token already.
            fresh = self._header != used and challenge == self._challenge
            if self._header is None or not fresh:
                self._answer(challenge)
            assert self._header is not None
            return self._header

    def refused(self) -> str:
        """The sentence for a second 401."""
        login = self._login()
        if login is None:
            return "unauthorized"
        return f"unauthorized: {self._host} does not accept user {login.user!r}"

    def _login(self) -> logins.Login | None:
        return self._given or logins.find(self._host, home=self._home)

    @property
    def _host(self) -> str:
        """As the name of a model has it, with its port if that is a special one."""
        return self._registry.netloc.decode("ascii")

    def _chosen(self, offered: Sequence[Challenge]) -> Challenge:
        """Bearer before Basic: a token is worth less to a thief than a password."""
        for scheme in ("bearer", "basic"):
            for challenge in offered:
                if challenge.scheme == scheme and (scheme == "basic" or _realm(challenge)):
                    return challenge
        names = ", ".join(challenge.scheme for challenge in offered)[:80] or "nothing"
        raise Unauthorized(f"unauthorized: {self._host} asks for {names}, not for Bearer or Basic")

    def _answer(self, challenge: Challenge) -> None:
        if challenge.scheme == "bearer":
            self._fetch(challenge)
            return
        login = self._login()
        if login is None:
            command = f"refollama login {self._host}"
            raise Unauthorized(f"unauthorized: {self._host} wants a user: `{command}`")
        self._keep(challenge, basic(login), None)

    def _fetch(self, challenge: Challenge) -> None:
        """Ask the token service; it must live on the registry's own host."""
        nonce = base64.urlsafe_b64encode(secrets.token_bytes(16)).decode().rstrip("=")
        realm = self._own(_realm(challenge))
        url = str(token_url(realm, challenge, nonce=nonce, now=int(time())))
        status, headers, body = self._ask(url, self._credentials(url))
        if status != httpx.codes.OK:
            raise _told(refusal(status, headers, body))
        token, lives = token_of(body)
        self._keep(challenge, f"Bearer {token}", lives)

    def _keep(self, challenge: Challenge, header: str, lives: float | None) -> None:
        self._challenge, self._header = challenge, header
        self._renew_at = monotonic() + (float("inf") if lives is None else EARLIER * lives)

    def _credentials(self, url: str) -> str:
        login = self._login()
        if login is not None:
            return basic(login)
        key = keys.load(self._home)
        return f"{key.public}:{key.sign(signed_text(url))}"

    def _own(self, realm: str) -> httpx.URL:
        """A registry that names a foreign token service would get a signature, or a password,
        that is good for someone else (CVE-2025-51471).  Raises: RegistryError.
        """
        try:
            url = httpx.URL(realm)
        except (httpx.InvalidURL, ValueError):
            raise RegistryError(f"{self._host}: its realm is no address: {realm[:200]!r}") from None
        if url.host != self._registry.host or url.userinfo:
            raise RegistryError(
                f"{self._host} sends us to another host, {url.host[:200]!r}, for a token: refused"
            )
        if url.scheme != "https" and (url.scheme, self._registry.scheme) != ("http", "http"):
            raise RegistryError(f"{self._host}: its token service at {place(url)} is not safe")
        return url


def basic(login: logins.Login) -> str:
    """User and password as a header.  Source: RFC 7617."""
    pair = f"{login.user}:{login.password}".encode()
    return f"Basic {base64.b64encode(pair).decode()}"


def _realm(challenge: Challenge) -> str:
    return challenge.parameters.get("realm", "")


def _told(error: RegistryError) -> RegistryError:
    """The same error, in Ollama's words for it; they say `pull` also of a push."""
    said = f"on pull registry responded with code {error}"
    return Passing(said, error.retry_after) if isinstance(error, Passing) else type(error)(said)
