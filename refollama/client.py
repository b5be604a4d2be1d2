"""A thin, synchronous client: one method per route, records as the server sent them.

Answers that take time are iterators. Nothing is sent before the first record is asked for, and
closing the iterator closes the connection, which is how an answer is cancelled on the server.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from refollama.errors import (
    BadRequest,
    NotFound,
    RefollamaError,
    ServerBusy,
    ServerUnreachable,
)
from refollama.host import api_key, base_url, on_this_machine
from refollama.version import __version__

Record = dict[str, Any]
Records = Generator[Record, None, None]

CONNECT_TIMEOUT = 10.0  # seconds; the network's part
PROBE_TIMEOUT = 10.0  # seconds for an answer that needs no model
BY_STATUS = {400: BadRequest, 404: NotFound, 503: ServerBusy}


class Client:
    """A server's routes as methods; `host` is written like OLLAMA_HOST, which is its default.

    Raises, from every method: RefollamaError in the server's own words (BadRequest, NotFound or
    ServerBusy where the status says so), ServerUnreachable when nobody answers.
    """

    def __init__(self, host: str | None = None) -> None:
        self.url = base_url(os.environ if host is None else {"OLLAMA_HOST": host})
        near = on_this_machine(self.url)
        self._http = httpx.Client(
            base_url=self.url,
            # A model may think for an hour: only connecting has a limit.
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT),
            headers={"User-Agent": f"refollama/{__version__}", **_authorization()},
            trust_env=not near,  # a proxy's "localhost" is another machine
            verify=self.url.startswith("https:"),  # loading certificates costs start-up time
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
        self._http.close()

    def is_running(self) -> bool:
        """Whether a server answers here.

        Raises: ServerUnreachable if something takes the connection and then stays silent.
        """
        try:
            return self._http.head("/", timeout=PROBE_TIMEOUT).is_success
        except httpx.ReadTimeout:
            raise ServerUnreachable(f"the server at {self.url} does not answer") from None
        except httpx.TransportError:
            return False

    def version(self) -> str:
        """The server's version."""
        return str(self._get("/api/version").get("version", ""))

    def tags(self) -> list[Record]:
        """The models that the server has: name, modified_at, size, digest, details."""
        return list(self._get("/api/tags").get("models") or [])

    def show(self, model: str, verbose: bool = False) -> Record:
        """What is known of a model: details, parameters, template, model_info, …"""
        return self._post("/api/show", {"model": model, "verbose": verbose})

    def copy(self, source: str, destination: str) -> None:
        """Give a model a second name."""
        self._send("POST", "/api/copy", {"source": source, "destination": destination})

    def delete(self, model: str) -> None:
        """Remove a model, and the blobs that no other one needs."""
        self._send("DELETE", "/api/delete", {"model": model})

    def ps(self) -> list[Record]:
        """The models in memory: name, size, size_vram, expires_at, …"""
        return list(self._get("/api/ps").get("models") or [])

    def has_blob(self, digest: str) -> bool:
        """Whether the server has a file of this digest, `sha256:…`."""
        with self._explained():
            answer = self._http.head(f"/api/blobs/{digest}", timeout=PROBE_TIMEOUT)
        if not answer.is_success and answer.status_code != httpx.codes.NOT_FOUND:
            raise _refusal(answer)
        return answer.is_success

    def send_blob(self, digest: str, chunks: Iterable[bytes]) -> None:
        """Give the server a file, piece by piece; it checks the digest."""
        with self._explained():
            answer = self._http.post(f"/api/blobs/{digest}", content=chunks)
        if not answer.is_success:
            raise _refusal(answer)

    def create(
        self,
        name: str,
        modelfile: str | None = None,
        directory: str | None = None,
        **fields: Any,
    ) -> Records:
        """Make a model; relative FROM paths start at `directory`. Yields progress records.

        `fields`, in place of a Modelfile: from, files, parameters, system, messages, …
        """
        form = {"modelfile": modelfile, "directory": directory, **fields}
        body = {"model": name, "stream": True, **form}
        return self._stream("/api/create", body, _is_success)

    def pull(self, model: str, insecure: bool = False) -> Records:
        """Fetch a model from its registry; `insecure`: by http. Yields progress records."""
        return self._transfer("/api/pull", model, insecure)

    def push(self, model: str, insecure: bool = False) -> Records:
        """Send a model to its registry; `insecure`: by http. Yields progress records."""
        return self._transfer("/api/push", model, insecure)

    def generate(self, model: str, prompt: str = "", **fields: Any) -> Records:
        """Complete a prompt; an empty one loads the model. Yields pieces, then the final record.

        `fields`: system, template, context, options, raw, …; None means not given.
        """
        body = {"model": model, "prompt": prompt, "stream": True, **fields}
        return self._stream("/api/generate", body, lambda record: record.get("done") is True)

    def chat(self, model: str, messages: list[Record], **fields: Any) -> Records:
        """Answer messages; none load the model. Yields pieces, then the final record.

        `fields`: options, format, think, keep_alive, tools, …; None means not given.
        """
        body = {"model": model, "messages": messages, "stream": True, **fields}
        return self._stream("/api/chat", body, lambda record: record.get("done") is True)

    def embed(self, model: str, input: str | list[str], **fields: Any) -> list[list[float]]:
        """A vector of length 1 for each text. `fields`: truncate, dimensions, options."""
        answer = self._post("/api/embed", {"model": model, "input": input, **fields})
        return list(answer.get("embeddings") or [])

    def embeddings(self, model: str, prompt: str, **fields: Any) -> list[float]:
        """A vector for one text, of the length that the model gave it. `fields`: options."""
        answer = self._post("/api/embeddings", {"model": model, "prompt": prompt, **fields})
        return list(answer.get("embedding") or [])

    def tokenize(self, model: str, text: str, **fields: Any) -> Record:
        """`tokens`: the ids; `pieces`: id, token, bytes, start, end. `fields`: special, bos."""
        return self._post("/api/tokenize", {"model": model, "text": text, **fields})

    def detokenize(self, model: str, tokens: list[int], **fields: Any) -> str:
        """The text of some ids. `fields`: special."""
        answer = self._post("/api/detokenize", {"model": model, "tokens": tokens, **fields})
        return str(answer.get("text", ""))

    # -----------------------------------------------------------------------------------------

    def _get(self, path: str) -> Record:
        with self._explained():
            answer = self._http.get(path, timeout=PROBE_TIMEOUT)
        if not answer.is_success:
            raise _refusal(answer)
        return _record(answer.content)

    def _send(self, method: str, path: str, body: Record) -> bytes:
        """An answer that comes at once, as bytes; it may be empty."""
        with self._explained():
            answer = self._http.request(method, path, json=body)
        if not answer.is_success:
            raise _refusal(answer)
        return answer.content

    def _post(self, path: str, body: Record) -> Record:
        """One record for one request, however long it takes."""
        given = {key: value for key, value in body.items() if value is not None}
        with self._explained():
            answer = self._http.post(path, json=given)
        if not answer.is_success:
            raise _refusal(answer)
        return _record(answer.content)

    def _transfer(self, path: str, model: str, insecure: bool) -> Records:
        body = {"model": model, "insecure": insecure, "stream": True}
        return self._stream(path, body, _is_success)

    def _stream(self, path: str, body: Record, is_last: Callable[[Record], bool]) -> Records:
        given = {key: value for key, value in body.items() if value is not None}
        finished = False
        with self._explained(), self._http.stream("POST", path, json=given) as answer:
            if not answer.is_success:
                answer.read()
                raise _refusal(answer)
            for line in lines(answer.iter_bytes()):
                record = _record(line)
                finished = is_last(record)
                yield record
        if not finished:
            raise RefollamaError("the server's answer ended before it was complete")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """The transport's exceptions in words that help."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise ServerUnreachable(
                f"could not connect to refollama at {self.url}; start it with 'refollama serve'"
            ) from None
        except httpx.TransportError as problem:
            raise ServerUnreachable(
                f"the connection to {self.url} broke: {str(problem) or type(problem).__name__}"
            ) from None


def _authorization() -> dict[str, str]:
    key = api_key(os.environ)
    return {"Authorization": f"Bearer {key}"} if key else {}


def lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The non-empty lines in a stream of bytes that is cut anywhere.

    Only a line feed ends a line: inside JSON text U+0085 and its kin are ordinary characters,
    at which `str.splitlines` (and so httpx's own `iter_lines`) would cut.
    """
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from filter(bytes.strip, whole)
    if rest.strip():
        yield rest


def _is_success(record: Record) -> bool:
    return record.get("status") == "success"


def _record(line: bytes) -> Record:
    """One JSON object; one that says `error` is raised."""
    try:
        record = json.loads(line)
    except ValueError:  # UnicodeDecodeError is one too
        record = None
    if not isinstance(record, dict):
        raise RefollamaError(f"the server's answer is no JSON object: {line[:60]!r}")
    if record.get("error"):
        raise RefollamaError(str(record["error"]))
    return record


def _refusal(answer: httpx.Response) -> RefollamaError:
    """What the server said, as the exception that its status stands for."""
    kind = BY_STATUS.get(answer.status_code, RefollamaError)
    try:
        return kind(str(answer.json()["error"]))
    except (ValueError, KeyError, TypeError):  # not JSON, or not of our form
        return kind(f"{answer.url} answered {answer.status_code} {answer.reason_phrase}")
