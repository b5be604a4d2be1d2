"""Manifests: which blobs make up a model.  The one place of on-disk JSON names and media types.

    manifests/<host>/<namespace>/<model>/<tag>
        {"schemaVersion":2,"mediaType":"…","config":{layer},"layers":[{layer},…]}
        layer = {"mediaType":"…","digest":"sha256:…","size":bytes,"from":"parent"}

A model's id is the hash of these bytes, so they are written as Ollama writes them, to the byte.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from refollama.errors import BadName, BadRequest, FormatError, ModelNotFound, StoreError
from refollama.messages import Message
from refollama.store.blobs import checked_digest, disk, read_small, sync, temporary
from refollama.store.name import Name

log = logging.getLogger(__name__)

READ_LIMIT = 4 << 20  # bytes; a manifest has a few thousand, a hostile one may never end

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG = "application/vnd.docker.container.image.v1+json"
MODEL = "application/vnd.ollama.image.model"
PROJECTOR = "application/vnd.ollama.image.projector"
ADAPTER = "application/vnd.ollama.image.adapter"
TEMPLATE = "application/vnd.ollama.image.template"
PROMPT = "application/vnd.ollama.image.prompt"  # the old name of a template
SYSTEM = "application/vnd.ollama.image.system"
PARAMS = "application/vnd.ollama.image.params"
LICENSE = "application/vnd.ollama.image.license"
MESSAGES = "application/vnd.ollama.image.messages"


# -------------------------------------------------------------------- the records


@dataclass(frozen=True, slots=True)
class Layer:
    """One blob of a model and what it is for."""

    media_type: str
    digest: str
    size: int  # bytes
    from_: str = ""  # short name of the model that it was inherited from

    @property
    def short(self) -> str:
        """Enough of its digest to know it again."""
        return self.digest.removeprefix("sha256:")[:12]

    def to_dict(self) -> dict[str, Any]:
        base = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        return base | ({"from": self.from_} if self.from_ else {})


@dataclass(frozen=True, slots=True)
class Manifest:
    """The blobs of a model: its config, and its layers in order of addition."""

    config: Layer
    layers: tuple[Layer, ...]

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """Raises: FormatError for anything that is not shaped like a manifest."""
        top = read_object(data, "manifest")
        if top.get("schemaVersion") != 2:
            raise FormatError("manifest: schemaVersion must be 2")
        layers = top.get("layers")
        layers = [] if layers is None else layers  # Go's empty list may be null
        if not isinstance(layers, list):
            raise FormatError("manifest: layers must be a list")
        return cls(_layer(top.get("config")), tuple(_layer(layer) for layer in layers))

    def to_bytes(self, *, newline: bool = True) -> bytes:
        """As Ollama writes what it creates; what it pulls has no newline."""
        text = to_json(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": self.config.to_dict(),
                "layers": [layer.to_dict() for layer in self.layers],
            }
        )
        return (text + "\n" * newline).encode()

    @property
    def size(self) -> int:
        """Of all blobs together, in bytes."""
        return self.config.size + sum(layer.size for layer in self.layers)

    @property
    def digests(self) -> frozenset[str]:
        return frozenset(layer.digest for layer in (self.config, *self.layers))


@dataclass(frozen=True, slots=True)
class Config:
    """What a model is, in words for people; computed once, when it is created."""

    format: str = ""  # "gguf"
    family: str = ""  # "llama"
    families: tuple[str, ...] | None = None
    parameter_size: str = ""  # "7B"
    quantization_level: str = ""  # "Q4_0"

    @classmethod
    def parse(cls, data: bytes) -> Config:
        """Registries leave fields out; a field of the wrong type is a FormatError."""
        top = read_object(data, "config")
        families = top.get("model_families")
        if families is not None and not _is_texts(families):
            raise FormatError("config: model_families must be a list of texts")
        return cls(
            format=_text(top, "model_format"),
            family=_text(top, "model_family"),
            families=None if families is None else tuple(families),
            parameter_size=_text(top, "model_type"),
            quantization_level=_text(top, "file_type"),
        )

    def to_bytes(self, digests: Iterable[str]) -> bytes:
        """The config blob of a model with these layers."""
        config = {
            "model_format": self.format,
            "model_family": self.family,
            "model_families": None if self.families is None else list(self.families),
            "model_type": self.parameter_size,
            "file_type": self.quantization_level,
            # constants, whatever the host: equal models have equal ids
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": list(digests)},
        }
        return (to_json(config) + "\n").encode()

    def details(self) -> dict[str, Any]:
        """As /api/tags and /api/show tell them."""
        return {
            "format": self.format,
            "family": self.family,
            "families": None if self.families is None else list(self.families),
            "parameter_size": self.parameter_size,
            "quantization_level": self.quantization_level,
        }


def params_to_bytes(parameters: Mapping[str, Any]) -> bytes:
    """The blob of a model's parameters, its keys sorted."""
    return (to_json({key: parameters[key] for key in sorted(parameters)}) + "\n").encode()


def params_from_bytes(data: bytes) -> dict[str, Any]:
    """Parameters as a Modelfile can have set them; their names and ranges are Options' business."""
    found = read_object(data, "params")
    for name, value in found.items():
        finite = isinstance(value, bool | int | str) or (
            isinstance(value, float) and math.isfinite(value)
        )
        if not finite and value is not None and not (_is_texts(value) or _is_numbers(value)):
            raise FormatError(f"params: {name[:80]!r} is no scalar and no list of texts or numbers")
    return {name: value for name, value in found.items() if value is not None}


def messages_to_bytes(messages: Iterable[Message]) -> bytes:
    """The blob of a model's messages: their roles and texts."""
    found = [{"role": message.role, "content": message.content} for message in messages]
    return (to_json(found) + "\n").encode()


def messages_from_bytes(data: bytes) -> tuple[Message, ...]:
    """Roles and texts; what else a message may hold is not stored by Modelfiles."""
    found = _read_json(data, "messages")
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise FormatError("messages: must be a list of objects")
    return tuple(Message(_text(one, "role"), _text(one, "content")) for one in found)


def read_object(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object.  Raises: FormatError, also for depths and lengths that Python refuses."""
    found = _read_json(data, what)
    if not isinstance(found, dict):
        raise FormatError(f"{what}: must be a JSON object")
    return found


def _read_json(data: bytes, what: str) -> Any:
    try:
        found = json.loads(data.decode())
        json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair cannot be written
    except (ValueError, RecursionError):
        raise FormatError(f"{what}: this is not JSON in UTF-8") from None
    return found


def _is_texts(found: object) -> bool:
    return isinstance(found, list) and all(isinstance(item, str) for item in found)


def _is_numbers(found: object) -> bool:
    return isinstance(found, list) and all(
        isinstance(item, int) or (isinstance(item, float) and math.isfinite(item)) for item in found
    )


def _layer(found: object) -> Layer:
    if not isinstance(found, dict):
        raise FormatError("manifest: config and each layer must be objects")
    size = found.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 63:
        raise FormatError("manifest: size must be a number of bytes")
    try:
        digest = checked_digest(_text(found, "digest"))
    except BadRequest as error:
        raise FormatError(f"manifest: {error}") from None
    return Layer(_text(found, "mediaType"), digest, size, _text(found, "from"))


def _text(found: dict[str, Any], key: str) -> str:
    """A text; absent and null are empty."""
    text = found.get(key)
    if text is not None and not isinstance(text, str):
        raise FormatError(f"{key} must be a text")
    return text or ""


# -------------------------------------------------------------------- JSON to the byte

# A pair that begins with a backslash is matched first, so that no half of it is taken for a letter.
_ESCAPED = re.compile(r"\\.|[<>&\u2028\u2029]")


def to_json(value: Any) -> str:
    """JSON as Go's encoder prints it: compact, keys in their given order.

    Example: {"a": 1.0, "b": "<x>"} → {"a":1,"b":"\\u003cx\\u003e"}
    """
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{to_json(key)}:{to_json(value[key])}" for key in value) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(to_json(item) for item in value) + "]"
    if isinstance(value, str):
        return _ESCAPED.sub(_escape, json.dumps(value, ensure_ascii=False))
    if isinstance(value, float):
        return _number(value)
    return json.dumps(value)


def _escape(match: re.Match[str]) -> str:
    # Go 1.21 has no short form for backspace and form feed.
    rare = {r"\b": r"\u0008", r"\f": r"\u000c"}
    found = match[0]
    return rare.get(found, found) if found.startswith("\\") else f"\\u{ord(found):04x}"


def _number(value: float) -> str:
    """The shortest decimal; an exponent only below 1e-6 or from 1e21."""
    if value != 0 and not 1e-6 <= abs(value) < 1e21:
        return repr(value).replace("e-0", "e-").replace(".0e", "e")
    return format(Decimal(repr(value)), "f").removesuffix(".0")


def as_float32(value: float) -> float:
    """The float whose shortest decimal is that of the nearest 32-bit float.

    A Modelfile's numbers are 32 bits wide in Ollama: 0.123456789 is stored as 0.12345679.
    Raises: OverflowError beyond the range of 32-bit floats.
    """
    (near,) = struct.unpack("<f", struct.pack("<f", value))
    shorter = (float(f"{near:.{digits}g}") for digits in range(1, 9))
    nine = float(f"{near:.9g}")  # always suffice
    return next((short for short in shorter if _is_nearest(near, short)), nine)


def _is_nearest(near: float, value: float) -> bool:
    """Is `near` what becomes of the value in 32 bits?"""
    try:
        return struct.pack("<f", value) == struct.pack("<f", near)
    except OverflowError:
        return False


# -------------------------------------------------------------------- the files


@dataclass(frozen=True, slots=True)
class Stored:
    """A manifest as it lies on the disk."""

    name: Name
    manifest: Manifest
    digest: str  # hex SHA-256 of the file's bytes: the model's id
    modified: float  # seconds since 1970


class Manifests:
    """The manifests of one store.  Names are matched to existing ones whatever their case."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "manifests"

    def names(self) -> list[Name]:
        """All names for which there is a file, in the order of a lexical walk."""
        with disk("looking through the manifests"):
            files = [path for path in self.folder.glob("*/*/*/*") if os.path.isfile(path)]
        parts = sorted(path.relative_to(self.folder).parts for path in files)
        return [name for name in map(_name, parts) if name is not None]

    def match(self, name: Name) -> Name:
        """The existing name that equals this one but for case, or else this one."""
        if os.path.isfile(self._path(name)):
            return name
        return next((other for other in self.names() if other.same_as(name)), name)

    def read(self, name: Name) -> Stored:
        """Raises: ModelNotFound, FormatError when it is broken, StoreError."""
        name = self.match(name)
        data = self.read_bytes(name)
        with disk("reading a manifest"):
            modified = self._path(name).stat().st_mtime
        return Stored(name, Manifest.parse(data), hashlib.sha256(data).hexdigest(), modified)

    def read_bytes(self, name: Name) -> bytes:
        """The file itself, of exactly this name.  Raises: ModelNotFound, StoreError."""
        path = self._path(name)
        if not os.path.isfile(path):
            raise ModelNotFound(name)
        return read_small(path, READ_LIMIT)

    def read_all(self) -> Iterator[Stored]:
        """All that can be read; the others are skipped with a warning."""
        for name in self.names():
            try:
                yield self.read(name)
            except (BadRequest, FormatError, ModelNotFound, StoreError) as error:
                log.warning("manifest of %s skipped: %s", name, error)

    def named(self) -> frozenset[str]:
        """The digests of all blobs that some manifest names."""
        return frozenset().union(*(stored.manifest.digests for stored in self.read_all()))

    def all_readable(self) -> bool:
        """False: some manifest may name blobs that we do not know of."""
        closed: list[OSError] = []
        tree = os.walk(self.folder, onerror=closed.append, followlinks=True)
        files = sum(not file.startswith(".") for *_, names in tree for file in names)
        return not closed and files == sum(1 for _ in self.read_all())

    def write(self, name: Name, data: bytes) -> None:
        """Put a manifest in its place, at once; its blobs must be there before.

        Raises: FormatError when these bytes could not be read back.
        """
        Manifest.parse(data)
        path = self._path(name)
        try:
            self._replace(path, data)
        except BaseException:
            self._tidy(path.parent)
            raise

    def remove(self, name: Name) -> Stored:
        """Take a manifest away, and the folders that it leaves empty; what it was."""
        stored = self.read(name)
        path = self._path(stored.name)
        with disk("removing a manifest"):
            path.unlink(missing_ok=True)
        self._tidy(path.parent)
        return stored

    def _path(self, name: Name) -> Path:
        path = self.folder / name.path
        with disk("looking for a manifest"):
            inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.folder))
        if not inside:
            raise StoreError(f"the manifest of {name} is a link that leaves the store")
        return path

    def _replace(self, path: Path, data: bytes) -> None:
        # At the top of the tree no reader, ours or Ollama's, takes it for a manifest.
        with temporary(self.folder, prefix=".", suffix="-partial") as file:
            with disk("writing a manifest"):
                file.write(data)
                os.fchmod(file.fileno(), 0o644)
            sync(file)
            with disk("naming a manifest"):
                path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
                os.replace(file.name, path)

    def _tidy(self, folder: Path) -> None:
        """Remove empty folders, upwards."""
        while folder != self.folder:
            try:
                folder.rmdir()
            except FileNotFoundError:
                pass
            except OSError:  # not empty
                return
            folder = folder.parent


def _name(parts: tuple[str, ...]) -> Name | None:
    try:
        return Name(*parts)
    except BadName as error:
        log.warning("a file among the manifests is skipped: %s", error)
        return None
