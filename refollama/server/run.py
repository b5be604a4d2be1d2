"""The server process: waitress around the app, from the first log line to a clean stop.

Requests are served synchronously, each by a thread of its own.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import signal
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from waitress.server import create_server

from refollama.errors import RefollamaError
from refollama.server.app import create_app, largest_body
from refollama.server.guard import Rules
from refollama.server.intake import Channel, Uploads
from refollama.service import Service
from refollama.version import __version__

log = logging.getLogger("refollama")

SPARE_THREADS = 32  # so that small requests are answered while the queue of prompts is full
CONNECTIONS = 1024  # clients that may be connected


def serve(host: str, port: int) -> None:
    """Answer requests until Ctrl-C or SIGTERM.

    Raises: RefollamaError if the address cannot be listened on.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # Addresses of a registry's storage are signed: who reads them in a log could use them.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    loopback = is_loopback(host)
    service = Service.default(local_files=loopback)
    threads = service.max_queue + SPARE_THREADS
    app = create_app(service, loopback=loopback)
    try:
        server = create_server(
            app,
            host=host,
            port=port,
            threads=threads,
            connection_limit=CONNECTIONS,
            asyncore_use_poll=True,  # select() cannot see that many
            channel_request_lookahead=1,  # keeps reading, and so learns that a client has gone
            ident="refollama",
            max_request_body_size=2 * largest_body(),  # up to it the app says no, and hears all
        )
    except OSError as error:
        raise RefollamaError(_why_not(host, port, error)) from None
    rules = Rules(loopback=loopback)
    uploads = Uploads(rules, (Path(tempfile.gettempdir()), service.store.root))
    for each in _servers(server):
        each.channel_class = partial(Channel, uploads)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, partial(_stop, service))
    _tell_who_may_ask(host, rules)
    for address in _addresses(server):
        log.info("refollama %s listens on %s", __version__, address)
    log.info("models are in %s", service.store.root)
    try:
        server.run()  # returns on SystemExit, once its threads have ended
    finally:
        server.close()
        service.close()
        log.info("stopped")


def _tell_who_may_ask(host: str, rules: Rules) -> None:
    if rules.wants_key:
        log.info("OLLAMA_API_KEY is set: requests must carry it")
    elif not is_loopback(host):
        log.warning(
            "everybody who can reach %s may use this server: OLLAMA_API_KEY would ask for a key",
            host,
        )


def is_loopback(host: str) -> bool:
    """Can this address be reached from this machine alone?"""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _stop(service: Service, number: int, frame: object) -> NoReturn:
    """Running answers end with an error line, which frees the threads that the server waits for."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)  # we are leaving already
    threading.Thread(target=service.close, name="stopping", daemon=True).start()
    sys.exit(0)


def _why_not(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} of {host} is taken: is a server running already? "
            "OLLAMA_HOST chooses another"
        )
    return f"cannot listen on {host}:{port}: {error.strerror or error}"


def _servers(server: Any) -> list[Any]:
    """A name may stand for several addresses: waitress then makes a server for each."""
    many = getattr(server, "effective_listen", None)
    return [each for each in server.map.values() if hasattr(each, "adj")] if many else [server]


def _addresses(server: Any) -> list[str]:
    """Where it listens; a name may stand for several addresses, and waitress then for several."""
    many = getattr(server, "effective_listen", None)
    listens = many or [(server.effective_host, server.effective_port)]
    return [f"http://{f'[{host}]' if ':' in host else host}:{port}" for host, port in listens]
