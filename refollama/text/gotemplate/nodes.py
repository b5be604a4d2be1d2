"""What does a template do? Nodes: expressions have a value, statements write text.

Each node is small and frozen, and works on a `Run`: the state and the limits of one rendering.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

from refollama.errors import TemplateError
from refollama.text.gotemplate import fmt
from refollama.text.gotemplate.functions import FUNCTIONS, Misfit
from refollama.text.gotemplate.lexer import error_at

# A template comes from a stranger, so everything it can grow by is limited.
MAX_DEPTH = 50  # blocks in blocks, parentheses, templates in templates; Python's stack holds 1000
MAX_STEPS = 1_000_000  # nodes, calls and arguments: about a second
MAX_TEXT = 2**25  # characters printed, built and looked at: many times the longest context
ROOT = 0  # the slot of the variable $, the data that render was given

# --------------------------------------------------------------------------------- values


class Expression(Protocol):
    @property
    def at(self) -> int: ...  # offset in the source

    def value(self, run: Run, dot: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Literal:
    at: int
    constant: Any

    def value(self, run: Run, dot: Any) -> Any:
        return self.constant


@dataclass(frozen=True, slots=True)
class Dot:
    at: int

    def value(self, run: Run, dot: Any) -> Any:
        return dot


@dataclass(frozen=True, slots=True)
class Variable:
    at: int
    slot: int

    def value(self, run: Run, dot: Any) -> Any:
        return run.variables[self.slot]


@dataclass(frozen=True, slots=True)
class Fields:
    """base.A.B: keys of nested maps. A missing key, and any key of nil, is nil."""

    at: int
    base: Expression
    names: tuple[str, ...]

    def value(self, run: Run, dot: Any) -> Any:
        value = self.base.value(run, dot)
        for name in self.names:
            if value is None:
                return None
            if not isinstance(value, Mapping):
                raise run.error(self.at, f"there is no field {name} in a {fmt.type_name(value)}")
            value = value.get(name)
            run.reached = run.reached or name == run.until
        return value


@dataclass(frozen=True, slots=True)
class Call:
    at: int
    name: str
    args: tuple[Expression, ...]

    def value(self, run: Run, dot: Any, piped: tuple[Any, ...] = ()) -> Any:
        """The function's result; what comes through a pipe is the last argument."""
        run.step(self.at)
        args = chain((arg.value(run, dot) for arg in self.args), piped)
        try:
            result = FUNCTIONS[self.name].call(run.counted(self.at, args))
            return run.joined(self.at, result) if isinstance(result, Iterator) else result
        except (Misfit, fmt.CannotPrint) as error:
            raise run.error(self.at, f"{self.name}: {error}") from None


@dataclass(frozen=True, slots=True)
class Pipe:
    """first | call | call, and the variables that get the result."""

    at: int
    first: Expression
    calls: tuple[Call, ...]
    slots: tuple[int, ...] = ()

    def value(self, run: Run, dot: Any) -> Any:
        run.step(self.at)
        value = self.first.value(run, dot)
        for call in self.calls:
            value = call.value(run, dot, (value,))
        for slot in self.slots:
            run.variables[slot] = value
        return value


# -------------------------------------------------------------------------- what to write


class Node(Protocol):
    @property
    def at(self) -> int: ...

    def write(self, run: Run, dot: Any) -> None: ...


Body = tuple[Node, ...]


class Break(Exception):
    """{{ break }}"""


class Continue(Exception):
    """{{ continue }}"""


class Reached(Exception):
    """The field has been written that was to be the last thing."""


@dataclass(frozen=True, slots=True)
class Text:
    at: int
    text: str

    def write(self, run: Run, dot: Any) -> None:
        run.print(self.at, self.text)


@dataclass(frozen=True, slots=True)
class Print:
    at: int
    pipe: Pipe

    def write(self, run: Run, dot: Any) -> None:
        value = self.pipe.value(run, dot)
        if self.pipe.slots:  # {{ $x := … }} sets, and prints nothing
            run.reached = False
            return
        try:
            run.print(self.at, "<no value>" if value is None else fmt.show(value))
        except fmt.CannotPrint as error:
            raise run.error(self.at, str(error)) from None


@dataclass(frozen=True, slots=True)
class Choice:
    """if and with, with all their `else if` branches: the first true one is written."""

    at: int
    branches: tuple[tuple[Pipe, Body], ...]
    otherwise: Body
    moves_dot: bool  # with: the dot becomes the value

    def write(self, run: Run, dot: Any) -> None:
        body, inner = self.otherwise, dot
        for pipe, branch in self.branches:
            if value := pipe.value(run, dot):
                body, inner = branch, value if self.moves_dot else dot
                break
        reached, run.reached = run.reached, False  # what a condition asks for is not shown yet
        run.write(body, inner)
        run.reached = reached


@dataclass(frozen=True, slots=True)
class Range:
    """Once for each entry of a list, a map (by sorted keys) or for 0 … n − 1."""

    at: int
    pipe: Pipe  # without its variables:
    slots: tuple[int, ...]  # $index and $element, $element alone, or none
    body: Body
    otherwise: Body

    def write(self, run: Run, dot: Any) -> None:
        value = self.pipe.value(run, dot)
        for slot in self.slots:
            run.variables[slot] = value  # what the else branch sees
        if not value or (type(value) is int and value < 0):
            return run.write(self.otherwise, dot)
        run.reached = False
        for pair in self._pairs(run, value):
            run.step(self.at)
            run.variables.update(zip(self.slots, pair[2 - len(self.slots) :], strict=False))
            try:
                run.write(self.body, pair[1])
            except Continue:
                continue
            except Break:
                break
        return None

    def _pairs(self, run: Run, value: Any) -> Iterator[tuple[Any, Any]]:
        if isinstance(value, Mapping):
            keys = value if isinstance(value, fmt.Struct) else sorted(value, key=str)
            return ((key, value[key]) for key in keys)
        if isinstance(value, list | tuple):
            return iter(enumerate(value))
        if type(value) is int:
            return ((number, number) for number in range(value))
        raise run.error(self.at, f"cannot range over a {fmt.type_name(value)}")


@dataclass(frozen=True, slots=True)
class Jump:
    at: int
    jump: type[Break] | type[Continue]

    def write(self, run: Run, dot: Any) -> None:
        raise self.jump


@dataclass(frozen=True, slots=True)
class Insert:
    """{{ template "name" pipe }}"""

    at: int
    name: str
    pipe: Pipe | None

    def write(self, run: Run, dot: Any) -> None:
        if self.name not in run.defined:
            raise run.error(self.at, f'template "{self.name}" is not defined')
        run.insert(run.defined[self.name], self.pipe.value(run, dot) if self.pipe else None)


@dataclass(slots=True)
class Run:
    """One rendering: what has been written, the variables, and how much it may still do."""

    source: str
    defined: Mapping[str, Body]
    variables: dict[int, Any]  # by slot; the parser gave each variable its own
    until: str = ""  # the field with which the text ends, wherever it is written
    reached: bool = False  # has that field been asked for?
    out: list[str] = field(default_factory=list)
    depth: int = 0
    steps: int = 0
    text: int = 0  # characters

    def write(self, body: Body, dot: Any) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH and body:
            raise self.error(body[0].at, f"nested more than {MAX_DEPTH} deep")
        try:
            for node in body:
                self.step(node.at)
                node.write(self, dot)
                if self.reached:
                    raise Reached
        finally:  # a break leaves, too
            self.depth -= 1

    def insert(self, body: Body, dot: Any) -> None:
        """Write another template: it has variables of its own, and its dot is its root."""
        outer, self.variables = self.variables, {ROOT: dot}
        self.write(body, dot)
        self.variables = outer

    def print(self, at: int, text: str) -> None:
        self.count(at, text)
        self.out.append(text)

    def step(self, at: int) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise self.error(at, f"more than {MAX_STEPS:,} steps")

    def count(self, at: int, value: Any) -> None:
        self.text += len(value) if isinstance(value, str) else 0
        if self.text > MAX_TEXT:
            raise self.error(at, f"more than {MAX_TEXT:,} characters")

    def counted(self, at: int, values: Iterable[Any]) -> Iterator[Any]:
        """The values; all text among them counts as work."""
        for value in values:
            self.step(at)
            self.count(at, value)
            yield value

    def joined(self, at: int, parts: Iterator[str]) -> str:
        return "".join(self.counted(at, parts))

    def error(self, at: int, problem: str) -> TemplateError:
        return error_at(self.source, at, problem)
