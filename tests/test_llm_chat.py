"""`llm.chat`: a conversation in Python.  Judge: the same prompt, given to `llm.generate`."""

import json

import pytest

import refollama
from refollama.errors import BadRequest
from refollama.messages import Create, Message
from refollama.service import Service
from refollama.shelf import LoadedModels
from refollama.store import Store
from tests.tiny import write_model

GREEDY = {"temperature": 0, "repeat_penalty": 1, "num_predict": 12}
JINJA = (
    "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)
TALK = [
    {"role": "user", "content": "the"},
    {"role": "assistant", "content": "in"},
    {"role": "user", "content": "er"},
]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "jinja.gguf"
    with refollama.load(write_model(path, keys={"tokenizer.chat_template": JINJA})) as llm:
        yield llm


def test_a_chat_is_the_answer_to_its_rendered_prompt(llm):
    text, record = llm.chat(TALK, GREEDY)
    judge, end = llm.generate("[the][in][er]:", GREEDY)
    assert text == judge != "" and record.context == end.context
    assert record.done_reason == "length" and record.thinking == "" and record.tool_calls == ()
    assert "".join(llm.chat(TALK, GREEDY, stream=True)) == text


def test_a_chat_notes_how_likely_its_tokens_were(llm):
    _, record = llm.chat(TALK, GREEDY, logprobs=2)
    _, judge = llm.generate("[the][in][er]:", GREEDY, logprobs=2)
    assert record.logprobs == judge.logprobs
    assert len(record.logprobs) == record.stats.eval_count
    assert all(len(one.top) == 2 for one in record.logprobs)


def test_messages_are_records_or_mappings_and_the_last_may_begin_the_answer(llm):
    records = [Message(message["role"], message["content"]) for message in TALK]
    assert llm.chat(records, GREEDY)[0] == llm.chat(TALK, GREEDY)[0]
    assert llm.chat(TALK[:2], GREEDY)[0] == llm.generate("[the][in", GREEDY)[0]


def test_format_holds(llm):
    options = {"temperature": 1.5, "seed": 5, "num_predict": 100}
    text, record = llm.chat(TALK, options, format="json")
    assert record.done_reason == "length" or isinstance(json.loads(text), dict)
    assert text.startswith("{")


def test_a_model_from_the_store_brings_its_modelfile(tiny):
    service = Service(Store.default(), LoadedModels(), local_files=True)
    lines = (
        f"FROM {tiny}\nTEMPLATE <{{{{ .System }}}}>{{{{ .Prompt }}}}\nSYSTEM be\nMESSAGE user a\n"
    )
    list(service.create(Create("m", lines + "MESSAGE assistant b\n")))
    with refollama.load("m") as llm:
        text, _ = llm.chat([{"role": "user", "content": "c"}], GREEDY)
        assert text == llm.generate("<be>ab<>c", GREEDY)[0]


@pytest.mark.parametrize(
    "messages", [[], [{"content": "hi"}], [{"role": "x"}], [{"role": "user", "text": "hi"}]]
)
def test_what_is_no_conversation_is_refused(llm, messages):
    with pytest.raises(BadRequest):
        llm.chat(messages)
