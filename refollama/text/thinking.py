"""What does a model think, and what does it say? An answer, split at the tags of its template.

    pieces    "<thi" "nk>\nTwo and" " two.\n</think>\n\n" "Four."
    thinking             "Two and" " two."
    content                                           "Four."

The law: however the text was cut into pieces, the joined outputs are the same.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from refollama.text.jinja import JinjaTemplate
from refollama.text.template import Template

# Where a Jinja template that lets its model think spells one of these, that is how it thinks.
KNOWN = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))

_AROUND = re.compile(
    r"(?:^|\}\})([^{}]*)\{\{-?\s*(?:\$\w*)?\.Thinking\s*-?\}\}([^{}]*)(?:\{\{|$)", re.DOTALL
)


class Tags(NamedTuple):
    """What a model writes before its thoughts, and behind them."""

    opening: str
    closing: str


def thinking_tags(template: Template | JinjaTemplate) -> Tags | None:
    """The tags around thoughts in a template; None if its model does not think aloud.

    Example: `<think>{{ .Thinking }}</think>` gives ("<think>", "</think>").
    """
    if isinstance(template, JinjaTemplate):
        found = (Tags(*pair) for pair in KNOWN if pair[1] in template.source)
        return next(found, None)
    for before, behind in _AROUND.findall(template.source):
        if before.strip() and behind.strip():
            return Tags(before.strip(), behind.strip())
    return None


class Thoughts:
    """Text of an answer in, thinking and content out; white space around the tags is nobody's.

    begun: the prompt ended in the opening tag, so the answer begins in the middle of a thought.
    """

    def __init__(self, tags: Tags, *, begun: bool = False) -> None:
        self._tags = tags
        self._state = self._inside if begun else self._before
        self._held = ""  # what may be part of a tag, or white space in front of one
        self._trim = begun  # is white space to be left out until something else comes?

    def feed(self, piece: str) -> tuple[str, str]:
        """What of it is thinking, and what is content."""
        self._held += piece
        thinking, content, state = "", "", None
        while state != self._state:
            state = self._state
            more_thinking, more_content = state()
            thinking, content = thinking + more_thinking, content + more_content
        return thinking, content

    def finish(self) -> tuple[str, str]:
        """No more text comes: what was held back."""
        rest, self._held = self._held, ""
        return (rest.rstrip(), "") if self.inside else ("", rest)

    @property
    def inside(self) -> bool:
        """Is the model thinking?"""
        return self._state == self._inside

    @property
    def over(self) -> bool:
        """Has it ended its thoughts, or begun without any?"""
        return self._state == self._after

    def _before(self) -> tuple[str, str]:
        """Nothing but white space has come: an opening tag, or an answer without thoughts?"""
        begun = self._held.lstrip()
        if begun.startswith(self._tags.opening):
            self._held, self._trim = begun.removeprefix(self._tags.opening), True
            self._state = self._inside
        elif not self._tags.opening.startswith(begun):
            self._state = self._after
        return "", ""

    def _inside(self) -> tuple[str, str]:
        self._trimmed()
        thought, closing, rest = self._held.partition(self._tags.closing)
        if closing:
            self._held, self._trim, self._state = rest, True, self._after
            return thought.rstrip(), ""
        whole = thought[: len(thought) - overlap(thought, self._tags.closing)].rstrip()
        self._held = thought[len(whole) :]
        return whole, ""

    def _after(self) -> tuple[str, str]:
        self._trimmed()
        content, self._held = self._held, ""
        return "", content

    def _trimmed(self) -> None:
        if self._trim:
            self._held = self._held.lstrip()
            self._trim = not self._held


def overlap(text: str, tag: str) -> int:
    """How many characters at the end of the text may be the beginning of the tag."""
    longest = min(len(text), len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)
