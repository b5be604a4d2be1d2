"""One model in memory that can answer: what `refollama.load()` gives.

llm = refollama.load("model.gguf")
llm.tokenizer · llm.net · llm.stream("Once upon") · llm.generate("Once upon")
llm.chat([{"role": "user", "content": "hi"}])
llm.logits(ids) · llm.hidden(ids, layer) · llm.score("Once upon a time") · llm.embed("Once")
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from refollama.cachekind import CacheKind
from refollama.convert import as_files, is_checkpoint
from refollama.dialogue import (
    Reader,
    Script,
    chat_prompt,
    check_messages,
    check_think,
    converse,
    gathered,
    raw_prompt,
    script_from,
    scripted,
)
from refollama.engine import limits
from refollama.engine.engine import Engine, Stream
from refollama.engine.pool import Pool
from refollama.engine.sequence import NO_EXTRAS, Extras, Marks, never
from refollama.errors import (
    Abandoned,
    BadOption,
    BadRequest,
    FormatError,
    NotFound,
    PromptTooLong,
    Stopping,
    UnsupportedModel,
)
from refollama.fable.bundled import stock
from refollama.fast import exactly, hasten, more_bytes, reading, threads_for_writing
from refollama.kvcache import CPU
from refollama.messages import Chat, Chunk, Message, Reached
from refollama.models.exact import warn_if_not_exact
from refollama.models.llama import Llama
from refollama.models.llava import Llava, Picture
from refollama.models.load import load_eyes, load_net
from refollama.models.memory import Placement, passes, place
from refollama.models.meter import Meter, Told, unheard
from refollama.models.vectors import pool
from refollama.options import Options
from refollama.pictures import Seen, file_of
from refollama.sampling.chain import Grammar, Watch
from refollama.sampling.grammar import JsonGrammar, Spellings, source
from refollama.several import check_count, several
from refollama.sight import Sight, looking
from refollama.store import Name, Store
from refollama.telling import Telling, stats, token_ids
from refollama.text import marks, tokenizer_from
from refollama.text.tokenizer import Tokenizer, unguarded
from refollama.weights.gguf import open_gguf

Chunks = Generator[Chunk, None, None]  # closing it is cancelling
Images = Sequence[bytes | str | Path]

AT_ONCE = 512  # tokens that `logits` and its kin send through the model in one step
MOST_CONTEXTS = 100  # a prompt that would fill so many is a mistake, or worse
DEFAULTS = Options()
NO_SCRIPT = Script()


class Answer(NamedTuple):
    """A whole answer: its text, and the record that ended it (reason, counts, context)."""

    text: str
    record: Chunk


class LoadedModel:
    """A net, its tokenizer, and the engine that lets many callers share them.

    `net` is an ordinary torch module: hook it, change it, call it. `slots` answers are written side
    by side, others wait; those that ask for another `CacheKind` have slots of their own.
    `defaults` are the options that stand in the model's Modelfile; `script` is what it and the file
    say about conversations.
    """

    def __init__(
        self,
        net: Llama,
        tokenizer: Tokenizer,
        *,
        defaults: Options = DEFAULTS,
        slots: int = 1,
        script: Script = NO_SCRIPT,
        sources: Sequence[Path] = (),
    ) -> None:
        self._engines = Pool(_maker(self))
        self._reading = threading.Lock()  # a text that is embedded has a cache to itself: one only
        self._sight = Sight()
        self._slots = slots
        self.net = net
        self.tokenizer = tokenizer
        self.defaults = defaults
        self.script = script
        self.sources = sources  # the files that its weights lie in

    # ── text in, text out ─────────────────────────────────────────────────────────────────────

    def stream(
        self,
        prompt: str,
        options: Mapping[str, Any] | None = None,
        *,
        images: Images = (),
        format: object = None,
        on_stage: Watch | None = None,
    ) -> Iterator[str]:
        """What the model writes after a raw prompt, piece by piece; closing it is cancelling.

        images: files, or their paths, for a model that can see; the prompt may say [img-0] where
        the first one stands.
        format: "json" for an object, or a JSON schema: see `grammar`.
        on_stage: see `Sampler`; it is called in the engine's thread.
        Raises: BadOption, BadRequest.
        """
        extras = Extras(grammar=self.grammar(format), on_stage=on_stage)
        with closing(self._ask(prompt, images, options, extras)) as chunks:
            yield from (chunk.text for chunk in chunks if chunk.text)

    def generate(  # noqa: PLR0913  all that may be asked of an answer
        self,
        prompt: str,
        options: Mapping[str, Any] | None = None,
        *,
        images: Images = (),
        format: object = None,
        logprobs: int | Sequence[str | int] | None = None,
        n: int = 1,
        on_stage: Watch | None = None,
    ) -> Answer:
        """The whole answer to a raw prompt: `text, record = llm.generate(…)`.

        logprobs: note in `record.logprobs` how likely each token was, and the best so many; or
        these tokens, by id or by what they print: [" yes", " no"].
        n: so many answers, from one reading of the prompt; all are in `record.answers`, and that
        of number k is the one that the seed `seed` + k gives.
        The rest is as in `stream`.
        """
        check_count(n)
        extras = self._noting(logprobs)
        extras = replace(extras, grammar=self.grammar(format), on_stage=on_stage)
        whole = gathered(self._ask(prompt, images, options, extras, n))
        return Answer(whole.text, whole)

    def _noting(self, logprobs: int | Sequence[str | int] | None) -> Extras:
        if isinstance(logprobs, int) and logprobs < 0:
            raise BadRequest(f"logprobs must be a number of alternatives, not {logprobs}")
        if logprobs is None or isinstance(logprobs, int):
            return Extras(logprobs=logprobs)
        named = [logprobs] if isinstance(logprobs, str) else logprobs  # not its characters
        return Extras(logprobs=0, named=token_ids(self.tokenizer, named))

    @overload
    def chat(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        options: Mapping[str, Any] | None = None,
        *,
        stream: Literal[False] = False,
        tools: Sequence[Mapping[str, Any]] = (),
        think: bool | str | None = None,
        format: object = None,
        logprobs: int | Sequence[str | int] | None = None,
    ) -> Answer: ...

    @overload
    def chat(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        options: Mapping[str, Any] | None = None,
        *,
        stream: Literal[True],
        tools: Sequence[Mapping[str, Any]] = (),
        think: bool | str | None = None,
        format: object = None,
        logprobs: int | Sequence[str | int] | None = None,
    ) -> Iterator[str]: ...

    def chat(  # noqa: PLR0913
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        options: Mapping[str, Any] | None = None,
        *,
        stream: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        think: bool | str | None = None,
        format: object = None,
        logprobs: int | Sequence[str | int] | None = None,
    ) -> Answer | Iterator[str]:
        """The answer to a conversation, through the model's template; `stream` gives its pieces.

        Messages: `Message`, or {"role": "user", "content": "hi"}, with "images" (files, or their
        paths) for a model that can see. `record.thinking` and `record.tool_calls` are what else is
        in the answer. logprobs: as `generate` has it.
        Raises: BadRequest, BadOption, TemplateError.
        """
        ask = Chat("", tuple(map(_message, messages)), tuple(tools), think=think, format=format)
        chunks = self._converse(ask, self.defaults.updated(options or {}), self._noting(logprobs))
        if stream:
            return (chunk.text for chunk in chunks if chunk.text)
        whole = gathered(chunks)
        return Answer(whole.text, whole)

    def _converse(self, ask: Chat, options: Options, extras: Extras) -> Chunks:
        if not ask.messages:
            raise BadRequest("a conversation needs a message")
        check_messages(ask.messages)
        check_think(ask.think)
        prompt = chat_prompt(self.script, ask, self.reader(options))
        extras = replace(extras, grammar=self.grammar(ask.format))
        with closing(converse(self, prompt, options, extras)) as chunks:
            yield from chunks

    def reader(
        self, options: Options, context: Sequence[int] = (), gone: Callable[[], bool] = never
    ) -> Reader:
        """What `dialogue` needs to know of this model, after the tokens of `context`.

        gone: asked before each picture; then looking at it raises Abandoned.
        """
        tokens = partial(self.tokens, context=context, options=options)
        room = limits.context(options, self.net.n_ctx)
        check = partial(self._check_length, options=options)
        look = partial(self._picture, gone=gone) if isinstance(self.net, Llava) else None
        return Reader(self.tokenizer, tokens, room, bool(context), check, look)

    def _picture(self, file: bytes, gone: Callable[[], bool]) -> Picture:
        self._check_wanted(gone)  # decoding may take a second or two
        assert isinstance(self.net, Llava)
        return self._sight.picture(self.net, file)

    def _ask(
        self,
        prompt: str,
        images: Images,
        options: Mapping[str, Any] | None,
        extras: Extras,
        n: int = 1,
    ) -> Chunks:
        chosen = self.defaults.updated(options or {})
        found = raw_prompt(prompt, tuple(map(file_of, images)), self.reader(chosen))
        extras = replace(extras, pictures=found.pictures)
        return several(partial(self.answer, found.tokens), chosen, extras, n)

    # ── ids in, numbers out: the plain path, without sampling ─────────────────────────────────

    def logits(self, tokens: Sequence[int], start: int = 0, stop: int | None = None) -> Tensor:
        """Logits after each of the tokens from `start` to `stop`.  → (stop − start, V) float32

        All tokens are read, but only these are turned into logits, which are V wide. This, `hidden`
        and `score` compute under the model's `defaults`, as far as those change the model.
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
        nothing = torch.zeros(0, self.net.config.d_model)
        return torch.cat([nothing, *_states(self._net(self.defaults), ids, layer)])

    def score(self, text: str | Sequence[int], start: int = 0) -> Tensor:
        """How likely the model thinks a given text, token by token.  → (T − 1 − start,) float32

        Log-probabilities in nats of the tokens after the first (BOS, if the model has one), each
        given those before it; `start` leaves out as many. Minus their mean is log(perplexity).
        Takes a text, tokenised as a prompt is, or ids.
        Raises: BadRequest, PromptTooLong.
        """
        ids = torch.tensor(self.tokens(text) if isinstance(text, str) else self._checked(text))
        states, ids = self.hidden(ids.tolist())[start:-1], ids[start + 1 :]
        found = [torch.zeros(0)]
        for some, following in zip(
            torch.split(states, AT_ONCE), torch.split(ids, AT_ONCE), strict=True
        ):
            likely = self._logits(some).log_softmax(-1)
            found.append(likely.gather(1, following[:, None])[:, 0])
        return torch.cat(found)

    @torch.no_grad()
    def _logits(self, hidden: Tensor) -> Tensor:
        """(T, d_model) → (T, V), on the CPU."""
        output = self._net(self.defaults).output
        with exactly():
            logits: Tensor = output(hidden.to(output.weight.device))
        return logits.cpu()

    def _net(self, options: Options) -> Llama:
        """The net in the form that these options want; its weights are shared."""
        return CacheKind.of(options, self.net).turned(self.net)

    # ── text in, one vector out ───────────────────────────────────────────────────────────────

    def embed(self, text: str | Sequence[str], options: Mapping[str, Any] | None = None) -> Tensor:
        """What the model makes of a text as a whole: (d_model,) float32; of N texts (N, d_model).

        Its last token's vector, `hidden(…)[-1]`, unless the file asks for another `pooling`. It is
        not of length 1; a text that is too long for `num_ctx` is cut at its end.
        Raises: BadRequest, BadOption.
        """
        chosen = self.defaults.updated(options or {})
        if isinstance(text, str):
            return self.vector(self.fitting(text, chosen), chosen)
        rows = [self.vector(self.fitting(one, chosen), chosen) for one in text]
        return torch.stack(rows) if rows else torch.zeros(0, self.net.config.d_model)

    def fitting(self, text: str, options: Options, *, truncate: bool = True) -> list[int]:
        """The ids of a text to embed, BOS and EOS included, cut at its end to fit `num_ctx`.

        Raises: BadRequest if nothing of it fits, or not all of it and it may not be cut.
        """
        n_ctx = min(options.num_ctx, self.net.n_ctx)
        most = MOST_CONTEXTS * max(n_ctx, 1) * self.tokenizer.longest  # what lies behind is cut
        ids = self.tokenizer.encode(text[:most], special=True)
        room = n_ctx - len(self.tokenizer.around([]))
        if len(ids) > room and not truncate:
            raise BadRequest(
                "the input length exceeds the context length: at least "
                f"{len(ids)} tokens, where there is room for {max(room, 0)}"
            )
        if len(ids) > room and room <= 0:
            raise BadRequest("input after truncation exceeds maximum context length")
        return self.tokenizer.around(ids[:room])

    def vector(
        self, tokens: Sequence[int], options: Options, gone: Callable[[], bool] = never
    ) -> Tensor:
        """The ids of a text → the vector that stands for it, (d_model,); one text after another.

        gone: asked now and then.  Raises: BadRequest, Abandoned, Stopping once the model is closed.
        """
        self._check_gqa(options)
        ids = self._checked(tokens)
        limits.check(len(ids), self.net.n_ctx)
        if not ids:
            raise BadRequest("the text is empty, and this model has no token to begin with")
        found = []
        with self._reading:
            for part in _states(self._net(options), ids):
                self._check_wanted(gone)
                found.append(part)
        return pool(torch.cat(found), self.net.config.pooling)

    # ── ids in, ids out ───────────────────────────────────────────────────────────────────────

    def tokens(
        self,
        prompt: str,
        context: Sequence[int] = (),
        *,
        options: Options | None = None,
        pictures: Sequence[Seen] = (),
    ) -> list[int]:
        """A prompt as ids, BOS and special tokens included, after those of an earlier answer.

        pictures: which the prompt has marks for. What stands behind one is tokenised by itself, as
        the model learned it: with a space in front, where its tokenizer puts one.
        Raises: BadRequest for ids that the vocabulary does not have; PromptTooLong for a text that
        would fill the context of these options a hundred times, before any work is put into it.
        """
        if options is not None:
            self._check_length(len(unguarded(prompt)), options)
        first, *rest = marks.parted(prompt) if pictures else (prompt,)
        ids = self.tokenizer.encode(str(first), special=True, continues=bool(context))
        for part in rest:
            some = pictures[part].ids if isinstance(part, int) else self._behind(part)
            ids.extend(some)
        return self._checked(context) + ids if context else self.tokenizer.around(ids)

    def _behind(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, special=True) if text else []

    def _check_length(self, characters: int, options: Options) -> None:
        """Raises: PromptTooLong for a text that would fill the context a hundred times."""
        room, fewest = limits.context(options, self.net.n_ctx), characters // self.tokenizer.longest
        if fewest > MOST_CONTEXTS * room:
            raise PromptTooLong(f"at least {fewest}", room)

    def grammar(self, format: object) -> Grammar | None:
        """From the `format` of a request to what the engine takes: `Extras(grammar=…)`.

        "json" asks for an object, a mapping is a JSON schema, None and "" ask for nothing.
        The whole answer is such a value then, or its `done_reason` is "length".
        Raises: BadRequest for anything else, and if the schema cannot be enforced.
        """
        asked = source(format)
        return None if asked is None else JsonGrammar(self._spellings, asked)

    @cached_property
    def _spellings(self) -> Spellings:
        words = self.tokenizer
        pieces = [words.piece(id) for id in range(words.vocab_size)]
        return Spellings(pieces, partial(words.encode, continues=True), self._marks().eos)

    def answer(self, tokens: Sequence[int], options: Options, extras: Extras = NO_EXTRAS) -> Chunks:
        """Ids of a prompt → pieces of text that are safe to show, then one final record.

        Its context is the prompt's ids, as the model saw them, and those of the text that was
        shown: what a stop string cut off is not in it. If the answer must have a form, one that a
        stop string cut is not whole: its reason is "length".
        Raises: BadOption, PromptTooLong, and all that `Engine.stream` raises.
        """
        start = time.perf_counter_ns()
        for reached in self._looking(tokens, options, extras):
            if extras.progress:
                yield Chunk(progress=reached)
        looked = time.perf_counter_ns() - start
        with self.start(tokens, options, extras) as ids:
            telling = Telling(self.tokenizer, ids.sequence, options.stop, extras)
            for item in ids.items():
                if chunk := telling.hear(item):
                    yield chunk
                if telling.stops.hit:
                    break
        if tail := telling.finish():
            yield tail
        drawn, cut = len(telling.drawn), telling.stops.hit
        yield Chunk(
            done=True,
            done_reason=telling.done_reason(),
            stats=stats(ids.sequence, start, drawn, looked),
            context=telling.context(),
            logprobs=telling.noted(drawn if cut else drawn + 1),  # the end token has one, too
        )

    def start(self, tokens: Sequence[int], options: Options, extras: Extras = NO_EXTRAS) -> Stream:
        """Ids of a prompt → ids of an answer, through the engine.  Closing it is cancelling.

        Raises: BadRequest, BadOption, Stopping once the model is closed, Abandoned, and all that
        `Engine.stream` raises.
        """
        self._check_gqa(options)
        ids = self._checked(tokens, extras.pictures)
        for _ in self._looking(tokens, options, extras):
            pass
        kind = CacheKind.of(options, self.net).with_parts(self.net)
        return self._engines.stream(kind, ids, options, extras)

    def _looking(
        self, tokens: Sequence[int], options: Options, extras: Extras
    ) -> Iterator[Reached]:
        check = partial(self._check_wanted, extras.gone)
        return looking(self.net, tokens, options, extras, self._marks().bos, check)

    def _check_wanted(self, gone: Callable[[], bool]) -> None:
        """Raises: Stopping, Abandoned."""
        if self._engines.closed:
            raise Stopping("the model has been unloaded")
        if gone():
            raise Abandoned("whoever asked has gone")

    def forget(self) -> None:
        """Let no later prompt find its beginning in the cache, nor what is being read now.

        The model notices hooks, other modules and weights that torch writes into by itself. Call
        this after changing it in any other way (`weight.data`, numpy, another `forward`).
        """
        self._engines.forget()
        self._sight.forget()

    @property
    def active(self) -> int:
        """Answers that are being written, or wait."""
        return self._engines.active

    def nbytes(self) -> tuple[int, int]:
        """Of weights and caches: bytes in all, and of those the ones on a GPU."""
        tensors = [*self.net.buffers(), *self.net.parameters(), *self._engines.memory()]
        tensors += self.net.gallery.memory() if isinstance(self.net, Llava) else []
        return (
            sum(tensor.nbytes for tensor in tensors) + more_bytes(self.net),
            sum(tensor.nbytes for tensor in tensors if tensor.is_cuda),
        )

    def close(self) -> None:
        """End all answers and let go of the caches. Dropping the model does the same."""
        self._engines.close()

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _new_engine(self, kind: tuple[object, ...]) -> Engine:
        wanted = kind[0]
        assert isinstance(wanted, CacheKind)
        net = wanted.turned(self.net)
        cache = net.new_cache(self._slots, wanted.dtype, CPU if wanted.low_vram else None)
        reads, writes = partial(reading, self.defaults.prompt_bits), threads_for_writing(net)
        return Engine(net, cache, self._marks(), reading=reads, writing_threads=writes)

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

    def _checked(self, tokens: Sequence[int], pictures: Sequence[Seen] = ()) -> list[int]:
        ids = [int(token) for token in tokens]
        seen = {id for picture in pictures for id in picture.ids}
        for token in ids:
            if not 0 <= token < self.net.n_vocab and token not in seen:
                raise BadRequest(
                    f"token id {token} is not in the vocabulary: 0 … {self.net.n_vocab - 1}"
                )
        return ids


@torch.no_grad()
def _states(net: Llama, ids: Sequence[int], layer: int | None = None) -> Iterator[Tensor]:
    """What `hidden` gives, in parts of AT_ONCE tokens, each computed when it is asked for."""
    cache, device = net.new_cache(), net.device
    for at in range(0, len(ids), AT_ONCE):
        part = torch.tensor([ids[at : at + AT_ONCE]], device=device)
        end = at + part.shape[1]
        places = torch.arange(at, end, device=device)[None]
        stream = net.residual(part, places, cache.rows([0], end))
        with exactly():
            x = next(islice(stream, len(net.blk) if layer is None else layer, None))
        x = net.output_norm(x.to(net.output_norm.weight.device)) if layer is None else x
        yield x[0].cpu()


def _maker(model: LoadedModel) -> Callable[[tuple[object, ...]], Engine]:
    """Its `_new_engine`, without holding on to it: a model that is dropped must end."""
    itself = weakref.ref(model)

    def make(kind: tuple[object, ...]) -> Engine:
        alive = itself()
        assert alive is not None
        return alive._new_engine(kind)

    return make


def _message(given: Message | Mapping[str, Any]) -> Message:
    if isinstance(given, Message):
        return given
    try:
        return Message(**{**given, "images": tuple(map(file_of, given.get("images") or ()))})
    except TypeError:
        raise BadRequest("a message must have a role and content, as Message has them") from None


# ── loading ───────────────────────────────────────────────────────────────────────────────────


def load(  # noqa: PLR0913  all that a model can be made of
    model: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    slots: int = 1,
    projector: str | Path | None = None,
    adapter: str | Path | Sequence[str | Path] = (),
    vision_blocks: int | None = None,
    told: Told = unheard,
) -> LoadedModel:
    """A model from a GGUF file, from a folder of safetensors, or by its name in the store.

    A text is taken for a file or folder if one lies there, else for a name. A folder is converted
    first, into a temporary file. `options` become its defaults,
    over those of its Modelfile; those about loading (`num_gpu`, `use_mmap`, …) count only here.
    projector: the file with a vision model's eyes ("mmproj"); a model in the store has its own.
    adapter: a LoRA's file or folder, or several, after those of a model in the store.
    vision_blocks: so many blocks of its tower are run, in place of what the file says (all that it
    holds, as LLaVA was trained); −1: all but the last, which is what llama.cpp runs.
    told: is called with the bytes that have found their place, and those that there are.
    Raises: NotFound, BadName, BadOption, FormatError, UnsupportedModel.
    """
    path = Path(model).expanduser()
    chosen, files = Options(), None
    added = [adapter] if isinstance(adapter, str | Path) else adapter
    adapters = [Path(one).expanduser() for one in added]
    if is_checkpoint(path):
        with as_files(path) as (first, *others):
            projector = projector or next(iter(others), None)
            return load(
                first,
                options,
                slots=slots,
                projector=projector,
                adapter=adapter,
                vision_blocks=vision_blocks,
                told=told,
            )
    if not path.is_file():
        if isinstance(model, Path) or path.suffix == ".gguf":
            raise NotFound(f"{model}: there is no such file")
        store = Store.default()
        stock(store, str(model))
        files = store.resolve(Name.parse(str(model)))
        path, chosen = files.weights, chosen.updated(files.parameters)
        projector = projector or next(iter(files.projectors), None)
        adapters = [*files.adapters, *adapters]
    chosen = chosen.updated(options or {})
    eyes = None if projector is None else Path(projector).expanduser()
    llm = load_file(
        path,
        chosen,
        slots=slots,
        projector=eyes,
        adapters=adapters,
        vision_blocks=vision_blocks,
        told=told,
    )
    llm.script = llm.script if files is None else scripted(llm.script, files)
    return llm


def load_file(  # noqa: PLR0913
    path: Path,
    options: Options = DEFAULTS,
    *,
    slots: int = 1,
    projector: Path | None = None,
    adapters: Sequence[Path] = (),
    vision_blocks: int | None = None,
    told: Told = unheard,
) -> LoadedModel:
    """A GGUF file as a model that can answer; what is behind the options is as in `load`.

    Raises: NotFound, BadOption, FormatError, UnsupportedModel.
    """
    file, wanted = open_gguf(path), Placement.of(options)
    sources = [path] if projector is None else [path, projector]
    sight = None if projector is None else open_gguf(projector)
    infos = (info for one in (file, sight) if one for info in one.tensors.values())
    meter = Meter(sum(info.nbytes for info in infos) * (1 + passes(wanted)), told)
    eyes = None if sight is None else load_eyes(sight, meter.add, vision_blocks)
    try:
        tokenizer = tokenizer_from(file.metadata)
        net = load_net(file, meter.add, eyes, adapters)
    except (FormatError, UnsupportedModel) as error:
        if str(error).startswith(path.name):
            raise
        raise type(error)(f"{path.name}: {error}") from None  # whose metadata it was
    if tokenizer.vocab_size != net.n_vocab:
        raise FormatError(
            f"{path.name}: the tokenizer has {tokenizer.vocab_size} tokens, "
            f"but token_embd.weight has {net.n_vocab} rows; expected as many"
        )
    place(net, path, wanted, meter.add, projector)
    if wanted.fast:
        hasten(net, meter.add, sources)
    meter.finish()
    warn_if_not_exact()
    script = script_from(file.metadata)
    return LoadedModel(
        net, tokenizer, defaults=options, slots=slots, script=script, sources=sources
    )
