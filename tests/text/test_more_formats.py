"""Sixteen more models' formats.  Judge: plain Python that writes what their authors published."""

import pytest

from refollama.text.prompt import Talk, render
from refollama.text.template import Template
from tests.text.more_formats import MORE_FORMATS, MORE_TALKS, expected

KINDS = [
    (name, kind)
    for name, form in MORE_FORMATS.items()
    for kind in ("turn", "messages")
    if getattr(form, kind)
]


@pytest.mark.parametrize("case", list(MORE_TALKS))
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_go_templates_write_what_the_models_authors_published(name, kind, case):
    """Case 20: the user alone, a system text, and several turns; and an answer that is begun."""
    form = MORE_FORMATS[name]
    text = render(Template(getattr(form, kind)), Talk(MORE_TALKS[case]))
    assert text == expected(form, MORE_TALKS[case])
