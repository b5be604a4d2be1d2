"""What is a model to be made of?  Both forms of a create request, as one list of commands.

modelfile "FROM llama2\\nSYSTEM be brief"        2023: a Modelfile's text, or the path of one
from "llama2", system "be brief", files {…}     today: its parts, with files as digests of blobs
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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
_OF_FOLDERS = (".safetensors", ".safetensors.index.json", ".pt", ".pth", "pytorch_model.bin")
PEFT = {"weights": "adapter_model.safetensors", "settings": "adapter_config.json"}


@dataclass(frozen=True, slots=True)
class Recipe:
    """A Modelfile, its parameters ready for JSON, and the folder that relative paths start from."""

    commands: Modelfile
    parameters: dict[str, Any]
    directory: Path | None = None
    folder: Mapping[str, str] = field(default_factory=dict)  # a checkpoint's files: name → digest


def read(ask: Create, *, local_files: bool) -> Recipe:
    """The recipe that a request gives, in either form.

    `local_files`: may it name a Modelfile of this machine by its path?
    Raises: BadRequest, ModelfileError, BadOption.
    """
    parts = tuple(_parts(ask))
    if not (ask.modelfile or ask.path):
        folder = _folder(ask.files)
        if not folder and not any(command.name == "from" for command in parts):
            raise BadRequest(
                "neither 'from' or 'files' was specified, nor a modelfile with a FROM line"
            )
        return Recipe(Modelfile(parts), _parameters(ask.parameters), folder=folder)
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
    if not _folder(ask.files):
        yield from (Command("from", (f"@{digest}",)) for digest in _digests(ask.files))
    yield from (Command("adapter", (what,)) for what in _adapters(ask.adapters))
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
        _relative(name)
        yield checked_digest(digest)


def _folder(files: Mapping[str, str]) -> dict[str, str]:
    """The files of a checkpoint's folder, if that is what they are; GGUF files are not."""
    found = {str(_relative(name)): checked_digest(digest) for name, digest in files.items()}
    if not any(name == "config.json" or name.endswith(_OF_FOLDERS) for name in found):
        return {}
    if any(name.endswith(".gguf") for name in found):
        raise BadRequest("files: a GGUF file and a folder's files are two models: send one of them")
    return found


def _adapters(files: Mapping[str, str]) -> Iterator[str]:
    """Blobs that stand for adapters; of one of PEFT's folders weights and settings, in this order.

    Example: {"a/adapter_config.json": …, "a/adapter_model.safetensors": …} is one adapter.
    """
    blobs = {_relative(name): f"@{checked_digest(digest)}" for name, digest in files.items()}
    for path, blob in blobs.items():
        other = path.with_name(PEFT["settings" if path.name == PEFT["weights"] else "weights"])
        if path.name not in PEFT.values():
            yield blob
        elif other not in blobs:
            raise BadRequest(f"adapters: {path.name} is there, but {other} is missing")
        elif path.name == PEFT["weights"]:
            yield f"{blob} {blobs[other]}"


def _relative(name: str) -> PurePosixPath:
    path = PurePosixPath(name.replace("\\", "/"))
    if ".." in path.parts or path.is_absolute() or name[1:2] == ":":
        raise BadRequest("file path must be relative")
    return path


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
