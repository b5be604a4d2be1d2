"""Models in memory: one that can answer, and the shelf that holds several.

llm = refollama.load("model.gguf")
llm.tokenizer · llm.net · llm.logits(ids) · llm.stream("Once upon") · llm.generate("Once upon")
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refollama.engine.engine import Engine, Stream
from refollama.errors import BadRequest, FormatError, NotFound
from refollama.messages import Chunk, Stats
from refollama.models.llama import Llama
from refollama.models.load import load_net
from refollama.options import Options
from refollama.store import Name, Store
from refollama.text import tokenizer_from
from refollama.text.stops import StopStrings
from refollama.text.tokenizer import StreamDecoder, Tokenizer
from refollama.weights.gguf import open_gguf


class Answer(NamedTuple):
    """A whole answer: its text, and the record that ended it (reason, counts, context)."""

    text: str
    record: Chunk


class LoadedModel:
    """A net, its tokenizer, and the engine that lets many callers share them.

    `net` is an ordinary torch module: hook it, change it, call it. `slots` answers are written side
    by side, others wait. `parameters` are the options that stand in the model's Modelfile.
    """

    def __init__(
        self,
        net: Llama,
        tokenizer: Tokenizer,
        *,
        parameters: Mapping[str, Any] | None = None,
        slots: int = 1,
    ) -> None:
        self.net = net
        self.tokenizer = tokenizer
        self.defaults = Options().updated(parameters or {})
        self._slots = slots
        self._engines: dict[bool, Engine] = {}  # by f16_kv: a cache has one type
        self._lock = threading.Lock()

    # ── text in, text out ─────────────────────────────────────────────────────────────────────

    def stream(self, prompt: str, options: Mapping[str, Any] | None = None) -> Iterator[str]:
        """What the model writes after a raw prompt, piece by piece; closing it is cancelling.

        Raises: BadOption, PromptTooLong.
        """
        return (chunk.text for chunk in self._ask(prompt, options) if chunk.text)

    def generate(self, prompt: str, options: Mapping[str, Any] | None = None) -> Answer:
        """The whole answer to a raw prompt: `text, record = llm.generate(…)`."""
        chunks = list(self._ask(prompt, options))
        return Answer("".join(chunk.text for chunk in chunks), chunks[-1])

    def _ask(self, prompt: str, options: Mapping[str, Any] | None) -> Iterator[Chunk]:
        return self.answer(self.tokens(prompt), self.defaults.updated(options or {}))

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

    def tokens(self, prompt: str, context: Sequence[int] = ()) -> list[int]:
        """A prompt as ids, BOS and special tokens included, after those of an earlier answer.

        Raises: BadRequest for ids that the vocabulary does not have.
        """
        if not context:
            return self.tokenizer.encode(prompt, bos=True, special=True)
        return self._checked(context) + self.tokenizer.encode(prompt, special=True, continues=True)

    def answer(self, tokens: Sequence[int], options: Options) -> Iterator[Chunk]:
        """Ids of a prompt → pieces of text that are safe to show, then one final record."""
        start = time.perf_counter_ns()
        decoder = StreamDecoder(self.tokenizer, after=tokens)
        stops = StopStrings(options.stop)
        drawn: list[int] = []
        with self.engine(options.f16_kv).stream(tokens, options) as ids:
            for token in ids:
                drawn.append(token)
                if text := stops.feed(decoder.push(token)):
                    yield Chunk(text)
                if stops.hit:
                    break
        tail = stops.feed(decoder.finish()) + stops.finish()
        if tail:
            yield Chunk(tail)
        yield Chunk(
            done=True,
            done_reason="stop" if stops.hit else ids.sequence.done_reason,
            stats=_stats(ids, start, len(tokens), len(drawn)),
            context=(*tokens, *drawn),
        )

    def engine(self, f16_kv: bool = True) -> Engine:
        """The engine whose cache is of this type; made when first needed."""
        with self._lock:
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
    files = Store.default().resolve(Name.parse(str(model)))
    return load_file(files.weights, parameters=files.parameters, slots=slots)


def load_file(
    path: Path, *, parameters: Mapping[str, Any] | None = None, slots: int = 1
) -> LoadedModel:
    """A GGUF file as a model that can answer.  Raises: FormatError, UnsupportedModel."""
    file = open_gguf(path)
    tokenizer = tokenizer_from(file.metadata)
    net = load_net(file)
    if tokenizer.vocab_size != net.n_vocab:
        raise FormatError(
            f"{path.name}: the tokenizer has {tokenizer.vocab_size} tokens, "
            f"but token_embd.weight has {net.n_vocab} rows; expected as many"
        )
    return LoadedModel(net, tokenizer, parameters=parameters, slots=slots)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a GGUF file, which need not hold any tensors."""
    return tokenizer_from(open_gguf(path).metadata)


class LoadedModels:
    """The models that are in memory, so that the next request need not load again.

    At most `limit` files at a time: the one that was idle longest makes room; if all are busy, the
    newcomer waits. Two names that share weights share the model.
    """

    def __init__(self, *, limit: int = 1, slots: int = 1) -> None:
        self.limit = limit
        self.slots = slots
        self._entries: dict[object, _Entry] = {}
        self._changed = threading.Condition()

    @contextmanager
    def lease(self, path: Path) -> Iterator[LoadedModel]:
        """The model of this file; while the lease lasts it stays loaded."""
        key = _identity(path)
        with self._changed:
            entry = self._entry(key)
            entry.users += 1
        try:
            yield self._load(key, entry, path)
        finally:
            with self._changed:
                entry.users -= 1
                entry.last_used = time.monotonic()
                if entry.users == 0 and self._entries.get(key) is not entry:
                    entry.close()  # taken off the shelf meanwhile
                self._changed.notify_all()

    def close(self) -> None:
        """Unload everything; running answers end with an error."""
        with self._changed:
            entries = list(self._entries.values())
            self._entries.clear()
        for entry in entries:
            entry.close()

    def _entry(self, key: object) -> _Entry:
        """The entry of this key; a new one waits until there is room."""
        while key not in self._entries and len(self._entries) >= self.limit:
            idle = [k for k, entry in self._entries.items() if entry.users == 0]
            if idle:
                oldest = min(idle, key=lambda k: self._entries[k].last_used)
                self._entries.pop(oldest).close()
            else:
                self._changed.wait()
        return self._entries.setdefault(key, _Entry())

    def _load(self, key: object, entry: _Entry, path: Path) -> LoadedModel:
        with entry.loading:  # the second request for a model waits for the first to load it
            if entry.model is None:
                try:
                    entry.model = load_file(path, slots=self.slots)
                except BaseException:
                    with self._changed:
                        self._entries.pop(key, None)
                    raise
            return entry.model


class _Entry:
    """One place on the shelf."""

    def __init__(self) -> None:
        self.model: LoadedModel | None = None
        self.users = 0
        self.last_used = 0.0
        self.loading = threading.Lock()

    def close(self) -> None:
        if self.model is not None:
            self.model.close()


def _identity(path: Path) -> object:
    """A file that was replaced is another file, though its name is the same."""
    stat = os.stat(path)
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def _stats(stream: Stream, start: int, prompt: int, drawn: int) -> Stats:
    """Counts and durations of an answer that has just ended."""
    seq, now = stream.sequence, time.perf_counter_ns()
    read = seq.prompt_read or now
    return Stats(
        total_duration=now - start,
        prompt_eval_count=prompt,
        prompt_eval_duration=read - (seq.started or read),
        eval_count=drawn,
        eval_duration=now - read,
    )
