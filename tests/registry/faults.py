"""A network that fails: a proxy before a registry that does harm, by a seed.

    with Faults(registry.host, seed=7) as network:
        …pull f"http://{network.host}/library/tale"…
        network.passed            every request, with the fault that befell it
        network.odds = 0          from now on all is well

The same seed does the same harm to the same request, whatever the order of the threads.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tests.registry.serving import Handler, Server

ANY = ("500", "503", "429", "refused", "silent", "lost", "redirected", "no HTTP")
BODY = ("cut", "stall", "drip", "too short", "too long", "longer than said")
BLOB = ("flipped", "range ignored", "other range", "said another range")
INWARDS = ("cut on the way in", "flipped on the way in")
NOT_FORWARDED = ("Connection", "Keep-Alive", "Transfer-Encoding", "Content-Length", "Date")


@dataclass
class Passed:
    """One request through the proxy."""

    method: str
    path: str
    range: str  # as the client asked
    fault: str  # empty if none
    status: int = 0  # of the answer, as the client saw it; 0 for none
    length: int = 0  # bytes of the answer's body that were sent

    @property
    def asked(self) -> tuple[int, int] | None:
        """(offset, end) of the range."""
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.range)
        return (int(match[1]), int(match[2]) + 1) if match else None


@dataclass
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str:
        return next((value for key, value in self.headers if key.lower() == name.lower()), "")

    def replace(self, name: str, value: str) -> None:
        self.headers = [(k, v) for k, v in self.headers if k.lower() != name.lower()]
        self.headers.append((name, value))


@dataclass
class Faults:
    """`odds`: the share of requests that meet a fault.  `only`: no other faults than these.

    `patience`: seconds that a silence or a slow answer lasts.
    """

    target: str
    seed: int = 0
    odds: float = 0.3
    only: tuple[str, ...] = (*ANY, *BODY, *BLOB, *INWARDS)
    patience: float = 3.0
    passed: list[Passed] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.server = Server(_Proxy, self)
        self.host = f"127.0.0.1:{self.server.port}"
        self.elsewhere = f"localhost:{self.server.port}"
        self._lock = threading.Lock()
        self._seen: Counter[str] = Counter()

    def __enter__(self) -> Faults:
        self.server.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.__exit__(*error)

    def begin(self, method: str, path: str, wanted: str) -> tuple[Passed, random.Random]:
        """What befalls this request, and the chance that decides the details."""
        # The names of uploads are the registry's choice: they may not change our luck.
        key = f"{self.seed} {method} {re.sub('/blobs/uploads/.*', '/uploads', path)} {wanted}"
        with self._lock:
            self._seen[key] += 1
            chance = random.Random(f"{key} {self._seen[key]}")
            possible = [f for f in _possible(method, path) if f in self.only]
            fault = chance.choices(possible, [_share(f) for f in possible])[0] if possible else ""
            passed = Passed(method, path, wanted, fault if chance.random() < self.odds else "")
            self.passed.append(passed)
        return passed, chance


def _possible(method: str, path: str) -> tuple[str, ...]:
    """Faults that make sense for a request.

    A flipped bit of a manifest is left out: nothing that a client knows would show it.
    """
    if method == "HEAD":
        return ANY
    if method == "GET":
        return ANY + BODY + (BLOB if "/blobs/sha256" in path else ())
    inwards = INWARDS if "/uploads/" in path and method != "POST" else ()
    return tuple(fault for fault in ANY if fault != "redirected") + inwards


def _share(fault: str) -> float:
    """Silences are as bad as any fault, but take long: they are rarer."""
    return 0.3 if fault in ("silent", "stall", "drip") else 1.0


class _Proxy(Handler):
    """Each answer is fetched whole, then spoilt on its way out."""

    passed: Passed
    chance: random.Random

    @property
    def faults(self) -> Faults:
        owner: Faults = self.server.owner
        return owner

    def _do(self) -> None:
        wanted = self.headers.get("Range", "")
        self.passed, self.chance = self.faults.begin(self.command, self.path, wanted)
        body = b"".join(self.pieces())
        act = _BEFORE.get(self.passed.fault)
        if act is not None:
            return act(self)
        answer = self._fetch(body)
        if answer is not None:
            _AFTER.get(self.passed.fault, _Proxy.pass_on)(self, answer)
        return None

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _do  # noqa: N815

    # ---------------------------------------------------------------- to the registry

    def _fetch(self, body: bytes) -> Answer | None:
        """What the registry says; None if the connection to it broke, as then does the client's."""
        body, length = self._inwards(body)
        connection = http.client.HTTPConnection(self.faults.target, timeout=30)
        with contextlib.closing(connection):
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for key, value in self._request_headers(length):
                connection.putheader(key, value)
            connection.endheaders(body)
            if len(body) < length:
                self.hang_up()
                return None
            got = connection.getresponse()
            headers = [(k, v) for k, v in got.getheaders() if k not in NOT_FORWARDED]
            headers += [("Content-Length", v) for v in got.headers.get_all("Content-Length", [])]
            # A refusal may claim a wrong length: it is read as far as it goes.
            with contextlib.suppress(http.client.IncompleteRead):
                return Answer(got.status, headers, got.read())
            return Answer(got.status, [], b"")

    def _inwards(self, body: bytes) -> tuple[bytes, int]:
        """The body as it gets there, and its length as it was announced."""
        if body and self.passed.fault == "cut on the way in":
            return body[: self.chance.randrange(len(body))], len(body)
        if body and self.passed.fault == "flipped on the way in":
            return flipped(body, self.chance), len(body)
        return body, len(body)

    def _request_headers(self, length: int) -> Iterator[tuple[str, str]]:
        for key, value in self.headers.items():
            if key in NOT_FORWARDED:
                continue
            if key == "Range" and self.passed.fault == "range ignored":
                continue
            if key == "Range" and self.passed.fault == "other range":
                value = _moved(value, self.chance)
            yield key, value
        if self.command not in ("GET", "HEAD") or length:
            yield "Content-Length", str(length)

    # ---------------------------------------------------------------- to the client

    def pass_on(self, answer: Answer) -> None:
        self.begin(answer, len(answer.body))
        self.write(answer.body)

    def begin(self, answer: Answer, length: int) -> None:
        """Status and headers, with this length."""
        self.passed.status = answer.status
        self.send_response(answer.status)
        known = answer.header("Content-Length") if self.command == "HEAD" else str(length)
        if answer.status != 204 and known:
            answer.replace("Content-Length", known)
        for key, value in answer.headers:
            self.send_header(key, value)
        self.end_headers()

    def write(self, body: bytes) -> None:
        if self.command != "HEAD" and body:
            self.wfile.write(body)
            self.passed.length += len(body)

    def hang_up(self) -> None:
        self.close_connection = True

    # ---------------------------------------------------------------- faults instead of an answer

    def fail(self, status: int, **headers: object) -> None:
        self.passed.status = status
        self.answer(status, b"out of order\n" * 3, **headers)

    def be_silent(self) -> None:
        self.server.stopped.wait(self.faults.patience)
        self.hang_up()

    def redirect(self) -> None:
        """To the other name of this proxy; from there, on to the registry, or into a circle."""
        self.passed.status = 307
        self.answer(307, Location=f"http://{self.faults.elsewhere}{self.path}")

    def talk_nonsense(self) -> None:
        self.wfile.write(self.chance.randbytes(200))
        self.hang_up()

    # ---------------------------------------------------------------- faults of an answer

    def lose(self, answer: Answer) -> None:
        """The registry has done it, and the client never hears of it."""
        self.hang_up()

    def cut(self, answer: Answer) -> None:
        self.begin(answer, len(answer.body))
        self.write(answer.body[: self._somewhere(answer)])
        self.hang_up()

    def stall(self, answer: Answer) -> None:
        self.begin(answer, len(answer.body))
        self.write(answer.body[: self._somewhere(answer)])
        self.be_silent()

    def drip(self, answer: Answer) -> None:
        """Slow, but never silent for long."""
        self.begin(answer, len(answer.body))
        size = max(1, len(answer.body) // 10)
        for at in range(0, len(answer.body), size):
            self.write(answer.body[at : at + size])
            self.server.stopped.wait(self.faults.patience / 100)

    def shorten(self, answer: Answer) -> None:
        """Less than was asked for, and said so."""
        answer.body = answer.body[: self._somewhere(answer)]
        self.pass_on(answer)

    def lengthen(self, answer: Answer) -> None:
        """More than was asked for, and said so."""
        answer.body += self.chance.randbytes(100)
        self.pass_on(answer)

    def overflow(self, answer: Answer) -> None:
        """More bytes than the length says."""
        self.begin(answer, len(answer.body))
        self.write(answer.body + b"and more" * 10)
        self.hang_up()

    def flip(self, answer: Answer) -> None:
        if answer.body:
            answer.body = flipped(answer.body, self.chance)
        self.pass_on(answer)

    def claim_another_range(self, answer: Answer) -> None:
        """The right bytes under a wrong name."""
        claimed = answer.header("Content-Range")
        if match := re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", claimed):
            first, last, size = map(int, match.groups())
            answer.replace("Content-Range", f"bytes {first + 1}-{last + 1}/{size}")
        self.pass_on(answer)

    def _somewhere(self, answer: Answer) -> int:
        return self.chance.randrange(len(answer.body)) if answer.body else 0


def flipped(body: bytes, chance: random.Random) -> bytes:
    """One bit of it is another."""
    at = chance.randrange(len(body))
    return body[:at] + bytes([body[at] ^ 1 << chance.randrange(8)]) + body[at + 1 :]


def _moved(wanted: str, chance: random.Random) -> str:
    """A range of the same length elsewhere, with no regard to the end of the file."""
    match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
    if match is None:
        return wanted
    by = chance.choice((-1, 1)) * chance.randrange(1, 1000)
    first = max(0, int(match[1]) + by)
    return f"bytes={first}-{first + int(match[2]) - int(match[1])}"


_BEFORE: dict[str, Callable[[_Proxy], None]] = {
    "500": lambda proxy: proxy.fail(500),
    "503": lambda proxy: proxy.fail(503, Retry_After="0"),
    "429": lambda proxy: proxy.fail(429, Retry_After="0"),
    "refused": _Proxy.hang_up,
    "silent": _Proxy.be_silent,
    "redirected": _Proxy.redirect,
    "no HTTP": _Proxy.talk_nonsense,
}
_AFTER: dict[str, Callable[[_Proxy, Answer], None]] = {
    "lost": _Proxy.lose,
    "cut": _Proxy.cut,
    "stall": _Proxy.stall,
    "drip": _Proxy.drip,
    "too short": _Proxy.shorten,
    "too long": _Proxy.lengthen,
    "longer than said": _Proxy.overflow,
    "flipped": _Proxy.flip,
    "said another range": _Proxy.claim_another_range,
}
