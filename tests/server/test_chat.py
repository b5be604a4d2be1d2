"""POST /api/chat: the prompt, the stream, tools, thoughts, and what is refused.

Judges: the same prompt sent raw, `_debug_render_only`, Ollama's own tests, and its official client.
"""

import json

import httpx
import ollama
import pytest

from refollama.loaded import LoadedModel
from refollama.messages import Chunk, Create, Stats
from refollama.text.tokenizer import unguarded
from tests.exactness import alike
from tests.server.conftest import GREEDY
from tests.text.chat_formats import CHATML, FORMATS
from tests.tiny import write_model

HI = [{"role": "user", "content": "hi"}]
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "he"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
WITH_TOOLS = (
    "{{ range .Tools }}{{ .Function.Name }};{{ end }}{{ range .Messages }}{{ .Content }}"
    '{{ range .ToolCalls }}<tool_call>{"name": "{{ .Function.Name }}"}</tool_call>{{ end }}'
    "{{ if .Thinking }}<think>{{ .Thinking }}</think>{{ end }}{{ end }}"
)


@pytest.fixture
def chat(http):
    """POST /api/chat → the records of the answer; several if it was streamed."""

    def post(**body):
        response = http.post("/api/chat", json={"model": "tiny", "messages": HI} | body)
        assert response.status_code == 200, response.text
        return [json.loads(line) for line in response.text.splitlines()]

    return post


@pytest.fixture
def refused(http):
    """The error of a request that is refused."""

    def post(status=400, route="chat", **body):
        response = http.post(f"/api/{route}", json={"model": "tiny", "messages": HI} | body)
        assert response.status_code == status, response.text
        return response.json()["error"]

    return post


@pytest.fixture(scope="session")
def roomy(tmp_path_factory):
    """A model whose context holds long templates."""
    return write_model(tmp_path_factory.mktemp("models") / "roomy.gguf", context_length=512)


@pytest.fixture
def make(service, roomy):
    """Create a model of these weights, with a template and more."""

    def create(name, template="", *more, weights=roomy):
        lines = [f"FROM {weights}", *([f'TEMPLATE """{template}"""'] if template else []), *more]
        list(service.create(Create(name, "\n".join(lines) + "\n")))

    return create


@pytest.fixture
def rendered(chat, ask):
    """The prompt of a chat, or of a generate if there is one."""

    def show(**body):
        (record,) = (ask if "prompt" in body else chat)(_debug_render_only=True, **body)
        return record["_debug_info"]["rendered_template"]

    return show


@pytest.fixture
def says(monkeypatch):
    """The model says just this, in these pieces."""

    def script(*pieces):
        def answer(self, tokens, options, extras):
            yield from (Chunk(piece) for piece in pieces)
            yield Chunk(done=True, done_reason="stop", stats=Stats(eval_count=len(pieces)))

        monkeypatch.setattr(LoadedModel, "answer", answer)

    return script


def content(records):
    return "".join(record["message"]["content"] for record in records)


# ── the stream ────────────────────────────────────────────────────────────────────────────────


def test_pieces_joined_equal_the_whole_and_each_carries_a_message(chat):
    streamed = chat(options=GREEDY)
    (whole,) = chat(options=GREEDY, stream=False)
    assert content(streamed) == whole["message"]["content"] != ""
    assert [r["done"] for r in streamed] == [False] * (len(streamed) - 1) + [True]
    assert all(record["message"]["role"] == "assistant" for record in streamed)
    assert streamed[-1]["message"] == {"role": "assistant", "content": ""}
    assert streamed[-1]["done_reason"] == whole["done_reason"] != ""
    assert {"total_duration", "load_duration", "prompt_eval_count", "eval_count"} <= set(whole)
    assert "context" not in whole and "response" not in whole


def test_a_chat_is_the_answer_to_its_prompt_sent_raw(make, chat, ask, rendered):
    make("chatml", CHATML.turn, "SYSTEM be brief")
    prompt = rendered(model="chatml", messages=TALK)
    assert prompt.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi")
    (raw,) = ask(model="chatml", prompt=prompt, raw=True, options=GREEDY, stream=False)
    (whole,) = chat(model="chatml", messages=TALK, options=GREEDY, stream=False)
    assert whole["message"]["content"] == raw["response"]


def test_logprobs_come_along(chat):
    (whole,) = chat(options=GREEDY, stream=False, logprobs=True, top_logprobs=2)
    streamed = chat(options=GREEDY, logprobs=True, top_logprobs=2)
    joined = [one for record in streamed for one in record.get("logprobs", [])]
    assert alike(joined, whole["logprobs"]) and len(joined) >= whole["eval_count"]
    assert all(len(one["top_logprobs"]) == 2 and one["logprob"] <= 0 for one in joined)


def test_format_holds_in_a_chat(chat):
    options = {"temperature": 1.5, "seed": 3, "num_predict": 60, "num_ctx": 128}
    (whole,) = chat(options=options, format="json", stream=False)
    text = whole["message"]["content"]
    assert text.startswith("{")
    assert whole["done_reason"] == "length" or isinstance(json.loads(text), dict)


def test_no_messages_load_the_model_and_keep_alive_0_unloads_it(chat, service):
    (loaded,) = chat(messages=[])
    assert (loaded["done"], loaded["done_reason"]) == (True, "load")
    assert loaded["message"] == {"role": "assistant", "content": ""}
    assert service.ps()
    (gone,) = chat(messages=[], keep_alive=0)
    assert gone["done_reason"] == "unload" and not service.ps()


# ── the prompt ────────────────────────────────────────────────────────────────────────────────


def test_the_models_system_text_stands_first_unless_the_request_begins_with_one(make, rendered):
    make("m", "<{{ .System }}|{{ .Prompt }}|{{ .First }}>", "SYSTEM D")
    assert rendered(model="m", messages=TALK) == "<D|hi|true>ho<|he|false>"
    own = [{"role": "system", "content": "S"}, *TALK]
    assert rendered(model="m", messages=own) == "<S|hi|true>ho<|he|false>"


def test_the_models_own_messages_come_before_those_of_the_request(make, rendered):
    make("m", CHATML.messages, "SYSTEM D", "MESSAGE user a", "MESSAGE assistant b")
    turns = rendered(model="m").split("<|im_start|>")[1:]
    assert [turn.split("<")[0] for turn in turns] == [
        "system\nD", "user\na", "assistant\nb", "user\nhi", "assistant\n",
    ]  # fmt: skip
    assert rendered(model="m", prompt="hi") == rendered(model="m")


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_files_own_template_is_used_where_the_modelfile_has_none(
    name, make, rendered, tmp_path, ask
):
    """Chat and generate render the same; after earlier tokens it is the same text again."""
    form = FORMATS[name]
    weights = write_model(tmp_path / "jinja.gguf", keys={"tokenizer.chat_template": form.jinja})
    make("m", weights=weights)
    expected = form.expected["one"].replace("Hi!", "hi")
    assert rendered(model="m") == rendered(model="m", prompt="hi") == expected
    (before,) = ask(model="m", prompt="hi", stream=False, options=GREEDY)
    assert rendered(model="m", prompt="hi", context=before["context"]) == expected
    make("m", "[{{ .Prompt }}]", weights=weights)  # the Modelfile's goes before the file's
    assert rendered(model="m") == "[hi]"


def test_the_rendered_prompt_comes_with_its_ids_and_without_guards(make, chat, service):
    make("m", "<s>{{ .Prompt }}")
    (record,) = chat(
        model="m", messages=[{"role": "user", "content": "</s>"}], _debug_render_only=True
    )
    info = record["_debug_info"]
    assert info["rendered_template"] == unguarded(info["rendered_template"]) == "<s></s>"
    assert info["image_count"] == 0 and info["prompt_ids"][:2] == [1, 1]
    assert 2 not in info["prompt_ids"]
    assert record["message"] == {"role": "assistant", "content": ""}


def test_a_gap_is_filled_in(make, rendered, refused):
    make("m", "{{ if .Suffix }}<PRE> {{ .Prompt }} <SUF>{{ .Suffix }} <MID>{{ end }}")
    assert rendered(model="m", prompt="def add(", suffix="    return c") == (
        "<PRE> def add( <SUF>    return c <MID>"
    )
    assert refused(route="generate", prompt="a", suffix="b") == (
        "registry.ollama.ai/library/tiny:latest does not support insert"
    )
    assert "suffix" in refused(route="generate", prompt="a", suffix="b", raw=True)


# ── what does not fit ─────────────────────────────────────────────────────────────────────────


def test_the_oldest_messages_go_and_the_record_says_so(make, chat, http):
    """All fit into a wide window, the last one alone into a narrow one; system texts stay."""
    make("m", "{{ range .Messages }}[{{ .Content }}]{{ end }}")
    messages = [{"role": "system", "content": "sss"}] + [
        {"role": role, "content": letter * 10}
        for letter, role in zip("abcdefg", ["user", "assistant"] * 4, strict=False)
    ]

    def shown(num_ctx):
        (record,) = chat(
            model="m", messages=messages, _debug_render_only=True, options={"num_ctx": num_ctx}
        )
        info = record["_debug_info"]
        return info["rendered_template"], len(info["prompt_ids"])

    everything, length = shown(128)
    assert everything == "".join(f"[{message['content']}]" for message in messages)
    for num_ctx in range(8, length):
        text, tokens = shown(num_ctx)
        assert text.startswith("[sss]") and text.endswith("[gggggggggg]")
        assert everything.endswith(text.removeprefix("[sss]"))
        alone = text == "[sss][gggggggggg]"
        assert tokens <= num_ctx or alone
    options = GREEDY | {"num_ctx": 60, "num_predict": 1}
    (record,) = chat(model="m", messages=messages, options=options, stream=False)
    text, tokens = shown(60)
    assert record["prompt_eval_count"] == tokens
    assert record["prompt_truncated"] == length - tokens
    assert record["messages_truncated"] == everything.count("[") - text.count("[")
    body = {"model": "m", "messages": messages, "options": options, "truncate": False}
    assert http.post("/api/chat", json=body).status_code == 400


# ── tools and thoughts ────────────────────────────────────────────────────────────────────────


def test_calls_are_told_apart_from_the_text(make, chat, says):
    make("m", WITH_TOOLS)
    says(
        "Let me ", "see <tool_c", 'all>{"name":"add","argu', 'ments":{"b":1,"a":2}}</tool', "_call>"
    )
    streamed = chat(model="m", tools=TOOLS)
    (whole,) = chat(model="m", tools=TOOLS, stream=False)
    assert content(streamed) == whole["message"]["content"] == "Let me see "
    (call,) = [call for r in streamed for call in r["message"].get("tool_calls", [])]
    assert call["function"] == {"index": 0, "name": "add", "arguments": {"b": 1, "a": 2}}
    assert list(call["function"]["arguments"]) == ["b", "a"]
    assert whole["message"]["tool_calls"][0]["function"] == call["function"]
    assert streamed[-1]["message"] == {"role": "assistant", "content": ""}


def test_without_tools_a_call_is_text(make, chat, says):
    make("m", WITH_TOOLS)
    says('<tool_call>{"name":"add","arguments":{}}</tool_call>')
    (whole,) = chat(model="m", stream=False)
    assert whole["message"]["content"] == '<tool_call>{"name":"add","arguments":{}}</tool_call>'


def test_thoughts_are_told_apart_unless_they_are_not_wanted(make, chat, ask, says):
    make("m", WITH_TOOLS)
    says("<thi", "nk>2 and", " 2</think>", "\n4")
    for think in (None, True, "high"):
        streamed = chat(model="m", think=think)
        assert content(streamed) == "4"
        thinking = "".join(r["message"].get("thinking", "") for r in streamed)
        assert thinking == "2 and 2"
    (plain,) = chat(model="m", think=False, stream=False)
    assert plain["message"] == {
        "role": "assistant", "content": "<think>2 and 2</think>\n4",
    }  # fmt: skip
    (generated,) = ask(model="m", prompt="hi", stream=False)
    assert (generated["thinking"], generated["response"]) == ("2 and 2", "4")


def test_tools_and_their_answers_are_rendered(make, rendered):
    make("m", WITH_TOOLS)
    call = {"id": "call_1", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call], "thinking": "hm"},
        {"role": "tool", "content": "3", "tool_name": "add", "tool_call_id": "call_1"},
    ]
    assert rendered(model="m", tools=TOOLS, messages=messages) == (
        'add;hi<tool_call>{"name": "add"}</tool_call><think>hm</think>3'
    )


# ── refusals ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"model": ""}, "model is required"),
        ({"messages": [{"role": "judge"}]},
         "invalid role: judge, role must be one of [system, user, assistant, tool]"),
        ({"messages": [{"content": "hi"}]},
         "invalid role: , role must be one of [system, user, assistant, tool]"),
        ({"messages": "hi"}, "messages must be a list of objects"),
        ({"messages": ["hi"]}, "messages must be a list of objects"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content must be a string"),
        ({"messages": [{"role": "user", "images": ["aGk="]}]},
         "this model cannot look at images"),
        ({"messages": [{"role": "user", "images": ["hi!"]}]},
         "messages[0].images[0] is not base64"),
        ({"messages": [{"role": "user", "images": "hi"}]},
         "messages[0].images must be a list of strings in base64"),
        ({"tools": TOOLS}, "registry.ollama.ai/library/tiny:latest does not support tools"),
        ({"tools": [{}]}, "registry.ollama.ai/library/tiny:latest does not support tools"),
        ({"think": True}, '"tiny" does not support thinking'),
        ({"think": "low"}, '"tiny" does not support thinking'),
        ({"think": "x"}, 'invalid think value: "x" (must be "high", "medium", "low", "max", '
                         "true, or false)"),
        ({"think": 1}, "think must be true, false or a level"),
        ({"top_logprobs": 21}, "top_logprobs must be between 0 and 20"),
        ({"top_logprobs": -1}, "top_logprobs must be between 0 and 20"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(refused, body, error):
    assert refused(**body) == error


def test_tools_must_have_names(make, refused):
    make("m", WITH_TOOLS)
    tools: list[object] = [{}, {"function": {}}, {"function": {"name": ""}}, {"function": "add"}]
    for tool in tools:
        assert "each tool must be" in refused(model="m", tools=[tool])


def test_not_to_think_is_always_fine_and_roles_may_be_written_in_capitals(chat):
    chat(think=False, options=GREEDY)
    assert chat(messages=[{"Role": "USER", "Content": "hi"}], options=GREEDY)[-1]["done"]


def test_a_model_that_there_is_not(refused):
    assert refused(404, model="other") == "model 'other' not found, try pulling it first"


@pytest.mark.parametrize("body", ["null", "{}"])
def test_nothing_is_no_chat(http, body):
    response = http.post("/api/chat", content=body)
    assert (response.status_code, response.json()["error"]) == (400, "model is required")


def test_what_a_files_template_raises_is_said(make, refused, tmp_path):
    source = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('the user begins') }}{% endif %}"
    )
    weights = write_model(tmp_path / "jinja.gguf", keys={"tokenizer.chat_template": source})
    make("m", weights=weights)
    messages = [{"role": "assistant", "content": "hi"}]
    assert refused(model="m", messages=messages) == "template: the user begins"


# ── the official client ───────────────────────────────────────────────────────────────────────


@pytest.fixture
def client(app):
    """Ollama's own client, with the app in place of a network."""
    return ollama.Client("http://localhost", transport=httpx.WSGITransport(app))


def test_the_official_client_chats_streamed_and_not(client):
    whole = client.chat("tiny", HI, options=GREEDY)
    parts = list(client.chat("tiny", HI, options=GREEDY, stream=True))
    assert "".join(part.message.content for part in parts) == whole.message.content != ""
    assert all(part.message.role == "assistant" for part in parts)
    assert (parts[-1].done, parts[-1].done_reason) == (True, whole.done_reason)
    assert client.chat("tiny", []).done_reason == "load"


def test_the_official_client_calls_a_function(client, make, says):
    """Its own way: a function as tool, the call run, the answer sent back."""

    def add(a: int, b: int) -> int:
        """Add numbers.

        Args:
          a: one
          b: another
        """
        return a + b

    make("m", WITH_TOOLS)
    says('<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>')
    messages = list(HI)
    said = client.chat("m", messages, tools=[add]).message
    (call,) = said.tool_calls
    assert add(**call.function.arguments) == 3
    messages += [said, {"role": "tool", "content": "3", "tool_name": call.function.name}]
    says("Three.")
    assert client.chat("m", messages, tools=[add]).message.content == "Three."


def test_the_official_client_sees_thoughts_and_errors(client, make, says):
    make("m", WITH_TOOLS)
    says("<think>hm</think>ho")
    said = client.chat("m", HI, think=True).message
    assert (said.thinking, said.content) == ("hm", "ho")
    with pytest.raises(ollama.ResponseError, match="does not support thinking") as refusal:
        client.chat("tiny", HI, think=True)
    assert refusal.value.status_code == 400
