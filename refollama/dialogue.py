"""What does a model get to read, and what is in its answer? The two ends of a conversation.

    messages ── opened ──► with the model's own ── render, shortened ──► Prompt ──► ids
    chunks ◄── told ── thinking, calls of tools and text, apart ◄── pieces of the answer

Used by `LoadedModel.chat` and by the service; neither weights nor HTTP are known here.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from refollama.errors import BadRequest, TemplateError
from refollama.messages import Chat, Chunk, Generate, Message, ToolCall
from refollama.pictures import Seen
from refollama.store import ModelFiles
from refollama.text import marks
from refollama.text.jinja import JinjaTemplate
from refollama.text.prompt import (
    ROLES,
    AnyTemplate,
    Talk,
    is_bare,
    knows_suffix,
    knows_tools,
    render,
    shortened,
    starts,
    template_from,
)
from refollama.text.thinking import Tags, Thoughts, thinking_tags
from refollama.text.tokenizer import Tokenizer, unguarded, valid
from refollama.text.toolcalls import ToolCalls, closing_tag, tool_tag

if TYPE_CHECKING:  # they bring torch along
    from refollama.engine.sequence import Extras
    from refollama.options import Options

MOST_PICTURES = 128  # in one request: each takes a megabyte or two until it has been looked at
THINK_LEVELS = ("high", "medium", "low", "max")

Chunks = Generator[Chunk, None, None]


@dataclass(frozen=True, slots=True)
class Script:
    """How a model wants to be talked to: what its Modelfile says, and what its file does."""

    name: str = "this model"
    template: str = ""  # Go's; empty: the file's own
    jinja: str = ""  # the file's own
    system: str = ""
    messages: tuple[Message, ...] = ()  # the turns that begin every conversation
    bos: str = ""  # how the tokens are written that begin and end a text
    eos: str = ""


def scripted(script: Script, files: ModelFiles) -> Script:
    """The file's own script, under what the Modelfile says."""
    return replace(
        script,
        name=files.name.full,
        template=files.template or "",
        system=files.system or "",
        messages=files.messages,
    )


def script_from(metadata: Mapping[str, Any]) -> Script:
    """What a GGUF file says about conversations. A key of another type is as good as none."""

    def spelled(name: str) -> str:
        tokens = metadata.get("tokenizer.ggml.tokens") or []
        id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return str(tokens[id]) if isinstance(id, int) and 0 <= id < len(tokens) else ""

    jinja = metadata.get("tokenizer.chat_template")
    jinja = jinja if isinstance(jinja, str) else ""
    return Script(jinja=jinja, bos=spelled("bos"), eos=spelled("eos"))


def _any_length(characters: int) -> None:
    """No text is too long."""


@dataclass(frozen=True, slots=True)
class Reader:
    """Who is to read the prompt: a tokenizer, and so many tokens of context."""

    words: Tokenizer
    tokens: Callable[..., list[int]]  # of a text, and of the pictures that it has marks for
    room: int
    continues: bool = False  # after tokens that were there before
    check: Callable[[int], None] = _any_length  # raises for so many characters: far too many
    look: Callable[[bytes], Seen] | None = None  # at the file of a picture, if it can see


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, and what to look for in the answer."""

    text: str  # as people may see it: without guards; a picture is [img-0]
    tokens: list[int]
    truncated: int = 0  # tokens that went with the messages that were left out
    messages_truncated: int = 0
    tags: Tags | None = None  # of thoughts, if they are to be told apart
    tool_tag: str = ""
    tools: frozenset[str] = field(default_factory=frozenset)  # names of those that may be called
    pictures: tuple[Seen, ...] = ()  # what the ids behind the vocabulary stand for

    @property
    def begun(self) -> bool:
        """Does the prompt begin the thought itself?"""
        return self.tags is not None and self.text.rstrip().endswith(self.tags.opening)


# ── before the answer ─────────────────────────────────────────────────────────────────────────


def chat_prompt(script: Script, ask: Chat, reader: Reader) -> Prompt:
    """The prompt of a conversation; the oldest messages go if not all fit.

    Raises: BadRequest for what the model cannot do, TemplateError, PromptTooLong.
    """
    template = template_from(script.template, script.jinja)
    marked, pictures = _looked(ask.messages, reader, "messages[{}]")
    messages = opened(script, marked)
    talk = Talk(messages, ask.tools, _thinks(script, template, ask.model, ask.think))
    if ask.tools and not knows_tools(template):
        raise BadRequest(f"{script.name} does not support tools")
    guard = _Guard(reader.words.guard, reader.check)
    writer = _Writer(script, template, reader, guard, pictures)
    tools = frozenset(map(_tool_name, ask.tools))
    if isinstance(ask.format, Mapping):  # then the answer has that form: it is no call
        tools = frozenset()
    prompt = writer.prompt(talk, truncate=ask.truncate)
    return replace(prompt, tool_tag=tool_tag(template) if tools else "", tools=tools)


def generate_prompt(script: Script, ask: Generate, reader: Reader) -> Prompt:
    """The prompt of one turn.  Raises: as `chat_prompt` does."""
    template = template_from(ask.template or script.template, script.jinja)
    think = _thinks(script, template, ask.model, ask.think)
    if ask.raw:
        return raw_prompt(ask.prompt, ask.images, reader)
    asked, pictures = _looked((Message("user", ask.prompt, ask.images),), reader)
    if ask.suffix and not knows_suffix(template):
        raise BadRequest(f"{script.name} does not support insert")
    script = replace(script, system=ask.system or script.system)
    script = script if not ask.context else replace(script, messages=())
    messages = opened(script, asked)
    talk = Talk(messages, think=think, suffix=ask.suffix, first=not ask.context)
    guard = _Guard(valid if is_bare(template) else reader.words.guard, reader.check)
    return _Writer(script, template, reader, guard, pictures).prompt(talk, truncate=False)


def raw_prompt(text: str, images: tuple[bytes, ...], reader: Reader) -> Prompt:
    """A text that is the prompt, and pictures in it.  Raises: BadRequest, PromptTooLong."""
    (asked,), pictures = _looked((Message("user", text, images),), reader)
    return _read(marks.around(valid, asked.content), reader, pictures)


def _read(text: str, reader: Reader, pictures: Sequence[Seen] = ()) -> Prompt:
    """A text as tokens; of the pictures those that it has marks for."""
    tokens = reader.tokens(text, pictures=pictures) if pictures else reader.tokens(text)
    numbers = (part for part in marks.parted(text) if isinstance(part, int))
    seen = tuple(pictures[number] for number in dict.fromkeys(numbers))
    return Prompt(marks.shown(unguarded(text)), tokens, pictures=seen)


def _looked(
    messages: Sequence[Message], reader: Reader, place: str = ""
) -> tuple[tuple[Message, ...], tuple[Seen, ...]]:
    """The messages with marks for their pictures, and all the pictures in order."""
    if reader.look is None:
        check_no_images(messages)
        return tuple(messages), ()
    if (count := sum(len(message.images) for message in messages)) > MOST_PICTURES:
        raise BadRequest(f"{count} images: at most {MOST_PICTURES} are looked at in one request")
    marked: list[Message] = []
    pictures: list[Seen] = []
    for at, message in enumerate(messages):
        found = _pictures(message, place.format(at), reader.look)
        with _named(place.format(at)):
            content = marks.placed(message.content, len(found), len(pictures))
        marked.append(replace(message, content=content, images=()))
        pictures += found
    return tuple(marked), tuple(pictures)


def _pictures(message: Message, place: str, look: Callable[[bytes], Seen]) -> list[Seen]:
    found = []
    for number, file in enumerate(message.images):
        with _named(f"{place}.images[{number}]".lstrip(".")):
            found.append(look(file))
    return found


def check_no_images(messages: Iterable[Message | Generate]) -> None:
    """Raises: BadRequest for an image; for a model that has no eyes."""
    if any(message.images for message in messages):
        raise BadRequest("this model cannot look at images")


@contextmanager
def _named(place: str) -> Iterator[None]:
    """What is wrong is said with its place in the request, if that has a name."""
    try:
        yield
    except BadRequest as error:
        raise BadRequest(f"{place}: {error}" if place else str(error)) from None


def opened(script: Script, messages: Sequence[Message]) -> tuple[Message, ...]:
    """The conversation behind the model's own beginning.

    The model's system text comes first, unless the conversation begins with one.
    """
    own = (Message("system", script.system),) if script.system else ()
    if messages and messages[0].role == "system":
        own, messages = (messages[0],), messages[1:]
    return (*own, *script.messages, *messages)


def check_messages(messages: Iterable[Message]) -> None:
    """Raises: BadRequest for a role that there is not."""
    for message in messages:
        if message.role not in ROLES:
            raise BadRequest(
                f"invalid role: {message.role[:40]}, role must be one of [{', '.join(ROLES)}]"
            )


def check_think(think: bool | str | None) -> None:
    """Raises: BadRequest for a level that there is not."""
    if isinstance(think, str) and think not in THINK_LEVELS:
        levels = ", ".join(f'"{level}"' for level in THINK_LEVELS)
        raise BadRequest(f'invalid think value: "{think[:40]}" (must be {levels}, true, or false)')


def _thinks(
    script: Script, template: AnyTemplate, model: str, think: bool | str | None
) -> bool | str | None:
    """Is it to think aloud? What can think does, unless it is told not to."""
    can = thinking_tags(template) is not None
    if think and not can:
        raise BadRequest(f'"{model or script.name}" does not support thinking')
    return True if can and think is None else think


def _tool_name(tool: Mapping[str, Any]) -> str:
    function = tool.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise BadRequest('each tool must be {"type": "function", "function": {"name": …, …}}')
    return name


class _Guard:
    """Guards each text once, as long as all together might fit: guarding takes a while.

    Raises: what `check` raises, before any work is put into the text that is too much.
    """

    def __init__(self, guard: Callable[[str], str], check: Callable[[int], None]) -> None:
        self._guard, self._check = guard, check
        self._known: dict[str, str] = {}
        self._characters = 0

    def __call__(self, text: str) -> str:
        if text not in self._known:
            self._characters += len(text)
            self._check(self._characters)
            self._known[text] = marks.around(self._guard, text)
        return self._known[text]


@dataclass(frozen=True, slots=True)
class _Writer:
    """Turns a conversation into text and tokens."""

    script: Script
    template: AnyTemplate
    reader: Reader
    guard: Callable[[str], str]
    pictures: tuple[Seen, ...] = ()

    def prompt(self, talk: Talk, *, truncate: bool) -> Prompt:
        """As much of the conversation as the context holds; the last message in any case."""
        whole = self._read(talk)
        found = whole
        if truncate and len(whole.tokens) > self.reader.room:
            found = self._shorter(talk, whole)
        lost = len(whole.tokens) - len(found.tokens)
        tags = thinking_tags(self.template) if talk.think is not False else None
        return replace(found, truncated=max(lost, 0), tags=tags)

    def _read(self, talk: Talk, dropped: int = 0) -> Prompt:
        prompt = _read(self.text(talk), self.reader, self.pictures)
        return replace(prompt, messages_truncated=dropped)

    def _shorter(self, talk: Talk, whole: Prompt) -> Prompt:
        """The longest end of the conversation that fits, else the shortest that can be written.

        A template may refuse an end, because of how it begins: that one does not fit.
        """
        choices = starts(talk.messages)[1:]
        written: dict[int, Prompt] = {}

        def fits(start: int) -> bool:
            messages = shortened(talk.messages, start)
            dropped = len(talk.messages) - len(messages)
            try:
                written[start] = self._read(replace(talk, messages=messages), dropped)
            except TemplateError:
                return False
            return len(written[start].tokens) <= self.reader.room

        found = bisect_left(choices, True, key=fits)
        if found < len(choices):
            return written[choices[found]]
        return written[max(written)] if written else whole

    def text(self, talk: Talk) -> str:
        """A template of Jinja's spells BOS itself; where the tokenizer adds one it goes."""
        words, bos = self.reader.words, self.script.bos
        text = render(self.template, talk, guard=self.guard, bos=bos, eos=self.script.eos)
        added = words.bos_id is not None and words.around([])[:1] == [words.bos_id]
        if isinstance(self.template, JinjaTemplate) and (added or self.reader.continues):
            return text.removeprefix(bos)
        return text


# ── the answer ────────────────────────────────────────────────────────────────────────────────


class Model(Protocol):
    """What has to be known of a model to hear its answer."""

    tokenizer: Tokenizer

    def answer(self, tokens: Sequence[int], options: Options, extras: Extras) -> Chunks: ...


def converse(model: Model, prompt: Prompt, options: Options, extras: Extras) -> Chunks:
    """The answer to a prompt; closing it is cancelling.

    If it must have a form, its thoughts need none: what follows them is such a value.
    Raises: all that `LoadedModel.answer` raises.
    """
    spelled = _marks(model.tokenizer, prompt)
    extras = replace(extras, spelled=spelled, pictures=prompt.pictures)
    if extras.grammar is None or prompt.tags is None:
        return told(model.answer(prompt.tokens, options, extras), prompt)
    return told(_thought_first(model, prompt, options, extras), prompt)


def _marks(words: Tokenizer, prompt: Prompt) -> frozenset[int]:
    """The control tokens among the tags that are looked for: what prints nothing is not found."""
    tags = (prompt.tool_tag, closing_tag(prompt.tool_tag), *(prompt.tags or ()))
    ids = (id for tag in tags for id in words.encode(tag, special=True, continues=True))
    return frozenset(id for id in ids if not words.piece(id))


def _thought_first(model: Model, prompt: Prompt, options: Options, extras: Extras) -> Chunks:
    """Two answers as one: thoughts without a form, then what is said, in the form."""
    start, text, shown = time.perf_counter_ns(), "", 0
    assert prompt.tags is not None
    thoughts = Thoughts(prompt.tags, begun=prompt.begun)
    chunk = Chunk()
    with closing(model.answer(prompt.tokens, options, replace(extras, grammar=None))) as free:
        for chunk in free:
            if chunk.progress is not None:
                yield chunk
                continue
            text += chunk.text
            thoughts.feed(chunk.text)
            if chunk.done or thoughts.over:
                break
            if thoughts.inside:
                yield replace(chunk, text=text[shown:])
                shown = len(text)
    if chunk.done and chunk.done_reason == "length":
        yield replace(chunk, text=text[shown:])
        return
    thought = _whole_thought(text, prompt.tags, begun=prompt.begun)
    yield Chunk(thought[shown:], logprobs=chunk.logprobs if thought else ())
    ids = model.tokenizer.encode(thought, special=True, continues=True) if thought else []
    if options.num_predict > 0:
        options = options.updated({"num_predict": max(0, options.num_predict - len(ids))})
    extras = replace(extras, progress=False)  # the prompt has been read
    with closing(model.answer([*prompt.tokens, *ids], options, extras)) as formed:
        for chunk in formed:
            yield _after_thought(chunk, len(ids), start) if chunk.done else chunk


def _whole_thought(text: str, tags: Tags, *, begun: bool) -> str:
    """A thought with its closing tag, also if the model forgot that; nothing if it had none."""
    if not begun and not text.lstrip().startswith(tags.opening):
        return ""
    return text.partition(tags.closing)[0] + tags.closing


def _after_thought(end: Chunk, ids: int, start: int) -> Chunk:
    """The thought counts as part of the answer, not of the prompt."""
    assert end.stats is not None
    reading = end.stats.prompt_eval_duration
    stats = replace(
        end.stats,
        prompt_eval_count=max(0, end.stats.prompt_eval_count - ids),
        eval_count=end.stats.eval_count + ids,
        eval_duration=max(0, time.perf_counter_ns() - start - reading),
    )
    return replace(end, stats=stats)


def told(chunks: Chunks, prompt: Prompt) -> Chunks:
    """The same answer, with thoughts, calls and text apart; log-probabilities come along."""
    reply = _Reply(prompt)
    noted: tuple[Any, ...] = ()
    with closing(chunks):
        for chunk in chunks:
            if chunk.progress is not None:
                yield chunk
                continue
            part = reply.finish() if chunk.done else reply.feed(chunk.text)
            noted += chunk.logprobs
            if part.text or part.thinking or part.tool_calls:
                yield replace(part, logprobs=noted)
                noted = ()
            if chunk.done:
                yield replace(_counted(chunk, prompt), logprobs=noted)


def gathered(chunks: Iterable[Chunk]) -> Chunk:
    """All pieces as one: the last record with all that was said.

    Of several answers all are in `answers`, and the first one stands for them.
    """
    pieces = [chunk for chunk in chunks if chunk.progress is None]
    end = pieces[-1]
    numbers = sorted({piece.index for piece in pieces if piece.index is not None})
    if not numbers:
        return _joined(pieces, end)
    of = [[piece for piece in pieces if piece.index == number] for number in numbers]
    answers = tuple(_joined(its, its[-1]) for its in of)
    return replace(_joined(of[0], end), answers=answers)


def _joined(pieces: Sequence[Chunk], end: Chunk) -> Chunk:
    return replace(
        end,
        text="".join(piece.text for piece in pieces),
        thinking="".join(piece.thinking for piece in pieces),
        tool_calls=tuple(call for piece in pieces for call in piece.tool_calls),
        logprobs=tuple(one for piece in pieces for one in piece.logprobs),
    )


def _counted(end: Chunk, prompt: Prompt) -> Chunk:
    if end.stats is None or not prompt.messages_truncated:
        return end
    lost = end.stats.prompt_truncated + prompt.truncated
    stats = replace(end.stats, prompt_truncated=lost, messages_truncated=prompt.messages_truncated)
    return replace(end, stats=stats)


class _Reply:
    """First a model thinks, if it does; then it calls tools, or says something."""

    def __init__(self, prompt: Prompt) -> None:
        self._thoughts = self._calls = None
        if prompt.tags is not None:
            self._thoughts = Thoughts(prompt.tags, begun=prompt.begun)
        if prompt.tools:
            self._calls = ToolCalls(prompt.tool_tag, prompt.tools)

    def feed(self, text: str) -> Chunk:
        thinking = ""
        if self._thoughts is not None:
            thinking, text = self._thoughts.feed(text)
        calls: tuple[ToolCall, ...] = ()
        if self._calls is not None:
            text, calls = self._calls.feed(text)
        return Chunk(text, thinking=thinking, tool_calls=calls)

    def finish(self) -> Chunk:
        thinking = text = ""
        if self._thoughts is not None:
            thinking, text = self._thoughts.finish()
        calls: tuple[ToolCall, ...] = ()
        if self._calls is not None:
            text, calls = self._calls.feed(text)
            text += self._calls.finish()
        return Chunk(text, thinking=thinking, tool_calls=calls)
