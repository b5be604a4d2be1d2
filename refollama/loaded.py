"""Models in memory: one that can answer, and the shelf that holds several.

llm = refollama.load("model.gguf")
llm.tokenizer · llm.net · llm.logits(ids) · llm.stream("Once upon") · llm.generate("Once upon")
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refollama.engine import limits
from refollama.engine.engine import LOOK_AROUND, Engine, Stream, never
from refollama.errors import (
    Abandoned,
    BadRequest,
    FormatError,
    NotFound,
    RefollamaError,
    Stopping,
    UnsupportedModel,
)
from refollama.messages import Chunk, Stats
from refollama.models.llama import Llama
from refollama.models.load import load_net
from refollama.options import Options
from refollama.store import ModelFiles, Name, Store
from refollama.text import tokenizer_from
from refollama.text.stops import StopStrings
from refollama.text.tokenizer import StreamDecoder, Tokenizer
from refollama.weights.gguf import open_gguf

Chunks = Generator[Chunk, None, None]  # closing it is cancelling


class Answer(NamedTuple):
    """A whole answer: its text, and the record that ended it (reason, counts, context)."""

    text: str
    record: Chunk


class LoadedModel:
    """A net, its tokenizer, and the engine that lets many callers share them.

    `net` is an ordinary torch module: hook it, change it, call it. `slots` answers are written side
    by side, others wait; those that ask for another `f16_kv` have slots of their own.
    `parameters` are the options that stand in the model's Modelfile.
    """

    def __init__(
        self,
        net: Llama,
        tokenizer: Tokenizer,
        *,
        parameters: Mapping[str, Any] | None = None,
        slots: int = 1,
    ) -> None:
        self._engines: dict[bool, Engine] = {}  # by f16_kv: a cache has one type
        self._lock = threading.Lock()
        self._closed = False
        self._slots = slots
        self.net = net
        self.tokenizer = tokenizer
        self.defaults = Options().updated(parameters or {})

    # ── text in, text out ─────────────────────────────────────────────────────────────────────

    def stream(self, prompt: str, options: Mapping[str, Any] | None = None) -> Iterator[str]:
        """What the model writes after a raw prompt, piece by piece; closing it is cancelling.

        Raises: BadOption, PromptTooLong.
        """
        with closing(self._ask(prompt, options)) as chunks:
            yield from (chunk.text for chunk in chunks if chunk.text)

    def generate(self, prompt: str, options: Mapping[str, Any] | None = None) -> Answer:
        """The whole answer to a raw prompt: `text, record = llm.generate(…)`."""
        chunks = list(self._ask(prompt, options))
        return Answer("".join(chunk.text for chunk in chunks), chunks[-1])

    def _ask(self, prompt: str, options: Mapping[str, Any] | None) -> Chunks:
        chosen = self.defaults.updated(options or {})
        return self.answer(self.tokens(prompt, options=chosen), chosen)

    # ── ids in, ids out ───────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits after each of the tokens, by the plain path, all at once.  → (T, V) float32

        Raises: BadRequest for ids that the vocabulary does not have.
        """
        ids = torch.tensor([self._checked(tokens)], device=self.net.device)
        positions = torch.arange(ids.shape[1], device=self.net.device)[None]
        cache = self.net.new_cache().rows([0], ids.shape[1])
        return self.net.output(self.net.hidden(ids, positions, cache)[0]).cpu()

    def tokens(
        self, prompt: str, context: Sequence[int] = (), *, options: Options | None = None
    ) -> list[int]:
        """A prompt as ids, BOS and special tokens included, after those of an earlier answer.

        Raises: BadRequest for ids that the vocabulary does not have; PromptTooLong for a text that
        cannot fit into the context of these options, before any work is put into it.
        """
        if options is not None:
            room = limits.context(options, self.net.n_ctx)
            fewest = -(-len(prompt) // self.tokenizer.longest)
            limits.check(len(context) + fewest, room, "at least ")
        if not context:
            return self.tokenizer.encode(prompt, bos=True, special=True)
        return self._checked(context) + self.tokenizer.encode(prompt, special=True, continues=True)

    def answer(
        self, tokens: Sequence[int], options: Options, gone: Callable[[], bool] = never
    ) -> Chunks:
        """Ids of a prompt → pieces of text that are safe to show, then one final record.

        Its context is the prompt's ids and those of the text that was shown: what a stop string
        cut off is not in it. For `gone`, see `Engine.stream`.
        """
        start = time.perf_counter_ns()
        decoder = StreamDecoder(self.tokenizer, after=tokens)
        stops = StopStrings(options.stop)
        drawn: list[int] = []
        shown = 0
        with self.engine(options.f16_kv).stream(tokens, options, gone) as ids:
            for token in ids:
                drawn.append(token)
                if text := stops.feed(decoder.push(token)):
                    shown += len(text)
                    yield Chunk(text)
                if stops.hit:
                    break
        tail = stops.feed(decoder.finish()) + stops.finish()
        if tail:
            shown += len(tail)
            yield Chunk(tail)
        yield Chunk(
            done=True,
            done_reason="stop" if stops.hit else ids.sequence.done_reason,
            stats=_stats(ids, start, len(tokens), len(drawn)),
            context=(*tokens, *(self._visible(tokens, drawn, shown) if stops.hit else drawn)),
        )

    def _visible(self, prompt: Sequence[int], drawn: Sequence[int], shown: int) -> list[int]:
        """The ids of an answer's first `shown` characters; a token that was cut is respelled."""
        decoder = StreamDecoder(self.tokenizer, after=prompt)
        kept: list[int] = []
        text = ""
        for token in drawn:
            longer = text + decoder.push(token)
            if len(longer) > shown:
                rest = longer[len(text) : shown]
                return kept + self.tokenizer.encode(rest, continues=True)
            kept.append(token)
            text = longer
        return kept

    def engine(self, f16_kv: bool = True) -> Engine:
        """The engine whose cache is of this type; made when first needed.

        Raises: Stopping, once the model is closed.
        """
        with self._lock:
            if self._closed:
                raise Stopping("the model has been unloaded")
            if f16_kv not in self._engines:
                self._engines[f16_kv] = Engine(
                    self.net,
                    eos=self.tokenizer.eos_ids,
                    newline=self.tokenizer.newline_id,
                    slots=self._slots,
                    f16_kv=f16_kv,
                )
            return self._engines[f16_kv]

    def close(self) -> None:
        """End all answers and let go of the caches. Dropping the model does the same."""
        with self._lock:
            self._closed = True
            for engine in self._engines.values():
                engine.close()
            self._engines.clear()

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        ids = [int(token) for token in tokens]
        for token in ids:
            if not 0 <= token < self.net.n_vocab:
                raise BadRequest(
                    f"token id {token} is not in the vocabulary: 0 … {self.net.n_vocab - 1}"
                )
        return ids


def load(model: str | Path, *, slots: int = 1) -> LoadedModel:
    """A model from a GGUF file, or by its name in the store.

    A text is taken for a file if one lies there, else for a name.
    Raises: NotFound, BadName, FormatError, UnsupportedModel.
    """
    path = Path(model).expanduser()
    if path.is_file():
        return load_file(path, slots=slots)
    if isinstance(model, Path) or path.suffix == ".gguf":
        raise NotFound(f"{model}: there is no such file")
    files = runnable(Store.default().resolve(Name.parse(str(model))))
    return load_file(files.weights, parameters=files.parameters, slots=slots)


def load_file(
    path: Path, *, parameters: Mapping[str, Any] | None = None, slots: int = 1
) -> LoadedModel:
    """A GGUF file as a model that can answer.  Raises: NotFound, FormatError, UnsupportedModel."""
    file = open_gguf(path)
    try:
        tokenizer, net = tokenizer_from(file.metadata), load_net(file)
    except (FormatError, UnsupportedModel) as error:
        if str(error).startswith(path.name):
            raise
        raise type(error)(f"{path.name}: {error}") from None  # whose metadata it was
    if tokenizer.vocab_size != net.n_vocab:
        raise FormatError(
            f"{path.name}: the tokenizer has {tokenizer.vocab_size} tokens, "
            f"but token_embd.weight has {net.n_vocab} rows; expected as many"
        )
    return LoadedModel(net, tokenizer, parameters=parameters, slots=slots)


def runnable(files: ModelFiles) -> ModelFiles:
    """The same files, if we can run all of them.  Raises: UnsupportedModel."""
    if files.adapters:
        raise UnsupportedModel(f"model '{files.name}' has an adapter; expected none: not built yet")
    return files


class LoadedModels:
    """The models that are in memory, so that the next request need not load again.

    At most `limit` files at a time: the one that was idle longest makes room; if all are busy, the
    newcomer waits. Who waits longest is served first. Two names that share weights share the model.
    """

    def __init__(self, *, limit: int = 1, slots: int = 1) -> None:
        self.limit = limit
        self.slots = slots
        self._entries: dict[object, _Entry] = {}
        self._queue: deque[object] = deque()  # a ticket for each request that is not yet admitted
        self._closed = False
        self._changed = threading.Condition()  # guards all of the above; never held while closing

    @contextmanager
    def lease(self, path: Path, gone: Callable[[], bool] = never) -> Iterator[LoadedModel]:
        """The model of this file; while the lease lasts it stays loaded.

        gone: asked now and then while waiting.  Raises: Abandoned if it says yes, Stopping, and
        all that `load_file` raises.
        """
        key = _identity(path)
        entry = self._admitted(key, gone)
        try:
            yield self._loaded(key, entry, path)
        finally:
            self._release(key, entry)

    def close(self) -> None:
        """Unload everything; running answers end with an error, and nothing is loaded any more."""
        with self._changed:
            self._closed = True
            entries = list(self._entries.values())
            self._entries.clear()
            self._changed.notify_all()
        for entry in entries:
            entry.close()

    def _admitted(self, key: object, gone: Callable[[], bool]) -> _Entry:
        """A place on the shelf, in the order of asking."""
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                while not (self._queue[0] is ticket and self._room(key)):
                    self._check(gone)
                    self._changed.wait(LOOK_AROUND)
                self._check(gone)
                entry = self._place(key)
                entry.users += 1
                return entry
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()

    def _check(self, gone: Callable[[], bool]) -> None:
        if self._closed:
            raise Stopping("the server is stopping")
        if gone():
            raise Abandoned("whoever asked has gone")

    def _room(self, key: object) -> bool:
        """Is this model here already, or could it be?"""
        return key in self._entries or len(self._entries) < self.limit or bool(self._idle())

    def _idle(self) -> list[object]:
        return [key for key, entry in self._entries.items() if entry.users == 0]

    def _place(self, key: object) -> _Entry:
        """The model's place; a new one may take that of the model that was idle longest."""
        if key not in self._entries:
            evicted = None
            if len(self._entries) >= self.limit:
                oldest = min(self._idle(), key=lambda k: self._entries[k].last_used)
                evicted = self._entries.pop(oldest)
            self._entries[key] = _Entry(evicted)
        return self._entries[key]

    def _loaded(self, key: object, entry: _Entry, path: Path) -> LoadedModel:
        with entry.loading:  # the second request for a model waits for the first to load it
            entry.evict()
            if entry.failure is not None:
                raise _again(entry.failure)
            if entry.model is None:
                try:
                    entry.model = load_file(path, slots=self.slots)
                except Exception as failure:
                    entry.failure = failure
                    raise
                finally:
                    self._settle(key, entry)
        if self._closed:
            raise Stopping("the server is stopping")
        return entry.model

    def _settle(self, key: object, entry: _Entry) -> None:
        """After loading: what failed leaves the shelf."""
        with self._changed:
            if entry.model is None and self._entries.get(key) is entry:
                del self._entries[key]

    def _release(self, key: object, entry: _Entry) -> None:
        with self._changed:
            entry.users -= 1
            entry.last_used = time.monotonic()
            orphan = entry.users == 0 and self._entries.get(key) is not entry
            self._changed.notify_all()
        if orphan:  # taken off the shelf meanwhile
            entry.close()


class _Entry:
    """One place on the shelf."""

    def __init__(self, evicted: _Entry | None) -> None:
        self.evicted = evicted  # whose place this was; closed before the new model is loaded
        self.model: LoadedModel | None = None
        self.failure: Exception | None = None
        self.users = 0
        self.last_used = 0.0
        self.loading = threading.Lock()

    def evict(self) -> None:
        """Let go of the one before. It may have to wait for a step of its model."""
        evicted, self.evicted = self.evicted, None
        if evicted is not None:
            evicted.close()

    def close(self) -> None:
        """Unload the model, if there is one."""
        self.evict()
        if self.model is not None:
            self.model.close()


def _again(failure: Exception) -> RefollamaError:
    """The same failure for another thread, as an error of its own."""
    told = isinstance(failure, RefollamaError)
    again = RefollamaError(str(failure) if told else f"loading failed: {type(failure).__name__}")
    again.status = failure.status if isinstance(failure, RefollamaError) else again.status
    again.__cause__ = failure
    return again


def _identity(path: Path) -> object:
    """A file that was replaced is another file, though its name is the same."""
    try:
        stat = os.stat(path)
    except OSError:
        raise NotFound(f"{path.name}: there is no such file") from None
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def _stats(stream: Stream, start: int, prompt: int, drawn: int) -> Stats:
    """Counts and durations of an answer that has just ended."""
    seq, now = stream.sequence, time.perf_counter_ns()
    read = seq.prompt_read or now
    return Stats(
        total_duration=now - start,
        prompt_eval_count=prompt if seq.prompt_read else 0,
        prompt_eval_duration=read - (seq.started or read),
        eval_count=drawn,
        eval_duration=now - read,
    )
