"""What value does a literal stand for? "a\\n" → a and a newline, 0x10 → 16, 'a' → 97."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from refollama.text.gotemplate import fmt
from refollama.text.gotemplate.lexer import Token

CONSTANTS: Mapping[str, Any] = {"true": True, "false": False, "nil": None}


def constant(token: Token) -> Any:
    """The value of a string, raw string, character, number, true, false or nil.

    Raises: ValueError, with a sentence, if the token is no such thing.
    """
    if token.kind in _READ:
        return _READ[token.kind](token.text)
    if token.kind == "name" and token.text in CONSTANTS:
        return CONSTANTS[token.text]
    raise ValueError(f"expected a value, not {token.text}")


def _string(text: str) -> str:
    return _unescaped(text, wrong="'")


def _raw_string(text: str) -> str:
    return text[1:-1].replace("\r", "")  # as in Go


def _character(text: str) -> int:
    """A character constant is the number of its code point."""
    char = _unescaped(text, wrong='"')
    if len(char) != 1:
        raise ValueError(f"{text} is not one character")
    return ord(char)


def _number(text: str) -> int | float:
    """An integer (decimal, 0x, 0o, 0b, or octal by a leading 0) or a float."""
    number = _integer(text)
    if number is None:
        return _float(text)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{text} does not fit in 64 bits")
    return number


def _integer(text: str) -> int | None:
    try:
        return int(text, 8 if re.fullmatch("[+-]?0[0-7_]+", text) else 0)
    except ValueError:
        return None


def _float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number")
    return number


_READ = {"string": _string, "raw": _raw_string, "char": _character, "number": _number}


_ESCAPE = re.compile(
    r"""(?P<plain>[^\\]+)
    | \\(?:(?P<named>[abfnrtv\\'"])
    | x(?P<byte>[0-9a-fA-F]{2}) | (?P<octal>[0-3][0-7]{2})
    | (?:u(?P<short>[0-9a-fA-F]{4}) | U(?P<long>[0-9a-fA-F]{8})))
    | (?P<wrong>\\.?)""",
    re.VERBOSE | re.DOTALL,
)
_NAMED = dict(zip("abfnrtv\\'\"", b"\a\b\f\n\r\t\v\\'\"", strict=True))


def _unescaped(text: str, wrong: str) -> str:
    """The inside of a quoted text; `wrong` is the quote that must not be escaped in it."""
    parts = []
    for match in _ESCAPE.finditer(text[1:-1]):
        escaped = _escaped(match)
        if escaped is None or match["named"] == wrong:
            raise ValueError(f"{match.group()} is no escape sequence")
        parts.append(escaped)
    return b"".join(parts).decode(errors="replace")


def _escaped(match: re.Match[str]) -> bytes | None:
    """The bytes that a part of a quoted string stands for; None if it stands for nothing."""
    kind, text = str(match.lastgroup), match[str(match.lastgroup)]
    if kind == "plain":
        return text.encode(errors="replace")
    if kind == "named":
        return bytes([_NAMED[text]])
    if kind in ("byte", "octal"):
        return bytes([int(text, 16 if kind == "byte" else 8)])
    if kind in ("short", "long"):
        return fmt.character(int(text, 16)).encode()
    return None
