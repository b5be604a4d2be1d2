"""The prompt of /api/generate.  Judge: the vectors of Ollama, December 2023."""

from __future__ import annotations

import pytest

from refollama.errors import TemplateError
from refollama.text.prompt import render_generate
from refollama.text.template import Template

LLAMA2 = (
    "[INST] {{ if and .First .System }}<<SYS>>{{ .System }}<</SYS>>\n\n{{ end }}"
    "{{ .Prompt }} [/INST] "
)


@pytest.mark.parametrize(
    ("template", "system", "first", "expected"),
    [
        ("", "S", True, "P"),  # the default template shows the prompt alone
        ("<{{ .System }}|{{ .Prompt }}|{{ .First }}>", "S", True, "<S|P|true>"),
        ("<{{ .System }}|{{ .Prompt }}|{{ .First }}>", "D", False, "<D|P|false>"),
        (LLAMA2, "S", True, "[INST] <<SYS>>S<</SYS>>\n\nP [/INST] "),
        (LLAMA2, "S", False, "[INST] P [/INST] "),
        (LLAMA2, "", True, "[INST] P [/INST] "),
        ("{{ .Missing }}{{ .Prompt }}", "", True, "<no value>P"),
    ],
)
def test_one_turn(template, system, first, expected):
    assert render_generate(template, system=system, prompt="P", first=first) == expected


def test_the_response_ends_the_prompt_whether_the_template_shows_it_or_not():
    for template, expected in (
        ("{{ .Prompt }}:", "P:R"),
        ("{{ .Prompt }}:{{ .Response }};", "P:R"),
    ):
        text = render_generate(template, system="", prompt="P", first=True, response="R")
        assert text == expected


def test_what_the_user_says_is_never_a_template():
    hostile = "{{ .System }} {{ range }}"
    assert render_generate("{{ .Prompt }}", system="secret", prompt=hostile, first=True) == hostile


def test_a_parsed_template_will_do_and_a_bad_one_is_an_error():
    parsed = Template("{{ .Prompt }}!")
    assert render_generate(parsed, system="", prompt="P", first=True) == "P!"
    with pytest.raises(TemplateError, match="line 1, column 5"):
        render_generate("{{ )", system="", prompt="P", first=True)
