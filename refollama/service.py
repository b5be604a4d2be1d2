"""Everything that the server can do, without HTTP: requests in, iterators of records out."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refollama.create import create
from refollama.errors import BadRequest, NotFound, UnsupportedModel
from refollama.loaded import LoadedModel, LoadedModels
from refollama.messages import Chunk, Create, Generate, Progress
from refollama.options import Options
from refollama.store import ModelEntry, Name, Store
from refollama.text.prompt import render_generate

FILE_STARTS = ("/", "./", "../", "~/")  # what a model name never begins with


@dataclass(frozen=True, slots=True)
class Runnable:
    """What it takes to answer as a model: its weights, and what its Modelfile said."""

    weights: Path
    template: str = ""
    system: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)


class Service:
    """The store, the loaded models, and what users ask of them.

    `local_files`: may a request name a file of this machine? Only while nobody else can ask.
    """

    def __init__(self, store: Store, loaded: LoadedModels, *, local_files: bool) -> None:
        self.store = store
        self.loaded = loaded
        self.local_files = local_files

    @classmethod
    def default(cls, *, local_files: bool) -> Service:
        """As the environment says: OLLAMA_MODELS, OLLAMA_NUM_PARALLEL, OLLAMA_MAX_LOADED_MODELS."""
        loaded = LoadedModels(
            limit=_count("OLLAMA_MAX_LOADED_MODELS", 1), slots=_count("OLLAMA_NUM_PARALLEL", 1)
        )
        return cls(Store.default(), loaded, local_files=local_files)

    def close(self) -> None:
        """Unload all models; running answers end with an error."""
        self.loaded.close()

    def tags(self) -> Sequence[ModelEntry]:
        """The models in the store."""
        return self.store.list()

    def create(self, ask: Create) -> Iterator[Progress]:
        """Make a model out of a Modelfile."""
        if not ask.model:
            raise BadRequest("model is required")
        return create(self.store, ask, local_files=self.local_files)

    def generate(self, ask: Generate) -> Iterator[Chunk]:
        """Complete a prompt; an empty one only loads the model.

        Raises, before the first chunk: NotFound, BadRequest and its kin, FormatError.
        """
        start = time.perf_counter_ns()
        _check(ask)
        files = self.find(ask.model)
        options = Options().updated(files.parameters)
        options = options.updated(ask.options, strict=ask.strict)
        with self.loaded.lease(files.weights) as model:
            loading = time.perf_counter_ns() - start
            if not ask.prompt:
                yield Chunk(done=True, done_reason="load")
                return
            for chunk in model.answer(_tokens(model, files, ask), options):
                yield _finished(chunk, ask, start, loading) if chunk.done else chunk

    def find(self, model: str) -> Runnable:
        """What a name stands for, or a path if those are allowed.

        Raises: NotFound, BadRequest, UnsupportedModel.
        """
        if model.startswith(FILE_STARTS):
            return self._find_file(model)
        files = self.store.resolve(Name.parse(model))
        if files.adapters:
            raise UnsupportedModel(f"model '{model}' has an adapter; expected none: not built yet")
        return Runnable(files.weights, files.template or "", files.system or "", files.parameters)

    def _find_file(self, model: str) -> Runnable:
        if not self.local_files:
            raise BadRequest("a server that others can reach runs models by name only, not files")
        path = Path(model).expanduser()
        if not path.is_file():
            raise NotFound(f"{model}: there is no such file")
        return Runnable(path)


def _check(ask: Generate) -> None:
    if not ask.model:
        raise BadRequest("model is required")
    if ask.raw and (ask.template or ask.system or ask.context):
        raise BadRequest("raw mode does not support template, system, or context")


def _tokens(model: LoadedModel, files: Runnable, ask: Generate) -> list[int]:
    """The prompt as the model will see it."""
    if ask.raw:
        return model.tokens(ask.prompt)
    text = render_generate(
        ask.template or files.template,
        system=ask.system or files.system,
        prompt=ask.prompt,
        first=not ask.context,
    )
    return model.tokens(text, ask.context)


def _finished(chunk: Chunk, ask: Generate, start: int, loading: int) -> Chunk:
    """The last record: times count from the request on; raw mode has no context."""
    assert chunk.stats is not None
    total = time.perf_counter_ns() - start
    return dataclasses.replace(
        chunk,
        stats=dataclasses.replace(chunk.stats, total_duration=total, load_duration=loading),
        context=() if ask.raw else chunk.context,
    )


def _count(variable: str, default: int) -> int:
    """A positive number from the environment."""
    text = os.environ.get(variable, "").strip()
    if text in ("", "0"):
        return default
    if not text.isascii() or not text.isdigit():
        raise BadRequest(f"{variable} must be a whole number, not {text!r}")
    return int(text)
