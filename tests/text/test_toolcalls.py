"""Calls of tools in an answer.  Judges: json itself, and the same text in one piece."""

import json
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refollama.text.jinja import JinjaTemplate
from refollama.text.template import Template
from refollama.text.toolcalls import ToolCalls, tool_tag

QWEN, MISTRAL = "<tool_call>", "[TOOL_CALLS]"
TOOLS = ("add", "now")


def told(pieces, tag=QWEN):
    """Content, and the calls as (name, arguments, index)."""
    parser = ToolCalls(tag, TOOLS)
    content, calls = "", []
    for piece in pieces:
        text, found = parser.feed(piece)
        content += text
        calls += [(call.name, call.arguments, call.index) for call in found]
    return content + parser.finish(), calls


Call = tuple[str, dict[str, int], int]
ADD: Call = ("add", {"b": 2, "a": 1}, 0)
NOW: Call = ("now", {}, 1)
CASES: list[tuple[str, str, str | None, list[Call]]] = [
    (QWEN, '<tool_call>\n{"name": "add", "arguments": {"b": 2, "a": 1}}\n</tool_call>', "", [ADD]),
    (
        QWEN,
        'Let me see. <tool_call>{"name":"add","arguments":{"b":2,"a":1}}</tool_call>\n'
        '<tool_call>{"name":"now","arguments":{}}</tool_call>',
        "Let me see. ",
        [ADD, NOW],
    ),
    (
        MISTRAL,
        '[TOOL_CALLS] [{"name":"add","arguments":{"b":2,"a":1}}, {"name":"now","arguments":{}}]',
        "",
        [ADD, NOW],
    ),
    # The tag is a control token, which prints nothing; and Llama's own form.
    (MISTRAL, ' [{"name":"add","arguments":{"b":2,"a":1}}]', "", [ADD]),
    ("", '{"name": "add", "parameters": {"b": 2, "a": 1}}', "", [ADD]),
    ("", '{"function": {"name": "add", "arguments": {"b": 2, "a": 1}}}', "", [ADD]),
    ("", '{"name": "add", "arguments": "{\\"b\\": 2, \\"a\\": 1}"}', "", [ADD]),
    # What is no call is content, to the letter.
    (QWEN, '<tool_call>{"name":"other","arguments":{}}</tool_call>', None, []),
    (QWEN, "<tool_call> is how I call tools.", None, []),
    (QWEN, '<tool_call>{"name":"add","argum', None, []),
    (QWEN, "1 < 2 <tool_", None, []),
    (QWEN, "  \n", None, []),
    ("", '{"age": 4}', None, []),
    ("", "[1] and [2]", None, []),
    ("", 'As JSON: {"name":"add","arguments":{}}', None, []),
    ("", '{"name":"add","arguments":{"a":NaN}}', None, []),
    ("", '{"name":"add","arguments":{"a":1e999}}', None, []),
    ("", '{"name":"add","arguments":{"a":[-1e999]}}', None, []),
    ("", '{"name":"add","arguments":"{\\"a\\":1e999}"}', None, []),
    (QWEN, '<tool_call>{"name":"add","arguments":{"a":Infinity}}</tool_call>', None, []),
    ("", '{"name":"add","arguments":[1]}', None, []),
    # A tag that led nowhere, and then one that does.
    (QWEN, '<tool_call><tool_call>{"name":"add","arguments":{"b":2,"a":1}}', QWEN, [ADD]),
    (QWEN, '<tool_call>{"name":"add","arguments":{"b":2,"a":1}}</tool_call> Done.', "Done.", [ADD]),
]


@pytest.mark.parametrize(("tag", "text", "content", "calls"), CASES)
def test_calls_and_content(tag, text, content, calls):
    assert told([text], tag) == (text if content is None else content, calls)
    if calls:
        assert list(calls[0][1]) == list(told([text], tag)[1][0][1])  # the order of the model


@pytest.mark.parametrize(("tag", "text", "content", "calls"), CASES)
def test_however_the_text_is_cut_the_calls_are_the_same(tag, text, content, calls):
    whole = told([text], tag)
    assert told(list(text), tag) == whole
    for at in range(len(text)):
        assert told([text[:at], text[at:]], tag) == whole


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    ),
    st.lists(st.integers(0, 200)),
)
def test_arguments_are_what_json_makes_of_them(value, cuts):
    """Braces, quotes and backslashes inside strings are no ends of objects."""
    text = f"<tool_call>{json.dumps({'name': 'add', 'arguments': {'x': value}})}</tool_call>after"
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(places)]
    assert told(pieces) == ("after", [("add", {"x": value}, 0)])


def test_content_is_shown_as_soon_as_it_can_be_none_of_a_call():
    parser = ToolCalls(QWEN, TOOLS)
    assert [parser.feed(piece)[0] for piece in ("One", " two <", "3", " <tool", "s>")] == [
        "One", " two ", "<3", " ", "<tools>",
    ]  # fmt: skip


def test_white_space_behind_a_call_is_not_kept():
    """Twice as much takes twice as long: nothing of it is looked at again."""
    parser = ToolCalls(QWEN, TOOLS)
    parser.feed('<tool_call>{"name":"now"}</tool_call>')
    begin = time.monotonic()
    assert all(parser.feed(" ") == ("", ()) for _ in range(40_000))
    assert time.monotonic() - begin < 2
    assert parser.feed(" Done.") == ("Done.", ())


def test_ids_are_different():
    parser = ToolCalls(QWEN, TOOLS)
    call = '<tool_call>{"name":"now"}</tool_call>'
    _, calls = parser.feed(call * 50)
    ids = {call.id for call in calls}
    assert len(ids) == 50 and all(id.startswith("call_") and len(id) == 13 for id in ids)


@pytest.mark.parametrize(
    ("template", "tag"),
    [
        ('{{ range .ToolCalls }}<tool_call>\n{"name": "{{ .Function.Name }}"}{{ end }}', QWEN),
        ('{{ if .ToolCalls }}<tool_call>\n{{ range .ToolCalls }}{"name"}{{ end }}{{ end }}', QWEN),
        ("{{- if .ToolCalls }}[TOOL_CALLS] [\n{{- range .ToolCalls }}{{ end }}{{ end }}", MISTRAL),
        ('{{ range .Messages }}{{ range .ToolCalls }}{"name"}{{ end }}{{ end }}', ""),
        ("{{ .Tools }}", ""),
    ],
)
def test_the_tag_is_what_the_template_writes_in_front_of_calls(template, tag):
    assert tool_tag(Template(template)) == tag


def test_in_jinja_the_tag_is_one_of_those_that_are_known():
    assert tool_tag(JinjaTemplate("{{ '<tool_call>' }}{{ tools }}")) == QWEN
    assert tool_tag(JinjaTemplate("{{ tools }}")) == ""
