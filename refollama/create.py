"""How does a Modelfile become a model?  Checked first, then blobs, then the manifest.

    FROM a file            → checked as GGUF, copied into the store
    FROM @sha256:<hex>     → checked as GGUF, already in the store
    FROM a model's name    → its layers, marked with where they came from
    FROM a folder          → a checkpoint's safetensors, converted: one GGUF blob, or two
    ADAPTER, a second FROM → a file or a blob that is an adapter or a projector, stored as such;
                             an adapter must fit the model, and PEFT's folders become files
    TEMPLATE SYSTEM …      → one small blob each
    quantize "Q4_K_M"      → the model's weights, packed anew
    PARAMETER …            → merged over the parent's, one blob
    MESSAGE …              → instead of the parent's, one blob

Whatever goes wrong, and whenever the caller closes the iterator, the store is as it was before.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from refollama.convert import Converted, Folder, convert, is_checkpoint
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
from refollama.messages import Create, Message, Progress
from refollama.paths import is_path
from refollama.store import TEXT_LIMIT, Store
from refollama.store import manifest as kinds
from refollama.store.blobs import checked_digest, regular
from refollama.store.draft import Draft
from refollama.store.manifest import Config, Layer, Manifest, messages_to_bytes, params_to_bytes
from refollama.store.modelfile import Command, Modelfile
from refollama.store.name import Name
from refollama.store.recipe import Recipe, read
from refollama.text.template import Template
from refollama.weights.gguf import GGUF, is_gguf, open_gguf
from refollama.weights.mixes import PLAIN, file_type

if TYPE_CHECKING:
    from refollama.quantize import Quantising

T = TypeVar("T")

PROGRESS_EVERY = 0.06  # seconds; as often as Ollama's own download bars move

# `general.file_type` → the name that people know.  Source: Ollama, December 2023.
QUANTIZATIONS = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 4: "Q4_1_F16", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1",
    10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M",
    16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 32: "BF16",
}  # fmt: skip

# What a text replaces when it is given; a licence replaces nothing.
_TEXTS = {
    "template": (kinds.TEMPLATE, (kinds.TEMPLATE, kinds.PROMPT)),
    "system": (kinds.SYSTEM, (kinds.SYSTEM,)),
    "license": (kinds.LICENSE, ()),
}


@dataclass(frozen=True, slots=True)
class _Part:
    """What FROM or ADAPTER stands for, checked."""

    status: str
    kind: str  # the media type of what it brings
    config: Config
    path: Path | None = None  # a file that is still to be copied into the store
    total: int = 0  # its length in bytes
    width: int = 0  # as `Described.width`
    made: Converted | None = None  # what is still to be converted into the store
    choices: Path | None = None  # the second file of an adapter of PEFT; its weights are `path`
    layers: tuple[Layer, ...] = ()  # those that the store has already
    parameters: Mapping[str, Any] = field(default_factory=dict)


_Step = tuple[Command, _Part | None]
_FILES = Command("from", ("files",))  # stands for a checkpoint whose files are blobs


def create(store: Store, ask: Create, *, local_files: bool) -> Generator[Progress, None, None]:
    """Make a model; the statuses of the work, one after another.

    `local_files`: may it name files of this machine?  Only where the asker sits at it.
    Raises: at once BadName, ModelfileError, TemplateError, BadRequest, NotFound, FormatError and
    UnsupportedModel; while iterating StoreError, and BadRequest if a file changes under way.
    """
    name = Name.parse(ask.model)
    recipe = read(ask, local_files=local_files)
    quantize = file_type(ask.quantize) if ask.quantize else ""
    _check_texts(recipe.commands)
    # FROM first, wherever it stands: what the Modelfile says replaces what is inherited.
    commands = sorted(recipe.commands.commands, key=lambda command: command.name != "from")
    find = _Finder(store, recipe.directory, local_files)
    steps: list[_Step] = [(_FILES, part) for part in find.uploaded(recipe.folder)]
    steps += [(command, part) for command in commands for part in find.parts(command)]
    steps.sort(key=_is_adapter)  # among the FROMs, too: it is held against the model
    _check_parts(steps)
    _check_together(store, steps)
    _check_adapters(store, steps)
    if quantize:
        _check_quantises(store, steps, quantize)
    return _steps(store, name, steps, recipe, quantize)


def _steps(
    store: Store, name: Name, steps: list[_Step], recipe: Recipe, quantize: str
) -> Generator[Progress, None, None]:
    """All that writes.  Each status comes before the work that it names."""
    with store.draft() as draft:
        build = _Build(store, draft, quantize)
        for command, part in steps:
            yield from build.follow(command, part)
        if recipe.parameters:
            yield Progress("creating parameters layer")
            build.put(kinds.PARAMS, _merged(steps, recipe.parameters), replaces=(kinds.PARAMS,))
        messages = _messages(recipe.commands)
        if messages:
            yield Progress("creating messages layer")
            build.put(kinds.MESSAGES, messages, replaces=(kinds.MESSAGES,))
        yield Progress("creating config layer")
        manifest = build.manifest()
        for layer in (*manifest.layers, manifest.config):
            verb = "writing" if draft.is_new(layer.digest) else "using already created"
            yield Progress(f"{verb} layer {layer.digest}")
        yield Progress("writing manifest")
        draft.commit(name, manifest)
    yield Progress("success")


def _merged(steps: list[_Step], parameters: Mapping[str, Any]) -> bytes:
    """The blob of all parameters: what is given wins over what is inherited."""
    inherited: dict[str, Any] = {}
    for _, part in steps:
        inherited |= part.parameters if part else {}
    return params_to_bytes({**inherited, **parameters})


def _messages(modelfile: Modelfile) -> bytes:
    said = (command.args for command in modelfile.all("message"))
    turns = [Message(role, text) for role, text in said]
    return messages_to_bytes(turns) if turns else b""


# -------------------------------------------------------------------- the parts of a model


@dataclass(slots=True)
class _Build:
    """A model in the making: its layers in order of addition."""

    store: Store
    draft: Draft
    quantize: str  # the type that the model's weights are to be packed as; "": they stay
    layers: list[Layer] = field(default_factory=list)
    configs: list[tuple[str, Config]] = field(default_factory=list)  # by kind of part

    def follow(self, command: Command, part: _Part | None) -> Iterator[Progress]:
        """One command of the Modelfile; parameters and messages come when all have been."""
        if part is not None:
            yield Progress(part.status)
            yield from self._take(part)
        if command.name in _TEXTS:
            yield Progress(f"creating {command.name} layer")
            media_type, replaces = _TEXTS[command.name]
            self.put(media_type, command.args[0].encode(), replaces)

    def put(self, media_type: str, data: bytes, replaces: tuple[str, ...]) -> None:
        """Add a small blob as the last layer.  Empty ones are left out."""
        if data:
            self.layers = [layer for layer in self.layers if layer.media_type not in replaces]
            self._add(Layer(media_type, self.draft.add(data), len(data)))

    def manifest(self) -> Manifest:
        """Adds the config, which names all the layers."""
        data = self._config().to_bytes(layer.digest for layer in self.layers)
        config = Layer(kinds.CONFIG, self.draft.add(data), len(data))
        return Manifest(config, tuple(self.layers))

    def _config(self) -> Config:
        """Of the model that is brought; a projector adds its family, an adapter nothing."""
        (base,) = (config for kind, config in self.configs if kind == kinds.MODEL)
        more = (config for kind, config in self.configs if kind == kinds.PROJECTOR)
        families = dict.fromkeys(family for c in (base, *more) for family in c.families or ())
        return replace(base, families=tuple(families) or None)

    def _add(self, layer: Layer) -> None:
        """What a model has already, it does not get twice: a licence, say, that is inherited."""
        had = {(other.media_type, other.digest) for other in self.layers}
        if (layer.media_type, layer.digest) not in had:
            self.layers.append(layer)

    def _take(self, part: _Part) -> Iterator[Progress]:
        if part.kind != kinds.ADAPTER:
            yield from self._put_in(part)
            return
        model = next(layer for layer in self.layers if layer.media_type == kinds.MODEL)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "adapter.gguf")
            part = _fitted(self.store, part, self.store.blobs.path(model.digest), file)
            yield from self._put_in(part)

    def _put_in(self, part: _Part) -> Iterator[Progress]:
        for layer in part.layers:
            self._add(replace(layer, digest=self.draft.use(layer.digest)))
        config = part.config
        if part.path is not None:
            config = yield from self._copy(part, part.path)
        if part.made is not None:
            config = yield from self._convert(part, part.made)
        if part.kind == kinds.MODEL and self.quantize:
            config = yield from self._quantise(config)
        self.configs.append((part.kind, config))

    def _copy(self, part: _Part, path: Path) -> Generator[Progress, None, Config]:
        at = Progress(part.status, total=part.total)
        digest = yield from _now_and_then(self.draft.add_file(path), at)
        # Checked once more, as it lies in the store: the file may have changed meanwhile.
        found = described(self.store.blobs.path(digest))
        if found.kind != part.kind:
            raise BadRequest(f"{path.name!r} was changed while it was read: try again")
        self._add(Layer(part.kind, digest, self.store.blobs.size(digest)))
        return found.config

    def _convert(self, part: _Part, made: Converted) -> Generator[Progress, None, Config]:
        at = Progress(part.status, total=part.total)
        digest = yield from _now_and_then(self.draft.add_pieces(made.pieces()), at)
        self._add(Layer(part.kind, digest, self.store.blobs.size(digest)))
        return described(self.store.blobs.path(digest)).config

    def _quantise(self, config: Config) -> Generator[Progress, None, Config]:
        """The weights packed anew, in place of those that were brought; they stay a while."""
        kinds_of = [layer.media_type for layer in self.layers]
        place = kinds_of.index(kinds.MODEL)
        old = self.layers[place].digest
        with open_gguf(self.store.blobs.path(old)) as file:
            work = _quantising(file, self.quantize)
            status = f"quantizing {work.source} model to {work.type}"
            at = Progress(status, digest=old, total=work.nbytes)
            yield replace(at, total=0)
            digest = yield from _now_and_then(self.draft.add_pieces(work.encoded()), at)
        self.layers[place] = Layer(kinds.MODEL, digest, self.store.blobs.size(digest))
        return replace(config, quantization_level=work.type)


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


# -------------------------------------------------------------------- what FROM and ADAPTER mean

_NO_FILES = (
    "{} a file of the server is only allowed from the machine that it runs on: "
    "upload the file as a blob and use {} @sha256:<digest>"
)
_STATUS = {
    kinds.MODEL: "creating model layer",
    kinds.PROJECTOR: "creating model layer",  # as Ollama says
    kinds.ADAPTER: "creating adapter layer",
}


@dataclass(frozen=True, slots=True)
class _Finder:
    """Looks for what the commands name: in the store, and on this machine if that is allowed."""

    store: Store
    directory: Path | None
    local_files: bool

    def parts(self, command: Command) -> tuple[_Part | None, ...]:
        """What a command brings; a folder may bring two, a model and its eyes."""
        folder = self._path(command.args[0]) if command.name == "from" else Path()
        if self.local_files and folder.is_absolute() and is_checkpoint(folder):
            try:
                return _converted(Folder.at(folder))
            except (FormatError, UnsupportedModel) as error:
                raise type(error)(f"FROM {command.args[0][:200]!r}: {error}") from None
            except (NotFound, StoreError):
                raise _unreadable(command) from None
        return (self.part(command),)

    def uploaded(self, files: Mapping[str, str]) -> tuple[_Part, ...]:
        """The model of a folder whose files are blobs, name → digest; nothing without files."""
        folder = Folder({name: self._blob_path(digest) for name, digest in files.items()})
        return _converted(folder) if files else ()

    def part(self, command: Command) -> _Part | None:
        """A blob, a file, or the name of a model: in this order.  None: it names nothing."""
        if command.name not in ("from", "adapter"):
            return None
        what = command.args[0]
        peft = self._peft(what) if command.name == "adapter" else None
        if peft is not None:
            return peft
        digest = self._digest(what)
        if digest is not None:
            return self._checked(command, self._blob(digest))
        path = self._local(command) if self.local_files else None
        if path is not None:
            return self._checked(command, _from_file(path, command))
        if command.name == "adapter":
            raise _unreadable(command) if self.local_files else _no_files(command)
        return self._model(self._model_name(command))

    def _peft(self, what: str) -> _Part | None:
        """An adapter of two files: two blobs, weights first, or a folder of this machine."""
        from refollama.weights.lora import peft  # torch comes with it

        digests = what.split()
        if len(digests) == 2 and all(one.startswith("@") for one in digests):
            weights, choices = (self._blob_path(one.removeprefix("@")) for one in digests)
        elif self.local_files and (folder := peft.folder_at(self._path(what))) is not None:
            weights, choices = peft.files(folder)
        else:
            return None
        total = weights.stat().st_size
        kind = kinds.ADAPTER
        return _Part("converting adapter", kind, Config("gguf"), weights, total, choices=choices)

    def _blob_path(self, digest: str) -> Path:
        if not self.store.blobs.has(checked_digest(digest)):
            raise NotFound(f"blob '{digest}' not found: upload it first")
        return self.store.blobs.path(digest)

    def _path(self, what: str) -> Path:
        path = Path.home() / what[2:] if what.startswith("~/") else Path(what)
        return path if self.directory is None else self.directory / path

    def _checked(self, command: Command, part: _Part) -> _Part:
        if command.name == "adapter" and part.kind != kinds.ADAPTER:
            raise _refused(command, "this is no adapter: a model or a projector belongs to FROM")
        return part

    def _digest(self, what: str) -> str | None:
        """Of a blob in the store: `@sha256:…`, or the path that `show` prints for it."""
        if what.startswith("@"):
            return checked_digest(what.removeprefix("@"))
        path = Path(what)
        if path.parent != self.store.blobs.folder.absolute():
            return None
        return checked_digest(path.name)

    def _blob(self, digest: str) -> _Part:
        kind, config, width = described(self._blob_path(digest))
        layer = Layer(kind, digest, self.store.blobs.size(digest))
        return _Part(_STATUS[kind], kind, config, width=width, layers=(layer,))

    def _model(self, name: Name) -> _Part:
        """All layers of the parent, marked with its name: a push can then mount them elsewhere."""
        store = self.store
        parent = store.manifests.read(name)
        weights = [layer for layer in parent.manifest.layers if layer.media_type == kinds.MODEL]
        if not all(store.blobs.has(layer.digest) for layer in weights):
            raise ModelNotFound(parent.name)
        old = store.config(parent)
        families = dict.fromkeys(filter(None, (*(old.families or ()), old.family)))
        return _Part(
            "reading model metadata",
            kinds.MODEL,
            replace(old, families=tuple(families) or None),
            layers=tuple(replace(one, from_=str(parent.name)) for one in parent.manifest.layers),
            parameters=store.parameters(parent),
        )

    def _local(self, command: Command) -> Path | None:
        """The file that is meant, or None where a model's name may be meant.

        Raises: BadRequest for what can only be a path and is no regular file: the same sentence
        whether it is missing, forbidden, a folder, a device, or no GGUF file.
        """
        what = command.args[0]
        path = self._path(what)
        if path.is_absolute() and os.path.isfile(path):
            return path
        if is_path(what):
            raise _unreadable(command)
        return None

    def _model_name(self, command: Command) -> Name:
        what = command.args[0]
        if is_path(what) and not self.local_files:
            raise _no_files(command)
        try:
            return Name.parse(what)
        except BadName as error:
            hint = f"neither a file nor a model name; {error}"
            told = hint if self.local_files else str(_no_files(command))
            raise BadRequest(f"FROM {what[:200]!r}: {told}") from None


def _from_file(path: Path, command: Command) -> _Part:
    if not (is_gguf(path) or (command.name == "adapter" and _is_old_adapter(path))):
        raise _unreadable(command)
    try:
        total = path.stat().st_size
        kind, config, width = described(path)
    except (NotFound, StoreError, OSError):
        raise _unreadable(command) from None
    return _Part(_STATUS[kind], kind, config, path, total, width)


def _converted(folder: Folder) -> tuple[_Part, ...]:
    """All that can be checked has been, when this returns; nothing is written yet."""
    return tuple(
        _Part(
            "converting model",
            kinds.MODEL if made.kind == "model" else kinds.PROJECTOR,
            Config("gguf"),
            total=made.size,
            width=made.width,
            made=made,
        )
        for made in convert(folder)
    )


def _unreadable(command: Command) -> BadRequest:
    word, what = command.name.upper(), command.args[0]
    return BadRequest(f"{word} {what[:200]!r}: there is no GGUF file that can be read")


def _no_files(command: Command) -> BadRequest:
    return BadRequest(_NO_FILES.format(*[command.name.upper()] * 2))


# -------------------------------------------------------------------- checks, before anything else


def _check_parts(steps: list[_Step]) -> None:
    """Exactly one language model; projectors and adapters may join it."""
    models = [command for command, part in steps if part and part.kind == kinds.MODEL]
    if not models:
        raise UnsupportedModel(
            "no FROM names a language model: a projector or an adapter alone cannot answer"
        )
    for command in models[1:]:
        raise _refused(command, "a second language model: only a projector or an adapter may join")


def _check_together(store: Store, steps: list[_Step]) -> None:
    """A projector makes rows for language models of one width."""
    parts = [(command, part) for command, part in steps if part is not None]
    projectors = [(c, part) for c, part in parts if part.kind == kinds.PROJECTOR and part.width]
    if not projectors:
        return
    read = next(_width(store, part) for _, part in parts if part.kind == kinds.MODEL)
    for command, part in projectors:
        if read and part.width != read:
            raise _refused(
                command,
                f"the projector makes rows of {part.width} numbers, but the language model reads "
                f"{read}: they do not belong together",
            )


def _is_adapter(step: _Step) -> bool:
    """Is it an adapter that FROM names?"""
    command, part = step
    return command.name == "from" and part is not None and part.kind == kinds.ADAPTER


def _check_adapters(store: Store, steps: list[_Step]) -> None:
    """Each fits the model, if that is at hand; one that is still to be made is waited for."""
    parts = [(command, part) for command, part in steps if part is not None]
    model = next(_file(store, part) for _, part in parts if part.kind == kinds.MODEL)
    for command, part in parts:
        if part.kind == kinds.ADAPTER and model is not None and is_gguf(model):
            try:
                _fitted(store, part, model)
            except (FormatError, UnsupportedModel) as error:
                raise _refused(command, str(error)) from None


def _check_quantises(store: Store, steps: list[_Step], type: str) -> None:
    """Are the model's weights there as they were trained?  Those still to be made are."""
    models = (part for _, part in steps if part and part.kind == kinds.MODEL)
    path = _file(store, next(models))
    if path is not None:
        with open_gguf(path) as file:
            _quantising(file, type)


def _quantising(file: GGUF, type: str) -> Quantising:
    """Raises: BadRequest for weights that are packed already."""
    from refollama.quantize import plan  # torch comes with it

    work = plan(file, type, again=True)
    packed = {change.old for change in work.changes if change.old != change.new} - set(PLAIN)
    if packed:
        raise BadRequest(
            "quantization is only supported for F16, BF16 and F32 models, and this one is "
            f"{work.source}"
        )
    return work


def _fitted(store: Store, part: _Part, model: Path, target: Path | None = None) -> _Part:
    """An adapter that fits the model; one of PEFT, written to `target` as a GGUF file.

    Raises: FormatError, UnsupportedModel, StoreError, NotFound.
    """
    from refollama.weights.lora import open_adapter, save_adapter  # torch comes with it

    source = _file(store, part)
    assert source is not None
    with open_gguf(model) as file:
        adapter = open_adapter(source, file, part.choices)
        if part.choices is None or target is None:
            return part
        save_adapter(target, adapter, file)
    return replace(part, path=target, total=target.stat().st_size, choices=None)


def _file(store: Store, part: _Part) -> Path | None:
    """What it brings: a file that is still to be copied, or a blob of its kind."""
    stored = [layer.digest for layer in part.layers if layer.media_type == part.kind]
    return store.blobs.path(stored[-1]) if stored else part.path


def _width(store: Store, model: _Part) -> int:
    """Of one that is in the store already, its weights say it."""
    stored = (layer.digest for layer in model.layers if layer.media_type == kinds.MODEL)
    widths = (described(store.blobs.path(digest)).width for digest in stored)
    return model.width or next(widths, 0)


def _check_texts(modelfile: Modelfile) -> None:
    for command in modelfile.commands:
        _check_text(command)
    for command in modelfile.all("template"):
        Template(command.args[0])
    if len(_messages(modelfile)) > TEXT_LIMIT:
        raise BadRequest("the messages of a model are longer than 4 MiB")


def _check_text(command: Command) -> None:
    try:
        length = len(command.args[-1].encode())
    except UnicodeEncodeError:
        raise _refused(command, "half a surrogate pair is no character") from None
    if length > TEXT_LIMIT:
        raise _refused(command, f"{command.name.upper()} is longer than 4 MiB")


def _refused(command: Command, problem: str) -> BadRequest:
    """With the line, where there is one."""
    return ModelfileError(problem, command.line) if command.line else BadRequest(problem)


# -------------------------------------------------------------------- what a file says of itself

_OLD_ADAPTER = b"algg"  # "ggla", the format of adapters before GGUF, as its little-endian number


class Described(NamedTuple):
    """What a file is: the media type of its layer, and words for people."""

    kind: str
    config: Config
    width: int = 0  # of a row: what a model reads, or a projector makes; 0 if that is not known


def described(path: Path) -> Described:
    """Model, projector or adapter?

    Raises: FormatError when this is neither a whole GGUF file nor an adapter of the old format.
    """
    if _is_old_adapter(path):
        return Described(kinds.ADAPTER, Config("ggla"))
    with open_gguf(path) as file:
        family = file.metadata.get("general.architecture") or "unknown"
        if not isinstance(family, str) or not family.isprintable() or len(family) > 80:
            raise FormatError(f"{path.name}: general.architecture is not a word")
        elements = sum(math.prod(tensor.shape) for tensor in file.tensors.values())
        quantization = _quantization(file.metadata.get("general.file_type"))
        kind = _kind(family, file.metadata.get("general.type"))
        width = _row_width(file, family, kind)
    config = Config("gguf", family, (family,), parameter_size(elements), quantization)
    return Described(kind, config, width)


# Of a projector, the matrix that makes the rows: the first one that is there.
_MAKES_ROWS = (
    "mm.model.mb_block.2.block.2.0.weight",
    "mm.model.mlp.2.weight",
    "mm.3.weight",
    "mm.2.weight",
    "mm.0.weight",
)


def _row_width(file: GGUF, family: str, kind: str) -> int:
    if kind == kinds.PROJECTOR:
        found = (file.tensors[name].shape[0] for name in _MAKES_ROWS if name in file.tensors)
        return next(found, 0)
    width = file.metadata.get(f"{family}.embedding_length")
    return width if type(width) is int else 0


def _kind(family: str, type: object) -> str:
    if type == "adapter":
        return kinds.ADAPTER
    return kinds.PROJECTOR if family == "clip" or type == "mmproj" else kinds.MODEL


def _is_old_adapter(path: Path) -> bool:
    try:
        with regular(path) as file:
            return file.read(len(_OLD_ADAPTER)) == _OLD_ADAPTER
    except (BadRequest, OSError):
        return False


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
