"""Everything that the server can do, without HTTP: requests in, iterators of records out."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from refollama import keep_alive
from refollama.create import create
from refollama.dialogue import (
    Prompt,
    Reader,
    chat_prompt,
    check_messages,
    check_no_images,
    check_think,
    converse,
    generate_prompt,
    scripted,
)
from refollama.engine.engine import MAX_QUEUE
from refollama.engine.sequence import Extras, never
from refollama.errors import (
    Abandoned,
    BadRequest,
    ModelNotFound,
    NotFound,
    RefollamaError,
    RegistryError,
    ServerBusy,
    Stopping,
)
from refollama.fable.bundled import stock
from refollama.loaded import DEFAULTS, Chunks, LoadedModel
from refollama.messages import (
    Chat,
    Chunk,
    Create,
    Detokenize,
    Embed,
    Embedded,
    Generate,
    InMemory,
    Piece,
    Progress,
    Pull,
    Push,
    Rendered,
    Show,
    Stats,
    Tokenize,
)
from refollama.models.meter import Told, unheard
from refollama.models.vectors import unit
from refollama.options import Options
from refollama.paths import is_path
from refollama.sampling import grammar
from refollama.several import check_count, several
from refollama.shelf import Files, LoadedModels, Running
from refollama.show import Shown, listed, show
from refollama.store import ModelEntry, ModelFiles, Name, Store
from refollama.store.blobs import checked_digest
from refollama.store.registry.download import Downloads
from refollama.store.registry.pull import pull
from refollama.store.registry.push import push
from refollama.telling import token_ids
from refollama.text.spans import Span
from refollama.text.tokenizer import Tokenizer, decode_spelled
from refollama.vocabularies import tokenizer_of
from refollama.watched import loading, paced
from refollama.weights.gguf import is_gguf

MOST_TEXT = 1 << 20  # characters that are tokenised in one request
Transfer = Generator[Progress, None, None]
Gone = Callable[[], bool]  # is nobody there any more who asked?

FOR_EVER_SHOWN = 2**63 / 1e9  # seconds, some 292 years: what Ollama shows for "for ever"
MOST_LOGPROBS = 20  # alternatives to each token, as in Ollama


@dataclass(frozen=True, slots=True)
class Runnable:
    """What it takes to answer as a model: its weights, and what its Modelfile said."""

    weights: Path
    files: ModelFiles | None = None  # what its Modelfile said; None for a file
    parameters: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""  # in the store; empty for a file

    @property
    def projector(self) -> Path | None:
        """What it sees with, if it can see; of several the first, as in Ollama."""
        return next(iter(self.files.projectors), None) if self.files else None

    @property
    def sources(self) -> Files:
        """All that is loaded for it."""
        return Files(self.weights, self.projector, self.files.adapters if self.files else ())


class Service:
    """The store, the loaded models, and what users ask of them.

    `local_files`: may a request name a file of this machine? Only while nobody else can ask.
    `max_queue`: prompts that are answered or wait at one time; more are refused.
    `keep_alive`: seconds that a model stays in memory, where a request does not say.
    `options`: what holds where neither the model nor the request says otherwise.
    """

    def __init__(
        self,
        store: Store,
        loaded: LoadedModels,
        *,
        local_files: bool,
        max_queue: int = MAX_QUEUE,
        keep_alive: float = keep_alive.DEFAULT,
        options: Options = DEFAULTS,
    ) -> None:
        self.store = store
        self.loaded = loaded
        self.local_files = local_files
        self.max_queue = max_queue
        self.keep_alive = keep_alive
        self.options = options
        self._places = threading.BoundedSemaphore(max_queue)
        self._downloads = Downloads(store.blobs)
        self._closing = threading.Event()

    @classmethod
    def default(cls, *, local_files: bool) -> Service:
        """As the environment says: OLLAMA_MODELS, OLLAMA_KEEP_ALIVE, OLLAMA_CONTEXT_LENGTH, …"""
        loaded = LoadedModels(
            limit=_count("OLLAMA_MAX_LOADED_MODELS", 1),
            slots=_count("OLLAMA_NUM_PARALLEL", 1),
            vision_blocks=_vision_blocks(),
        )
        return cls(
            Store.default(),
            loaded,
            local_files=local_files,
            max_queue=_count("OLLAMA_MAX_QUEUE", MAX_QUEUE),
            keep_alive=keep_alive.from_environment(os.environ),
            options=dataclasses.replace(
                DEFAULTS, num_ctx=_count("OLLAMA_CONTEXT_LENGTH", DEFAULTS.num_ctx)
            ),
        )

    def close(self) -> None:
        """Unload all models; running answers, pulls and pushes end with an error."""
        self._closing.set()
        self.loaded.close()

    def tags(self) -> Sequence[ModelEntry]:
        """The models in the store, and what their files say of them."""
        return listed(self.store, self.store.list())

    def create(self, ask: Create, gone: Gone = never) -> Transfer:
        """Make a model out of a Modelfile.  A model that FROM names, and that is not here, is
        pulled first.

        Raises: as `create.create` and `pull` do; NotFound if it cannot be pulled either.
        """
        _named(ask.model)
        try:
            return create(self.store, ask, local_files=self.local_files)
        except ModelNotFound as missing:
            if stock(self.store, missing.name):
                return self.create(ask, gone)
            return self._pulled_first(ask, missing.name, gone)

    def _pulled_first(self, ask: Create, parent: str, gone: Gone) -> Transfer:
        yield Progress("pulling model")
        try:
            yield from self.pull(Pull(parent), gone)
        except RegistryError as error:
            raise NotFound(f"model '{parent}' not found, and not to be pulled: {error}") from None
        yield from self.create(ask, gone)  # another FROM may name another one

    def pull(self, ask: Pull, gone: Gone = never) -> Transfer:
        """Fetch a model from its registry; pulls of the same blob share one download.

        Closing the iterator leaves the work; what was fetched stays for the next pull.
        Raises: before the first step BadRequest and its kin; later RegistryError, StoreError,
        FormatError, and Stopping when the service closes.
        """
        _named(ask.model)
        gone, insecure = self._or_closing(gone), ask.insecure
        return self._told(
            ask.model,
            pull(self.store, ask.model, insecure=insecure, downloads=self._downloads, gone=gone),
        )

    def push(self, ask: Push, gone: Gone = never) -> Transfer:
        """Send a model to its registry.  Raises: as `pull` does, and ModelNotFound."""
        _named(ask.model)
        gone, insecure = self._or_closing(gone), ask.insecure
        return self._told(ask.model, push(self.store, ask.model, insecure=insecure, gone=gone))

    def _or_closing(self, gone: Gone) -> Gone:
        return lambda: self._closing.is_set() or gone()

    def _told(self, model: str, steps: Transfer) -> Transfer:
        """The steps; who still listens when the service closes is told why they end."""
        try:
            with _as_sent(model):
                yield from steps
        except Abandoned:
            if self._closing.is_set():
                raise Stopping("the server stops; what was transferred stays") from None
            raise

    def show(self, ask: Show) -> Shown:
        """All about a model.  Raises: BadRequest and its kin, NotFound, FormatError."""
        _named(ask.model)
        stock(self.store, ask.model)
        with _as_sent(ask.model):
            return show(self.store, ask)

    def copy(self, source: str, destination: str) -> None:
        """Give a model a second name.  Raises: BadRequest, NotFound, StoreError."""
        if not source or not destination:
            raise BadRequest("source add destination are required")  # sic: Ollama's own words
        names = Name.parse(source), Name.parse(destination)
        stock(self.store, source)
        with _as_sent(source):
            self.store.copy(*names)

    def delete(self, model: str) -> None:
        """Remove a model, and the blobs that no other one names.  One that is loaded goes on."""
        _named(model)
        with _as_sent(model):
            self.store.remove(Name.parse(model))

    def ps(self) -> list[InMemory]:
        """The models in memory; those that stay longest come first."""
        now = datetime.now().astimezone()
        return [self._in_memory(one, now) for one in self.loaded.running()]

    def _in_memory(self, one: Running, now: datetime) -> InMemory:
        digest, details = self._details(one.use.name)
        return InMemory(
            name=one.use.name,
            digest=digest,
            details=details,
            expires_at=now + timedelta(seconds=min(one.left, FOR_EVER_SHOWN)),
            nbytes=one.nbytes,
            nbytes_gpu=one.nbytes_gpu,
            n_ctx=one.n_ctx,
        )

    def _details(self, name: str) -> tuple[str, dict[str, Any]]:
        """Digest and details of a model; it may be gone from the store, or a file beside it."""
        try:
            stored = self.store.manifests.read(Name.parse(name))
            return stored.digest, self.store.config(stored).details()
        except RefollamaError:
            return "", {}

    def has_blob(self, digest: str) -> bool:
        """Is it in the store?  Raises: BadRequest for what is no digest."""
        return self.store.blobs.has(digest)

    def add_blob(self, digest: str, chunks: Iterator[bytes]) -> bool:
        """Store a blob; was it new?  Raises: BadRequest if its bytes have another digest."""
        had = self.has_blob(digest)
        self.store.blobs.add(chunks, expected=checked_digest(digest))
        return not had

    def generate(self, ask: Generate, gone: Gone = never) -> Chunks:
        """Complete a prompt; an empty one only loads the model.

        gone: is nobody there to hear it?  Asked now and then; Abandoned is raised if it says yes.
        Raises, before the first chunk: NotFound, BadRequest and its kin, FormatError, ServerBusy.
        """
        return self._answer(ask, gone)

    def chat(self, ask: Chat, gone: Gone = never) -> Chunks:
        """Go on with a conversation; an empty one only loads the model.  As `generate` does."""
        return self._answer(ask, gone)

    def _answer(self, ask: Generate | Chat, gone: Gone) -> Chunks:
        ask = dataclasses.replace(ask, progress=ask.progress and ask.stream)
        return paced(self._chunks(ask, gone)) if ask.progress else self._chunks(ask, gone)

    def _chunks(self, ask: Generate | Chat, gone: Gone) -> Chunks:
        start = time.perf_counter_ns()
        _check(ask)
        files = self.find(ask.model)
        _check_sees(files, ask)
        options = self.options.updated(files.parameters)
        options = options.updated(ask.options, strict=ask.strict)
        empty = not (ask.messages if isinstance(ask, Chat) else ask.prompt)
        if empty and self.unloaded(ask, files):
            yield Chunk(done=True, done_reason="unload")
            return
        with ExitStack() as held:
            lease = partial(self.model, ask, files, options, gone)
            if ask.progress:
                model = yield from loading(lambda told: held.enter_context(lease(told)))
            else:
                model = held.enter_context(lease())
            loaded = time.perf_counter_ns() - start
            _check_completes(model, ask)
            if empty:
                yield Chunk(done=True, done_reason="load")
                return
            prompt = _prompt(model, files, ask, model.reader(options, _context(ask), gone))
            if ask.debug_render_only:
                yield Chunk(done=True, rendered=_rendered(prompt))
                return
            one = partial(converse, model, prompt)
            chunks = several(one, options, _extras(model, ask, gone), ask.n)
            for chunk in held.enter_context(closing(chunks)):
                yield _finished(chunk, ask, start, loaded) if chunk.done else chunk

    def embed(self, ask: Embed, gone: Callable[[], bool] = never) -> Embedded:
        """A vector for each text; all texts are checked before any work is put into one.

        Raises: as `generate` does.
        """
        start = time.perf_counter_ns()
        if not ask.model:
            raise BadRequest("model is required")
        files = self.find(ask.model)
        options = self.options.updated(files.parameters)
        options = options.updated(ask.options, strict=ask.strict)
        if not ask.input and self.unloaded(ask, files):
            return Embedded((), Stats())
        with self.model(ask, files, options, gone) as model:
            loading = time.perf_counter_ns() - start
            texts = [model.fitting(text, options, truncate=ask.truncate) for text in ask.input]
            vectors = (model.vector(ids, options, gone) for ids in texts)
            rows = (unit(v, ask.dimensions) if ask.normalise else v for v in vectors)
            return Embedded(
                tuple(row.tolist() for row in rows),
                Stats(
                    total_duration=time.perf_counter_ns() - start,
                    load_duration=loading,
                    prompt_eval_count=sum(map(len, texts)),
                ),
            )

    def tokenize(self, ask: Tokenize) -> list[Piece]:
        """The tokens of a text, and where they stand in it. The weights are not loaded."""
        words = self._tokenizer(ask.model)
        if len(ask.text) > MOST_TEXT:
            raise BadRequest(f"the text has {len(ask.text)} characters; at most {MOST_TEXT} fit")
        found = words.spans(ask.text, special=ask.special)
        if ask.bos:
            found = _with_ends(words, found)
        return [Piece(one.id, words.spelling(one.id), one.start, one.end) for one in found]

    def detokenize(self, ask: Detokenize) -> str:
        """The text of some tokens. The weights are not loaded.  Raises: BadRequest for strange ids.

        Half a character becomes U+FFFD.
        """
        words = self._tokenizer(ask.model)
        if not ask.special:
            return words.decode(ask.tokens)
        return decode_spelled(words, ask.tokens)

    def _tokenizer(self, model: str) -> Tokenizer:
        if not model:
            raise BadRequest("model is required")
        return tokenizer_of(self.find(model).weights)

    @contextmanager
    def model(
        self,
        ask: Generate | Chat | Embed,
        files: Runnable,
        options: Options,
        gone: Gone,
        told: Told = unheard,
    ) -> Iterator[LoadedModel]:
        """A place in the queue and the model, which then stays for the request's `keep_alive`.

        Raises: ServerBusy, and all that `LoadedModels.lease` raises.
        """
        keep = self.keep_alive if ask.keep_alive is None else ask.keep_alive
        name = files.name or ask.model
        lease = self.loaded.lease(files.sources, options, gone, keep=keep, name=name, told=told)
        with self._place(), lease as model:
            yield model

    def unloaded(self, ask: Generate | Chat | Embed, files: Runnable) -> bool:
        """Was this an empty request with `keep_alive` 0?  Then the model goes, and none is loaded.

        Whoever calls has seen that it is empty.
        """
        if ask.keep_alive != 0:
            return False
        self.loaded.unload(files.sources)
        return True

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

        Raises: NotFound, BadRequest.
        """
        if is_path(model):
            return self._find_file(model)
        stock(self.store, model)
        with _as_sent(model):
            files = self.store.resolve(Name.parse(model))
        return Runnable(files.weights, files, files.parameters, name=str(files.name))

    def _find_file(self, model: str) -> Runnable:
        if not self.local_files:
            raise BadRequest("a server that others can reach runs models by name only, not files")
        path = os.path.expanduser(model)
        if not is_gguf(path):
            raise NotFound(f"{model}: there is no GGUF file that can be read")
        return Runnable(Path(path))


def _named(model: str) -> None:
    if not model:
        raise BadRequest("model is required")


@contextmanager
def _as_sent(model: str) -> Iterator[None]:
    """A model that is not found is named as the user named it."""
    try:
        yield
    except ModelNotFound:
        raise ModelNotFound(model) from None


def _check_completes(model: LoadedModel, ask: Generate | Chat) -> None:
    if model.net.config.embeds_only:
        asked = "chat" if isinstance(ask, Chat) else "generate"
        raise BadRequest(f'"{ask.model}" does not support {asked}')


def _check_sees(files: Runnable, ask: Generate | Chat) -> None:
    """Before a model is loaded that cannot look at what it is shown."""
    if files.projector is None:
        check_no_images(ask.messages if isinstance(ask, Chat) else (ask,))


def _rendered(prompt: Prompt) -> Rendered:
    return Rendered(prompt.text, tuple(prompt.tokens), len(prompt.pictures))


def _check(ask: Generate | Chat) -> None:
    """What is wrong with a request whatever model it is for."""
    _named(ask.model)
    if not 0 <= ask.top_logprobs <= MOST_LOGPROBS:
        raise BadRequest(f"top_logprobs must be between 0 and {MOST_LOGPROBS}")
    if len(ask.logprob_tokens) > MOST_LOGPROBS:
        raise BadRequest(f"logprob_tokens must name {MOST_LOGPROBS} tokens at most")
    if ask.logprob_tokens and not ask.logprobs:
        raise BadRequest('logprob_tokens needs "logprobs": true')
    check_count(ask.n)
    check_think(ask.think)
    grammar.source(ask.format)  # said before a model is loaded for it
    if isinstance(ask, Chat):
        check_messages(ask.messages)
    elif ask.raw:
        _check_raw(ask)


def _check_raw(ask: Generate) -> None:
    if ask.template or ask.system or ask.context:
        raise BadRequest("raw mode does not support template, system, or context")
    if ask.suffix:
        raise BadRequest("raw mode does not support suffix")


def _context(ask: Generate | Chat) -> Sequence[int]:
    return () if isinstance(ask, Chat) else ask.context


def _prompt(model: LoadedModel, files: Runnable, ask: Generate | Chat, reader: Reader) -> Prompt:
    """The prompt as the model will see it, and what to look for in the answer."""
    script = scripted(model.script, files.files) if files.files else model.script
    if isinstance(ask, Chat):
        return chat_prompt(script, ask, reader)
    return generate_prompt(script, ask, reader)


def _extras(model: LoadedModel, ask: Generate | Chat, gone: Gone) -> Extras:
    return Extras(
        gone=gone,
        truncate=ask.truncate,
        shift=ask.shift,
        logprobs=ask.top_logprobs if ask.logprobs else None,
        named=_named_tokens(model, ask),
        progress=ask.progress,
        grammar=model.grammar(ask.format),
    )


def _named_tokens(model: LoadedModel, ask: Generate | Chat) -> tuple[int, ...]:
    try:
        return token_ids(model.tokenizer, ask.logprob_tokens)
    except BadRequest as error:
        raise BadRequest(f"logprob_tokens: {error}") from None


def _finished(chunk: Chunk, ask: Generate | Chat, start: int, loading: int) -> Chunk:
    """The last record: times count from the request on; chats and raw mode have no context."""
    assert chunk.stats is not None
    total = time.perf_counter_ns() - start
    return dataclasses.replace(
        chunk,
        stats=dataclasses.replace(chunk.stats, total_duration=total, load_duration=loading),
        context=() if isinstance(ask, Chat) or ask.raw else chunk.context,
    )


def _with_ends(words: Tokenizer, text: list[Span]) -> list[Span]:
    """BOS and EOS stand for nothing in the text: they have no width."""
    middle, end = -1, text[-1].end if text else 0
    around = words.around([middle])
    before, behind = around[: around.index(middle)], around[around.index(middle) + 1 :]
    return [*(Span(id, 0, 0) for id in before), *text, *(Span(id, end, end) for id in behind)]


def _vision_blocks() -> int | None:
    """How much of a vision tower is run: as its file says, or as llama.cpp does it."""
    text = os.environ.get("REFOLLAMA_VISION", "").strip()
    if text not in ("", "llama.cpp"):
        raise BadRequest(f"REFOLLAMA_VISION must be empty or 'llama.cpp', not {text!r}")
    return -1 if text else None


def _count(variable: str, default: int) -> int:
    """A positive number from the environment."""
    text = os.environ.get(variable, "").strip()
    if text in ("", "0"):
        return default
    if not text.isascii() or not text.isdigit():
        raise BadRequest(f"{variable} must be a whole number, not {text!r}")
    return int(text)
