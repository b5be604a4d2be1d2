"""Where do pictures stand in a text?  At `[img-0]`, if the user says so, else in front of it.

    "what is [img-1] beside [img-0]?"      a user's message with two pictures
    "what is ⟨3⟩ beside ⟨2⟩?"              in a conversation that has two before: marks

What a user writes is a wish; what is meant has a sign in front that nobody can write, so nobody can
spell a picture that is not there. As people are shown it, a mark is `[img-3]`.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable

from refollama.errors import BadRequest

SIGN = f"\udbfd{secrets.token_hex(8)}"  # no UTF-8 can hold its beginning, and nobody knows the rest

_WISH = re.compile(r"\[img(?:-([0-9]{1,9}))?\]")
_MARK = re.compile(rf"{SIGN}\[img-([0-9]+)\]")


def placed(text: str, count: int, first: int) -> str:
    """The text of a message with marks for its pictures, which have the numbers from `first` on.

    `[img-0]` is its first picture; `[img]` the next one that is nowhere yet, as in Ollama. Those
    that stand nowhere stand in front.
    Raises: BadRequest for a number without a picture.  A message without pictures may write it.
    """
    if not count:
        return text
    named = {int(number) for number in _WISH.findall(text) if number}
    if strange := sorted(number for number in named if number >= count):
        raise BadRequest(f"[img-{strange[0]}] stands for no picture: there are {count}, from 0 on")
    left = [number for number in range(count) if number not in named]

    def mark(match: re.Match[str]) -> str:
        if match[1]:
            return _mark(first + int(match[1]))
        return _mark(first + left.pop(0)) if left else match[0]

    marked = _WISH.sub(mark, text)
    return "".join(_mark(first + number) for number in left) + marked


def around(guard: Callable[[str], str], text: str) -> str:
    """The text behind a guard that knows no marks: they pass as they are."""
    if SIGN not in text:
        return guard(text)
    parts = parted(text)
    return "".join(_mark(part) if isinstance(part, int) else guard(part) for part in parts)


def parted(text: str) -> list[str | int]:
    """Texts and numbers of pictures in turn; a text, perhaps an empty one, at both ends.

    Example: "a⟨3⟩" → ["a", 3, ""].
    """
    parts = _MARK.split(text)
    return [int(part) if at % 2 else part for at, part in enumerate(parts)]


def shown(text: str) -> str:
    """As people may see it."""
    return text.replace(SIGN, "")


def _mark(number: int) -> str:
    return f"{SIGN}[img-{number}]"
