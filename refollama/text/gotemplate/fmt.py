"""How does Go print values? What `{{ .X }}`, print, println, printf and json of a template write:

    true · 3 · 1e+06 · hi · [a b] · map[k:v] · <nil>

Values are what JSON can hold: None, bool, int, float, str, lists and mappings.
Source: the documentation of Go's package fmt.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

MAX_WIDTH = 1_000_000  # characters; Go's own limit for widths and precisions
MAX_NESTING = 100  # lists in lists; deeper data is no data that a prompt is made of


class CannotPrint(Exception):
    """A value that has no printed form; the template turns this into its own error."""


class Struct(dict[str, Any]):
    """One of Go's records: a template asks for Go's names, and prints the JSON that it stands for.

    Struct({"Name": "add"}, plain={"name": "add"}).  A map whose order matters is one, too.
    """

    def __init__(self, fields: Mapping[str, Any], plain: Any) -> None:
        super().__init__(fields)
        self.plain = plain


class Structs(list[Any]):
    """A list that is printed as JSON."""


def show(value: Any, depth: int = 0) -> str:
    """A value as %v prints it."""
    if depth > MAX_NESTING:
        raise CannotPrint("the data is nested too deeply to be printed")
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _general(value)
    if isinstance(value, Struct | Structs):
        return to_json(value)
    if isinstance(value, Mapping):
        keys = sorted(value, key=str)
        return f"map[{' '.join(f'{show(k)}:{show(value[k], depth + 1)}' for k in keys)}]"
    if isinstance(value, list | tuple):
        return f"[{' '.join(show(item, depth + 1) for item in value)}]"
    return "<nil>" if value is None else str(value)


def type_name(value: object) -> str:
    """The name of a value's type, as Go's messages have it."""
    names = {bool: "bool", int: "int", float: "float64", str: "string", type(None): "nil"}
    if isinstance(value, Mapping):
        return "map[string]interface {}"
    if isinstance(value, list | tuple):
        return "[]interface {}"
    return names.get(type(value), type(value).__name__)


def sprint(values: Sequence[Any]) -> Iterator[str]:
    """The parts of Go's Sprint: a space between two neighbours that are both no strings."""
    for index, value in enumerate(values):
        if index and not isinstance(value, str) and not isinstance(values[index - 1], str):
            yield " "
        yield show(value)


def sprintln(values: Sequence[Any]) -> Iterator[str]:
    """The parts of Go's Sprintln: a space between all, and a newline."""
    for index, value in enumerate(values):
        yield " " + show(value) if index else show(value)
    yield "\n"


def to_json(value: Any) -> str:
    """Go's json.Marshal: compact, keys of maps sorted, <, > and & escaped."""
    try:
        text = json.dumps(_plain(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CannotPrint(f"no JSON can be made of this: {error}") from None
    return re.sub("[<>&\u2028\u2029]", lambda match: f"\\u{ord(match.group()):04x}", text)


def _plain(value: Any) -> Any:
    """What is to be written as JSON: records as they came, other maps by sorted keys."""
    if isinstance(value, Struct):
        return value.plain
    if isinstance(value, Mapping):
        return {key: _plain(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


# ----------------------------------------------------------------------------------- printf

_VERB = re.compile(
    r"%(?P<flags>[-+0 ]*)(?P<width>\d+)?(?:\.(?P<precision>\d*))?(?P<verb>.?)", re.DOTALL
)

# How a value of each type answers to each verb; %v works for all and is not listed.
_FORMS: Mapping[type, Mapping[str, Callable[[Any, int | None], str]]] = {
    bool: {"t": lambda value, _: show(value)},
    str: {
        "s": lambda text, cut: text[:cut],
        "q": lambda text, cut: quoted(text[:cut]),
        "x": lambda text, cut: text[:cut].encode(errors="replace").hex(),
        "X": lambda text, cut: text[:cut].encode(errors="replace").hex().upper(),
    },
    int: {
        "d": lambda number, _: str(number),
        "x": lambda number, _: f"{number:x}",
        "X": lambda number, _: f"{number:X}",
        "o": lambda number, _: f"{number:o}",
        "b": lambda number, _: f"{number:b}",
        "c": lambda number, _: character(number),
    },
    float: {
        "f": lambda number, digits: f"{number:.{6 if digits is None else digits}f}",
        "e": lambda number, digits: f"{number:.{6 if digits is None else digits}e}",
        "g": lambda number, digits: show(number) if digits is None else f"{number:.{digits}g}",
    },
    list: {"s": lambda items, _: show(items)},
    tuple: {"s": lambda items, _: show(items)},
}


def sprintf(form: str, values: Sequence[Any]) -> Iterator[str]:
    """The parts of Go's Sprintf, for the verbs v s q t d x X o b c f e g and %%.

    As in Go a mistake is printed, not raised: `%!d(string=hi)`, `%!s(MISSING)`, `%!(EXTRA int=1)`.
    """
    end, used = 0, 0
    for match in _VERB.finditer(form):
        yield form[end : match.start()]
        end = match.end()
        verb = match["verb"]
        if verb in ("", "%"):
            yield verb or "%!(NOVERB)"
        elif used == len(values):
            yield f"%!{verb}(MISSING)"
        else:
            yield _formatted(match, values[used])
            used += 1
    yield form[end:]
    if used < len(values):
        yield f"%!(EXTRA {', '.join(map(_typed, values[used:]))})"


def quoted(text: str) -> str:
    """A string as Go source writes it."""
    named = dict(zip('\a\b\f\n\r\t\v\\"', 'abfnrtv\\"', strict=True))

    def written(char: str) -> str:
        if char in named:
            return "\\" + named[char]
        if char.isprintable():
            return char
        code = ord(char)
        if code < 0x80:
            return f"\\x{code:02x}"
        return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

    return f'"{"".join(map(written, text))}"'


def character(code: int) -> str:
    """The character of a code point; U+FFFD for what is none."""
    good = 0 <= code <= 0x10FFFF and not 0xD800 <= code <= 0xDFFF
    return chr(code) if good else "\ufffd"


def _formatted(match: re.Match[str], value: Any) -> str:
    """One verb with its flags, width and precision."""
    flags, verb, width = match["flags"], match["verb"], _bounded(match["width"] or "")
    precision = None if match["precision"] is None else _bounded(match["precision"])
    make = _FORMS.get(type(value), {}).get(verb)
    if verb != "v" and make is None:
        return f"%!{verb}({_typed(value)})"
    text = show(value) if make is None else make(value, precision)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and not text.startswith("-"):
        text = "+" * ("+" in flags) + text
    if "-" in flags:
        return text.ljust(width)
    return text.zfill(width) if "0" in flags and number else text.rjust(width)


def _typed(value: Any) -> str:
    return "<nil>" if value is None else f"{type_name(value)}={show(value)}"


def _bounded(digits: str) -> int:
    """A width or precision; one that is too large for Go is none."""
    small = 0 < len(digits) <= len(str(MAX_WIDTH))
    return min(int(digits), MAX_WIDTH) if small else 0


def _general(number: float) -> str:
    """%g with as many digits as needed; an exponent below 1e-4 and from 1e+06 on."""
    if not math.isfinite(number):
        return "NaN" if math.isnan(number) else f"{'+' if number > 0 else '-'}Inf"
    exact = Decimal(repr(number)).normalize()
    exponent = exact.adjusted()
    if not number or -4 <= exponent < 6:
        return f"{exact:f}"
    sign, digits, _ = exact.as_tuple()
    first, rest = str(digits[0]), "".join(map(str, digits[1:]))
    mantissa = f"{first}.{rest}" if rest else first
    return f"{'-' * sign}{mantissa}e{'-' if exponent < 0 else '+'}{abs(exponent):02d}"
