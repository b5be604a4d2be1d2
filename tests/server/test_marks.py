"""Tags of calls and thoughts that are control tokens, which print nothing: they are found, too.

Judge: the same answer by a model whose vocabulary spells the tags letter by letter.
"""

import contextlib
import itertools
import json
import types

import pytest

from refollama.loaded import LoadedModel
from refollama.messages import Create
from tests.server.test_chat import TOOLS
from tests.tiny import SCORES, TOKENS, TYPES, write_model

TEMPLATE = (
    "{{ range .Tools }}{{ .Function.Name }}{{ end }}{{ range .Messages }}{{ .Content }}"
    "{{ if .Thinking }}<think>{{ .Thinking }}</think>{{ end }}"
    '{{ range .ToolCalls }}[TOOL_CALLS]{"name": "{{ .Function.Name }}"}{{ end }}{{ end }}'
)
MARKS = ["[TOOL_CALLS]", "<think>", "</think>", "[OTHER]"]
CALL = '[{"name": "add", "arguments": {"a": 1}}]'
HI = [{"role": "user", "content": "hi"}]


class Said(list[int]):
    """The ids of an answer, as an engine streams them."""

    sequence: types.SimpleNamespace

    def items(self):
        return iter(self)


@pytest.fixture(params=["control", "text"])
def model(request, service, tmp_path, monkeypatch):
    """A model that says what it is told to; its marks are control tokens, or plain text."""
    count = len(MARKS) if request.param == "control" else 0
    keys = {
        "tokenizer.ggml.tokens": [*TOKENS, *MARKS[:count]],
        "tokenizer.ggml.scores": [*SCORES, *[0.0] * count],
        "tokenizer.ggml.token_type": [*TYPES, *[3] * count],
    }
    path = write_model(
        tmp_path / "marks.gguf", keys=keys, extra={"token_embd.weight": (len(TOKENS) + count, 64),
                                                   "output.weight": (len(TOKENS) + count, 64)}
    )  # fmt: skip
    list(service.create(Create("m", f'FROM {path}\nTEMPLATE """{TEMPLATE}"""')))

    def say(text):
        @contextlib.contextmanager
        def start(self, tokens, options, extras):
            said = Said(self.tokenizer.encode(text, special=True, continues=True))
            printing = all(map(self.tokenizer.piece, said))
            assert printing == (request.param == "text") or not any(m in text for m in MARKS)
            said.sequence = types.SimpleNamespace(
                prompt=list(tokens), likely=[], started=1, prompt_read=2, cached=0, dropped=0,
                done_reason="stop",
            )  # fmt: skip
            yield said

        monkeypatch.setattr(LoadedModel, "start", start)

    return say


def chat(http, **body):
    answer = http.post("/api/chat", json={"model": "m", "messages": HI, "stream": False} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()["message"]


@pytest.mark.parametrize(
    ("thought", "before", "call"),
    list(itertools.product(["", "hm hm"], ["", "let me "], ["", CALL])),
)
def test_thoughts_text_and_calls_are_told_apart(http, model, thought, before, call):
    mark = f"[TOOL_CALLS] {call}" if call else ""
    model((f"<think>{thought}</think>" if thought else "") + before + mark)
    message = chat(http, tools=TOOLS)
    assert message.get("thinking", "") == thought
    assert message["content"].strip() == before.strip()
    calls = [one["function"] for one in message.get("tool_calls", [])]
    assert calls == ([{"index": 0, "name": "add", "arguments": {"a": 1}}] if call else [])


def test_marks_that_are_not_looked_for_print_nothing(http, model, request):
    """Nor do other control tokens. (A fragment behind one begins with a space.)"""
    as_text = request.node.callspec.params["model"] == "text"
    model(f"<think>hm</think>so[TOOL_CALLS]{CALL}")
    shown = f"<think>hm</think>so[TOOL_CALLS]{CALL}" if as_text else f"hmso{CALL}"
    assert chat(http, think=False)["content"].replace(" ", "") == shown.replace(" ", "")
    model("so[OTHER]be")
    shown = "so[OTHER]be" if as_text else "sobe"
    assert chat(http, tools=TOOLS)["content"].replace(" ", "") == shown


# ── tools and a form at once ──────────────────────────────────────────────────────────────────

NAMED = {"name": "add", "arguments": {"a": 1}}


def test_what_must_have_a_schemas_form_is_no_call(http, service, model):
    """It is what the client parses; `json` is no such promise: there the model may call."""
    model(json.dumps(NAMED))
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    assert json.loads(chat(http, tools=TOOLS, format=schema)["content"]) == NAMED
    message = chat(http, tools=TOOLS, format="json")
    assert message["content"] == "" and message["tool_calls"][0]["function"]["name"] == "add"


def test_a_real_answer_with_tools_and_a_schema_has_the_form(http, service, tiny):
    list(service.create(Create("n", f'FROM {tiny}\nTEMPLATE """{TEMPLATE}"""')))
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    body = {
        "model": "n",
        "think": False,
        "tools": TOOLS,
        "options": {"num_predict": 100, "seed": 1},
    }
    message = chat(http, format={**schema, "additionalProperties": False}, **body)
    assert isinstance(json.loads(message["content"])["ok"], bool) and "tool_calls" not in message
