"""Files that a Modelfile names, sent to a server on another machine.

Such a server cannot read this one's disk: each file goes to it as a blob, named by its SHA-256, and
the Modelfile that it gets says `@sha256:…` where the path stood. What it has already is not sent.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from refollama import terminal
from refollama.store import modelfile as modelfiles
from refollama.store.recipe import PEFT

if TYPE_CHECKING:
    from refollama.client import Client

CHUNK = 1 << 20  # bytes that are read at once

_FILE_LINE = re.compile(r"([ \t]*(?:FROM|ADAPTER)[ \t]+)(\S.*?)(\s*)", re.IGNORECASE)


def with_blobs(client: Client, modelfile: str, directory: Path) -> str:
    """The same Modelfile with digests in place of files, which the server has by then.

    A checkpoint's folder becomes GGUF files first. Names of models stay as they are, and so do
    paths that lead to no file here. What looks like such a line inside of a text is text: no file
    leaves this machine by accident.
    Raises: ModelfileError, OSError, and all that the client raises.
    """
    from refollama.convert import is_checkpoint

    lines = modelfile.removeprefix("\ufeff").split("\n")
    for command in modelfiles.parse(modelfile).commands:
        if command.name not in ("from", "adapter"):
            continue
        path = directory / os.path.expanduser(command.args[0].strip())
        line = _FILE_LINE.fullmatch(lines[command.line - 1])
        if line and path.is_file():
            lines[command.line - 1] = f"{line[1]}@{send(client, path)}{line[3]}"
        elif line and command.name == "adapter" and (path / PEFT["settings"]).is_file():
            both = " ".join(f"@{send(client, path / name)}" for name in PEFT.values())
            lines[command.line - 1] = f"{line[1]}{both}{line[3]}"
        elif line and command.name == "from" and is_checkpoint(path):
            digests = send_converted(client, path)
            lines[command.line - 1] = "\n".join(f"{line[1]}@{each}{line[3]}" for each in digests)
    return "\n".join(lines)


def send_converted(client: Client, folder: Path) -> list[str]:
    """Send a checkpoint as the GGUF files that it becomes; gives their digests.

    Raises: as `send` does, and FormatError, UnsupportedModel, before anything is sent.
    """
    from refollama.convert import as_files

    with ExitStack() as converted:
        with terminal.counter(f"converting {folder.name}", "bytes") as moved:
            paths = converted.enter_context(as_files(folder, moved))
        return [send(client, path) for path in paths]


def send(client: Client, path: Path) -> str:
    """Send a file, unless the server has it; gives its digest.  Raises: OSError, RefollamaError."""
    size = path.stat().st_size
    sha = hashlib.sha256()
    with terminal.bar(f"reading {path.name}", size) as moved:
        for chunk in _chunks(path, moved):
            sha.update(chunk)
    digest = f"sha256:{sha.hexdigest()}"
    if not client.has_blob(digest):
        with terminal.bar(f"sending {path.name}", size) as moved:
            client.send_blob(digest, _chunks(path, moved))
    return digest


def _chunks(path: Path, moved: Callable[[int], None]) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk
            moved(len(chunk))
