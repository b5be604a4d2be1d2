"""Asking a model from the command line: one prompt, or a conversation with commands of its own.

                 ┌─ "/…"  a command: changes Ask, or shows something
    a line ──────┤
                 └─ else  a message ──► /api/chat      what was said goes along as messages
                                    └─► /api/generate  … as `context`, where chat is refused

An answer that failed or was stopped leaves no trace in what is remembered.
"""

from __future__ import annotations

import base64
import os
import re
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from refollama import overview, terminal
from refollama.errors import BadRequest, NotFound, RefollamaError
from refollama.options import LISTS, Options, from_text
from refollama.paths import is_path

if TYPE_CHECKING:
    from refollama.client import Client
    from refollama.promptline import PromptLine

Record = dict[str, Any]
Records = Generator[Record, None, None]

HELP = """\
  /set ...              change how the model answers: '/? set' tells what there is
  /show ...             what is known of the model: '/? show' tells what there is
  /list [PREFIX]        the models there are
  /load MODEL           talk with another model, from the beginning
  /save MODEL           keep this conversation and its settings as a model
  /clear                forget what was said
  /bye, /exit, Ctrl-D   leave
  /?, /help             this text; '/? shortcuts' tells the keys

A message that begins with three quotes goes on until a line ends with three.
"""
HELP_SET = """\
  /set parameter NAME VALUE...   an option, such as temperature 0
  /set system TEXT               the system message; three quotes begin one of several lines
  /set history, nohistory        whether the arrow keys bring back what you type
  /set wordwrap, nowordwrap      whether long lines are broken between words
  /set format json, noformat     whether the answer is a JSON object
  /set think, nothink            whether a model that can think does so first
  /set verbose, quiet            whether counts and durations follow each answer
"""
HELP_SHOW = """\
  /show info          the model at a glance
  /show license       its license
  /show modelfile     a Modelfile that makes it again
  /show parameters    its options, and those of this conversation
  /show system        the system message
  /show template      the prompt template
"""
HELP_KEYS = """\
  Ctrl-A, Home      to the start of the line       Ctrl-E, End       to its end
  Ctrl-B, left      back a character               Ctrl-F, right     forward a character
  Alt-B             back a word                    Alt-F             forward a word
  Ctrl-H            delete the character before    Ctrl-D, Delete    delete the character here
  Ctrl-W            delete the word before         Ctrl-Y            put back what was deleted
  Ctrl-U            delete the line before here    Ctrl-K            delete the line from here
  up, down          earlier and later messages     Ctrl-R            search in them
  Ctrl-L            clear the screen               Ctrl-Z            put refollama to sleep
  Ctrl-C            stop the answer, or drop the line
  Ctrl-D            leave, on an empty line
"""
HELPS = {"": HELP, "set": HELP_SET, "show": HELP_SHOW, "shortcuts": HELP_KEYS}


@dataclass(frozen=True, slots=True)
class Ask:
    """What goes with every prompt, and how its answer is shown.  None: as the model has it."""

    model: str
    system: str | None = None
    options: Mapping[str, Any] | None = None
    format: Any = None  # "json" or a JSON schema
    keep_alive: str | int | None = None
    think: bool | str | None = None
    raw: bool | None = None  # the prompt is what the model sees
    wordwrap: bool = True
    verbose: bool = False
    hides_thinking: bool = False

    def fields(self) -> Record:
        """The part of a request that generate and chat share."""
        return {
            "options": dict(self.options) if self.options else None,
            "format": self.format,
            "keep_alive": self.keep_alive,
            "think": self.think,
            "progress": sys.stderr.isatty() or None,
        }


@dataclass(slots=True)
class Told:
    """An answer as it was shown: its text, what was thought before, and the final record."""

    text: str = ""
    thinking: str = ""
    final: Record = field(default_factory=dict)


# --- one answer ------------------------------------------------------------------------------


def complete(client: Client, ask: Ask, prompt: str) -> None:
    """Show the answer to one prompt; an empty prompt only loads the model."""
    text, images = see(client, ask, prompt)
    told = tell(_generate(client, ask, text, images=images), ask, bool(prompt))
    if prompt:
        print(flush=True)
    show_statistics(ask, told)


def _generate(client: Client, ask: Ask, prompt: str, **fields: Any) -> Records:
    more = {"system": ask.system, "raw": ask.raw, **ask.fields(), **fields}
    return client.generate(ask.model, prompt, **more)


def tell(records: Records, ask: Ask, thinks: bool = True) -> Told:
    """Show an answer as it comes, on standard output; leaving early cancels it."""
    told = Told()
    with closing(records):
        waiting = terminal.until_first(records, "thinking" if thinks else "loading")
        told.text = terminal.show_answer(_pieces(waiting, told, ask.hides_thinking), ask.wordwrap)
    return told


def _pieces(records: Iterator[Record], told: Told, hides_thinking: bool) -> Iterator[str]:
    """The texts of an answer; `told` takes all else that the records say."""
    thinking = terminal.Thinking(hides_thinking)
    for told.final in records:
        message = told.final.get("message") or told.final
        thought = message.get("thinking") or ""
        told.thinking += thought
        thinking.show(thought)
        if text := message.get("content") or message.get("response"):
            thinking.end()
            yield text


def show_statistics(ask: Ask, told: Told) -> None:
    """Counts and durations, on standard error, if they are wanted."""
    if ask.verbose:
        print(terminal.statistics(told.final), file=sys.stderr, flush=True)


# --- what was said ---------------------------------------------------------------------------


class Memory(Protocol):
    """What makes a conversation of single requests."""

    def ask(self, client: Client, ask: Ask, text: str, images: list[str] | None) -> Records:
        """The answer to a message, given all that was said before."""

    def keep(self, text: str, images: list[str] | None, told: Told) -> None:
        """Remember a message that was answered."""

    def messages(self) -> list[Record]:
        """What was said, for a model that is to go on from here."""

    def clear(self) -> None:
        """Forget all of it."""


class Messages:
    """Every message goes along each time: nothing is remembered but here."""

    def __init__(self) -> None:
        self._turns: list[Record] = []

    def ask(self, client: Client, ask: Ask, text: str, images: list[str] | None) -> Records:
        """Through /api/chat."""
        system = [{"role": "system", "content": ask.system}] if ask.system else []
        return client.chat(ask.model, [*system, *self._turns, _user(text, images)], **ask.fields())

    def keep(self, text: str, images: list[str] | None, told: Told) -> None:
        """Both sides, with what was shown and thought."""
        answer = {"role": "assistant", "content": told.text}
        if told.thinking:
            answer["thinking"] = told.thinking
        self._turns += [_user(text, images), answer]

    def messages(self) -> list[Record]:
        """As they were sent, without images, which no model file can hold."""
        return [{"role": turn["role"], "content": turn["content"]} for turn in self._turns]

    def clear(self) -> None:
        """An empty list."""
        self._turns = []


class Context:
    """Token ids that the last answer gave stand for all that was said."""

    def __init__(self) -> None:
        self._ids: list[int] | None = None
        self._images: list[str] | None = None  # the last ones: no ids stand for pictures
        self._said: list[Record] = []

    def ask(self, client: Client, ask: Ask, text: str, images: list[str] | None) -> Records:
        """Through /api/generate."""
        images = images or self._images
        return _generate(client, ask, text, context=self._ids, images=images)

    def keep(self, text: str, images: list[str] | None, told: Told) -> None:
        """The ids, and the pictures."""
        self._ids, self._images = told.final.get("context"), images or self._images
        self._said += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": told.text},
        ]

    def messages(self) -> list[Record]:
        """As text: ids mean nothing to another model."""
        return list(self._said)

    def clear(self) -> None:
        """No ids."""
        self._ids, self._images, self._said = None, None, []


def _user(text: str, images: list[str] | None) -> Record:
    return {"role": "user", "content": text, **({"images": images} if images else {})}


def begin(client: Client, ask: Ask) -> Memory:
    """Load the model, and find out by which route it talks.

    Raises: RefollamaError if it does not load.
    """
    if not ask.raw:
        try:
            tell(client.chat(ask.model, [], **ask.fields()), ask, thinks=False)
            return Messages()
        except (BadRequest, NotFound):  # no chat here; or no such model, as the next line tells
            pass
    tell(_generate(client, replace(ask, system=None), ""), ask, thinks=False)
    return Context()


def look(client: Client, model: str, verbose: bool = False) -> Record:
    """What the server says of a model.

    Raises: BadRequest for a file that is run where it lies: only names have an entry to show.
    """
    if is_path(model):
        raise BadRequest(f"{model} has no name: make a model of it with 'refollama create' first")
    return client.show(model, verbose=verbose)


# --- images ----------------------------------------------------------------------------------

# A path that says so by its beginning, up to the nearest ending of an image; spaces are allowed.
# One may begin inside another: in "and/or ./cat.png" it is the second that is a file.
_IMAGE = re.compile(
    r"(?=((?:\./|~/|/)(?:\\.|[^\\\n])*?\.(?:jpe?g|png|webp|gif|bmp|svg)\b))", re.IGNORECASE
)


def see(client: Client, ask: Ask, text: str) -> tuple[str, list[str] | None]:
    """A prompt without the paths of images, and the images in base64.

    A model without vision gets the text as it is, and the user is told.
    """
    paths = _pictures(text)
    if not paths:
        return text, None
    if not _has_vision(client, ask.model):
        terminal.note(f"'{ask.model}' has no vision: it reads {', '.join(paths)} as text")
        return text, None
    for name in paths:
        terminal.note(f"added image '{name}'")
        for quote in ("'", '"', ""):
            text = text.replace(f"{quote}{name}{quote}", "")
    images = [base64.b64encode(path.read_bytes()).decode() for path in paths.values()]
    return text.strip(), images


def _pictures(text: str) -> dict[str, Path]:
    """The paths in a text that lead to a file, as they are written there."""
    found, end = {}, 0
    for match in _IMAGE.finditer(text):
        path = _path(match[1])
        if match.start() >= end and os.path.isfile(path):
            found[match[1]] = path
            end = match.end(1)
    return found


def _path(name: str) -> Path:
    """As a shell would read it: a backslash takes the next character as it is."""
    return Path(re.sub(r"\\(.)", r"\1", name)).expanduser()


def _has_vision(client: Client, model: str) -> bool:
    try:
        record = look(client, model)
    except (BadRequest, NotFound):  # a file, or a server that does not tell
        return False
    families = (record.get("details") or {}).get("families") or []  # of servers from 2023
    return "vision" in (record.get("capabilities") or []) or "clip" in families


# --- the conversation ------------------------------------------------------------------------


class Talk:
    """Asks for a line, answers it, and so on until the user leaves.

    `named` makes of what the user calls a model what the server calls it.
    """

    def __init__(
        self, client: Client, ask: Ask, line: PromptLine, named: Callable[[str], str]
    ) -> None:
        self._client, self._ask, self._line, self._named = client, ask, line, named
        self._memory = begin(client, ask)

    def run(self) -> None:
        """Returns when the user leaves."""
        for text in self._line.messages():
            if text.strip() in ("/bye", "/exit"):
                return
            self._survive(text)

    def _survive(self, text: str) -> None:
        """What goes wrong with one line is told, and the next one asked for."""
        try:
            if is_command(text):
                self._obey(text.strip())
            elif text.strip():
                self._turn(text)
        except KeyboardInterrupt:
            print("\n", flush=True)
        except RefollamaError as problem:
            print(f"Error: {problem}\n", file=sys.stderr, flush=True)
        except OSError as problem:
            print(f"Error: {problem.strerror or problem}\n", file=sys.stderr, flush=True)

    def _turn(self, message: str) -> None:
        text, images = see(self._client, self._ask, message)
        told = tell(self._memory.ask(self._client, self._ask, text, images), self._ask)
        self._memory.keep(text, images, told)
        print("\n", flush=True)
        show_statistics(self._ask, told)

    # --- commands

    def _obey(self, line: str) -> None:
        command, rest = _split(line)
        if action := _COMMANDS.get(command):
            action(self, rest)
        else:
            _unknown(command)

    def _help(self, topic: str) -> None:
        print(HELPS.get(topic.removeprefix("/"), HELP))

    def _clear(self, _: str) -> None:
        self._memory.clear()
        print("Forgotten: the conversation begins anew.")

    def _list(self, prefix: str) -> None:
        rows = map(overview.list_row, self._client.tags())
        print(terminal.table(overview.LIST, [row for row in rows if row[0].startswith(prefix)]))

    def _load(self, name: str) -> None:
        """The new model first: if it does not load, the old one stays."""
        ask = replace(self._ask, model=self._named(_needed(name, "/load MODEL")))
        self._memory, self._ask = begin(self._client, ask), ask

    def _save(self, name: str) -> None:
        made: Record = {
            "from": self._ask.model,
            "system": self._ask.system,
            "parameters": dict(self._ask.options) if self._ask.options else None,
            "messages": self._all_messages(),
        }
        records = self._client.create(_needed(name, "/save MODEL"), **made)
        with closing(records), terminal.spinner("saving"):
            for _ in records:
                pass
        print(f"Created new model '{name}'")

    def _all_messages(self) -> list[Record] | None:
        """Those of the model, which stand before all that is said here, and ours.  None: as it is.

        A list would take the place of the model's own.
        """
        said, model = self._memory.messages(), self._ask.model
        if not said or is_path(model):
            return said or None
        return [*(look(self._client, model).get("messages") or []), *said]

    def _show(self, rest: str) -> None:
        record = None if not rest else look(self._client, self._ask.model)
        if record is None:
            print(HELP_SHOW)
        elif rest == "info":
            print(terminal.printable(overview.overview(record)))
        elif rest in overview.PARTS:
            print(terminal.printable(self._part(record, rest)))
        else:
            _unknown(f"/show {rest}")

    def _part(self, record: Record, name: str) -> str:
        """What is set here goes before what the model has."""
        if name == "system" and self._ask.system:
            return self._ask.system
        if name == "parameters" and self._ask.options:
            ours = overview.parameters(self._ask.options)
            theirs = record.get("parameters")
            more = f"\n\nModel defined parameters:\n{theirs}" if theirs else ""
            return f"User defined parameters:\n{ours}{more}"
        return overview.part(record, name)

    def _set(self, rest: str) -> None:
        name, value = _split(rest)
        if not name:
            print(HELP_SET)
        elif name in _SWITCHES and not value:
            self._ask = replace(self._ask, **_SWITCHES[name])
            print(f"Set '{name}' mode.")
        elif setting := _SETTINGS.get(name):
            setting(self, value)
        else:
            _unknown(f"/set {rest}")

    def _set_history(self, _: str) -> None:
        self._line.remember(True)

    def _set_nohistory(self, _: str) -> None:
        self._line.remember(False)

    def _set_parameter(self, value: str) -> None:
        name, text = _split(_needed(value, "/set parameter NAME VALUE"))
        texts = text.split() if name in LISTS else [text]
        try:
            options = {**(self._ask.options or {}), name: from_text(name, texts)}
            Options().updated(options, strict=True)
        except BadRequest as problem:
            raise BadRequest(f'Couldn\'t set parameter: "{problem}"') from None
        self._ask = replace(self._ask, options=options)
        print(f"Set parameter '{name}' to '{', '.join(texts)}'")

    def _set_system(self, text: str) -> None:
        self._ask = replace(self._ask, system=_needed(text, "/set system TEXT"))
        print("Set system message.")

    def _set_format(self, value: str) -> None:
        if value != "json":
            raise BadRequest("Invalid or missing format. For 'json' mode use '/set format json'")
        self._ask = replace(self._ask, format=value)
        print("Set format to 'json' mode.")

    def _set_noformat(self, _: str) -> None:
        self._ask = replace(self._ask, format=None)
        print("Disabled format.")


_Action = Callable[[Talk, str], None]

_COMMANDS: dict[str, _Action] = {
    "/?": Talk._help,
    "/help": Talk._help,
    "/set": Talk._set,
    "/show": Talk._show,
    "/list": Talk._list,
    "/load": Talk._load,
    "/save": Talk._save,
    "/clear": Talk._clear,
}
_SETTINGS: dict[str, _Action] = {
    "parameter": Talk._set_parameter,
    "system": Talk._set_system,
    "history": Talk._set_history,
    "nohistory": Talk._set_nohistory,
    "format": Talk._set_format,
    "noformat": Talk._set_noformat,
}
_SWITCHES: dict[str, Record] = {
    "wordwrap": {"wordwrap": True},
    "nowordwrap": {"wordwrap": False},
    "verbose": {"verbose": True},
    "quiet": {"verbose": False},
    "think": {"think": True},
    "nothink": {"think": False},
}


def is_command(text: str) -> bool:
    """Whether a line is for us and not for the model: it begins with `/`, but not with a path.

    Example: /bye, /nonsense are; /etc/hosts, /home/me/cat.png are not
    """
    return bool(re.match(r"\s*/[^/\s]*(\s|$)", text))


def _split(text: str) -> tuple[str, str]:
    """The first word, and what follows it."""
    first, *rest = text.split(None, 1) or [""]
    return first, rest[0] if rest else ""


def _needed(value: str, usage: str) -> str:
    if not value:
        raise BadRequest(f"usage: {usage}")
    return value


def _unknown(command: str) -> None:
    print(f"Unknown command '{command}'. Type /? for help")
