"""How requests and records look as JSON: the only place with names of the wire.

Bodies are read as leniently as Ollama reads them: any content type, keys in any case, `null` for
"not given", unknown keys ignored, anything behind the first JSON value too. A value of the wrong
type is an error that names the field.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from refollama import keep_alive
from refollama.errors import BadRequest, RefollamaError
from refollama.messages import (
    Chat,
    Chunk,
    Create,
    Detokenize,
    Embed,
    Embedded,
    Generate,
    InMemory,
    Message,
    Piece,
    Progress,
    Pull,
    Push,
    Show,
    Stats,
    Tokenize,
    TokenLogprob,
    ToolCall,
)
from refollama.show import Shown
from refollama.store import ModelEntry
from refollama.text.toolcalls import STRICT_JSON

log = logging.getLogger(__name__)

Record = dict[str, Any]  # one JSON object

# What a message may hold in a conversation, but has no place in the layer of a model's messages.
NOT_STORED = ("images", "tool_calls", "tool_call_id", "tool_name", "thinking")
WITHOUT_EFFECT_IN_CREATE = ("renderer", "parser", "requires", "info", "remote_host")
WITHOUT_EFFECT_IN_PULL = ("username", "password")  # logins are kept where the server runs


class Body:
    """The JSON object of a request; each value is checked as it is taken.

    Raises: BadRequest, with the field's name and the type that it must have.
    """

    def __init__(self, raw: bytes | Mapping[str, Any], place: str = "") -> None:
        found = _first_object(raw) if isinstance(raw, bytes) else raw
        self._fields = {key.lower(): value for key, value in found.items()}
        self._place = place  # of an object within another, such as "messages[0]."

    @property
    def sent(self) -> Mapping[str, Any]:
        """All fields."""
        return self._fields

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

    def tokens(self, name: str) -> tuple[str | int, ...]:
        """A list of tokens, by text or id; an empty one if it is not given."""
        values = self._take(name, list, "a list of strings and integers") or []
        if any(type(value) not in (str, int) for value in values):
            raise BadRequest(f"{name} must be a list of strings and integers")
        return tuple(values)

    def texts(self, name: str) -> tuple[str, ...]:
        """A text, or a list of texts; an empty text is no text, unless it stands in a list."""
        value = self._fields.get(name)
        texts = value if isinstance(value, list) else [value] if value not in (None, "") else []
        if any(not isinstance(text, str) for text in texts):
            raise BadRequest(f"invalid input type: {name} must be a string or a list of strings")
        return tuple(texts)

    def keep_alive(self) -> float | None:
        """Seconds that the model is to stay in memory; None if nothing is said."""
        return keep_alive.seconds(self._fields.get("keep_alive"))

    def names(self, name: str) -> Mapping[str, str]:
        """An object of texts, such as file names and digests."""
        found = self.mapping(name)
        if any(not isinstance(value, str) for value in found.values()):
            raise BadRequest(f"{name} must be an object of strings")
        return found

    def turns(self, name: str) -> tuple[Message, ...]:
        """A list of messages that a model is made with: their roles and contents."""
        found = self._take(name, list, "a list of messages") or []
        if not all(isinstance(turn, dict) for turn in found):
            raise BadRequest(f"{name} must be a list of messages")
        said = [(turn.get("role"), turn.get("content") or "") for turn in found]
        if not all(isinstance(part, str) for pair in said for part in pair):
            raise BadRequest(f"{name}: role and content must be strings")
        lost = {key.lower() for turn in found for key, value in turn.items() if value}
        for field in NOT_STORED:
            if field in lost:
                raise BadRequest(f"{name}: {field} cannot be stored in a model")
        return tuple(Message(role, content) for role, content in said)

    def objects(self, name: str) -> list[Body]:
        """A list of objects; an empty one if it is not given."""
        values = self._take(name, list, "a list of objects") or []
        if not all(isinstance(value, dict) for value in values):
            raise BadRequest(f"{self._place}{name} must be a list of objects")
        return [Body(value, f"{self._place}{name}[{at}].") for at, value in enumerate(values)]

    def images(self) -> tuple[bytes, ...]:
        """Files in base64."""
        values = self._take("images", list, "a list of strings in base64") or []
        return tuple(_file(value, f"{self._place}images[{at}]") for at, value in enumerate(values))

    def think(self) -> bool | str | None:
        """Yes, no, or how much."""
        value = self._fields.get("think")
        if value is not None and not isinstance(value, bool | str):
            raise BadRequest("think must be true, false or a level")
        return value

    def value(self, name: str) -> object:
        """Any JSON value, as it was sent."""
        return self._fields.get(name)

    def tools(self) -> tuple[Mapping[str, Any], ...]:
        """The tools that a model may call, as they were sent."""
        return tuple(tool.sent for tool in self.objects("tools"))

    def warn(self, name: str) -> None:
        """A field that has no effect yet and does no harm."""
        if self._fields.get(name) is not None:
            log.warning("%s has no effect in this version; ignored", name)

    def warn_of_family(self, beginning: str) -> None:
        """All fields whose names begin so, in one line: there may be any number of them."""
        names = sorted(name for name in self._fields if name.startswith(beginning))
        if names:
            log.warning("%s… has no effect in this version; ignored: %.200r", beginning, names)

    def _take(self, name: str, kind: type, wanted: str) -> Any:
        value = self._fields.get(name)
        if value is not None and type(value) is not kind:
            raise BadRequest(f"{self._place}{name} must be {wanted}")
        return value


def _file(value: object, place: str) -> bytes:
    """Base64 → bytes; it may stand in lines."""
    if not isinstance(value, str):
        raise BadRequest(f"{place} must be a string in base64")
    try:
        return base64.b64decode(value.replace("\r", "").replace("\n", ""), validate=True)
    except ValueError:
        raise BadRequest(f"{place} is not base64") from None


def _first_object(raw: bytes) -> dict[str, Any]:
    if not raw.strip():
        raise BadRequest("missing request body")
    try:
        text = raw.decode("utf-8-sig").lstrip()
        value, _ = STRICT_JSON.raw_decode(text)
    except UnicodeDecodeError as error:
        raise BadRequest(f"the request body is not UTF-8: byte {error.start}") from None
    except RecursionError:
        raise BadRequest("the request body is nested too deeply") from None
    except ValueError as error:
        raise BadRequest(f"the request body is not JSON: {error}") from None
    if value is None:  # nothing is given
        return {}
    if not isinstance(value, dict):
        raise BadRequest("the request body must be a JSON object")
    return value


# ── requests ──────────────────────────────────────────────────────────────────────────────────


def read_generate(raw: bytes) -> Generate:
    """The body of POST /api/generate."""
    body = Body(raw)
    return Generate(
        **_of_both(body),
        prompt=body.text("prompt"),
        system=body.text("system"),
        template=body.text("template"),
        context=body.ids("context"),
        raw=body.flag("raw", False),
        suffix=body.text("suffix"),
        images=body.images(),
    )


def read_chat(raw: bytes) -> Chat:
    """The body of POST /api/chat."""
    body = Body(raw)
    return Chat(
        **_of_both(body),
        messages=tuple(map(_message, body.objects("messages"))),
        tools=body.tools(),
    )


def _of_both(body: Body) -> dict[str, Any]:
    """What a prompt and a conversation may both be asked with."""
    return {
        "model": body.text("model", "name"),
        "options": body.mapping("options"),
        "strict": body.flag("strict", False),
        "keep_alive": body.keep_alive(),
        "think": body.think(),
        "format": body.value("format"),
        "truncate": body.flag("truncate", True),
        "shift": body.flag("shift", True),
        "logprobs": body.flag("logprobs", False),
        "top_logprobs": body.integer("top_logprobs", 0),
        "logprob_tokens": body.tokens("logprob_tokens"),
        "n": body.integer("n", 1),
        "progress": body.flag("progress", False),
        "debug_render_only": body.flag("_debug_render_only", False),
        "stream": body.flag("stream", True),
    }


def _message(body: Body) -> Message:
    return Message(
        role=body.text("role").lower(),
        content=body.text("content"),
        images=body.images(),
        tool_calls=tuple(map(_tool_call, body.objects("tool_calls"))),
        tool_name=body.text("tool_name"),
        tool_call_id=body.text("tool_call_id"),
        thinking=body.text("thinking"),
    )


def _tool_call(body: Body) -> ToolCall:
    function = Body(body.mapping("function"), "tool_calls.function.")
    return ToolCall(
        name=function.text("name"),
        arguments=function.mapping("arguments"),
        id=body.text("id"),
        index=function.integer("index", 0),
    )


def read_embed(raw: bytes) -> Embed:
    """The body of POST /api/embed."""
    body = Body(raw)
    dimensions = body.integer("dimensions", 0)
    if dimensions < 0:
        raise BadRequest(f"dimensions must be 0 (all of them) or more, not {dimensions}")
    return Embed(
        model=body.text("model", "name"),
        input=body.texts("input"),
        truncate=body.flag("truncate", True),
        dimensions=dimensions,
        options=body.mapping("options"),
        strict=body.flag("strict", False),
        keep_alive=body.keep_alive(),
    )


def read_embeddings(raw: bytes) -> Embed:
    """The body of POST /api/embeddings: one text, whose vector comes as the model made it."""
    body = Body(raw)
    prompt = body.text("prompt")
    return Embed(
        model=body.text("model", "name"),
        input=(prompt,) if prompt else (),
        options=body.mapping("options"),
        strict=body.flag("strict", False),
        keep_alive=body.keep_alive(),
        normalise=False,
    )


def read_tokenize(raw: bytes) -> Tokenize:
    """The body of POST /api/tokenize."""
    body = Body(raw)
    return Tokenize(
        model=body.text("model", "name"),
        text=body.text("text"),
        special=body.flag("special", False),
        bos=body.flag("bos", False),
    )


def read_detokenize(raw: bytes) -> Detokenize:
    """The body of POST /api/detokenize."""
    body = Body(raw)
    return Detokenize(
        model=body.text("model", "name"),
        tokens=body.ids("tokens"),
        special=body.flag("special", False),
    )


def read_create(raw: bytes) -> Create:
    """The body of POST /api/create: a Modelfile as text (2023), or what it would say in parts."""
    body = Body(raw)
    for name in WITHOUT_EFFECT_IN_CREATE:
        body.warn(name)
    body.warn_of_family("draft_")
    return Create(
        model=body.text("model", "name"),
        modelfile=body.text("modelfile"),
        directory=body.text("directory") or None,
        path=body.text("path"),
        from_=body.text("from"),
        files=body.names("files"),
        adapters=body.names("adapters"),
        template=body.text("template"),
        system=body.text("system"),
        licenses=body.texts("license"),
        parameters=body.mapping("parameters"),
        messages=body.turns("messages"),
        quantize=body.text("quantize", "quantization"),
        stream=body.flag("stream", True),
    )


def read_pull(raw: bytes) -> Pull:
    """The body of POST /api/pull."""
    return Pull(*_registry_fields(Body(raw)))


def read_push(raw: bytes) -> Push:
    """The body of POST /api/push."""
    return Push(*_registry_fields(Body(raw)))


def _registry_fields(body: Body) -> tuple[str, bool, bool]:
    for name in WITHOUT_EFFECT_IN_PULL:
        body.warn(name)
    return body.text("model", "name"), body.flag("insecure", False), body.flag("stream", True)


def read_show(raw: bytes) -> Show:
    """The body of POST /api/show."""
    body = Body(raw)
    return Show(
        model=body.text("model", "name"),
        system=body.text("system"),
        template=body.text("template"),
        options=body.mapping("options"),
        verbose=body.flag("verbose", False),
    )


def read_copy(raw: bytes) -> tuple[str, str]:
    """The body of POST /api/copy: source and destination."""
    body = Body(raw)
    return body.text("source"), body.text("destination")


def read_delete(raw: bytes) -> str:
    """The body of DELETE /api/delete: a model's name."""
    return Body(raw).text("model", "name")


# ── records ───────────────────────────────────────────────────────────────────────────────────


def chunk_record(ask: Generate, chunk: Chunk) -> Record:
    """One line of an answer; numbers that are zero are left out, as Ollama does."""
    end = {"context": list(chunk.context)} if chunk.context else {}
    return _answer_record(ask, chunk, _response, end)


def chat_record(ask: Chat, chunk: Chunk) -> Record:
    """One line of an answer in a conversation: each carries a message, the last one too."""
    return _answer_record(ask, chunk, _reply, {})


Said = Callable[[Chunk], Record]  # the text of an answer, as its route tells it


def _response(chunk: Chunk) -> Record:
    return {"response": chunk.text} | _aside_record(chunk)


def _reply(chunk: Chunk) -> Record:
    return {"message": {"role": "assistant", "content": chunk.text} | _aside_record(chunk)}


def _answer_record(ask: Generate | Chat, chunk: Chunk, said: Said, end: Record) -> Record:
    record: Record = {
        "model": ask.model,
        "created_at": datetime.now(timezone.utc).isoformat().replace("+00:00", "Z"),
        **said(chunk),
        "done": chunk.done,
        **_several_record(chunk, said),
    }
    if chunk.logprobs:
        record["logprobs"] = [_logprob_record(one) for one in chunk.logprobs]
    if chunk.progress is not None:
        record["progress"] = asdict(chunk.progress)
    if chunk.rendered is not None:
        shown = {
            "rendered_template": chunk.rendered.text,
            "image_count": chunk.rendered.images,
        }
        return record | {"_debug_info": shown | {"prompt_ids": list(chunk.rendered.ids)}}
    if chunk.done:
        record |= {"done_reason": chunk.done_reason}
        record |= end
        record |= _stats_record(chunk.stats or Stats())
    return record


def _several_record(chunk: Chunk, said: Said) -> Record:
    """What is told of several answers: which one it is, how it ended, or all of them at once."""
    if chunk.answers:
        return {"answers": [_one_of_several(one, said) for one in chunk.answers]}
    if chunk.index is None:
        return {}
    counts = chunk.stats or Stats()
    end = {"done_reason": chunk.done_reason, "eval_count": counts.eval_count}
    return {"index": chunk.index} | (end if chunk.done_reason else {})


def _one_of_several(chunk: Chunk, said: Said) -> Record:
    noted = [_logprob_record(one) for one in chunk.logprobs]
    return _several_record(chunk, said) | said(chunk) | ({"logprobs": noted} if noted else {})


def _aside_record(chunk: Chunk) -> Record:
    """What else is in an answer besides its text."""
    record: Record = {"thinking": chunk.thinking} if chunk.thinking else {}
    if chunk.tool_calls:
        record["tool_calls"] = [_tool_call_record(call) for call in chunk.tool_calls]
    return record


def _tool_call_record(call: ToolCall) -> Record:
    function = {"index": call.index, "name": call.name, "arguments": call.arguments}
    return {"id": call.id, "function": function}


def _logprob_record(one: TokenLogprob) -> Record:
    record = {"token": one.token, "logprob": one.logprob, "bytes": list(one.bytes), "id": one.id}
    others = {"top_logprobs": one.top, "named": one.named}
    return record | {
        name: [_logprob_record(each) for each in some] for name, some in others.items() if some
    }


def _stats_record(stats: Stats) -> Record:
    numbers = {
        "total_duration": stats.total_duration,
        "load_duration": stats.load_duration,
        "prompt_eval_count": stats.prompt_eval_count,
        "prompt_cached_count": stats.prompt_cached_count,
        "prompt_truncated": stats.prompt_truncated,
        "messages_truncated": stats.messages_truncated,
        "prompt_eval_duration": stats.prompt_eval_duration,
        "eval_count": stats.eval_count,
        "eval_duration": stats.eval_duration,
    }
    return {name: number for name, number in numbers.items() if number}


def embed_record(ask: Embed, answer: Embedded) -> Record:
    """The answer of POST /api/embed."""
    record: Record = {"model": ask.model, "embeddings": list(answer.vectors)}
    return record | _stats_record(answer.stats)


def embeddings_record(answer: Embedded) -> Record:
    """The answer of POST /api/embeddings: one vector, or an empty one for an empty prompt."""
    return {"embedding": next(iter(answer.vectors), [])}


def tokenize_record(ask: Tokenize, pieces: list[Piece]) -> Record:
    """The answer of POST /api/tokenize: the ids, and what each of them is."""
    return {
        "model": ask.model,
        "tokens": [piece.id for piece in pieces],
        "pieces": [_piece_record(piece) for piece in pieces],
    }


def _piece_record(piece: Piece) -> Record:
    return {
        "id": piece.id,
        "token": piece.bytes.decode(errors="replace"),
        "bytes": list(piece.bytes),
        "start": piece.start,
        "end": piece.end,
    }


def detokenize_record(ask: Detokenize, text: str) -> Record:
    """The answer of POST /api/detokenize."""
    return {"model": ask.model, "text": text}


def progress_record(progress: Progress) -> Record:
    record: Record = {"status": progress.status}
    record |= {"digest": progress.digest} if progress.digest else {}
    numbers = {name: getattr(progress, name) for name in ("total", "completed", "resumed")}
    return record | {name: number for name, number in numbers.items() if number}


def model_record(entry: ModelEntry) -> Record:
    """One model of GET /api/tags."""
    return {
        "name": str(entry.name),
        "model": str(entry.name),
        "modified_at": entry.modified_at.isoformat(),
        "size": entry.size,
        "digest": entry.digest,
        "details": entry.details,
        "capabilities": list(entry.capabilities),
    }


def show_record(shown: Shown) -> Record:
    """The answer of POST /api/show: what is empty is left out, as Ollama does."""
    files = shown.files
    texts = {
        "license": "\n".join(files.licenses),
        "modelfile": shown.modelfile,
        "parameters": shown.parameters,
        "template": shown.template,
        "system": files.system,
    }
    record: Record = {name: text for name, text in texts.items() if text}
    record["details"] = {"parent_model": files.parent, **files.config.details()}
    if files.messages:
        record["messages"] = [{"role": m.role, "content": m.content} for m in files.messages]
    record["model_info"] = shown.info
    if shown.projector is not None:
        record["projector_info"] = shown.projector
    record["tensors"] = [
        {"name": tensor.name, "type": tensor.type, "shape": list(tensor.shape)}
        for tensor in shown.tensors
    ]
    record["capabilities"] = list(shown.capabilities)
    return record | {"modified_at": files.modified_at.isoformat()}


def memory_record(model: InMemory) -> Record:
    """One model of GET /api/ps."""
    return {
        "name": model.name,
        "model": model.name,
        "size": model.nbytes,
        "digest": model.digest,
        "details": {"parent_model": "", **model.details},
        "expires_at": model.expires_at.isoformat(),
        "size_vram": model.nbytes_gpu,
        "context_length": model.n_ctx,
    }


def error_record(error: Exception) -> Record:
    """What a client may know of an error: a sentence of ours, or that something broke."""
    if isinstance(error, RefollamaError):
        return {"error": str(error)}
    return {"error": "internal error: the server's log says more"}


# ── bytes ─────────────────────────────────────────────────────────────────────────────────────


def dumps(record: Record) -> str:
    """Compact and ASCII: no reader of lines can stumble over a separator inside a string.

    Raises: ValueError for a number that JSON does not know.
    """
    return json.dumps(record, ensure_ascii=True, separators=(",", ":"), allow_nan=False)


def ndjson(records: Iterable[Record]) -> Iterator[bytes]:
    """One line a record; one that cannot be written makes an error the last line."""
    for record in records:
        try:
            line = dumps(record)
        except ValueError as error:
            log.exception("a record that is not JSON")
            yield dumps(error_record(error)).encode() + b"\n"
            return
        yield line.encode() + b"\n"
