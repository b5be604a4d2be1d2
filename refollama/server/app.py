"""The Flask app: routes, one error handler, and checks on who is asking."""

from __future__ import annotations

import logging
import os

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException

from refollama.errors import BadRequest, RefollamaError
from refollama.server import guard, wire
from refollama.server import log as access
from refollama.server.routes import routes
from refollama.service import Service

log = logging.getLogger(__name__)

MIB = 1 << 20
LARGEST_BODY = 64  # MiB of a JSON request, unless REFOLLAMA_MAX_BODY says otherwise


def largest_body() -> int:
    """Bytes that a JSON request may have; what is uploaded to `/api/blobs` may be of any size.

    Raises: BadRequest if REFOLLAMA_MAX_BODY is no number of MiB.
    """
    text = os.environ.get("REFOLLAMA_MAX_BODY", "").strip() or str(LARGEST_BODY)
    if not (text.isascii() and text.isdigit() and int(text)):
        raise BadRequest(f"REFOLLAMA_MAX_BODY must be a whole number of MiB, not {text!r}")
    return int(text) * MIB


def create_app(service: Service, *, loopback: bool = True) -> Flask:
    """An app that answers for this service.

    `loopback`: is it reached from this machine alone? Then requests must name this machine.
    Raises: BadRequest if OLLAMA_ORIGINS, OLLAMA_API_KEY or REFOLLAMA_MAX_BODY make no sense.
    """
    app = Flask("refollama", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = largest_body()
    app.extensions["refollama"] = service
    app.url_map.strict_slashes = False
    app.register_blueprint(routes)
    app.register_error_handler(Exception, answer_error)
    access.install(app)
    guard.install(app, loopback=loopback)
    return app


def answer_error(error: Exception) -> Response:
    """Every error as JSON, with the status that its class carries."""
    if isinstance(error, HTTPException):
        return _http_error(error)
    if isinstance(error, RefollamaError):
        return _json(wire.error_record(error), error.status)
    log.exception("failed to answer %s %s", request.method, request.path)
    return _json(wire.error_record(error), 500)


def _http_error(error: HTTPException) -> Response:
    """401, 404, 405, 413 and their kin, with the headers that belong to them."""
    sentences = {
        404: f"{request.path} does not exist",
        405: f"{request.path} does not take {request.method}",
        413: f"the request body is larger than {_limit()}",
    }
    status = error.code or 500
    response = _json({"error": sentences.get(status, error.description or error.name)}, status)
    for name, value in error.get_headers(request.environ):
        if name in ("Allow", "WWW-Authenticate"):
            response.headers[name] = value
    return response


def _limit() -> str:
    """How much of a body this route takes, in words."""
    most = request.max_content_length or 0
    return f"{most // MIB} MiB" if most >= MIB else f"{most} bytes"


def _json(record: wire.Record, status: int) -> Response:
    return Response(
        wire.dumps(record), status=status, content_type="application/json; charset=utf-8"
    )
