"""What does the model get to read? A conversation, put through the model's template.

template   {{ .System }} USER: {{ .Prompt }} ASSISTANT: {{ .Response }}</s>
prompt     You are Mario. USER: Who are you? ASSISTANT:

There are three kinds of templates. Those of 2023 write one turn, so they are filled in once for
each turn; today's write all `.Messages`; a file's own (Jinja) writes all `messages`.

The special tokens that the template spells are meant; those that a user's text spells are text:
what is filled in goes through `guard`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from refollama.errors import BadRequest, TemplateError
from refollama.messages import Message, ToolCall
from refollama.text.gotemplate.fmt import Struct, Structs
from refollama.text.jinja import JinjaTemplate
from refollama.text.template import Template

DEFAULT_TEMPLATE = "{{ .Prompt }}"  # of a model that has none
ROLES = ("system", "user", "assistant", "tool")

Guard = Callable[[str], str]
AnyTemplate = Template | JinjaTemplate

_PROMPT_ALONE = re.compile(r"\s*\{\{-?\s*\.Prompt\s*-?\}\}\s*")
_END = "\udbfe"  # behind the last message; like the guard, one of those that no text can hold


@dataclass(frozen=True, slots=True)
class Talk:
    """What a template is filled in with: a conversation, and how the model is to go on.

    A last message of the assistant is the beginning of its answer.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()  # as sent: {"type": "function", "function": {…}}
    think: bool | str | None = None  # None: as the template likes
    suffix: str = ""  # behind what is to be written
    first: bool = True  # was nothing said before these messages?


def template_from(go: str, jinja: str = "") -> AnyTemplate:
    """The template of a model: Go's, else its file's own, else one that shows the prompt alone.

    Raises: TemplateError.
    """
    if not go.strip() and jinja.strip():
        return _jinja(jinja)
    return _go(go or DEFAULT_TEMPLATE)


@lru_cache(maxsize=8)  # a model's template is the same at each request
def _go(source: str) -> Template:
    return Template(source)


@lru_cache(maxsize=8)
def _jinja(source: str) -> JinjaTemplate:
    return JinjaTemplate(source)


def is_bare(template: AnyTemplate) -> bool:
    """Is it the prompt alone? Whoever writes the whole prompt writes its special tokens, too."""
    return isinstance(template, Template) and bool(_PROMPT_ALONE.fullmatch(template.source))


def knows_tools(template: AnyTemplate) -> bool:
    """Can it tell the model which tools there are?"""
    return not template.names.isdisjoint({"Tools", "tools"})


def knows_suffix(template: AnyTemplate) -> bool:
    """Can it ask for what stands between a prompt and a suffix?"""
    return "Suffix" in template.names


def render(
    template: AnyTemplate, talk: Talk, *, guard: Guard = str, bos: str = "", eos: str = ""
) -> str:
    """The conversation as one text.

    Neighbours of one role become one message, with a blank line between them.
    guard: `Tokenizer.guard`, for all that is filled in.  bos, eos: how these tokens are written,
    for Jinja.
    Raises: TemplateError; BadRequest for what the template has no place for.
    """
    talk = replace(talk, messages=joined(talk.messages))
    if isinstance(template, JinjaTemplate):
        return _render_jinja(template, talk, guard, {"bos_token": bos, "eos_token": eos})
    if talk.suffix or "Messages" in template.names:
        return template.render(_go_values(talk, guard))
    return _render_turns(template, talk, guard)


def joined(messages: Iterable[Message]) -> tuple[Message, ...]:
    """Neighbours of one role as one message; each answer of a tool stays its own."""
    found: list[Message] = []
    for message in messages:
        if found and found[-1].role == message.role != "tool":
            found[-1] = _both(found[-1], message)
        else:
            found.append(message)
    return tuple(found)


def _both(a: Message, b: Message) -> Message:
    return replace(
        a,
        content="\n\n".join(filter(None, (a.content, b.content))),
        thinking="\n\n".join(filter(None, (a.thinking, b.thinking))),
        images=a.images + b.images,
        tool_calls=a.tool_calls + b.tool_calls,
    )


# ── one turn at a time, as in 2023 ────────────────────────────────────────────────────────────

_SLOTS = {"system": "System", "user": "Prompt", "assistant": "Response"}


def _render_turns(template: Template, talk: Talk, guard: Guard) -> str:
    """All turns; of the last one nothing stands behind the answer, which is yet to come.

    Source: Ollama, December 2023; since then a template may show the answer itself.
    """
    *before, last = _turns(talk.messages, guard)
    first, text = talk.first, ""
    for turn in before:
        text += _filled(template, turn, first)
        first = False
    return text + _filled(template, last, first, until="Response")


def _turns(messages: Sequence[Message], guard: Guard) -> Iterator[dict[str, str]]:
    """System text, prompt and response of each turn; a new one begins where a place is taken."""
    turn: dict[str, str] = {}
    for message in messages:
        slot = _SLOTS.get(message.role)
        if slot is None or message.tool_calls:
            raise BadRequest("the template of this model has no place for tools and their answers")
        if turn.get(slot) or "Response" in turn:
            yield turn
            turn = {}
        turn[slot] = guard(message.content)
    yield turn


def _filled(template: Template, turn: Mapping[str, str], first: bool, until: str = "") -> str:
    """One turn; where the template does not show the response it comes last."""
    values = dict.fromkeys(("System", "Prompt", "Response", "Suffix"), "") | dict(turn)
    text = template.render(values | {"First": first}, until)
    return text if "Response" in template.names else text + values["Response"]


def render_generate(
    template: str | Template,
    *,
    system: str,
    prompt: str,
    first: bool,
    response: str = "",
    guard: Guard = str,
) -> str:
    """One turn as text; an empty template is the default one.

    first: is it the first turn?  response: what the model has said already.  guard: not used if
    the template is the prompt alone: that prompt is raw.
    Raises: TemplateError.
    """
    if isinstance(template, str):
        template = _go(template or DEFAULT_TEMPLATE)
    if is_bare(template):
        guard = str
    turn = {"System": guard(system), "Prompt": guard(prompt), "Response": guard(response)}
    return _filled(template, turn, first, until="Response")


# ── all messages at once, as today ────────────────────────────────────────────────────────────


def _go_values(talk: Talk, guard: Guard) -> dict[str, Any]:
    """The variables of a template that ranges over `.Messages`, or fills in a gap."""
    system = "\n\n".join(m.content for m in talk.messages if m.role == "system")
    values = {
        "System": guard(system),
        "Messages": [_go_message(message, guard) for message in talk.messages],
        "Tools": Structs(_go_record(_guarded(tool, guard)) for tool in talk.tools),
        "Prompt": guard(talk.messages[-1].content) if talk.suffix else "",
        "Suffix": guard(talk.suffix),
        "Response": "",
        "First": talk.first,
        "Think": bool(talk.think),
        "ThinkLevel": talk.think if isinstance(talk.think, str) else "",
        "IsThinkSet": talk.think is not None,
    }
    return values | ({"Messages": []} if talk.suffix else {})


def _go_message(message: Message, guard: Guard) -> dict[str, Any]:
    return {
        "Role": message.role,
        "Content": guard(message.content),
        "Thinking": guard(message.thinking),
        "Images": [],
        "ToolCalls": Structs(_go_call(call, guard) for call in message.tool_calls),
        "ToolName": guard(message.tool_name),
        "ToolCallID": guard(message.tool_call_id),
    }


def _go_call(call: ToolCall, guard: Guard) -> Struct:
    arguments = _guarded(call.arguments, guard)
    name, id = guard(call.name), guard(call.id)
    fields = {"Index": call.index, "Name": name, "Arguments": Struct(arguments, arguments)}
    plain = {"index": call.index, "name": name, "arguments": arguments}
    function = Struct(fields, plain)
    return Struct({"ID": id, "Function": function}, {"id": id, "function": plain})


# What templates ask of a tool, whether it was sent or not.
_GO_DEFAULTS: Mapping[str, Any] = {
    "Name": "", "Description": "", "Type": "", "Required": [], "Properties": {}, "Enum": [],
}  # fmt: skip


def _go_record(record: Mapping[str, Any]) -> Struct:
    """A tool, or a part of one: its keys as Go writes names; those of properties are their own."""
    fields = dict(_GO_DEFAULTS)
    for key, value in record.items():
        name = key.lstrip("$")
        fields[name[:1].upper() + name[1:]] = _go_part(key, value)
    return Struct(fields, record)


def _go_part(key: str, value: Any) -> Any:
    if key == "properties" and isinstance(value, Mapping):
        inner = {name: _go_part("", one) for name, one in value.items()}
        return Struct(inner, value)
    if isinstance(value, Mapping):
        return _go_record(value)
    if isinstance(value, list):
        return Structs(_go_part("", one) for one in value) if key == "type" else value
    return value


def _guarded(value: Any, guard: Guard) -> Any:
    """The same data; each text in it is guarded."""
    if isinstance(value, str):
        return guard(value)
    if isinstance(value, Mapping):
        return {guard(key): _guarded(one, guard) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_guarded(one, guard) for one in value]
    return value


# ── the file's own template ───────────────────────────────────────────────────────────────────


def _render_jinja(
    template: JinjaTemplate, talk: Talk, guard: Guard, tokens: Mapping[str, str]
) -> str:
    """Source: Hugging Face's documentation of chat templates; the variables are theirs."""
    messages = [_jinja_message(message, guard) for message in talk.messages]
    begun = talk.messages[-1].role == "assistant"
    if begun:
        messages[-1]["content"] += _END
    values = {
        "messages": messages,
        "tools": _guarded(talk.tools, guard) or None,
        "add_generation_prompt": not begun,
        **tokens,
        **_jinja_thinking(talk.think),
    }
    text = template.render(values)
    if not begun:
        return text
    if _END not in text:
        raise TemplateError("it does not show the last message, so that cannot be continued")
    return text[: text.rindex(_END)].replace(_END, "")


def _jinja_message(message: Message, guard: Guard) -> dict[str, Any]:
    calls = [
        {
            "type": "function",
            "id": guard(call.id),
            "function": {"name": guard(call.name), "arguments": _guarded(call.arguments, guard)},
        }
        for call in message.tool_calls
    ]
    more = {
        "tool_calls": calls,
        "reasoning_content": guard(message.thinking),
        "name": guard(message.tool_name),
        "tool_call_id": guard(message.tool_call_id),
    }
    given = {key: value for key, value in more.items() if value}
    return {"role": message.role, "content": guard(message.content)} | given


def _jinja_thinking(think: bool | str | None) -> dict[str, Any]:
    """There is no one name for it: Qwen's, then those of DeepSeek, Granite and gpt-oss."""
    if think is None:
        return {}
    level = {"reasoning_effort": think} if isinstance(think, str) else {}
    return {"enable_thinking": bool(think), "thinking": bool(think)} | level


# ── what to leave out when not all of it fits ─────────────────────────────────────────────────


def starts(messages: Sequence[Message]) -> list[int]:
    """Where a conversation may begin, from nothing left out to the last message alone.

    Between these two only users begin: templates may demand that they and the assistant take
    turns, and an answer of a tool does not come without its call.
    """
    ends = (0, len(messages) - 1)
    return [at for at, message in enumerate(messages) if at in ends or message.role == "user"]


def shortened(messages: Sequence[Message], start: int) -> tuple[Message, ...]:
    """The conversation from there on; the system messages before it stay."""
    return (*(m for m in messages[:start] if m.role == "system"), *messages[start:])
