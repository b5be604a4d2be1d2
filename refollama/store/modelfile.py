"""Modelfiles: text to commands and back.

    FROM llama2                      a model, a file, or @sha256:<digest> of a blob in the store
    PARAMETER temperature 0.7        one line per value; `stop` may come several times
    SYSTEM \"\"\"You are Mario.\"\"\"      also TEMPLATE and LICENSE; the text is taken as it is
    # a comment

The cutting into items is Ollama's of December 2023, because Modelfiles were written against it: a
quote anywhere in a line opens a text, which may run over several lines; what follows its closing
quote on that line is lost; there are no escapes. Three things are mended, so that nearly every
text can be said: a last line without a newline is read as if it had one; three quotes protect the
spaces of a parameter; of more than three quotes in a row the last three close.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
    for item in _items(text.removeprefix("\ufeff")):  # the mark that some editors leave
        if item.name in _READERS:
            commands.append(Command(item.name, _READERS[item.name](item), item.line))
        elif item.name in _GONE:
            raise ModelfileError(_GONE[item.name], item.line)
        elif item.name and not item.name.startswith("#"):
            log.warning("Modelfile: line %d: unknown command %.80r ignored", item.line, item.word)
    modelfile = Modelfile(tuple(commands))
    if not modelfile.all("from"):
        raise ModelfileError("no FROM line for the model was specified")
    modelfile.parameters()  # each value is checked
    return modelfile


_GONE = {
    "embed": "EMBED is no longer supported: use the embeddings endpoint of the API instead",
    "prompt": "PROMPT is no longer supported: use TEMPLATE instead",
}


class _Item(NamedTuple):
    """A line, or a line whose quoted part runs on."""

    word: str
    rest: str  # behind the first space
    kept: int  # so many characters at its end stood between three quotes
    line: int

    @property
    def name(self) -> str:
        return self.word.lower()


def _items(text: str) -> Iterator[_Item]:
    if not text.endswith("\n"):
        text += "\n"
    start, line = 0, 1
    while start < len(text):
        end_of_line = text.index("\n", start)
        item, kept, end = _quoted(text, start, end_of_line) or (
            text[start:end_of_line].removesuffix("\r"),
            0,
            end_of_line + 1,
        )
        word, _, rest = item.partition(" ")
        yield _Item(word, rest, min(kept, len(rest)), line)
        line += text.count("\n", start, end)
        start = end


def _quoted(text: str, start: int, end_of_line: int) -> tuple[str, int, int] | None:
    """The item of a line that opens a text which is closed somewhere, and where that ends."""
    for mark in ('"""', '"'):
        opened = text.find(mark, start, end_of_line)
        closed = text.find(mark, opened + len(mark)) if opened >= 0 else -1
        if closed >= 0:
            while mark == '"""' and text.startswith('"', closed + 3):
                closed += 1
            inner = text[opened + len(mark) : closed]
            kept = len(inner) if mark == '"""' else 0
            return text[start:opened] + inner, kept, closed + len(mark)
    return None


def _source(item: _Item) -> tuple[str, ...]:
    if not item.rest.strip():
        raise ModelfileError(f"{item.word.upper()} needs an argument", item.line)
    return (item.rest.strip(),)


def _parameter(item: _Item) -> tuple[str, ...]:
    key, *values = item.rest.split(None, 1)[:2] or [""]
    if not key:
        raise ModelfileError("PARAMETER needs a name and a value", item.line)
    value = "".join(values).strip()
    if item.kept and (front := item.rest[: -item.kept].split(None, 1))[:1] == [key]:
        value = "".join(front[1:]) + item.rest[-item.kept :]
    if not value:
        raise ModelfileError(f"missing value for [{key[:80]}]", item.line)
    return key, value


def _raw(item: _Item) -> tuple[str, ...]:
    return (item.rest,)


def _message(item: _Item) -> tuple[str, ...]:
    role, _, text = item.rest.lstrip(" ").partition(" ")
    if role not in ROLES:
        raise ModelfileError(f"message role must be one of {', '.join(ROLES)}", item.line)
    return role, text


_READERS: dict[str, Callable[[_Item], tuple[str, ...]]] = {
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

    Raises: ModelfileError for a text with three quotes in a row inside: no Modelfile can say it.
    """
    return "".join(line(command) + "\n" for command in modelfile.commands)


def line(command: Command) -> str:
    """One command of a Modelfile, as Ollama writes it; several lines if its text has them.

    Raises: ModelfileError, as `print` does.
    """
    *words, text = command.args
    word = " ".join([command.name.upper(), *words])
    if command.name in ("template", "system", "license", "message"):
        return f"{word} {_in_quotes(command, text)}"
    if set(text) & set('"\r\n') or text != text.strip():
        return f"{word} {_in_quotes(command, text)}"
    return f'{word} "{text}"' if words == ["stop"] else f"{word} {text}"


def _in_quotes(command: Command, text: str) -> str:
    if '"""' in text.rstrip('"'):
        raise ModelfileError(
            f"this {command.name.upper()} cannot be written: its text holds three quotes in a row"
        )
    return f'"""{text}"""'
