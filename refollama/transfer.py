"""Models that come to this machine or leave it, from the command line.

    pull NAME                  registry → store   ┐ by the server; what is interrupted goes on
    push NAME                  store → registry   ┘ from there the next time
    pull ./tale.gguf [NAME]    disk → store         as `create` would, from a Modelfile of one line

`run` pulls what the server does not have, as Ollama does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from refollama import terminal
from refollama.errors import (
    BadRequest,
    NotFound,
    RefollamaError,
    RegistryError,
    ServerUnreachable,
    Unauthorized,
)
from refollama.host import base_url, on_this_machine
from refollama.paths import is_path
from refollama.store import Name
from refollama.store import modelfile as modelfiles
from refollama.upload import with_blobs

if TYPE_CHECKING:
    from refollama.client import Client

T = TypeVar("T")
Records = Generator[dict[str, Any], None, None]

MODELFILE = "Modelfile"
LONGEST_NAME = 80  # characters, by the grammar of names


# --- registries ------------------------------------------------------------------------------


def pull(client: Client, model: str, insecure: bool = False) -> None:
    """Fetch a model, and show how it goes.  Raises: all that the client raises."""
    again = f"refollama pull {'--insecure ' if insecure else ''}{model}"
    _show(client.pull(model, insecure), f"what was fetched stays: '{again}' goes on from there")


def push(client: Client, model: str, insecure: bool = False) -> None:
    """Send a model, and show how it goes.  Raises: all that the client raises."""
    again = f"refollama push {'--insecure ' if insecure else ''}{model}"
    _show(client.push(model, insecure), f"what the registry has stays: '{again}' sends the rest")


def with_pull(client: Client, model: str, insecure: bool, ask: Callable[[], T]) -> T:
    """What `ask` gives; a model that the server does not have is pulled, and asked for once more.

    Raises: NotFound, with the reason, if it is not to be had; and all that `ask` raises.
    """
    try:
        return ask()
    except NotFound:
        if is_path(model):
            raise
    try:
        pull(client, model, insecure)
    except ServerUnreachable:
        raise  # ours has gone: that is another story
    except RefollamaError as problem:
        raise NotFound(f"model '{model}' not found, and pulling it failed: {problem}") from None
    return ask()


def _show(records: Records, advice: str) -> None:
    """Whoever stops it is told that not all is lost."""
    try:
        with closing(records):
            terminal.show_progress(records)
    except KeyboardInterrupt:
        terminal.note(advice)
        raise


# --- logins ----------------------------------------------------------------------------------


def login_host(text: str) -> str:
    """The host of a registry, as it stands in names of models.

    Raises: BadName; BadRequest if the server is on another machine: it has logins of its own.
    """
    url = base_url(os.environ)
    if not on_this_machine(url):
        raise BadRequest(f"the server at {url} would not see this: log in on its machine")
    return _somewhere(text.rstrip("/")).host


def login(host: str, user: str, password: str, insecure: bool = False) -> None:
    """Keep them for the next pull or push, unless the registry does not accept them.

    A registry that cannot be asked now is no reason to refuse them; it is told.
    Raises: Unauthorized, BadRequest; StoreError and its kin.
    """
    from refollama.store.registry import Registry, logins

    given = logins.checked(user, password)
    try:
        with (
            Registry(_somewhere(host), insecure=insecure, login=given) as registry,
            terminal.spinner(f"asking {host}"),
        ):
            registry.knock()
    except Unauthorized as problem:
        raise Unauthorized(f"this login is not kept: {problem}") from None
    except RegistryError as problem:
        terminal.note(f"this login could not be tried: {problem}")
    logins.store(host, user, password)


def _somewhere(host: str) -> Name:
    """A name at a registry, of a model that need not be there."""
    return Name.parse(f"{host}/namespace/model")


def logout(host: str) -> None:
    """Forget them.  Raises: NotFound."""
    from refollama.store.registry import logins

    if not logins.forget(host):
        raise NotFound(f"there is no login for '{host}'")


# --- from disk -------------------------------------------------------------------------------


class OnDisk(NamedTuple):
    """What is to be made of a file or a folder."""

    name: str
    modelfile: str
    folder: Path  # where relative paths in it start


def on_disk(path: Path, name: str | None = None) -> OnDisk:
    """A GGUF file, or a folder with a Modelfile, a checkpoint or a single GGUF file.

    name: instead of its own.

    Raises: NotFound, BadRequest, OSError.
    """
    path = path.absolute()
    if not path.exists():
        raise NotFound(f"{path}: there is no such file or folder")
    if not path.is_dir():
        return _of_file(path, name or _named_after(path))
    name = name or _named_after(path.resolve())
    if (path / MODELFILE).is_file():
        return OnDisk(name, read_text(path / MODELFILE), path)
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return OnDisk(name, modelfiles.line(modelfiles.Command("from", (".",))), path)
    return _of_file(_only_gguf(path), name)


def to_create(name: str, modelfile: Path, source: Path | None) -> OnDisk:
    """A Modelfile, unless there is a file or a folder to make the model of.

    Raises: NotFound, BadRequest, OSError.
    """
    if source is not None:
        return on_disk(source.expanduser(), name)
    return OnDisk(name, read_text(modelfile), modelfile.absolute().parent)


def make(client: Client, source: OnDisk, quantize: str | None = None) -> None:
    """A model out of it, and how that goes; a server on another machine is sent the files.

    quantize: the type that its weights are to be packed as.
    Raises: OSError, and all that the client raises.
    """
    near = on_this_machine(client.url)
    text = source.modelfile if near else with_blobs(client, source.modelfile, source.folder)
    folder = str(source.folder) if near else None
    fields = {"quantize": quantize} if quantize else {}
    with closing(client.create(source.name, text, folder, **fields)) as records:
        terminal.show_progress(records)


def read_text(path: Path) -> str:
    """A Modelfile.  Raises: BadRequest if it is no text; OSError."""
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise BadRequest(f"{path}: not UTF-8 text") from None


def _of_file(path: Path, name: str) -> OnDisk:
    source = modelfiles.Command("from", (f"./{path.name}",))
    return OnDisk(name, modelfiles.line(source), path.parent)


def _only_gguf(folder: Path) -> Path:
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".gguf")
    if not found:
        raise NotFound(f"{folder}: there is neither a Modelfile nor a GGUF file in it")
    if len(found) > 1:
        names = ", ".join([*(path.name for path in found[:3]), "…"][: len(found)])
        raise BadRequest(f"{folder} has {len(found)} GGUF files ({names}): name one of them")
    return found[0]


def _named_after(path: Path) -> str:
    """A model's name out of a file's.  Example: `my tale (v1.5).gguf` → my-tale-v1.5"""
    stem = path.stem if path.suffix.lower() == ".gguf" else path.name
    plain = re.sub(r"[^A-Za-z0-9_.]+", "-", re.sub(r"\.{2,}", ".", stem))
    name = plain[:LONGEST_NAME].strip("-.")
    if not name:
        raise BadRequest(f"no name for a model follows from {path}: say one behind it")
    return name
