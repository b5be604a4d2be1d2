"""What does a Jinja template write? A process of its own, that nothing is lost with.

A template comes from a stranger. Jinja's sandbox keeps it from Python's insides; time and memory
it may still waste in many ways, so `jinja.py` starts this file as a process that may have little
memory and write no files, and stops it when it takes too long.

    stdin   {"source": "{{ bos_token }}…", "values": {"messages": […]}}      one JSON object a line
    stdout  {"text": "<s>…"}   or   {"error": "…", "line": 3}

Without `values` it only reads the template: {"names": ["bos_token", "messages"]}.
Nothing of the house is imported here: the fewer modules, the sooner it starts.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEXT = 2**25  # characters, as in templates of the other kind
MAX_MEMORY = 2**29  # bytes of address space; Python and Jinja take a tenth of it
DEEPEST = 400  # Python calls; templates that the models come with need some twenty

Record = dict[str, Any]


def main() -> None:
    """Answer one line after another, until there are no more."""
    _limit()
    for line in sys.stdin.buffer:
        answer = json.dumps(answered(json.loads(line)))
        sys.stdout.buffer.write(answer.encode() + b"\n")
        sys.stdout.buffer.flush()


def answered(request: Record) -> Record:
    """The text, the names or the error; whatever a template does, this returns."""
    try:
        if "values" in request:
            return {"text": rendered(request["source"], request["values"])}
        return {"names": names(request["source"])}
    except jinja2.TemplateSyntaxError as error:
        return {"error": error.message or "syntax error", "line": error.lineno}
    except jinja2.TemplateError as error:
        return {"error": error.message or type(error).__name__}
    except MemoryError:
        return {"error": "more memory than it may have"}
    except RecursionError:
        return {"error": "nested too deeply"}
    except Exception as error:  # a template may raise whatever Python's own types raise
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def rendered(source: str, values: Mapping[str, Any]) -> str:
    """The template, filled in.  Raises: what `answered` turns into errors."""
    parts, length = [], 0
    for part in _compiled(source).generate(values):
        length += len(part)
        if length > MAX_TEXT:
            raise jinja2.TemplateRuntimeError(f"more than {MAX_TEXT:,} characters")
        parts.append(part)
    return "".join(parts)


def names(source: str) -> list[str]:
    """The variables that the template mentions, its own among them."""
    _compiled(source)
    mentioned = _environment().parse(source).find_all(jinja2.nodes.Name)
    return sorted({variable.name for variable in mentioned})


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    """As model authors expect it.  Source: Hugging Face's documentation of chat templates."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    env.filters["tojson"] = _to_json
    env.globals["raise_exception"] = _raise
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env


class _Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}: marks for training; here only what is inside."""

    tags = {"generation"}  # noqa: RUF012  Jinja's own form

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter would escape what HTML minds."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: object) -> None:
    raise jinja2.TemplateError(str(message))  # a template may hand over anything


def _limit() -> None:
    """From here on: little memory, and no writing to files."""
    sys.setrecursionlimit(DEEPEST)
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on every system
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
