"""What is a model to be made of?  Both forms of a create request, as one list of commands.

modelfile "FROM llama2\\nSYSTEM be brief"        2023: a Modelfile's text, or the path of one
from "llama2", system "be brief", files {…}     today: its parts, with files as digests of blobs
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from refollama.errors import BadRequest, ModelfileError
from refollama.messages import Create
from refollama.options import Options
from refollama.store import modelfile as modelfiles
from refollama.store.blobs import checked_digest, regular
from refollama.store.manifest import as_float32
from refollama.store.modelfile import Command, Modelfile

LARGEST_MODELFILE = 4 << 20  # bytes; as much as any one text of a model may have


@dataclass(frozen=True, slots=True)
class Recipe:
    """A Modelfile, its parameters ready for JSON, and the folder that relative paths start from."""

    commands: Modelfile
    parameters: dict[str, Any]
    directory: Path | None = None


def read(ask: Create, *, local_files: bool) -> Recipe:
    """The recipe that a request gives, in either form.

    `local_files`: may it name a Modelfile of this machine by its path?
    Raises: BadRequest, ModelfileError, BadOption.
    """
    parts = tuple(_parts(ask))
    if not (ask.modelfile or ask.path):
        if not any(command.name == "from" for command in parts):
            raise BadRequest(
                "neither 'from' or 'files' was specified, nor a modelfile with a FROM line"
            )
        return Recipe(Modelfile(parts), _parameters(ask.parameters))
    if parts or ask.parameters:
        raise BadRequest("give a modelfile, or from, files, system and so on, but not both")
    directory = _directory(ask) if local_files else None
    commands = modelfiles.parse(ask.modelfile or _text_at(ask.path, local_files))
    return Recipe(commands, _parameters(commands.parameters()), directory)


# -------------------------------------------------------------------- today's form


def _parts(ask: Create) -> Iterator[Command]:
    """Its fields as the commands of a Modelfile; their line is 0."""
    if ask.from_:
        yield Command("from", (ask.from_.strip(),))
    yield from (Command("from", (f"@{digest}",)) for digest in _digests(ask.files))
    if len(ask.adapters) > 1:
        raise BadRequest("only one adapter is currently supported")
    yield from (Command("adapter", (f"@{digest}",)) for digest in _digests(ask.adapters))
    for name, text in (("template", ask.template), ("system", ask.system)):
        if text:
            yield Command(name, (text,))
    yield from (Command("license", (text,)) for text in ask.licenses if text)
    for turn in ask.messages:
        if turn.role not in modelfiles.ROLES:
            raise BadRequest(f"message role must be one of {', '.join(modelfiles.ROLES)}")
        yield Command("message", (turn.role, turn.content))


def _digests(files: Mapping[str, str]) -> Iterator[str]:
    """The blobs that stand for files; their names say only what they were."""
    for name, digest in files.items():
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if ".." in parts or parts[:1] == ("/",) or name[1:2] == ":":
            raise BadRequest("file path must be relative")
        if name.endswith((".safetensors", ".safetensors.index.json")):
            raise BadRequest("safetensors files cannot be imported yet: send a GGUF file")
        yield checked_digest(digest)


def _parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """Checked values, ready for JSON; numbers with a fraction as wide as Ollama stores them."""
    known = {name: value for name, value in given.items() if value is not None}
    options = Options().updated(known, strict=True)
    return {name: _stored(name, getattr(options, name)) for name in known}


def _stored(name: str, value: Any) -> Any:
    if isinstance(value, tuple):
        return [_stored(name, item) for item in value]
    if isinstance(value, str):
        return _writable(name, value)
    try:
        return as_float32(value) if isinstance(value, float) else value
    except OverflowError:
        raise BadRequest(f"parameter '{name}' is too large: {value}") from None


def _writable(name: str, text: str) -> str:
    """The text, if UTF-8 can say it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRequest(f"parameter '{name}': half a surrogate pair is no character") from None
    return text


# -------------------------------------------------------------------- the form of 2023


def _directory(ask: Create) -> Path | None:
    """Where relative paths start: said so, or where the Modelfile lies."""
    if ask.directory:
        return Path(ask.directory)
    return _expanded(ask.path).parent if ask.path else None


def _text_at(path: str, local_files: bool) -> str:
    if not local_files:
        raise BadRequest(
            "the path of a Modelfile is only allowed from the machine that the server runs on: "
            "send its text as modelfile"
        )
    with regular(_expanded(path)) as file:
        data = file.read(LARGEST_MODELFILE + 1)
    if len(data) > LARGEST_MODELFILE:
        raise ModelfileError(f"longer than {LARGEST_MODELFILE >> 20} MiB")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ModelfileError("this is not a text in UTF-8") from None


def _expanded(path: str) -> Path:
    """With `~` as the home folder. A user who does not exist leaves the path as it is."""
    try:
        return Path(os.path.expanduser(path))
    except ValueError:  # NUL, or half a surrogate pair, in the user's name
        return Path(path)
