"""The records that travel between the rooms: plain data, no behaviour.

`Generate`, `Chat` and `Create` are what a user asks; `Chunk` and `Progress` are what comes back,
one after another. `server/wire.py` alone knows how they look as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any


@dataclass(frozen=True, slots=True)
class ToolCall:
    """The model wants a tool to be run."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)  # in the order of the model
    id: str = ""  # what the tool's answer refers to
    index: int = 0  # which of the calls of one answer


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str  # "system", "user", "assistant" or "tool"
    content: str = ""
    images: tuple[bytes, ...] = ()  # files: PNG, JPEG, …
    tool_calls: tuple[ToolCall, ...] = ()
    tool_name: str = ""  # role "tool": whose answer this is
    tool_call_id: str = ""  # role "tool": to which call
    thinking: str = ""  # what the model thought before it said the content


@dataclass(frozen=True, slots=True)
class Generate:
    """One request to complete a prompt."""

    model: str
    prompt: str = ""
    system: str = ""  # empty: the model's own
    template: str = ""  # empty: the model's own
    context: tuple[int, ...] = ()  # token ids that earlier answers returned
    options: Mapping[str, Any] = field(default_factory=dict)  # as sent; checked by Options
    strict: bool = False  # an unknown option is an error, not a warning
    keep_alive: float | None = None  # seconds in memory afterwards; None: the server's
    raw: bool = False  # no template: the prompt is what the model sees
    suffix: str = ""  # what stands behind the text that is to be written
    images: tuple[bytes, ...] = ()  # files: PNG, JPEG, …
    think: bool | str | None = None  # aloud, before it answers; None: if the model can
    format: object = None  # "json" or a JSON schema, as sent; None or "": free text
    debug_render_only: bool = False  # show the prompt, answer nothing
    truncate: bool = True  # a prompt that does not fit is cut; else it is an error
    shift: bool = True  # when the context is full, forget part of it and go on
    logprobs: bool = False  # note how likely each token was
    top_logprobs: int = 0  # and the likeliest ones in its place
    logprob_tokens: tuple[str | int, ...] = ()  # and these ones, by text or id
    n: int = 1  # answers, each with a seed of its own: `seed`, `seed` + 1, …
    progress: bool = False  # tell how far loading and reading the prompt have come
    stream: bool = True


@dataclass(frozen=True, slots=True)
class Chat:
    """One request to go on with a conversation."""

    model: str
    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()  # as sent: {"type": "function", "function": {…}}
    think: bool | str | None = None
    format: object = None  # "json" or a JSON schema, as sent; None or "": free text
    options: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False
    keep_alive: float | None = None  # seconds in memory afterwards; None: the server's
    truncate: bool = True  # the oldest messages go if not all fit
    shift: bool = True
    logprobs: bool = False
    top_logprobs: int = 0
    logprob_tokens: tuple[str | int, ...] = ()
    n: int = 1
    progress: bool = False
    debug_render_only: bool = False
    stream: bool = True


@dataclass(frozen=True, slots=True)
class Embed:
    """One request to turn texts into vectors; without texts it only loads the model."""

    model: str
    input: tuple[str, ...] = ()
    truncate: bool = True  # a text that does not fit is cut; else it is an error
    dimensions: int = 0  # keep the first so many numbers of each vector; 0: all
    options: Mapping[str, Any] = field(default_factory=dict)  # as sent; checked by Options
    strict: bool = False  # an unknown option is an error, not a warning
    keep_alive: float | None = None  # seconds in memory afterwards; None: the server's
    normalise: bool = True  # to length 1


@dataclass(frozen=True, slots=True)
class Embedded:
    """A vector for each text, in their order."""

    vectors: tuple[list[float], ...]
    stats: Stats


@dataclass(frozen=True, slots=True)
class Tokenize:
    """One request to cut a text into tokens."""

    model: str
    text: str = ""
    special: bool = False  # control tokens that are spelled in the text are meant
    bos: bool = False  # with BOS and EOS where the model wants them


@dataclass(frozen=True, slots=True)
class Detokenize:
    """One request to put tokens together again."""

    model: str
    tokens: tuple[int, ...] = ()
    special: bool = False  # control tokens are shown as they are spelled; else they print nothing


@dataclass(frozen=True, slots=True)
class Piece:
    """A token, and the bytes from `start` to `end` of the UTF-8 text that it stands for."""

    id: int
    bytes: bytes  # what it prints; of a control token, how it is spelled
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely the model thought a token, before any option had its say.  Units: nats."""

    id: int
    token: str  # its text; half a character is shown as U+FFFD
    bytes: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()  # the likeliest tokens in its place, if asked for
    named: tuple[TokenLogprob, ...] = ()  # the tokens in its place that were asked for


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts and durations of one answer.  Units: tokens and nanoseconds.

    prompt_eval_count: of the prompt as the model saw it; prompt_cached_count: of those, how many
    needed no work; prompt_truncated: how many were cut off before; messages_truncated: how many
    messages of a conversation went with them.
    """

    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    prompt_cached_count: int = 0
    prompt_truncated: int = 0
    messages_truncated: int = 0
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt as the model would see it."""

    text: str  # a picture is shown as [img-0]
    ids: tuple[int, ...]  # the rows of a picture have ids behind those of the vocabulary
    images: int = 0


@dataclass(frozen=True, slots=True)
class Reached:
    """How far work has come that goes before an answer."""

    stage: str  # "load" (units: bytes of weights), "images", or "prompt" (units: tokens)
    completed: int
    total: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer; the last one is `done` and carries the reason, counts and context.

    Of several answers each has its `index`, and ends with a piece that has a reason, but is not
    `done`: that is the last piece of all, with the counts of all.
    """

    text: str = ""
    done: bool = False
    done_reason: str = ""  # "stop", "length" or "load"
    stats: Stats | None = None
    context: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()  # of the tokens since the last piece
    thinking: str = ""  # what the model thinks, apart from what it says
    tool_calls: tuple[ToolCall, ...] = ()
    rendered: Rendered | None = None  # instead of an answer, if only that was asked for
    index: int | None = None  # which of several answers
    answers: tuple[Chunk, ...] = ()  # all of them, where they are told as one
    progress: Reached | None = None  # no piece of an answer, but how far one is from beginning


IDLE = Chunk(progress=Reached("idle", 0, 0))  # nothing yet; heard where several answers are told


@dataclass(frozen=True, slots=True)
class Create:
    """One request to make a model: out of a Modelfile, or out of what one would say."""

    model: str
    modelfile: str = ""
    directory: str | None = None  # where relative FROM paths start
    path: str = ""  # of a Modelfile on the server's machine
    from_: str = ""  # a model's name
    files: Mapping[str, str] = field(default_factory=dict)  # name → digest of a blob
    adapters: Mapping[str, str] = field(default_factory=dict)
    template: str = ""
    system: str = ""
    licenses: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[Message, ...] = ()  # the turns that begin every chat
    quantize: str = ""  # the type that the weights are to be packed as, such as "Q4_K_M"
    stream: bool = True


@dataclass(frozen=True, slots=True)
class Pull:
    """One request to fetch a model from a registry."""

    model: str
    insecure: bool = False  # speak http to the registry
    stream: bool = True


@dataclass(frozen=True, slots=True)
class Push:
    """One request to send a model to a registry."""

    model: str
    insecure: bool = False
    stream: bool = True


@dataclass(frozen=True, slots=True)
class Show:
    """One request to tell all about a model; what is not empty here stands in for its own."""

    model: str
    system: str = ""
    template: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    verbose: bool = False  # with vocabularies and other long lists


@dataclass(frozen=True, slots=True)
class InMemory:
    """A model that is loaded.  Units: bytes; tokens."""

    name: str
    digest: str  # hex, of its manifest; empty for a file
    details: Mapping[str, Any]
    expires_at: datetime  # when it goes, if nobody uses it until then; local time
    nbytes: int  # of its weights and caches
    nbytes_gpu: int  # of those, on a GPU
    n_ctx: int


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a long piece of work has come.  Units: bytes."""

    status: str
    digest: str = ""
    total: int = 0
    completed: int = 0
    resumed: int = 0  # of these, how many an earlier try had left
