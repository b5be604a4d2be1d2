"""Modelfiles: text to commands and back.

    FROM llama2                      a model, a file, or @sha256:<digest> of a blob in the store
    PARAMETER temperature 0.7        one line per value; `stop` may come several times
    SYSTEM \"\"\"You are Mario.\"\"\"      also TEMPLATE and LICENSE; the text is taken as it is
    # a comment

The cutting into items is Ollama's of December 2023, because Modelfiles were written against it: a
quote anywhere in a line opens a text, which may run over several lines; what follows its closing
quote on that line is lost; there are no escapes. One thing is mended: a last line without a
newline is read as if it had one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from refollama import options
from refollama.errors import BadOption, ModelfileError

log = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Command:
    """One command of a Modelfile.

    Arguments: from, adapter (what,) · parameter (key, value) · template, system, license (text,) ·
    message (role, text).
    """

    name: str  # lower case
    args: tuple[str, ...]
    line: int = field(default=0, compare=False)  # where it stands, from 1


@dataclass(frozen=True, slots=True)
class Modelfile:
    """What a Modelfile asks for, in file order; at least one `from`."""

    commands: tuple[Command, ...]

    def all(self, name: str) -> tuple[Command, ...]:
        return tuple(command for command in self.commands if command.name == name)

    def parameters(self) -> dict[str, Any]:
        """Checked values, ready for JSON; the first of a repeated scalar, all of `stop`.

        Raises: ModelfileError with the line of the value that does not fit.
        """
        texts: dict[str, list[str]] = {}
        values = {}
        for command in self.all("parameter"):
            key, text = command.args
            _value(command, [text])
            texts.setdefault(key, []).append(text)
            values[key] = _value(command, texts[key])
        return values


# -------------------------------------------------------------------- reading


def parse(text: str) -> Modelfile:
    """Raises: ModelfileError (status 400), with the line; unknown commands are only warned about.

    Source: behaviour of Ollama in December 2023.
    """
    commands = []
    for item, line in _items(text.removeprefix("\ufeff")):  # the mark that some editors leave
        word, _, rest = item.partition(" ")
        name = word.lower()
        if name in _READERS:
            commands.append(Command(name, _READERS[name](name, rest, line), line))
        elif name in _GONE:
            raise ModelfileError(_GONE[name], line)
        elif word and not word.startswith("#"):
            log.warning("Modelfile: line %d: unknown command %.80r ignored", line, word)
    modelfile = Modelfile(tuple(commands))
    if not modelfile.all("from"):
        raise ModelfileError("no FROM line for the model was specified")
    modelfile.parameters()  # each value is checked
    return modelfile


_GONE = {
    "embed": "EMBED is no longer supported: use the embeddings endpoint of the API instead",
    "prompt": "PROMPT is no longer supported: use TEMPLATE instead",
}


def _items(text: str) -> Iterator[tuple[str, int]]:
    """Cut into items: a line, or a line whose quoted part runs on; each with its first line."""
    if not text.endswith("\n"):
        text += "\n"
    start, line = 0, 1
    while start < len(text):
        end_of_line = text.index("\n", start)
        item, end = _quoted(text, start, end_of_line) or (
            text[start:end_of_line].removesuffix("\r"),
            end_of_line + 1,
        )
        yield item, line
        line += text.count("\n", start, end)
        start = end


def _quoted(text: str, start: int, end_of_line: int) -> tuple[str, int] | None:
    """The item of a line that opens a text which is closed somewhere, and where that ends."""
    for mark in ('"""', '"'):
        opened = text.find(mark, start, end_of_line)
        closed = text.find(mark, opened + len(mark)) if opened >= 0 else -1
        if closed >= 0:
            inner = text[opened + len(mark) : closed]
            return text[start:opened] + inner, closed + len(mark)
    return None


def _source(name: str, rest: str, line: int) -> tuple[str, ...]:
    if not rest.strip():
        raise ModelfileError(f"{name.upper()} needs an argument", line)
    return (rest.strip(),)


def _parameter(name: str, rest: str, line: int) -> tuple[str, ...]:
    key, *value = rest.split(None, 1)[:2] or [""]
    if not key:
        raise ModelfileError("PARAMETER needs a name and a value", line)
    if not value or not value[0].strip():
        raise ModelfileError(f"missing value for [{key[:80]}]", line)
    return key, value[0].strip()


def _raw(name: str, rest: str, line: int) -> tuple[str, ...]:
    return (rest,)


def _message(name: str, rest: str, line: int) -> tuple[str, ...]:
    role, _, text = rest.lstrip(" ").partition(" ")
    if role not in ROLES:
        raise ModelfileError(f"message role must be one of {', '.join(ROLES)}", line)
    return role, text


_READERS: dict[str, Callable[[str, str, int], tuple[str, ...]]] = {
    "from": _source,
    "adapter": _source,
    "parameter": _parameter,
    "template": _raw,
    "system": _raw,
    "license": _raw,
    "message": _message,
}


def _value(command: Command, texts: list[str]) -> Any:
    try:
        return options.from_text(command.args[0], texts)
    except BadOption as error:
        raise ModelfileError(str(error), command.line) from None


# -------------------------------------------------------------------- writing


def print(modelfile: Modelfile) -> str:
    """A text that parses to the same commands.

    Raises: ModelfileError for a text that ends in a quote or holds three in a row: no Modelfile
    can say it.
    """
    return "".join(_line(command) + "\n" for command in modelfile.commands)


def _line(command: Command) -> str:
    *words, text = command.args
    plain = command.name in ("from", "adapter", "parameter") and not set(text) & set('"\r\n')
    return " ".join([command.name.upper(), *words, text if plain else _in_quotes(command, text)])


def _in_quotes(command: Command, text: str) -> str:
    if '"""' in text or text.endswith('"'):
        raise ModelfileError(
            f"this {command.name.upper()} cannot be written: its text ends in a quote or holds "
            "three in a row"
        )
    return f'"""{text}"""'
