"""Both ends of a conversation, without a real model: words are tokens, answers are written here."""

import tracemalloc
from typing import Any

import pytest

from refollama.dialogue import (
    Prompt,
    Reader,
    Script,
    chat_prompt,
    converse,
    gathered,
    generate_prompt,
    opened,
    told,
)
from refollama.engine.sequence import Extras
from refollama.errors import BadRequest, PromptTooLong, TemplateError
from refollama.messages import Chat, Chunk, Generate, Message, Stats, TokenLogprob
from refollama.options import Options
from refollama.text.prompt import shortened, starts
from refollama.text.thinking import Tags

TAGS = Tags("<think>", "</think>")
SHOW = "{{ range .Messages }}{{ .Role }}:{{ .Content }} {{ end }}"


GRAMMAR: Any = object()
SPLIT: Any = str.split  # words are tokens


class Words:
    """A tokenizer whose tokens are words; BOS stands in front of them."""

    bos_id = 0

    def guard(self, text):
        return text

    def around(self, ids):
        return [0, *ids]

    def encode(self, text, **_):
        return text.split()

    def piece(self, id):
        return id.encode()


def reader(room=1000, **more):
    words: Any = Words()
    return Reader(words, SPLIT, room, **more)


def user(text):
    return Message("user", text)


# ── the prompt ────────────────────────────────────────────────────────────────────────────────


def test_the_models_own_beginning_comes_first():
    own = Script(system="D", messages=(user("a"), Message("assistant", "b")))
    roles = [message.content for message in opened(own, (user("c"),))]
    assert roles == ["D", "a", "b", "c"]
    asked = [message.content for message in opened(own, (Message("system", "S"), user("c")))]
    assert asked == ["S", "a", "b", "c"]
    assert opened(Script(), (user("c"),)) == (user("c"),)


@pytest.mark.parametrize("room", range(1, 14))
def test_as_many_messages_as_fit(room):
    """Judge: every shorter conversation that a user begins, tried one by one."""
    texts = ["one", "two words", "three of them", "four of them here", "last"]
    script = Script(template="{{ range .Messages }}{{ .Content }} {{ end }}")
    turns = tuple(
        Message(role, text) for role, text in zip(["user", "assistant"] * 3, texts, strict=False)
    )
    prompt = chat_prompt(script, Chat("m", turns), reader(room))
    best = next((n for n in (0, 2, 4) if len(" ".join(texts[n:]).split()) <= room), len(texts) - 1)
    assert list[Any](prompt.tokens) == " ".join(texts[best:]).split()
    assert prompt.messages_truncated == best
    assert prompt.truncated == len(" ".join(texts[:best]).split())
    whole = chat_prompt(script, Chat("m", turns, truncate=False), reader(room))
    assert len(whole.tokens) == 11 and whole.messages_truncated == 0


ALTERNATE = (  # as templates of Mistral's and Gemma's families demand it
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }} {% endfor %}"
)
TURNS = tuple(Message(("user", "assistant")[n % 2], f"{n} a b") for n in range(9))


@pytest.mark.parametrize("room", range(1, 30))
def test_where_roles_must_take_turns_a_shortened_conversation_begins_with_a_user(room):
    prompt = chat_prompt(Script(jinja=ALTERNATE), Chat("m", TURNS), reader(room))
    dropped = next((n for n in range(0, 9, 2) if 3 * (9 - n) <= room), 8)
    assert prompt.messages_truncated == dropped
    assert prompt.text.split()[0] == str(dropped)


def test_an_end_that_the_template_refuses_does_not_fit():
    """Judge: the only two ends that it takes, tried by hand."""
    picky = "{{ messages[0].content in ok or raise_exception('no') }}{{ messages | length }}"
    room = "{% set ok = ['0 a b', '6 a b'] %}" + picky + "{% for m in messages %} x{% endfor %}"
    prompt = chat_prompt(Script(jinja=room), Chat("m", TURNS), reader(5))
    assert (prompt.messages_truncated, prompt.text) == (6, "True3 x x x")
    none = room.replace("6 a b", "-")
    whole = chat_prompt(Script(jinja=none), Chat("m", TURNS), reader(5))
    assert (whole.messages_truncated, len(whole.tokens)) == (0, 10)  # the engine says: too long


def test_a_template_that_refuses_the_whole_conversation_says_so():
    with pytest.raises(TemplateError, match="must alternate"):
        chat_prompt(Script(jinja=ALTERNATE), Chat("m", TURNS[1:]), reader(1))


def test_only_the_ends_that_are_tried_are_built(monkeypatch):
    built = []

    def noted(messages, start):
        built.append(start)
        return shortened(messages, start)

    monkeypatch.setattr("refollama.dialogue.shortened", noted)
    script = Script(template=SHOW)
    chat_prompt(script, Chat("m", TURNS), reader())
    assert built == []
    chat_prompt(script, Chat("m", TURNS * 100), reader(60))
    assert 0 < len(built) <= 10  # of 500 that there are


def test_a_long_conversation_takes_no_room_for_each_of_its_ends():
    """Three thousand ends of it, as tuples, would be 72 MB."""
    turns = TURNS[:2] * 3000
    tracemalloc.start()
    try:
        starting = [len(shortened(turns, at)) for at in starts(turns)]
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert (len(starting), starting[0], starting[-1]) == (3001, 6000, 1)


def test_a_templates_own_bos_goes_where_the_tokenizer_adds_one():
    jinja = "{{ bos_token }}{{ messages[0].content }}"
    script = Script(jinja=jinja, bos="<s>")
    assert chat_prompt(script, Chat("m", (user("hi"),)), reader()).text == "hi"
    words: Any = Words()
    words.around = list  # adds none
    plain = Reader(words, SPLIT, 9)
    assert chat_prompt(script, Chat("m", (user("hi"),)), plain).text == "<s>hi"
    later = Reader(words, SPLIT, 9, continues=True)
    assert generate_prompt(script, Generate("m", "hi"), later).text == "hi"


def test_generate_is_a_chat_of_one_turn_and_after_a_context_the_models_turns_are_known():
    script = Script(template=SHOW, system="D", messages=(user("a"), Message("assistant", "b")))
    once = generate_prompt(script, Generate("m", "hi"), reader()).text
    assert once == chat_prompt(script, Chat("m", (user("hi"),)), reader()).text
    again = generate_prompt(script, Generate("m", "hi", context=(1,)), reader(continues=True)).text
    assert again == "system:D user:hi "
    other = Generate("m", "hi", system="S", template="[{{ .System }}|{{ .Prompt }}]")
    assert generate_prompt(Script(system="D"), other, reader()).text == "[S|hi]"


def test_what_can_think_does_unless_told_not_to():
    script = Script(template="{{ .Think }}{{ range .Messages }}<t>{{ .Thinking }}</t>{{ end }}")
    for think, shown, tags in ((None, "true", True), (True, "true", True), (False, "false", False)):
        prompt = chat_prompt(script, Chat("m", (user("hi"),), think=think), reader())
        assert prompt.text.startswith(shown) and (prompt.tags is not None) == tags
    with pytest.raises(BadRequest, match='"m" does not support thinking'):
        chat_prompt(Script(), Chat("m", (user("hi"),), think=True), reader())


# ── the answer ────────────────────────────────────────────────────────────────────────────────


def logprob(id):
    return TokenLogprob(id, "", b"", 0.0)


def chunks(*texts, reason="stop"):
    for id, text in enumerate(texts):
        yield Chunk(text, logprobs=(logprob(id),))
    yield Chunk(done=True, done_reason=reason, stats=Stats(eval_count=len(texts)))


def test_no_logprob_is_lost_while_text_is_held_back():
    prompt = Prompt("", [], tags=TAGS, tool_tag="<tool_call>", tools=frozenset({"add"}))
    pieces = list(told(chunks("<thi", "nk>a", "</think>", "b", "<tool_", "x"), prompt))
    assert [one.id for piece in pieces for one in piece.logprobs] == list(range(6))
    whole = gathered(told(chunks("<thi", "nk>a", "</think>", "b", "<tool_", "x"), prompt))
    assert (whole.thinking, whole.text) == ("a", "b<tool_x")
    assert whole.logprobs == tuple(map(logprob, range(6)))


def test_the_record_counts_the_messages_that_went():
    prompt = Prompt("", [], truncated=7, messages_truncated=2)
    end = gathered(told(chunks("a"), prompt))
    assert end.stats is not None
    assert (end.stats.prompt_truncated, end.stats.messages_truncated) == (7, 2)


class Scripted:
    """A model that says one thing freely, and another in a form."""

    tokenizer: Any = Words()

    def __init__(self, free, formed, reason="stop") -> None:
        self.free, self.formed, self.reason = free, formed, reason
        self.asked: list[Any] = []

    def answer(self, tokens, options, extras):
        self.asked.append((tokens, options.num_predict, extras.grammar is not None))
        pieces = self.free if extras.grammar is None else self.formed
        yield from chunks(*pieces, reason=self.reason if extras.grammar is None else "stop")


@pytest.mark.parametrize(
    ("free", "begun", "expected", "more"),
    [
        (["<think>", "a b ", "c</think>", "no json"], False, ("a b c", '{"x":1}'), 3),
        (["<think>a b", " c</th", "ink>no"], False, ("a b c", '{"x":1}'), 3),
        (["a b", " c</think>"], True, ("a b c", '{"x":1}'), 3),
        (["<think>a b c"], False, ("a b c", '{"x":1}'), 3),  # it forgot to close the thought
        (["no thought"], False, ("", '{"x":1}'), 0),
        ([" \n"], False, ("", '{"x":1}'), 0),
    ],
)
def test_thoughts_are_free_and_what_follows_them_has_the_form(free, begun, expected, more):
    model = Scripted(free, ['{"x"', ":1}"])
    prompt = Prompt("say <think>" if begun else "say", [1], tags=TAGS)
    extras = Extras(grammar=GRAMMAR)
    whole = gathered(converse(model, prompt, Options(num_predict=10), extras))
    assert (whole.thinking, whole.text) == expected
    assert [formed for *_, formed in model.asked] == [False, True]
    tokens, left, _ = model.asked[1]
    assert (len(tokens), left) == (1 + more, 10 - more)
    assert whole.stats is not None and whole.stats.eval_count == 2 + more


def test_a_thought_that_used_up_all_tokens_is_the_answer():
    model = Scripted(["<think>a", " b"], ["{}"], reason="length")
    whole = gathered(converse(model, Prompt("", [], tags=TAGS), Options(), Extras(grammar=GRAMMAR)))
    assert (whole.thinking, whole.text, whole.done_reason) == ("a b", "", "length")
    assert len(model.asked) == 1


def test_texts_that_are_far_too_much_are_not_guarded_first():
    """All of a conversation together; what stands there twice counts once."""
    guarded = []

    def check(characters):
        if characters > 100:
            raise PromptTooLong("at least 1000", 10)

    class Slow(Words):
        def guard(self, text):
            guarded.append(text)
            return text

    words: Any = Slow()
    slow = Reader(words, SPLIT, 1000, check=check)
    same = (user("a" * 60), Message("assistant", "b"), user("a" * 60))
    assert chat_prompt(Script(template=SHOW), Chat("m", same), slow).tokens
    assert sorted(text[:1] for text in guarded if text) == ["a", "b"]
    guarded.clear()
    other = (user("a" * 60), Message("assistant", "b"), user("c" * 60))
    with pytest.raises(PromptTooLong, match="it has at least 1000 tokens"):
        chat_prompt(Script(template=SHOW), Chat("m", other), slow)
    assert "c" * 60 not in guarded
    tools = [{"type": "function", "function": {"name": "f", "description": "d" * 101}}]
    with pytest.raises(PromptTooLong):
        chat_prompt(
            Script(template="{{ .Tools }}" + SHOW), Chat("m", (user("a"),), tuple(tools)), slow
        )


def test_a_model_that_does_not_think_has_the_form_at_once():
    model = Scripted(["free"], ["{}"])
    assert (
        gathered(converse(model, Prompt("", []), Options(), Extras(grammar=GRAMMAR))).text == "{}"
    )
    assert gathered(converse(model, Prompt("", [], tags=TAGS), Options(), Extras())).text == "free"
