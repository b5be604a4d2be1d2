"""Go's text/template, as far as prompt templates use it.

    {{ if .System }}<<SYS>>{{ .System }}<</SYS>>{{ end }}[INST] {{ .Prompt }} [/INST]

    source ── gotemplate/lexer ──► tokens ── parser ──► nodes ── render ──► text

if, with, range (else, break, continue), define, template, block, variables, pipes, parentheses,
comments, trim markers, and the functions of gotemplate/functions. What is false: false, 0, "",
nil, empty lists and maps. A key that is missing is nil: false, and printed as `<no value>`.

Deliberately stricter than Go: what can only fail when it is executed (a wrong number of arguments,
an argument for what is no function) fails at once. More lenient: a field of nil is nil.
Source: the documentation of Go's package text/template.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from refollama.errors import TemplateError
from refollama.text.gotemplate.nodes import ROOT, Reached, Run
from refollama.text.gotemplate.parser import Parser

LONGEST = 1 << 16  # characters; the longest that models come with have some ten thousand


class Template:
    """A parsed template, to be rendered any number of times.

    Raises: TemplateError, with line and column.
    """

    def __init__(self, source: str) -> None:
        if len(source) > LONGEST:
            raise TemplateError(f"longer than {LONGEST} characters", 1, 1)
        self.source = source
        parser = Parser(source)
        self._body = parser.whole()
        self._defined = parser.defined
        self.names = frozenset(parser.names)  # of all fields mentioned: {"System", "Prompt"}

    def render(self, values: Mapping[str, Any], until: str = "") -> str:
        """The text for these values: what JSON can hold (str, numbers, bool, None, lists, maps).

        until: a field; what follows the place where it is written, or would be, is left out.
        Raises: TemplateError if they do not fit, or if nesting, steps or text exceed the limits.
        """
        run = Run(self.source, self._defined, variables={ROOT: values}, until=until)
        with suppress(Reached):
            run.write(self._body, values)
        return "".join(run.out)
