"""How does a Modelfile become a model?  Checked first, then blobs, then the manifest.

    FROM a file            → checked as GGUF, copied into the store
    FROM @sha256:<hex>     → checked as GGUF, already in the store
    FROM a model's name    → its layers, marked with where they came from
    TEMPLATE SYSTEM …      → one small blob each
    PARAMETER …            → merged over the parent's, one blob

Whatever goes wrong, and whenever the caller closes the iterator, the store is as it was before.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from refollama.errors import (
    BadName,
    BadRequest,
    FormatError,
    ModelfileError,
    ModelNotFound,
    NotFound,
    StoreError,
    UnsupportedModel,
)
from refollama.messages import Create, Progress
from refollama.paths import is_path
from refollama.store import TEXT_LIMIT, Store
from refollama.store import manifest as kinds
from refollama.store import modelfile as modelfiles
from refollama.store.blobs import checked_digest
from refollama.store.draft import Draft
from refollama.store.manifest import Config, Layer, Manifest, as_float32, params_to_bytes
from refollama.store.modelfile import Command, Modelfile
from refollama.store.name import Name
from refollama.text.template import Template
from refollama.weights.gguf import is_gguf, open_gguf

T = TypeVar("T")

PROGRESS_EVERY = 0.06  # seconds; as often as Ollama's own download bars move

# `general.file_type` → the name that people know.  Source: Ollama, December 2023.
QUANTIZATIONS = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 4: "Q4_1_F16", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1",
    10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M",
    16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
}  # fmt: skip

# What a text replaces when it is given; a licence replaces nothing.
_TEXTS = {
    "template": (kinds.TEMPLATE, (kinds.TEMPLATE, kinds.PROMPT)),
    "system": (kinds.SYSTEM, (kinds.SYSTEM,)),
    "license": (kinds.LICENSE, ()),
}


@dataclass(frozen=True, slots=True)
class _Base:
    """What FROM stands for, checked."""

    status: str
    config: Config
    path: Path | None = None  # a file that is still to be copied into the store
    total: int = 0  # its length in bytes
    layers: tuple[Layer, ...] = ()  # those that the store has already
    parameters: Mapping[str, Any] = field(default_factory=dict)


def create(store: Store, ask: Create, *, local_files: bool) -> Generator[Progress, None, None]:
    """Make a model; the statuses of the work, one after another.

    `local_files`: may FROM name a file of this machine?  Only where the asker sits at it.
    Raises: at once BadName, ModelfileError, TemplateError, BadRequest, NotFound, FormatError and
    UnsupportedModel; while iterating StoreError, and BadRequest if the file changes under way.
    """
    name = Name.parse(ask.model)
    modelfile = modelfiles.parse(ask.modelfile)
    _check(modelfile)
    parameters = _parameters(modelfile)
    directory = Path(ask.directory) if ask.directory else None
    base = _base(store, modelfile.all("from")[0].args[0], directory, local_files)
    return _steps(store, name, modelfile, parameters, base)


def _steps(
    store: Store, name: Name, modelfile: Modelfile, parameters: dict[str, Any], base: _Base
) -> Generator[Progress, None, None]:
    """All that writes.  Each status comes before the work that it names."""
    with store.draft() as draft:
        build = _Build(store, draft, base.config)
        # FROM first, wherever it stands: what the Modelfile says replaces what is inherited.
        for command in sorted(modelfile.commands, key=lambda command: command.name != "from"):
            yield from build.follow(command, base)
        if parameters:
            yield Progress("creating parameters layer")
            merged = params_to_bytes({**base.parameters, **parameters})
            build.put(kinds.PARAMS, merged, replaces=(kinds.PARAMS,))
        yield Progress("creating config layer")
        manifest = build.manifest()
        for layer in (*manifest.layers, manifest.config):
            verb = "writing" if draft.is_new(layer.digest) else "using already created"
            yield Progress(f"{verb} layer {layer.digest}")
        yield Progress("writing manifest")
        draft.commit(name, manifest)
    yield Progress("success")


# -------------------------------------------------------------------- the parts of a model


@dataclass(slots=True)
class _Build:
    """A model in the making: its layers in order of addition."""

    store: Store
    draft: Draft
    config: Config
    layers: list[Layer] = field(default_factory=list)

    def follow(self, command: Command, base: _Base) -> Iterator[Progress]:
        """One command of the Modelfile."""
        if command.name == "from":
            yield Progress(base.status)
            yield from self._take(base)
        if command.name in _TEXTS:
            yield Progress(f"creating {command.name} layer")
            media_type, replaces = _TEXTS[command.name]
            self.put(media_type, command.args[0].encode(), replaces)

    def put(self, media_type: str, data: bytes, replaces: tuple[str, ...]) -> None:
        """Add a small blob as the last layer.  Empty ones are left out."""
        if data:
            kept = [layer for layer in self.layers if layer.media_type not in replaces]
            self.layers = [*kept, Layer(media_type, self.draft.add(data), len(data))]

    def manifest(self) -> Manifest:
        """Adds the config, which names all the layers."""
        data = self.config.to_bytes(layer.digest for layer in self.layers)
        config = Layer(kinds.CONFIG, self.draft.add(data), len(data))
        return Manifest(config, tuple(self.layers))

    def _take(self, base: _Base) -> Iterator[Progress]:
        for layer in base.layers:
            self.draft.use(layer.digest)
        self.layers += base.layers
        if base.path is not None:
            yield from self._copy(base.path, Progress(base.status, total=base.total))

    def _copy(self, path: Path, at: Progress) -> Iterator[Progress]:
        digest = yield from _now_and_then(self.draft.add_file(path), at)
        # Checked once more, as it lies in the store: the file may have changed meanwhile.
        self.config = _described(self.store.blobs.path(digest))
        self.layers.append(Layer(kinds.MODEL, digest, self.store.blobs.size(digest)))


def _now_and_then(steps: Generator[int, None, T], at: Progress) -> Generator[Progress, None, T]:
    """Bytes done → progress, seldom enough to read; the last one is always told."""
    shown, done = time.monotonic(), 0
    with closing(steps):
        while True:
            try:
                done = next(steps)
            except StopIteration as end:
                yield replace(at, completed=done)
                return cast(T, end.value)
            if time.monotonic() - shown >= PROGRESS_EVERY:
                yield replace(at, completed=done)
                shown = time.monotonic()


# -------------------------------------------------------------------- what FROM means

_NO_FILES = (
    "FROM a file of the server is only allowed from the machine that it runs on: "
    "upload the file as a blob and use FROM @sha256:<digest>"
)


def _base(store: Store, what: str, directory: Path | None, local_files: bool) -> _Base:
    """A blob, a file, or the name of a model: in this order."""
    if what.startswith("@"):
        return _from_blob(store, what.removeprefix("@"))
    path = _local(what, directory) if local_files else None
    if path is not None:
        return _from_file(path, what)
    return _from_model(store, _model_name(what, local_files))


def _from_blob(store: Store, text: str) -> _Base:
    digest = checked_digest(text)
    if not store.blobs.has(digest):
        raise NotFound(f"blob '{digest}' not found: upload it first")
    config = _described(store.blobs.path(digest))
    layer = Layer(kinds.MODEL, digest, store.blobs.size(digest))
    return _Base("creating model layer", config, layers=(layer,))


def _from_file(path: Path, what: str) -> _Base:
    if not is_gguf(path):
        raise _unreadable(what)
    try:
        total = path.stat().st_size
        return _Base("creating model layer", _described(path), path, total)
    except (NotFound, StoreError, OSError):
        raise _unreadable(what) from None


def _from_model(store: Store, name: Name) -> _Base:
    """All layers of the parent, marked with its name: a push can then mount them elsewhere."""
    parent = store.manifests.read(name)
    weights = [layer for layer in parent.manifest.layers if layer.media_type == kinds.MODEL]
    if not all(store.blobs.has(layer.digest) for layer in weights):
        raise ModelNotFound(parent.name)
    old = store.config(parent)
    families = dict.fromkeys(filter(None, (*(old.families or ()), old.family)))
    return _Base(
        "reading model metadata",
        replace(old, families=tuple(families) or None),
        layers=tuple(replace(layer, from_=str(parent.name)) for layer in parent.manifest.layers),
        parameters=store.parameters(parent),
    )


def _local(what: str, directory: Path | None) -> Path | None:
    """The file that is meant, or None where a model's name may be meant.

    Raises: BadRequest for what can only be a path and is no regular file: the same sentence
    whether it is missing, forbidden, a folder, a device, or no GGUF file.
    """
    path = Path.home() / what[2:] if what.startswith("~/") else Path(what)
    path = directory / path if directory is not None else path
    if path.is_absolute() and os.path.isfile(path):
        return path
    if is_path(what):
        raise _unreadable(what)
    return None


def _unreadable(what: str) -> BadRequest:
    return BadRequest(f"FROM {what[:200]!r}: there is no GGUF file that can be read")


def _model_name(what: str, local_files: bool) -> Name:
    if is_path(what) and not local_files:
        raise BadRequest(_NO_FILES)
    try:
        return Name.parse(what)
    except BadName as error:
        hint = f"neither a file nor a model name; {error}" if local_files else _NO_FILES
        raise BadRequest(f"FROM {what[:200]!r}: {hint}") from None


# -------------------------------------------------------------------- checks, before anything else


def _check(modelfile: Modelfile) -> None:
    """What this version cannot do is refused, not dropped."""
    for command in (*modelfile.all("adapter"), *modelfile.all("message")):
        raise ModelfileError(f"{command.name.upper()} is not supported yet", command.line)
    for command in modelfile.all("from")[1:]:
        raise ModelfileError("several FROM lines are not supported yet", command.line)
    for command in modelfile.commands:
        _check_text(command)
    for command in modelfile.all("template"):
        Template(command.args[0])


def _check_text(command: Command) -> None:
    try:
        length = len(command.args[-1].encode())
    except UnicodeEncodeError:
        raise ModelfileError("half a surrogate pair is no character", command.line) from None
    if length > TEXT_LIMIT:
        raise ModelfileError(f"{command.name.upper()} is longer than 4 MiB", command.line)


def _parameters(modelfile: Modelfile) -> dict[str, Any]:
    """Checked values; numbers with a fraction as wide as Ollama stores them."""
    values = modelfile.parameters()
    for key, value in values.items():
        try:
            values[key] = as_float32(value) if isinstance(value, float) else value
        except OverflowError:
            raise ModelfileError(f"parameter '{key}' is too large: {value}") from None
    return values


def _described(path: Path) -> Config:
    """What the weights say of themselves.

    Raises: FormatError when this is not a whole GGUF file; UnsupportedModel for a projector.
    """
    with open_gguf(path) as file:
        family = file.metadata.get("general.architecture") or "unknown"
        if not isinstance(family, str) or not family.isprintable() or len(family) > 80:
            raise FormatError(f"{path.name}: general.architecture is not a word")
        if family == "clip":
            raise UnsupportedModel("a projector (architecture clip) cannot be used in FROM yet")
        elements = sum(math.prod(tensor.shape) for tensor in file.tensors.values())
        quantization = _quantization(file.metadata.get("general.file_type"))
    return Config("gguf", family, (family,), parameter_size(elements), quantization)


def parameter_size(elements: int) -> str:
    """A count of weights for people.  Example: 6 740 000 000 → "7B"; 10⁹ exactly → "1000M"."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if elements > unit:
            return f"{elements / unit:.0f}{letter}"
    return str(elements) if elements else "unknown"


def _quantization(file_type: object) -> str:
    if not isinstance(file_type, int) or isinstance(file_type, bool):
        return "unknown"
    return QUANTIZATIONS.get(file_type, "unknown")
