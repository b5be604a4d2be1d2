"""Servers that are killed by the dozen: the real one, each in a process of its own.

Importing all that a server needs takes seconds. One process does it once, and each server is a
fork of that: from there on it is `refollama serve`, as anybody starts it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import httpx

from tests.server.process import free_port

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["refollama.server", "refollama.cli", "refollama.service"])


@contextlib.contextmanager
def forked_server(models: Path) -> Iterator[tuple[str, ForkServerProcess]]:
    """Its address, and the process; ended by SIGTERM if it has not ended by then."""
    port = free_port()
    environment = {"OLLAMA_HOST": f"127.0.0.1:{port}", "OLLAMA_MODELS": str(models)}
    environment["HOME"] = os.environ["HOME"]
    process = FORKS.Process(target=_serve, args=(environment,))
    process.start()
    try:
        _wait(f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        process.join()
        process.close()


def _serve(environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    from refollama.cli import main

    sys.argv = ["refollama", "serve"]
    main()


def _wait(url: str) -> None:
    for _ in range(1200):
        with contextlib.suppress(httpx.TransportError):
            httpx.head(url, verify=False)
            return
        time.sleep(0.05)
    raise AssertionError("the server does not answer")
