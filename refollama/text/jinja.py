"""The templates that GGUF files carry themselves: Jinja, run in a process of its own.

    {% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}

`jinja_worker.py` is that process. It is started when a model needs it, serves all templates, and is
stopped when one takes too long or too much. The next template gets a new process; the one that
was too slow is refused for a while.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refollama.errors import ServerBusy, TemplateError

LONGEST = 1 << 16  # characters; the longest that models come with have some ten thousand
TIME_LIMIT = 5.0  # seconds for one rendering; a hundred messages take some milliseconds
WAIT_LIMIT = 20.0  # seconds until it is one's turn
REFUSED_FOR = 60.0  # seconds; not for ever, as the machine may have been busy, or the talk long
MOST_REFUSED = 64  # sources that are remembered
START_LIMIT = 60.0  # seconds until the process answers for the first time, on a busy machine

Record = dict[str, Any]


class JinjaTemplate:
    """A chat template, to be rendered any number of times.

    Raises: TemplateError, with the line if it cannot be read; ServerBusy after WAIT_LIMIT.
    """

    def __init__(self, source: str) -> None:
        if len(source) > LONGEST:
            raise TemplateError(f"longer than {LONGEST} characters")
        self.source = source
        self.names = frozenset(_WORKER.ask({"source": source})["names"])  # {"messages", "tools"}

    def render(self, values: Mapping[str, Any]) -> str:
        """The text for these values, as `Template.render` gives it.

        Raises: TemplateError if they do not fit, if the template says so (`raise_exception`), or
        if it takes more than TIME_LIMIT or too much memory; ServerBusy after WAIT_LIMIT.
        """
        return str(_WORKER.ask({"source": self.source, "values": values})["text"])


class _Worker:
    """The process, and the one line at a time that it is asked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._refused: dict[str, tuple[float, str]] = {}  # source → until when, and why

    def ask(self, request: Record) -> Record:
        """Its answer.

        Raises: TemplateError if that is an error, or does not come; ServerBusy.
        """
        self._check(request["source"])
        if not self._lock.acquire(timeout=WAIT_LIMIT):
            raise ServerBusy("the server is busy: other templates take long to be filled in")
        try:
            self._check(request["source"])  # who waited with it may have been told meanwhile
            line = self._told(request)
        finally:
            self._lock.release()
        answer: Record = json.loads(line)
        if "error" in answer:
            raise TemplateError(answer["error"], answer.get("line"))
        return answer

    def close(self) -> None:
        """Stop the process; the next question starts another."""
        with self._lock:
            self._stop()

    def _told(self, request: Record) -> bytes:
        line = _within(TIME_LIMIT, self._running(), request)
        if not line:
            self._stop()
            raise TemplateError(self._refuse(request["source"]))
        return line

    def _check(self, source: str) -> None:
        """Raises: TemplateError if it has just run out of time."""
        until, problem = self._refused.get(source, (0.0, ""))
        if time.monotonic() < until:
            raise TemplateError(problem)

    def _refuse(self, source: str) -> str:
        """Why; the source that was refused first makes place."""
        problem = f"it takes more than {TIME_LIMIT:g} seconds, or more memory than it may have"
        self._refused.pop(source, None)
        self._refused[source] = time.monotonic() + REFUSED_FOR, problem
        if len(self._refused) > MOST_REFUSED:
            del self._refused[next(iter(self._refused))]
        return problem

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._stop()
            self._process = _started()
        return self._process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.communicate()  # closes the pipes, too


def _started() -> subprocess.Popen[bytes]:
    """A process that finds the same modules as this one does, and nothing in the folder it is in.

    Raises: TemplateError if it does not answer.
    """
    code = "import json, runpy, sys; sys.path[:] = json.loads(sys.argv[1]); "
    code += "runpy.run_path(sys.argv[2], run_name='__main__')"
    worker = str(Path(__file__).with_name("jinja_worker.py"))
    places = json.dumps([place for place in sys.path if place])
    process = subprocess.Popen(
        [sys.executable, "-c", code, places, worker],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    if not _within(START_LIMIT, process, {"source": ""}):
        process.kill()
        process.communicate()
        raise TemplateError("the process that renders Jinja templates does not start")
    return process


def _within(seconds: float, process: subprocess.Popen[bytes], request: Record) -> bytes:
    """One line for another; b"" if it does not come in time."""
    assert process.stdin is not None and process.stdout is not None
    clock = threading.Timer(seconds, process.kill)
    clock.start()
    try:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except OSError:  # it is gone
        return b""
    finally:
        clock.cancel()
    return line if line.endswith(b"\n") else b""


_WORKER = _Worker()
atexit.register(_WORKER.close)
