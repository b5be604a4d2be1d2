"""A server for one command: started when nobody listens, gone when the command is.

    refollama run ─┬─ stdin pipe ──► refollama serve --host 127.0.0.1:0 --until-stdin-closes
                   ├─ log file ◄──── "listens on http://127.0.0.1:PORT"
                   └─ HTTP ────────► 127.0.0.1:PORT

The pipe carries nothing. The system closes it however the command ends, even by kill -9, and the
server takes that as its signal to leave; so no way of dying leaves a server behind.

The server takes a free port itself and then says which. Were the port chosen here, another
program could take it before the server does, and would be told what the user asks.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import IO, NoReturn

from refollama.errors import RefollamaError, ServerUnreachable
from refollama.host import LOOPBACK

START_TIMEOUT = 60.0  # seconds; importing torch from a cold disk takes many of them
POLL_EVERY = 0.05  # seconds; shorter than anyone notices
GRACE = 5.0  # seconds between asking a process to leave and making it
LOG_TAIL = 2000  # bytes of the log that an error repeats: its last screen

# White space behind the number: a line is read while it is written, and half a port is another.
_TOLD = re.compile(rf"\blistens on (http://{re.escape(LOOPBACK)}:[1-9][0-9]*)\s".encode())


def command() -> list[str]:
    """The command line that starts a server of ours on any free port of this machine."""
    where = f"{LOOPBACK}:0"
    return [sys.executable, "-m", "refollama", "serve", "--host", where, "--until-stdin-closes"]


@contextmanager
def private_server() -> Iterator[str]:
    """Start a server and give its URL; stop exactly that process at the end.

    Raises: ServerUnreachable, with the end of its log, if it does not start or dies early.
    """
    with tempfile.TemporaryFile() as log, _leaving_on_sigterm():
        process = _start(log)
        try:
            yield _wait_until_it_answers(process, log)
        except ServerUnreachable:
            _explain_death(process, log)
            raise
        finally:
            _stop(process)


def stop_when_stdin_closes() -> None:
    """The server's half: end this process soon after standard input has ended."""
    threading.Thread(target=_watch_stdin, name="stdin watcher", daemon=True).start()


# ---------------------------------------------------------------------------------------------


def _start(log: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(),
        env=_environment(),
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        # Ctrl-C stops an answer; it reaches the terminal's whole group, and the server must stay.
        start_new_session=True,
    )


def _environment() -> dict[str, str]:
    """Ours, and the server finds this very package: never a `torch.py` in the user's folder."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(path)}


def _wait_until_it_answers(process: subprocess.Popen[bytes], log: IO[bytes]) -> str:
    """The server's URL. Only a server that lives is asked: a dead one's port may be a stranger's.

    It has to live after its answer, too: then the port was its own, and so was the answer.
    """
    deadline = time.monotonic() + START_TIMEOUT
    while process.poll() is None:
        url = _told_url(log)
        if url and _answers(url) and process.poll() is None:
            return url
        if time.monotonic() > deadline:
            raise RefollamaError(
                f"the server did not answer within {START_TIMEOUT:.0f} s:\n{_tail(log)}"
            )
        time.sleep(POLL_EVERY)
    raise RefollamaError(f"the server did not start:\n{_tail(log)}")


def _told_url(log: IO[bytes]) -> str | None:
    """Where the server says that it listens; None until it does."""
    told = _TOLD.search(os.pread(log.fileno(), os.fstat(log.fileno()).st_size, 0))
    return told[1].decode() if told else None


def _answers(url: str) -> bool:
    from refollama.client import Client

    with Client(url) as client:
        return client.is_running()


def _explain_death(process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    """Raise what a dead server wrote last; do nothing if it lives."""
    try:
        process.wait(1)  # its connections end a moment before it does
    except subprocess.TimeoutExpired:
        return
    raise ServerUnreachable(f"the server ended unexpectedly:\n{_tail(log)}") from None


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdin is not None
    process.stdin.close()


def _tail(log: IO[bytes]) -> str:
    """The end of the log. The file is shared with its writer, but not through this handle."""
    end = os.fstat(log.fileno()).st_size
    start = max(0, end - LOG_TAIL)
    return os.pread(log.fileno(), end - start, start).decode("utf-8", "replace").strip()


@contextmanager
def _leaving_on_sigterm() -> Iterator[None]:
    """SIGTERM unwinds like any other exit, so that the server is stopped, too."""
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(signum: int, _: FrameType | None) -> NoReturn:
    sys.exit(128 + signum)


def _watch_stdin() -> None:
    # Not through sys.stdin: its lock, held by a waiting thread, would abort the interpreter's end.
    with suppress(OSError):  # closed from the start
        while os.read(0, 4096):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)
