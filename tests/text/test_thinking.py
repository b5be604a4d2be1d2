"""Thoughts, told apart from the answer.  Judge: the same text in one piece, split by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refollama.text.jinja import JinjaTemplate
from refollama.text.template import Template
from refollama.text.thinking import Tags, Thoughts, thinking_tags

TAGS = Tags("<think>", "</think>")


def told(pieces, begun=False):
    parser = Thoughts(TAGS, begun=begun)
    parts = [parser.feed(piece) for piece in pieces] + [parser.finish()]
    return tuple("".join(side) for side in zip(*parts, strict=True))


CASES = [
    ("<think>\nTwo and two.\n</think>\n\nFour.", False, ("Two and two.", "Four.")),
    (" \n<think>a  b</think>c", False, ("a  b", "c")),
    ("Two </think> Four", True, ("Two", "Four")),
    ("\n\nTwo", True, ("Two", "")),
    ("<think></think>Four", False, ("", "Four")),
    ("<think>cut off in the mid", False, ("cut off in the mid", "")),
    ("<think>a </thi", False, ("a </thi", "")),
    ("  No <think>thought</think>", False, ("", "  No <think>thought</think>")),
    ("<thin", False, ("", "<thin")),
    ("<thought>", False, ("", "<thought>")),
    ("<think>a</think>b</think>c", False, ("a", "b</think>c")),
    ("", False, ("", "")),
]


@pytest.mark.parametrize(("text", "begun", "expected"), CASES)
def test_thoughts_and_content(text, begun, expected):
    assert told([text], begun) == expected
    assert told(list(text), begun) == expected


@given(st.lists(st.sampled_from(["<think>", "</think>", "<", "think", ">", " ", "\n", "a"])))
def test_however_the_text_is_cut_the_parts_are_the_same(words):
    text = "".join(words)
    for begun in (False, True):
        assert told(words, begun) == told([text], begun) == told(list(text), begun)


def test_thoughts_are_shown_as_soon_as_they_come():
    parser = Thoughts(TAGS)
    pieces = ("<think>\n", "One", " two", " </", "x", "</think>", "\nAll")
    assert [parser.feed(piece) for piece in pieces] == [
        ("", ""), ("One", ""), (" two", ""), ("", ""), (" </x", ""), ("", ""), ("", "All"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("template", "tags"),
    [
        ("{{ if .Thinking }}<think>\n{{ .Thinking }}\n</think>{{ end }}", TAGS),
        ("{{ range $m := .Messages }}[T]{{- $m.Thinking -}}[/T]{{ end }}", Tags("[T]", "[/T]")),
        ("{{ range .Messages }}{{ .Thinking }}{{ end }}", None),
        ("{{ .Prompt }}", None),
    ],
)  # fmt: skip
def test_the_tags_are_what_stands_around_thoughts(template, tags):
    assert thinking_tags(Template(template)) == tags


def test_in_jinja_the_tags_are_those_that_are_known():
    assert thinking_tags(JinjaTemplate("{{ m.split('</think>')[-1] }}")) == TAGS
    assert thinking_tags(JinjaTemplate("{{ messages }}")) is None
