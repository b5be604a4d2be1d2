"""Which tools does a model call? JSON objects in its answer, found while the text is streamed.

    template   {{ range .ToolCalls }}<tool_call>{"name": …, "arguments": …}</tool_call>{{ end }}
    pieces     Let me see. <tool│_call>{"name": "add", "argu│ments": {"a": 1}}</tool_call>
    content    Let me see.
    calls                                                           add(a=1)

Text is held back while it could still be a call; what turns out to be none is content. A call names
one of the tools that were offered. Without a tag, or before it, an answer may begin with the JSON.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import string
from collections.abc import Callable, Container, Mapping
from typing import Any

from refollama.messages import ToolCall
from refollama.text.jinja import JinjaTemplate
from refollama.text.template import Template
from refollama.text.thinking import overlap

KNOWN = ("<tool_call>", "[TOOL_CALLS]", "<|tool_call|>", "<|python_tag|>", "<tool_calls>")
ID_LETTERS = string.ascii_lowercase + string.digits
NAMES = ("name", "tool_name", "function")  # where models put a tool's name,
ARGUMENTS = ("arguments", "parameters", "args")  # and what it is to be called with

_RANGE = re.compile(r"(?:(?:^|\}\})([^{}]*))?\{\{-?\s*range [^}]*\.ToolCalls\s*-?\}\}([^{}]*)")
_LIST = " \t\r\n["  # what may stand between a tag and its first object,
_BETWEEN = " \t\r\n,;]"  # and behind an object


State = Callable[[], str | ToolCall]


def tool_tag(template: Template | JinjaTemplate) -> str:
    """What a model writes in front of its calls; "" if it begins with the JSON.

    It is guessed: the text around `range .ToolCalls`, up to the first brace; for Jinja, KNOWN.
    """
    if isinstance(template, JinjaTemplate):
        return next((tag for tag in KNOWN if tag in template.source), "")
    found = _RANGE.search(template.source)
    if found is None:
        return ""
    return _tag(found[2]) or _tag(found[1] or "")


def closing_tag(tag: str) -> str:
    """What a model may write behind its calls.  Example: <tool_call> → </tool_call>"""
    return re.sub(r"^(<\|?|\[)", r"\1/", tag)


def _tag(text: str) -> str:
    return text.strip().removesuffix("[").strip()


class ToolCalls:
    """Text of an answer in, content and calls out.

    The law: however the text was cut into pieces, content and calls are the same.
    """

    def __init__(self, tag: str, tools: Container[str]) -> None:
        self._tag = tag
        self._closing = closing_tag(tag)
        self._tools = tools
        self._state: State = self._text
        self._held = ""
        self._object = _Object(0)
        self._begins = True  # has nothing but white space come?
        self._count = 0

    def feed(self, piece: str) -> tuple[str, tuple[ToolCall, ...]]:
        """What of it is content, and the calls that are complete now."""
        self._held += piece
        content = ""
        calls: list[ToolCall] = []
        while True:
            state, length = self._state, len(self._held)
            found = state()
            if isinstance(found, ToolCall):
                calls.append(found)
            else:
                content += found
            if (self._state, len(self._held)) == (state, length):
                return content, tuple(calls)

    def finish(self) -> str:
        """No more text comes: what was held back; half a call is content."""
        rest, self._held = self._held, ""
        return rest

    # ── each state takes what it can from what is held ──

    def _text(self) -> str:
        """Content, until a tag comes; or, at the very beginning, JSON."""
        begun = self._held.lstrip()
        if self._begins and (not begun or self._may_become(begun, self._tag)):
            return ""
        if self._begins and begun[0] in "{[" and not self._is(begun, self._tag):
            return self._look(0, len(self._held) - len(begun))
        at = self._held.find(self._tag) if self._tag else -1
        if at >= 0:
            return self._look(at, len(self._tag))
        self._begins = False
        return self._take(len(self._held) - overlap(self._held, self._tag))

    def _call(self) -> str | ToolCall:
        """From a tag to the end of the object behind it."""
        if not self._object.closed(self._held):
            return ""
        text = self._take(self._object.end)
        call = self._meant(text[self._object.start :])
        self._state = self._between if call else self._text
        self._count += 1 if call else 0
        return call or text

    def _between(self) -> str:
        """Behind a call: a closing tag, another call, or content."""
        rest = self._held = self._held.lstrip(_BETWEEN)  # at once: there may be much of it
        if self._is(rest, self._closing):
            self._held = rest.removeprefix(self._closing)
        elif self._is(rest, self._tag) or rest.startswith("{"):
            self._look(0, len(self._tag) if self._is(rest, self._tag) else 0)
        elif rest and not any(self._may_become(rest, tag) for tag in (self._tag, self._closing)):
            self._state = self._text
        return ""

    def _look(self, at: int, length: int) -> str:
        """A call may begin there, behind so many characters."""
        content = self._take(at)
        self._begins, self._state, self._object = False, self._call, _Object(length)
        return content

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        return taken

    @staticmethod
    def _is(text: str, tag: str) -> bool:
        return bool(tag) and text.startswith(tag)

    @staticmethod
    def _may_become(text: str, tag: str) -> bool:
        return tag.startswith(text) and text != tag

    def _meant(self, text: str) -> ToolCall | None:
        """The call that an object stands for, if it does."""
        found = _loaded(text)
        inner = found.get("function") if isinstance(found, Mapping) else None
        record = inner if isinstance(inner, Mapping) else found
        if not isinstance(record, Mapping):
            return None
        name = next((record[key] for key in NAMES if isinstance(record.get(key), str)), None)
        arguments: Any = next((record[key] for key in ARGUMENTS if key in record), {})
        arguments = _loaded(arguments) if isinstance(arguments, str) else arguments
        if name not in self._tools or not isinstance(arguments, Mapping):
            return None
        return ToolCall(str(name), arguments, _new_id(), self._count)


class _Object:
    """Where a JSON object begins and ends in a growing text; each character is looked at once."""

    def __init__(self, start: int) -> None:
        self.start = start  # of the object, once it is found
        self.end = start  # behind what has been looked at
        self._depth = 0
        self._quoted = False
        self._escaped = False

    def closed(self, text: str) -> bool:
        """Has it ended, or can there be none? Then it is text[start:end]."""
        while self.end < len(text):
            char = text[self.end]
            self.end += 1
            if self._depth == 0 and char in _LIST:
                self.start = self.end
            elif self._depth == 0 and char != "{":
                self.end -= 1  # it may begin a tag
                return True
            elif self._step(char):
                return True
        return False

    def _step(self, char: str) -> bool:
        """Is this the character that closes it?"""
        if self._quoted:
            self._quoted = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
            return False
        self._quoted = char == '"'
        self._depth += (char == "{") - (char == "}")
        return self._depth == 0


def _loaded(text: str) -> Any:
    """A JSON value; None if it is none."""
    try:
        return STRICT_JSON.decode(text)
    except (ValueError, RecursionError):
        return None


def _finite(digits: str) -> float:
    """A number of JSON; 1e999 would become one that JSON cannot write.  Raises: ValueError."""
    number = float(digits)
    if math.isinf(number):
        raise ValueError("a number is too large")
    return number


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a JSON value")


STRICT_JSON = json.JSONDecoder(parse_float=_finite, parse_constant=_no_number)


def _new_id() -> str:
    return "call_" + "".join(secrets.choice(ID_LETTERS) for _ in range(8))
