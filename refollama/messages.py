"""The records that travel between the rooms: plain data, no behaviour.

`Generate` and `Create` are what a user asks; `Chunk` and `Progress` are what comes back, one after
another. `server/wire.py` alone knows how they look as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
    raw: bool = False  # no template: the prompt is what the model sees
    truncate: bool = True  # a prompt that does not fit is cut; else it is an error
    shift: bool = True  # when the context is full, forget part of it and go on
    logprobs: bool = False  # note how likely each token was
    top_logprobs: int = 0  # and the likeliest ones in its place
    stream: bool = True


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely the model thought a token, before any option had its say.  Units: nats."""

    id: int
    token: str  # its text; half a character is shown as U+FFFD
    bytes: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()  # the likeliest tokens in its place, if asked for


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts and durations of one answer.  Units: tokens and nanoseconds.

    prompt_eval_count: of the prompt as the model saw it; prompt_cached_count: of those, how many
    needed no work; prompt_truncated: how many were cut off before.
    """

    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    prompt_cached_count: int = 0
    prompt_truncated: int = 0
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer; the last one is `done` and carries the reason, counts and context."""

    text: str = ""
    done: bool = False
    done_reason: str = ""  # "stop", "length" or "load"
    stats: Stats | None = None
    context: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()  # of the tokens since the last piece


@dataclass(frozen=True, slots=True)
class Create:
    """One request to make a model out of a Modelfile."""

    model: str
    modelfile: str
    directory: str | None = None  # where relative FROM paths start
    stream: bool = True


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a long piece of work has come.  Units: bytes."""

    status: str
    digest: str = ""
    total: int = 0
    completed: int = 0
