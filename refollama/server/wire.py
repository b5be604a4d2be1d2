"""How requests and records look as JSON: the only place with names of the wire.

Bodies are read as leniently as Ollama reads them: any content type, keys in any case, `null` for
"not given", unknown keys ignored, anything behind the first JSON value too. A value of the wrong
type is an error that names the field.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from typing import Any

from refollama.errors import BadRequest, RefollamaError
from refollama.messages import Chunk, Create, Generate, Progress, Stats, TokenLogprob
from refollama.store import ModelEntry

log = logging.getLogger(__name__)

Record = dict[str, Any]  # one JSON object

# Fields that ask for something that is not built yet: better a clear no than a wrong answer.
NOT_YET = {
    "images": "this version cannot look at images",
    "format": "this version has no JSON mode: format must be empty",
    "suffix": "this version cannot fill in the middle: suffix must be empty",
    "think": "this version knows no thinking models: think must be false",
}
NOT_YET_IN_CREATE = {
    "path": "this version takes a Modelfile's text, as modelfile, not its path",
    "from": "this version takes a Modelfile's text, as modelfile, not its parts",
    "files": "this version takes a Modelfile's text, as modelfile, not its parts",
    "quantize": "this version cannot quantise",
}


class Body:
    """The JSON object of a request; each value is checked as it is taken.

    Raises: BadRequest, with the field's name and the type that it must have.
    """

    def __init__(self, raw: bytes) -> None:
        self._fields = {key.lower(): value for key, value in _first_object(raw).items()}

    def text(self, *names: str) -> str:
        """The first of these fields that is given; "" if none is."""
        given = (
            value for name in names if (value := self._take(name, str, "a string")) is not None
        )
        return next(given, "")

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._take(name, bool, "true or false")
        return default if value is None else value

    def integer(self, name: str, default: int) -> int:
        """A whole number."""
        value = self._take(name, int, "an integer")
        return default if value is None else value

    def mapping(self, name: str) -> Mapping[str, Any]:
        """An object; an empty one if it is not given."""
        return self._take(name, dict, "an object") or {}

    def ids(self, name: str) -> tuple[int, ...]:
        """A list of integers; an empty one if it is not given."""
        values = self._take(name, list, "a list of integers") or []
        if any(type(value) is not int for value in values):
            raise BadRequest(f"{name} must be a list of integers")
        return tuple(values)

    def refuse(self, sentences: Mapping[str, str]) -> None:
        """Fields that must be absent, null, false or empty."""
        for name, sentence in sentences.items():
            if self._fields.get(name):
                raise BadRequest(sentence)

    def warn(self, name: str) -> None:
        """A field that has no effect yet and does no harm."""
        if self._fields.get(name) is not None:
            log.warning("%s has no effect in this version; ignored", name)

    def _take(self, name: str, kind: type, wanted: str) -> Any:
        value = self._fields.get(name)
        if value is not None and type(value) is not kind:
            raise BadRequest(f"{name} must be {wanted}")
        return value


def _first_object(raw: bytes) -> dict[str, Any]:
    if not raw.strip():
        raise BadRequest("missing request body")
    try:
        text = raw.decode("utf-8-sig").lstrip()
        value, _ = json.JSONDecoder(parse_constant=_no_number).raw_decode(text)
    except UnicodeDecodeError as error:
        raise BadRequest(f"the request body is not UTF-8: byte {error.start}") from None
    except RecursionError:
        raise BadRequest("the request body is nested too deeply") from None
    except ValueError as error:
        raise BadRequest(f"the request body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRequest("the request body must be a JSON object")
    return value


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a JSON value")


# ── requests ──────────────────────────────────────────────────────────────────────────────────


def read_generate(raw: bytes) -> Generate:
    """The body of POST /api/generate."""
    body = Body(raw)
    ask = Generate(
        model=body.text("model", "name"),
        prompt=body.text("prompt"),
        system=body.text("system"),
        template=body.text("template"),
        context=body.ids("context"),
        options=body.mapping("options"),
        strict=body.flag("strict", False),
        raw=body.flag("raw", False),
        truncate=body.flag("truncate", True),
        shift=body.flag("shift", True),
        logprobs=body.flag("logprobs", False),
        top_logprobs=body.integer("top_logprobs", 0),
        stream=body.flag("stream", True),
    )
    body.refuse(NOT_YET)
    body.warn("keep_alive")
    return ask


def read_create(raw: bytes) -> Create:
    """The body of POST /api/create, in its form of 2023: a Modelfile as text."""
    body = Body(raw)
    body.refuse(NOT_YET_IN_CREATE)
    return Create(
        model=body.text("model", "name"),
        modelfile=body.text("modelfile"),
        directory=body.text("directory") or None,
        stream=body.flag("stream", True),
    )


# ── records ───────────────────────────────────────────────────────────────────────────────────


def chunk_record(ask: Generate, chunk: Chunk) -> Record:
    """One line of an answer; numbers that are zero are left out, as Ollama does."""
    record: Record = {
        "model": ask.model,
        "created_at": datetime.now(timezone.utc).isoformat().replace("+00:00", "Z"),
        "response": chunk.text,
        "done": chunk.done,
    }
    if chunk.logprobs:
        record["logprobs"] = [_logprob_record(one) for one in chunk.logprobs]
    if chunk.done:
        record |= {"done_reason": chunk.done_reason}
        record |= {"context": list(chunk.context)} if chunk.context else {}
        record |= _stats_record(chunk.stats or Stats())
    return record


def _logprob_record(one: TokenLogprob) -> Record:
    record = {"token": one.token, "logprob": one.logprob, "bytes": list(one.bytes), "id": one.id}
    return record | ({"top_logprobs": [_logprob_record(t) for t in one.top]} if one.top else {})


def _stats_record(stats: Stats) -> Record:
    numbers = {
        "total_duration": stats.total_duration,
        "load_duration": stats.load_duration,
        "prompt_eval_count": stats.prompt_eval_count,
        "prompt_cached_count": stats.prompt_cached_count,
        "prompt_truncated": stats.prompt_truncated,
        "prompt_eval_duration": stats.prompt_eval_duration,
        "eval_count": stats.eval_count,
        "eval_duration": stats.eval_duration,
    }
    return {name: number for name, number in numbers.items() if number}


def progress_record(progress: Progress) -> Record:
    record: Record = {"status": progress.status}
    record |= {"digest": progress.digest} if progress.digest else {}
    record |= {"total": progress.total} if progress.total else {}
    return record | ({"completed": progress.completed} if progress.completed else {})


def model_record(entry: ModelEntry) -> Record:
    """One model of GET /api/tags."""
    return {
        "name": str(entry.name),
        "model": str(entry.name),
        "modified_at": entry.modified_at.isoformat(),
        "size": entry.size,
        "digest": entry.digest,
        "details": entry.details,
    }


def error_record(error: Exception) -> Record:
    """What a client may know of an error: a sentence of ours, or that something broke."""
    if isinstance(error, RefollamaError):
        return {"error": str(error)}
    return {"error": "internal error: the server's log says more"}


# ── bytes ─────────────────────────────────────────────────────────────────────────────────────


def dumps(record: Record) -> str:
    """Compact and ASCII: no reader of lines can stumble over a separator inside a string."""
    return json.dumps(record, ensure_ascii=True, separators=(",", ":"))


def ndjson(records: Iterable[Record]) -> Iterator[bytes]:
    """One line a record."""
    for record in records:
        yield dumps(record).encode() + b"\n"
