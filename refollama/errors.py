"""Everything that can go wrong and that a user can be told about.

RefollamaError                    500
├── BadRequest                    400  the request itself is wrong
│   ├── BadOption                 400  an option of the wrong type or out of range
│   ├── BadName                   400  not a model name
│   ├── ModelfileError            400  a Modelfile that cannot be read; knows its line
│   ├── TemplateError             400  a template that cannot be parsed; knows line and column
│   └── PromptTooLong             400  more tokens than the context holds
├── FormatError                   400  bytes that are not what they claim to be
├── UnsupportedModel              400  a good file of a kind that we cannot run
├── NotFound                      404
│   └── ModelNotFound             404
├── ServerBusy                    503  the queue is full
├── Stopping                      503  the model or the server is going away
├── Abandoned                     499  whoever asked has gone; nobody reads this
├── StoreError                    500  the disk said no
├── RegistryError                 500  a registry said no, or something senseless
│   ├── Passing                   500  it may go better next time
│   └── Unauthorized              500  it wants to know us, and does not
└── ServerUnreachable             503  seen by clients only: nobody listens

Each class carries the HTTP status that `server/app.py` answers with; the message is the sentence
that the user reads, so it names what was found and what would have been right.
"""

from __future__ import annotations


class RefollamaError(Exception):
    """Base of all errors that are meant for a user's eyes."""

    status = 500


class BadRequest(RefollamaError):
    """The request itself is wrong; sending it again will not help."""

    status = 400


class BadOption(BadRequest):
    """An option of the wrong type or outside its range."""


class BadName(BadRequest):
    """A text that is no model name."""


class ModelfileError(BadRequest):
    """A Modelfile that cannot be read."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        where = "" if line is None else f"line {line}: "
        super().__init__(f"Modelfile: {where}{problem}")


class TemplateError(BadRequest):
    """A prompt template that cannot be parsed or executed."""

    def __init__(self, problem: str, line: int | None = None, column: int | None = None) -> None:
        places = {"line": line, "column": column}
        where = ", ".join(f"{what} {at}" for what, at in places.items() if at is not None)
        super().__init__(f"template: {where}: {problem}" if where else f"template: {problem}")


class PromptTooLong(BadRequest):
    """A prompt with more tokens than the context holds."""

    def __init__(self, tokens: int | str, room: int) -> None:
        super().__init__(
            f"the prompt is longer than the context length: it has {tokens} tokens, the context "
            f"{room}; shorten the prompt or raise num_ctx"
        )


class FormatError(RefollamaError):
    """Bytes that are not what they claim to be: names the file, the field and the offset."""

    status = 400


class UnsupportedModel(RefollamaError):
    """A sound file of a kind that this program cannot run: says what was found and expected."""

    status = 400


class NotFound(RefollamaError):
    """The thing that the request names does not exist."""

    status = 404


class ModelNotFound(NotFound):
    """No model of that name in the store."""

    def __init__(self, name: object) -> None:
        super().__init__(f"model '{name}' not found, try pulling it first")
        self.name = str(name)


class ServerBusy(RefollamaError):
    """Too many requests are waiting already."""

    status = 503


class Stopping(RefollamaError):
    """The model has been unloaded, or the server stops."""

    status = 503


class Abandoned(RefollamaError):
    """Whoever asked has gone: the work ends, and nobody reads why."""

    status = 499


class StoreError(RefollamaError):
    """The disk said no: full, forbidden, broken."""


class RegistryError(RefollamaError):
    """A registry said no, or something that makes no sense.  (500: so Ollama reports it.)"""


class Passing(RegistryError):
    """A failure that may pass: a broken connection, a stall, a registry that is busy.

    retry_after: seconds that the registry asks to wait; None if it does not say.
    """

    def __init__(self, problem: str, retry_after: float | None = None) -> None:
        super().__init__(problem)
        self.retry_after = retry_after


class Unauthorized(RegistryError):
    """The registry does not know who we are, or does not let us."""


class ServerUnreachable(RefollamaError):
    """Nobody listens where the client was told to look."""

    status = 503
