"""Whom a command talks to: the server at OLLAMA_HOST, or what stands in for it on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from refollama import terminal
from refollama.errors import RefollamaError
from refollama.host import on_this_machine
from refollama.version import __version__

if TYPE_CHECKING:
    from refollama.client import Client, Record


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
    """Who lists, copies, removes models: the server, or the store if none listens here."""
    from refollama.client import Client

    with Client() as client:
        listens = not on_this_machine(client.url) or client.is_running()
        yield client if listens else Here()


def version() -> tuple[str, str]:
    """The server's version, or ours if none answers; and what is to be known of it, or nothing."""
    from refollama.client import Client

    try:
        with Client() as client:
            if client.is_running():
                found = client.version()
                return found, "" if found == __version__ else f"client version is {__version__}"
    except RefollamaError as problem:
        return __version__, str(problem)
    return __version__, "could not connect to a running refollama instance"


class Here:
    """The store of this machine, in the words of a client."""

    def tags(self) -> list[Record]:
        """The models that there are: name, modified_at, size, digest."""
        from refollama.store import Store

        return [
            {
                "name": str(model.name),
                "modified_at": model.modified_at.isoformat(),
                "size": model.size,
                "digest": model.digest,
            }
            for model in Store.default().list()
        ]

    def copy(self, source: str, destination: str) -> None:
        """Give a model a second name."""
        from refollama.fable.bundled import stock
        from refollama.store import Name, Store

        store = Store.default()
        stock(store, source)
        store.copy(Name.parse(source), Name.parse(destination))

    def delete(self, model: str) -> None:
        """Remove a model, and the blobs that no other one needs."""
        from refollama.store import Name, Store

        Store.default().remove(Name.parse(model))
