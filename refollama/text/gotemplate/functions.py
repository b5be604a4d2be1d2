"""What do the functions of a template compute? One table, FUNCTIONS.

Source: the documentation of Go's package text/template; `json`, the dates and `toTypeScriptType`
are Ollama's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

from refollama.text.gotemplate import fmt


class Misfit(Exception):
    """Arguments that a function cannot take; the caller knows the place."""


def _and(args: Iterator[Any]) -> Any:
    """The first false argument, or the last one; those behind it are never computed."""
    return _until(args, False)


def _or(args: Iterator[Any]) -> Any:
    """The first true argument, or the last one; those behind it are never computed."""
    return _until(args, True)


def _until(args: Iterator[Any], wanted: bool) -> Any:
    value = None
    for value in args:
        if bool(value) is wanted:
            break
    return value


def _not(args: Iterator[Any]) -> bool:
    return not next(args)


def _eq(args: Iterator[Any]) -> bool:
    """Is the first equal to any of the others?"""
    first = next(args)
    others = list(args)
    return any(_equal(first, other) for other in others)


def _equal(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    if isinstance(a, list | tuple | Mapping) or isinstance(b, list | tuple | Mapping):
        raise Misfit("lists and maps cannot be compared")
    if type(a) is not type(b):
        raise Misfit(f"cannot compare {fmt.type_name(a)} with {fmt.type_name(b)}")
    return bool(a == b)


def _less(args: Iterator[Any]) -> bool:
    a, b = args
    if type(a) is not type(b) or not isinstance(a, int | float | str) or isinstance(a, bool):
        raise Misfit(f"{fmt.type_name(a)} and {fmt.type_name(b)} have no order")
    return bool(a < b)


def _less_or_equal(args: Iterator[Any]) -> bool:
    a, b = args
    return _less(iter((a, b))) or _equal(a, b)


def _len(args: Iterator[Any]) -> int:
    """Entries of a list or map; bytes of a string."""
    value = next(args)
    if isinstance(value, str):
        return len(_bytes(value))
    if isinstance(value, list | tuple | Mapping):
        return len(value)
    raise Misfit(f"{fmt.type_name(value)} has no length")


def _index(args: Iterator[Any]) -> Any:
    """index x 1 "k" is x[1]["k"]; of a string, a byte's value."""
    value = next(args)
    for key in args:
        value = _entry(value, key)
    return value


def _entry(value: Any, key: Any) -> Any:
    if isinstance(value, Mapping) and isinstance(key, str):
        return value.get(key)
    if not isinstance(value, str | list | tuple) or type(key) is not int:
        raise Misfit(f"cannot index {fmt.type_name(value)} with {fmt.type_name(key)}")
    items = _bytes(value) if isinstance(value, str) else value
    if not 0 <= key < len(items):
        raise Misfit(f"index {key} is out of range: the length is {len(items)}")
    return items[key]


def _slice(args: Iterator[Any]) -> Any:
    """slice x 1 3 is x[1:3]; of a string, its bytes (half characters become U+FFFD)."""
    value, *bounds = args
    if not isinstance(value, str | list | tuple):
        raise Misfit(f"cannot slice {fmt.type_name(value)}")
    if len(bounds) == 3 and isinstance(value, str):
        raise Misfit("a string has no capacity to cut: give two bounds")
    if any(type(bound) is not int for bound in bounds):
        raise Misfit("the bounds of a slice must be integers")
    items = _bytes(value) if isinstance(value, str) else value
    size = len(items)
    start, stop, capacity = bounds + [0, size, size][len(bounds) :]
    if not 0 <= start <= stop <= capacity <= size:
        raise Misfit(f"bounds {bounds} are out of range: the length is {size}")
    part = items[start:stop]
    return part.decode(errors="replace") if isinstance(part, bytes) else part


def _bytes(text: str) -> bytes:
    return text.encode(errors="replace")  # lone surrogates have no bytes


def _printf(args: Iterator[Any]) -> Iterator[str]:
    form, *values = args
    if not isinstance(form, str):
        raise Misfit(f"the first argument of printf must be a string, not {fmt.type_name(form)}")
    return fmt.sprintf(form, values)


def _date(days_ago: int) -> str:
    return (date.today() - timedelta(days=days_ago)).isoformat()


_TYPESCRIPT = {
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "array": "any[]",
    "object": "Record<string, any>",
    "null": "null",
}


def _typescript(args: Iterator[Any]) -> str:
    """The type of a property, or the name of one of JSON Schema's types, in TypeScript's words."""
    given = next(args)
    kinds = given.get("Type") if isinstance(given, Mapping) else given
    names = kinds if isinstance(kinds, list | tuple) else [kinds]
    return " | ".join(_TYPESCRIPT.get(str(name), "any") for name in names) or "any"


@dataclass(frozen=True, slots=True)
class Function:
    """The arguments come one by one, so that `and` and `or` can leave the rest alone."""

    call: Callable[[Iterator[Any]], Any]  # text may come back in parts, which are counted
    least: int
    most: float = math.inf


FUNCTIONS: Mapping[str, Function] = {
    "and": Function(_and, 1),
    "or": Function(_or, 1),
    "not": Function(_not, 1, 1),
    "eq": Function(_eq, 2),
    "ne": Function(lambda args: not _eq(args), 2, 2),
    "lt": Function(_less, 2, 2),
    "le": Function(_less_or_equal, 2, 2),
    "gt": Function(lambda args: not _less_or_equal(args), 2, 2),
    "ge": Function(lambda args: not _less(args), 2, 2),
    "len": Function(_len, 1, 1),
    "index": Function(_index, 1),
    "slice": Function(_slice, 1, 4),
    "print": Function(lambda args: fmt.sprint(list(args)), 0),
    "println": Function(lambda args: fmt.sprintln(list(args)), 0),
    "printf": Function(_printf, 1),
    "json": Function(lambda args: fmt.to_json(next(args)), 1, 1),
    "currentDate": Function(lambda args: _date(0), 0),
    "yesterdayDate": Function(lambda args: _date(1), 0),
    "toTypeScriptType": Function(_typescript, 1, 1),
}
