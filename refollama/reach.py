"""Whom a command talks to: the server at OLLAMA_HOST, or what stands in for it on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from refollama import terminal
from refollama.host import on_this_machine

if TYPE_CHECKING:
    from refollama.client import Client


@contextmanager
def server() -> Iterator[Client]:
    """A client of the server at OLLAMA_HOST; if none listens on this machine, of a private one."""
    from refollama.client import Client
    from refollama.private_server import private_server

    with Client() as client:
        if not on_this_machine(client.url) or client.is_running():
            yield client
            return
    with ExitStack() as stack:
        with terminal.spinner("starting"):
            url = stack.enter_context(private_server())
        yield stack.enter_context(Client(url))


@contextmanager
def keeper() -> Iterator[Client | Here]:
    """Who copies and removes models: the server, or the store if none listens on this machine."""
    from refollama.client import Client

    with Client() as client:
        listens = not on_this_machine(client.url) or client.is_running()
        yield client if listens else Here()


class Here:
    """The store of this machine, in the words of a client."""

    def copy(self, source: str, destination: str) -> None:
        """Give a model a second name."""
        from refollama.store import Name, Store

        Store.default().copy(Name.parse(source), Name.parse(destination))

    def delete(self, model: str) -> None:
        """Remove a model, and the blobs that no other one needs."""
        from refollama.store import Name, Store

        Store.default().remove(Name.parse(model))
