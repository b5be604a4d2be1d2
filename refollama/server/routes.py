"""One short function for each route: read the request, ask the service, write the records."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Generator, Iterator
from functools import partial
from itertools import chain
from typing import TypeVar

from flask import Blueprint, Response, current_app, request

from refollama.dialogue import gathered
from refollama.engine.sequence import never
from refollama.errors import Abandoned, NotFound, RefollamaError
from refollama.messages import Chunk, Progress
from refollama.server import wire
from refollama.service import Service
from refollama.version import __version__

T = TypeVar("T")
Items = Generator[T, None, None]

log = logging.getLogger(__name__)

CHUNK = 1 << 20  # bytes of an upload that are in memory at one time

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
    return answer(chunks, partial(wire.chunk_record, ask), stream=ask.stream)


@routes.post("/api/chat")
def chat() -> Response:
    """Go on with a conversation."""
    ask = wire.read_chat(request.get_data())
    chunks = service().chat(ask, client_is_gone())
    return answer(chunks, partial(wire.chat_record, ask), stream=ask.stream)


@routes.post("/api/embed")
def embed() -> Response:
    """A vector for each text."""
    ask = wire.read_embed(request.get_data())
    return one(wire.embed_record(ask, service().embed(ask, client_is_gone())))


@routes.post("/api/embeddings")
def embeddings() -> Response:
    """A vector for one text, as in 2023."""
    ask = wire.read_embeddings(request.get_data())
    return one(wire.embeddings_record(service().embed(ask, client_is_gone())))


@routes.post("/api/tokenize")
def tokenize() -> Response:
    """The tokens of a text."""
    ask = wire.read_tokenize(request.get_data())
    return one(wire.tokenize_record(ask, service().tokenize(ask)))


@routes.post("/api/detokenize")
def detokenize() -> Response:
    """The text of some tokens."""
    ask = wire.read_detokenize(request.get_data())
    return one(wire.detokenize_record(ask, service().detokenize(ask)))


@routes.post("/api/create")
def create() -> Response:
    """Make a model out of a Modelfile."""
    ask = wire.read_create(request.get_data())
    steps = service().create(ask, client_is_gone())
    if not ask.stream:
        return one(wire.progress_record(last(steps)))
    return many(next(steps), steps, wire.progress_record)


@routes.post("/api/pull")
def pull() -> Response:
    """Fetch a model from its registry."""
    ask = wire.read_pull(request.get_data())
    return transfer(service().pull(ask, client_is_gone()), stream=ask.stream)


@routes.post("/api/push")
def push() -> Response:
    """Send a model to its registry."""
    ask = wire.read_push(request.get_data())
    return transfer(service().push(ask, client_is_gone()), stream=ask.stream)


@routes.post("/api/show")
def show() -> Response:
    """All about a model."""
    return one(wire.show_record(service().show(wire.read_show(request.get_data()))))


@routes.post("/api/copy")
def copy() -> Response:
    """Give a model a second name."""
    service().copy(*wire.read_copy(request.get_data()))
    return Response(status=200)


@routes.delete("/api/delete")
def delete() -> Response:
    """Remove a model."""
    service().delete(wire.read_delete(request.get_data()))
    return Response(status=200)


@routes.get("/api/ps")
def ps() -> Response:
    """The models in memory."""
    return one({"models": [wire.memory_record(model) for model in service().ps()]})


@routes.route("/api/blobs/<digest>", methods=["HEAD"])
def has_blob(digest: str) -> Response:
    """Is a blob in the store?"""
    if not service().has_blob(digest):
        raise NotFound(f'blob "{digest[:80]}" not found')
    return Response(status=200)


@routes.post("/api/blobs/<digest>")
def add_blob(digest: str) -> Response:
    """Store what is sent, if it has this digest."""
    request.max_content_length = sys.maxsize  # a model has any length; None: the app's limit
    new = service().add_blob(digest, chunks_of_body())
    return Response(status=201 if new else 200)


# ── answers ───────────────────────────────────────────────────────────────────────────────────


def service() -> Service:
    """The service that this app was created with."""
    found: Service = current_app.extensions["refollama"]
    return found


def client_is_gone() -> Callable[[], bool]:
    """A question that waitress can answer; other servers notice at the next write."""
    ask: Callable[[], bool] = request.environ.get("waitress.client_disconnected", never)
    return ask


def chunks_of_body() -> Iterator[bytes]:
    """What is sent, piece by piece, also without a length: then until it ends."""
    chunked = "chunked" in request.headers.get("Transfer-Encoding", "").lower()
    body = request.environ["wsgi.input"] if chunked else request.stream
    return iter(lambda: body.read(CHUNK), b"")


def one(record: wire.Record) -> Response:
    return Response(wire.dumps(record), content_type="application/json; charset=utf-8")


def answer(
    chunks: Items[Chunk], record: Callable[[Chunk], wire.Record], *, stream: bool
) -> Response:
    """What a model says; that it was loaded, or unloaded, is never a stream."""
    if not stream:
        return one(record(gathered(chunks)))
    first = next(chunks)
    if first.done_reason in ("load", "unload") or first.rendered is not None:
        return one(record(first))
    return many(first, chunks, record)


def transfer(steps: Items[Progress], *, stream: bool) -> Response:
    """A pull or a push; what is wrong before its first step has a status of its own."""
    first = next(steps)
    return many(first, steps, wire.progress_record) if stream else outcome(first, steps)


def outcome(first: Progress, rest: Items[Progress]) -> Response:
    """How it ended, as one record without a charset; whatever goes wrong is a 500: as Ollama."""
    status = 200
    try:
        record = wire.progress_record(last(chain([first], rest)))
    except Abandoned:
        raise
    except RefollamaError as error:
        record, status = wire.error_record(error), 500
    return Response(wire.dumps(record), status, content_type="application/json")


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


def last(steps: Iterator[Progress]) -> Progress:
    """The state in which a long piece of work ended."""
    *_, end = steps
    return end
