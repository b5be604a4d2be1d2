"""One model in memory that can answer: what `refollama.load()` gives.

llm = refollama.load("model.gguf")
llm.tokenizer · llm.net · llm.stream("Once upon") · llm.generate("Once upon")
llm.logits(ids) · llm.hidden(ids, layer) · llm.score("Once upon a time")
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refollama.engine import limits
from refollama.engine.engine import Engine, Stream
from refollama.engine.sequence import NO_EXTRAS, Extras, Logprob, Marks
from refollama.engine.sequence import Sequence as Running
from refollama.errors import (
    BadOption,
    BadRequest,
    FormatError,
    NotFound,
    Stopping,
    UnsupportedModel,
)
from refollama.kvcache import CPU
from refollama.messages import Chunk, Stats, TokenLogprob
from refollama.models.config import ModelConfig
from refollama.models.llama import Llama
from refollama.models.load import load_net
from refollama.models.memory import Placement, place
from refollama.options import Options
from refollama.sampling.chain import Watch
from refollama.store import ModelFiles, Name, Store
from refollama.text import tokenizer_from
from refollama.text.stops import StopStrings
from refollama.text.tokenizer import StreamDecoder, Tokenizer, unguarded
from refollama.weights.gguf import open_gguf

Chunks = Generator[Chunk, None, None]  # closing it is cancelling

AT_ONCE = 512  # tokens that `logits` and its kin send through the model in one step
MOST_CONTEXTS = 100  # a prompt that would fill so many is a mistake, or worse
MOST_ENGINES = 2  # idle ones beyond it are closed when another is needed
DEFAULTS = Options()


class Answer(NamedTuple):
    """A whole answer: its text, and the record that ended it (reason, counts, context)."""

    text: str
    record: Chunk


class Memory(NamedTuple):
    """The options that decide what a token's keys are: each choice needs a cache of its own."""

    f16_kv: bool
    low_vram: bool
    rope_frequency_base: float
    rope_frequency_scale: float
    n_ctx: int  # the longest context that turns alike; 0 where all do (all but longrope)

    @classmethod
    def of(cls, options: Options, config: ModelConfig) -> Memory:
        rope, n_ctx = config.rope, limits.context(options, config.n_ctx)
        return cls(
            options.f16_kv,
            options.low_vram,
            options.rope_frequency_base,
            options.rope_frequency_scale,
            (config.n_ctx if n_ctx > rope.trained_on else rope.trained_on) * rope.longrope,
        )


class LoadedModel:
    """A net, its tokenizer, and the engine that lets many callers share them.

    `net` is an ordinary torch module: hook it, change it, call it. `slots` answers are written side
    by side, others wait; those that ask for another kind of `Memory` have slots of their own.
    `defaults` are the options that stand in the model's Modelfile.
    """

    def __init__(
        self,
        net: Llama,
        tokenizer: Tokenizer,
        *,
        defaults: Options = DEFAULTS,
        slots: int = 1,
    ) -> None:
        self._engines: dict[Memory, Engine] = {}  # the one used last comes last
        self._lock = threading.Lock()
        self._closed = False
        self._slots = slots
        self.net = net
        self.tokenizer = tokenizer
        self.defaults = defaults

    # ── text in, text out ─────────────────────────────────────────────────────────────────────

    def stream(
        self,
        prompt: str,
        options: Mapping[str, Any] | None = None,
        *,
        on_stage: Watch | None = None,
    ) -> Iterator[str]:
        """What the model writes after a raw prompt, piece by piece; closing it is cancelling.

        on_stage: see `Sampler`; it is called in the engine's thread.
        Raises: BadOption.
        """
        with closing(self._ask(prompt, options, Extras(on_stage=on_stage))) as chunks:
            yield from (chunk.text for chunk in chunks if chunk.text)

    def generate(
        self,
        prompt: str,
        options: Mapping[str, Any] | None = None,
        *,
        logprobs: int | None = None,
        on_stage: Watch | None = None,
    ) -> Answer:
        """The whole answer to a raw prompt: `text, record = llm.generate(…)`.

        logprobs: note in `record.logprobs` how likely each token was, and the best so many.
        """
        chunks = list(self._ask(prompt, options, Extras(logprobs=logprobs, on_stage=on_stage)))
        noted = tuple(one for chunk in chunks for one in chunk.logprobs)
        return Answer("".join(chunk.text for chunk in chunks), replace(chunks[-1], logprobs=noted))

    def _ask(self, prompt: str, options: Mapping[str, Any] | None, extras: Extras) -> Chunks:
        chosen = self.defaults.updated(options or {})
        return self.answer(self.tokens(prompt, options=chosen), chosen, extras)

    # ── ids in, numbers out: the plain path, without sampling ─────────────────────────────────

    def logits(self, tokens: Sequence[int], start: int = 0, stop: int | None = None) -> Tensor:
        """Logits after each of the tokens from `start` to `stop`.  → (stop − start, V) float32

        All tokens are read, but only these are turned into logits, which are V wide.
        Raises: BadRequest for ids that the vocabulary does not have; PromptTooLong.
        """
        return self._logits(self.hidden(tokens)[start:stop])

    @torch.no_grad()
    def hidden(self, tokens: Sequence[int], layer: int | None = None) -> Tensor:
        """What the model makes of each token: (T,) → (T, d_model) float32.

        layer 0 is the embedding, layer n what the n-th block adds up to (the residual stream), and
        None what the output matrix reads: the last layer, normed.
        Raises: BadRequest, PromptTooLong, as `logits` does.
        """
        ids, layers = self._checked(tokens), len(self.net.blk)
        limits.check(len(ids), self.net.n_ctx)
        if layer is not None and not 0 <= layer <= layers:
            raise BadRequest(f"layer {layer} does not exist: there are 0 … {layers}")
        cache, device = self.net.new_cache(), self.net.device
        found = [torch.zeros(0, self.net.config.d_model)]
        for at in range(0, len(ids), AT_ONCE):
            part = torch.tensor([ids[at : at + AT_ONCE]], device=device)
            end = at + part.shape[1]
            places = torch.arange(at, end, device=device)[None]
            stream = self.net.residual(part, places, cache.rows([0], end))
            x = next(islice(stream, layers if layer is None else layer, None))
            found.append((self.net.output_norm(x) if layer is None else x)[0].cpu())
        return torch.cat(found)

    def score(self, text: str | Sequence[int]) -> Tensor:
        """How likely the model thinks a given text, token by token.  → (T − 1,) float32

        Log-probabilities in nats of the tokens after the first (BOS, if the model has one), each
        given those before it: minus their mean is the log of the perplexity.
        Takes a text, tokenised as a prompt is, or ids.
        Raises: BadRequest, PromptTooLong.
        """
        ids = torch.tensor(self.tokens(text) if isinstance(text, str) else self._checked(text))
        states = self.hidden(ids.tolist())[:-1]
        found = [torch.zeros(0)]
        for some, following in zip(
            torch.split(states, AT_ONCE), torch.split(ids[1:], AT_ONCE), strict=True
        ):
            likely = self._logits(some).log_softmax(-1)
            found.append(likely.gather(1, following[:, None])[:, 0])
        return torch.cat(found)

    @torch.no_grad()
    def _logits(self, hidden: Tensor) -> Tensor:
        """(T, d_model) → (T, V), on the CPU."""
        return self.net.output(hidden.to(self.net.device)).cpu()

    # ── ids in, ids out ───────────────────────────────────────────────────────────────────────

    def tokens(
        self, prompt: str, context: Sequence[int] = (), *, options: Options | None = None
    ) -> list[int]:
        """A prompt as ids, BOS and special tokens included, after those of an earlier answer.

        Raises: BadRequest for ids that the vocabulary does not have; PromptTooLong for a text that
        would fill the context of these options a hundred times, before any work is put into it.
        """
        if options is not None:
            room = MOST_CONTEXTS * limits.context(options, self.net.n_ctx)
            fewest = len(unguarded(prompt)) // self.tokenizer.longest
            limits.check(fewest, room, "at least ")
        if not context:
            return self.tokenizer.encode(prompt, bos=True, special=True)
        return self._checked(context) + self.tokenizer.encode(prompt, special=True, continues=True)

    def answer(self, tokens: Sequence[int], options: Options, extras: Extras = NO_EXTRAS) -> Chunks:
        """Ids of a prompt → pieces of text that are safe to show, then one final record.

        Its context is the prompt's ids, as the model saw them, and those of the text that was
        shown: what a stop string cut off is not in it.
        Raises: BadOption, PromptTooLong, and all that `Engine.stream` raises.
        """
        start = time.perf_counter_ns()
        with self.start(tokens, options, extras) as ids:
            telling = _Telling(self.tokenizer, ids.sequence, options.stop)
            for token in ids:
                if chunk := telling.push(token):
                    yield chunk
                if telling.stops.hit:
                    break
        if tail := telling.finish():
            yield tail
        drawn, cut = len(telling.drawn), telling.stops.hit
        yield Chunk(
            done=True,
            done_reason="stop" if cut else ids.sequence.done_reason,
            stats=_stats(ids.sequence, start, drawn),
            context=telling.context(),
            logprobs=telling.noted(drawn if cut else drawn + 1),  # the end token has one, too
        )

    def start(self, tokens: Sequence[int], options: Options, extras: Extras = NO_EXTRAS) -> Stream:
        """Ids of a prompt → ids of an answer, through the engine.  Closing it is cancelling.

        Raises: BadOption, Stopping once the model is closed, and all that `Engine.stream` raises.
        """
        self._check_gqa(options)
        with self._lock:
            return self._engine(Memory.of(options, self.net.config)).stream(tokens, options, extras)

    def forget(self) -> None:
        """Let no later prompt find its beginning in the cache.

        The model notices hooks, other modules and weights that torch writes into by itself. Call
        this after changing it in any other way.
        """
        with self._lock:
            for engine in self._engines.values():
                engine.forget()

    @property
    def active(self) -> int:
        """Answers that are being written, or wait."""
        with self._lock:
            return sum(engine.active for engine in self._engines.values())

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

    def _engine(self, memory: Memory) -> Engine:
        """The engine whose cache is of this kind; made when first needed. The lock is held."""
        if self._closed:
            raise Stopping("the model has been unloaded")
        engine = self._engines.pop(memory, None) or self._new_engine(memory)
        self._engines[memory] = engine
        return engine

    def _new_engine(self, memory: Memory) -> Engine:
        idle = [kind for kind, engine in self._engines.items() if not engine.active]
        for kind in idle[: max(0, len(self._engines) - MOST_ENGINES + 1)]:
            self._engines.pop(kind).close()
        net = self.net.with_rope(
            memory.rope_frequency_base, memory.rope_frequency_scale, memory.n_ctx
        )
        cache = net.new_cache(
            self._slots,
            torch.float16 if memory.f16_kv else torch.float32,
            CPU if memory.low_vram else None,
        )
        return Engine(net, cache, self._marks())

    def _marks(self) -> Marks:
        """BOS ends an answer, too: where a model draws it, another text would begin."""
        words = self.tokenizer
        bos = words.bos_id
        begins = frozenset[int]()
        if bos is not None and not words.piece(bos):  # where the file names none it may be a comma
            begins = frozenset((bos,))
        return Marks(words.eos_ids | begins, bos, words.newline_id)

    def _check_gqa(self, options: Options) -> None:
        """`num_gqa` was needed before files said it themselves; a wrong one is a mistake."""
        shares = {layer.n_heads // layer.n_kv_heads for layer in self.net.config.layers}
        if options.num_gqa not in {0, 1, *shares}:
            raise BadOption(
                f"option 'num_gqa' is {options.num_gqa}, but this model has "
                f"{' or '.join(map(str, sorted(shares)))} query heads for each key head: "
                "leave it out"
            )

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        ids = [int(token) for token in tokens]
        for token in ids:
            if not 0 <= token < self.net.n_vocab:
                raise BadRequest(
                    f"token id {token} is not in the vocabulary: 0 … {self.net.n_vocab - 1}"
                )
        return ids


# ── from ids to records ───────────────────────────────────────────────────────────────────────


class _Telling:
    """An answer on its way from ids to pieces of text."""

    def __init__(self, tokenizer: Tokenizer, sequence: Running, stop: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.sequence = sequence
        self.stops = StopStrings(stop)
        self.drawn: list[int] = []
        self.shown = 0  # characters
        self._decoder = StreamDecoder(tokenizer, after=sequence.prompt)
        self._noted = 0  # tokens whose log-probabilities were told

    def push(self, token: int) -> Chunk | None:
        """The text that is safe to show now, if there is any."""
        self.drawn.append(token)
        return self._chunk(self.stops.feed(self._decoder.push(token)))

    def finish(self) -> Chunk | None:
        """What was held back, once no more comes."""
        return self._chunk(self.stops.feed(self._decoder.finish()) + self.stops.finish())

    def _chunk(self, text: str) -> Chunk | None:
        self.shown += len(text)
        return Chunk(text, logprobs=self.noted(len(self.drawn))) if text else None

    def noted(self, count: int) -> tuple[TokenLogprob, ...]:
        """Log-probabilities of the first `count` tokens, less those that were told already.

        The engine may be ahead of what has been read of it, so its list may be longer.
        """
        likely = self.sequence.likely[self._noted : count]
        self._noted += len(likely)
        return tuple(self._named(one) for one in likely)

    def context(self) -> tuple[int, ...]:
        """The ids of the prompt and of what was shown; a token that was cut is respelled."""
        if not self.stops.hit:
            return (*self.sequence.prompt, *self.drawn)
        return (*self.sequence.prompt, *self._visible())

    def _visible(self) -> list[int]:
        """The ids of an answer's first `shown` characters."""
        decoder = StreamDecoder(self.tokenizer, after=self.sequence.prompt)
        kept: list[int] = []
        text = ""
        for token in self.drawn:
            longer = text + decoder.push(token)
            if len(longer) > self.shown:
                rest = longer[len(text) : self.shown]
                return kept + self.tokenizer.encode(rest, continues=True)
            kept.append(token)
            text = longer
        return kept

    def _named(self, one: Logprob) -> TokenLogprob:
        best = tuple(self._token(id, logprob) for id, logprob in one.best)
        return replace(self._token(one.id, one.logprob), top=best)

    def _token(self, id: int, logprob: float) -> TokenLogprob:
        spelled = self.tokenizer.spelling(id)
        return TokenLogprob(id, spelled.decode(errors="replace"), spelled, logprob)


def _stats(seq: Running, start: int, drawn: int) -> Stats:
    """Counts and durations of an answer that has just ended."""
    now = time.perf_counter_ns()
    read = seq.prompt_read or now
    return Stats(
        total_duration=now - start,
        prompt_eval_count=len(seq.prompt) if seq.prompt_read else 0,
        prompt_cached_count=seq.cached,
        prompt_truncated=seq.dropped,
        prompt_eval_duration=read - (seq.started or read),
        eval_count=drawn,
        eval_duration=now - read,
    )


# ── loading ───────────────────────────────────────────────────────────────────────────────────


def load(
    model: str | Path, options: Mapping[str, Any] | None = None, *, slots: int = 1
) -> LoadedModel:
    """A model from a GGUF file, or by its name in the store.

    A text is taken for a file if one lies there, else for a name. `options` become its defaults,
    over those of its Modelfile; those about loading (`num_gpu`, `use_mmap`, …) count only here.
    Raises: NotFound, BadName, BadOption, FormatError, UnsupportedModel.
    """
    path = Path(model).expanduser()
    chosen = Options()
    if not path.is_file():
        if isinstance(model, Path) or path.suffix == ".gguf":
            raise NotFound(f"{model}: there is no such file")
        files = runnable(Store.default().resolve(Name.parse(str(model))))
        path, chosen = files.weights, chosen.updated(files.parameters)
    return load_file(path, chosen.updated(options or {}), slots=slots)


def load_file(path: Path, options: Options = DEFAULTS, *, slots: int = 1) -> LoadedModel:
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
    place(net, path, Placement.of(options))
    return LoadedModel(net, tokenizer, defaults=options, slots=slots)


def runnable(files: ModelFiles) -> ModelFiles:
    """The same files, if we can run all of them.  Raises: UnsupportedModel."""
    if files.adapters:
        raise UnsupportedModel(f"model '{files.name}' has an adapter; expected none: not built yet")
    return files
