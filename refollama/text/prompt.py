"""What does the model get to read? A request, put through the model's template.

template   {{ .System }} USER: {{ .Prompt }} ASSISTANT:
prompt     You are Mario. USER: Who are you? ASSISTANT:

The special tokens that the template spells are meant; those that a user's text spells are text:
what is filled in goes through `guard`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from refollama.text.template import Template

DEFAULT_TEMPLATE = "{{ .Prompt }}"  # of a model that has none
_PROMPT_ALONE = re.compile(r"\s*\{\{-?\s*\.Prompt\s*-?\}\}\s*")


def render_generate(
    template: str | Template,
    *,
    system: str,
    prompt: str,
    first: bool,
    response: str = "",
    guard: Callable[[str], str] = str,
) -> str:
    """One turn as text; an empty template is the default one.

    first: is it the first turn?  response: what the model has said already, put behind the
    template as it is, even if the template shows `.Response` itself.  guard: `Tokenizer.guard`,
    for all that is filled in; not used if the template is the prompt alone: that prompt is raw.
    Raises: TemplateError.  Source: Ollama, December 2023.
    """
    if isinstance(template, str):
        template = _parsed(template or DEFAULT_TEMPLATE)
    if _PROMPT_ALONE.fullmatch(template.source):
        guard = str  # whoever writes the whole prompt writes its special tokens, too
    system, prompt, response = guard(system), guard(prompt), guard(response)
    values = {"System": system, "Prompt": prompt, "Response": response, "First": first}
    return template.render(values) + response


@lru_cache(maxsize=8)  # a model's template is the same at each request
def _parsed(source: str) -> Template:
    return Template(source)
