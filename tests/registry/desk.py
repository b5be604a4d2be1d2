"""A server that says what a test tells it to, and remembers what it was asked."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from refollama.store.name import Name
from refollama.store.registry.session import Registry
from tests.registry.serving import Handler, Server


@dataclass(frozen=True)
class Seen:
    """One request, as it came over the wire."""

    method: str
    target: str
    headers: dict[str, str]  # names in lower case
    body: bytes


class Desk:
    """`say(exchange, seen)` answers every request; `scheme` is https once `tls` has wrapped it."""

    def __init__(self, say: Callable[[Exchange, Seen], object]) -> None:
        self.say = say
        self.seen: list[Seen] = []
        self.lock = threading.Lock()
        self.server = Server(Exchange, self)

    @property
    def port(self) -> int:
        return self.server.port

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def targets(self) -> list[str]:
        return [seen.target for seen in self.seen]


class Exchange(Handler):
    """One request at the desk."""

    def handle(self) -> None:
        with suppress(ssl.SSLError):  # a client that does not trust us hangs up: its right
            super().handle()

    def _do(self) -> None:
        desk: Desk = self.server.owner
        body = b"".join(self.pieces())
        headers = {name.lower(): value for name, value in self.headers.items()}
        seen = Seen(self.command, self.path, headers, body)
        with desk.lock:
            desk.seen.append(seen)
        desk.say(self, seen)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = _do  # noqa: N815


@contextmanager
def open_desk(say: Callable[[Exchange, Seen], object]) -> Iterator[Desk]:
    desk = Desk(say)
    with desk.server:
        yield desk


def registry_at(host: str, home: Path | None = None, *, insecure: bool = True) -> Registry:
    """What a pull of `<host>/me/tale` would use."""
    return Registry(Name.parse(f"{host}/me/tale"), insecure=insecure, home=home)


def hello(exchange: Exchange, _: Seen) -> None:
    exchange.answer(200, b"hello")
