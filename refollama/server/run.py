"""The server process: waitress around the app, from the first log line to a clean stop.

Requests are served synchronously: a thread each, from a fixed pool; those beyond it wait.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import signal
import sys
from typing import NoReturn

from waitress.server import create_server

from refollama.errors import RefollamaError
from refollama.server.app import LARGEST_BODY, create_app
from refollama.service import Service
from refollama.version import __version__

log = logging.getLogger("refollama")

THREADS = 64  # requests that are answered at once
CONNECTIONS = 1024  # clients that may wait for it


def serve(host: str, port: int) -> None:
    """Answer requests until Ctrl-C or SIGTERM.

    Raises: RefollamaError if the address cannot be listened on.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    loopback = is_loopback(host)
    service = Service.default(local_files=loopback)
    app = create_app(service, loopback=loopback)
    try:
        server = create_server(
            app,
            host=host,
            port=port,
            threads=THREADS,
            connection_limit=CONNECTIONS,
            asyncore_use_poll=True,  # select() cannot see that many
            ident="refollama",
            max_request_body_size=LARGEST_BODY + 1,
        )
    except OSError as error:
        raise RefollamaError(_why_not(host, port, error)) from None
    signal.signal(signal.SIGTERM, _stop)
    if not loopback:
        log.warning("everybody who can reach %s may use this server: there is no login", host)
    log.info("refollama %s listens on http://%s:%d", __version__, _bracketed(host), port)
    log.info("models are in %s", service.store.root)
    try:
        server.run()  # returns on SystemExit and KeyboardInterrupt
    finally:
        server.close()
        service.close()
        log.info("stopped")


def is_loopback(host: str) -> bool:
    """Can this address be reached from this machine alone?"""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _stop(number: int, frame: object) -> NoReturn:
    sys.exit(0)


def _why_not(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} of {host} is taken: is a server running already? "
            "OLLAMA_HOST chooses another"
        )
    return f"cannot listen on {host}:{port}: {error.strerror or error}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
