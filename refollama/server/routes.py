"""One short function for each route: read the request, ask the service, write the records."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from functools import partial
from itertools import chain
from typing import TypeVar

from flask import Blueprint, Response, current_app, request

from refollama.engine.sequence import never
from refollama.errors import RefollamaError
from refollama.messages import Chunk, Progress
from refollama.server import wire
from refollama.service import Service
from refollama.version import __version__

T = TypeVar("T")
Items = Generator[T, None, None]

log = logging.getLogger(__name__)
routes = Blueprint("api", __name__)


@routes.get("/")
def home() -> Response:
    """Clients look here to see whether anybody listens."""
    return Response("Ollama is running", mimetype="text/plain")


@routes.get("/api/version")
def version() -> Response:
    """Our own version."""
    return one({"version": __version__})


@routes.get("/api/tags")
def tags() -> Response:
    """The models in the store."""
    return one({"models": [wire.model_record(entry) for entry in service().tags()]})


@routes.post("/api/generate")
def generate() -> Response:
    """Complete a prompt."""
    ask = wire.read_generate(request.get_data())
    chunks = service().generate(ask, client_is_gone())
    if not ask.stream:
        return one(wire.chunk_record(ask, whole(chunks)))
    first = next(chunks)
    if first.done_reason == "load":  # always one object, never a stream
        return one(wire.chunk_record(ask, first))
    return many(first, chunks, partial(wire.chunk_record, ask))


@routes.post("/api/create")
def create() -> Response:
    """Make a model out of a Modelfile."""
    ask = wire.read_create(request.get_data())
    steps = service().create(ask)
    if not ask.stream:
        return one(wire.progress_record(last(steps)))
    return many(next(steps), steps, wire.progress_record)


# ── answers ───────────────────────────────────────────────────────────────────────────────────


def service() -> Service:
    """The service that this app was created with."""
    found: Service = current_app.extensions["refollama"]
    return found


def client_is_gone() -> Callable[[], bool]:
    """A question that waitress can answer; other servers notice at the next write."""
    ask: Callable[[], bool] = request.environ.get("waitress.client_disconnected", never)
    return ask


def one(record: wire.Record) -> Response:
    return Response(wire.dumps(record), content_type="application/json; charset=utf-8")


def many(first: T, rest: Items[T], record: Callable[[T], wire.Record]) -> Response:
    """A stream of lines. The first one was waited for, so that an early error has a status.

    When the client is gone the server closes the response, and that closes the work itself.
    """
    lines = wire.ndjson(guarded(first, rest, record))
    response = Response(lines, content_type="application/x-ndjson")
    response.call_on_close(rest.close)
    return response


def guarded(first: T, rest: Items[T], record: Callable[[T], wire.Record]) -> Iterator[wire.Record]:
    """After the first byte the status can no longer change: a late error is the last line."""
    try:
        for item in chain([first], rest):
            yield record(item)
    except RefollamaError as error:
        yield wire.error_record(error)
    except Exception as error:
        log.exception("failed in the middle of a stream")
        yield wire.error_record(error)


def whole(chunks: Iterator[Chunk]) -> Chunk:
    """All pieces as one: the last record with the whole text."""
    *pieces, end = list(chunks)
    return Chunk(
        text="".join(piece.text for piece in pieces),
        done=True,
        done_reason=end.done_reason,
        stats=end.stats,
        context=end.context,
        logprobs=tuple(one for chunk in (*pieces, end) for one in chunk.logprobs),
    )


def last(steps: Iterator[Progress]) -> Progress:
    """The state in which a long piece of work ended."""
    *_, end = steps
    return end
