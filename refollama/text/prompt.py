"""What does the model get to read? A request, put through the model's template.

template   {{ .System }} USER: {{ .Prompt }} ASSISTANT:
prompt     You are Mario. USER: Who are you? ASSISTANT:
"""

from __future__ import annotations

from functools import lru_cache

from refollama.text.template import Template

DEFAULT_TEMPLATE = "{{ .Prompt }}"  # of a model that has none


def render_generate(
    template: str | Template, *, system: str, prompt: str, first: bool, response: str = ""
) -> str:
    """One turn as text; an empty template is the default one.

    first: is it the first turn?  response: what the model has said already, put behind the
    template as it is, even if the template shows `.Response` itself.
    Raises: TemplateError.  Source: Ollama, December 2023.
    """
    if isinstance(template, str):
        template = _parsed(template or DEFAULT_TEMPLATE)
    values = {"System": system, "Prompt": prompt, "Response": response, "First": first}
    return template.render(values) + response


@lru_cache(maxsize=8)  # a model's template is the same at each request
def _parsed(source: str) -> Template:
    return Template(source)
