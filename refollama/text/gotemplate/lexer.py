"""Where do text and actions begin and end? Source → tokens.

"Hi {{- .Name }}!"  →  text "Hi" · open · field ".Name" · close · text "!" · eof
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from refollama.errors import TemplateError


@dataclass(frozen=True, slots=True)
class Token:
    kind: str  # text, open, close, eof, or the name of a group in _WORD
    text: str
    at: int  # offset in the source
    spaced: bool = False  # stands behind a space


_SPACE = " \t\r\n"
_OPEN = re.compile(r"\{\{(?P<trim>-[ \t\r\n])?(?P<comment>/\*)?")
_GAP = re.compile(r"[ \t\r\n]*")
_CLOSE = re.compile(r"(?P<trim>-)?\}\}")
_COMMENT_END = re.compile(r"(?P<trim>[ \t\r\n]-)?\}\}")
_WORD = re.compile(
    r"""(?P<string>"(?:[^"\\\n]|\\.)*")
    | (?P<raw>`[^`]*`)
    | (?P<char>'(?:[^'\\\n]|\\.)+')
    | (?P<number>[+-]?\.?[0-9](?:[eEpP][+-]|[0-9A-Za-z_.])*)
    | (?P<variable>\$\w*)
    | (?P<field>\.[^\W\d]\w*)
    | (?P<name>[^\W\d]\w*)
    | (?P<mark>:=|[=|,().])""",
    re.VERBOSE,
)
_UNFINISHED = {'"': "unterminated string", "`": "unterminated raw string", "'": "bad character"}


def lex(source: str) -> Iterator[Token]:
    """Text and the words of actions, with trim markers and comments already worked in."""
    at, trim = 0, False
    while opening := _OPEN.search(source, at):
        yield from _text(source, at, opening.start(), trim, bool(opening["trim"]))
        if opening["comment"]:
            closing = _comment_end(source, opening)
        else:
            yield Token("open", "{{", opening.start())
            words = _Words(source, opening.end())
            yield from words
            closing = words.closing
            yield Token("close", "}}", closing.start())
        at, trim = closing.end(), bool(closing["trim"])
    yield from _text(source, at, len(source), trim, False)
    yield Token("eof", "the end of the template", len(source))


def _text(source: str, start: int, end: int, left: bool, right: bool) -> Iterator[Token]:
    """The text between two actions, cut where their markers say so; none if it is empty."""
    text = source[start:end]
    text = text.lstrip(_SPACE) if left else text
    text = text.rstrip(_SPACE) if right else text
    if text:
        yield Token("text", text, start)


def _comment_end(source: str, opening: re.Match[str]) -> re.Match[str]:
    end = source.find("*/", opening.end())
    if end < 0:
        raise error_at(source, opening.start(), "unclosed comment")
    closing = _COMMENT_END.match(source, end + 2)
    if closing is None:
        raise error_at(source, end, "a comment must end right before the closing braces: */}}")
    return closing


class _Words:
    """The words of one action; afterwards `closing` is the match of its closing braces."""

    closing: re.Match[str]

    def __init__(self, source: str, at: int) -> None:
        self._source, self._at = source, at

    def __iter__(self) -> Iterator[Token]:
        while not self._closed(spaced := self._skip_spaces()):
            word = _WORD.match(self._source, self._at) or self._wrong()
            assert word.lastgroup is not None
            yield Token(word.lastgroup, word.group(), self._at, spaced)
            self._at = word.end()

    def _skip_spaces(self) -> bool:
        gap = _GAP.match(self._source, self._at)
        assert gap is not None
        self._at = gap.end()
        return gap.group() != ""

    def _closed(self, spaced: bool) -> bool:
        """Do the closing braces stand here? Their trim marker needs a space in front."""
        closing = _CLOSE.match(self._source, self._at)
        if closing is None or (closing["trim"] and not spaced):
            return False
        self.closing = closing
        return True

    def _wrong(self) -> NoReturn:
        char = self._source[self._at : self._at + 1]
        problem = _UNFINISHED.get(char, f"unexpected {char!r}") if char else "unclosed action"
        raise error_at(self._source, self._at, problem)


def error_at(source: str, at: int, problem: str) -> TemplateError:
    """The error with line and column, both counted from 1, in characters."""
    return TemplateError(problem, source.count("\n", 0, at) + 1, at - source.rfind("\n", 0, at))
