"""Everything that the server can do, without HTTP: requests in, iterators of records out."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refollama.create import create
from refollama.engine.engine import MAX_QUEUE
from refollama.engine.sequence import Extras, never
from refollama.errors import BadRequest, NotFound, ServerBusy
from refollama.loaded import Chunks, LoadedModel, runnable
from refollama.messages import Chunk, Create, Generate, Progress
from refollama.options import Options
from refollama.paths import is_path
from refollama.shelf import LoadedModels
from refollama.store import ModelEntry, Name, Store
from refollama.text.prompt import render_generate
from refollama.weights.gguf import is_gguf

MOST_LOGPROBS = 20  # alternatives to each token, as in Ollama


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
    `max_queue`: prompts that are answered or wait at one time; more are refused.
    """

    def __init__(
        self,
        store: Store,
        loaded: LoadedModels,
        *,
        local_files: bool,
        max_queue: int = MAX_QUEUE,
    ) -> None:
        self.store = store
        self.loaded = loaded
        self.local_files = local_files
        self.max_queue = max_queue
        self._places = threading.BoundedSemaphore(max_queue)

    @classmethod
    def default(cls, *, local_files: bool) -> Service:
        """As the environment says: OLLAMA_MODELS, _NUM_PARALLEL, _MAX_LOADED_MODELS, _MAX_QUEUE."""
        loaded = LoadedModels(
            limit=_count("OLLAMA_MAX_LOADED_MODELS", 1), slots=_count("OLLAMA_NUM_PARALLEL", 1)
        )
        queue = _count("OLLAMA_MAX_QUEUE", MAX_QUEUE)
        return cls(Store.default(), loaded, local_files=local_files, max_queue=queue)

    def close(self) -> None:
        """Unload all models; running answers end with an error."""
        self.loaded.close()

    def tags(self) -> Sequence[ModelEntry]:
        """The models in the store."""
        return self.store.list()

    def create(self, ask: Create) -> Generator[Progress, None, None]:
        """Make a model out of a Modelfile."""
        if not ask.model:
            raise BadRequest("model is required")
        return create(self.store, ask, local_files=self.local_files)

    def generate(self, ask: Generate, gone: Callable[[], bool] = never) -> Chunks:
        """Complete a prompt; an empty one only loads the model.

        gone: is nobody there to hear it?  Asked now and then; Abandoned is raised if it says yes.
        Raises, before the first chunk: NotFound, BadRequest and its kin, FormatError, ServerBusy.
        """
        start = time.perf_counter_ns()
        _check(ask)
        files = self.find(ask.model)
        options = Options().updated(files.parameters)
        options = options.updated(ask.options, strict=ask.strict)
        with self._place(), self.loaded.lease(files.weights, options, gone) as model:
            loading = time.perf_counter_ns() - start
            if not ask.prompt:
                yield Chunk(done=True, done_reason="load")
                return
            extras = Extras(
                gone=gone,
                truncate=ask.truncate,
                shift=ask.shift,
                logprobs=ask.top_logprobs if ask.logprobs else None,
            )
            tokens = _tokens(model, files, ask, options)
            with closing(model.answer(tokens, options, extras)) as chunks:
                for chunk in chunks:
                    yield _finished(chunk, ask, start, loading) if chunk.done else chunk

    @contextmanager
    def _place(self) -> Iterator[None]:
        if not self._places.acquire(blocking=False):
            raise ServerBusy(f"the server is busy: {self.max_queue} requests are waiting already")
        try:
            yield
        finally:
            self._places.release()

    def find(self, model: str) -> Runnable:
        """What a name stands for, or a path if those are allowed.

        Raises: NotFound, BadRequest, UnsupportedModel.
        """
        if is_path(model):
            return self._find_file(model)
        files = runnable(self.store.resolve(Name.parse(model)))
        return Runnable(files.weights, files.template or "", files.system or "", files.parameters)

    def _find_file(self, model: str) -> Runnable:
        if not self.local_files:
            raise BadRequest("a server that others can reach runs models by name only, not files")
        path = os.path.expanduser(model)
        if not is_gguf(path):
            raise NotFound(f"{model}: there is no GGUF file that can be read")
        return Runnable(Path(path))


def _check(ask: Generate) -> None:
    if not ask.model:
        raise BadRequest("model is required")
    if not 0 <= ask.top_logprobs <= MOST_LOGPROBS:
        raise BadRequest(f"top_logprobs must be between 0 and {MOST_LOGPROBS}")
    if ask.raw and (ask.template or ask.system or ask.context):
        raise BadRequest("raw mode does not support template, system, or context")


def _tokens(model: LoadedModel, files: Runnable, ask: Generate, options: Options) -> list[int]:
    """The prompt as the model will see it."""
    if ask.raw:
        return model.tokens(ask.prompt, options=options)
    text = render_generate(
        ask.template or files.template,
        system=ask.system or files.system,
        prompt=ask.prompt,
        first=not ask.context,
        guard=model.tokenizer.guard,
    )
    return model.tokens(text, ask.context, options=options)


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
