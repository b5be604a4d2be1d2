"""Answers that must have a form, from the model on.  Judges: `json` and `jsonschema`.

The weights are random and the temperature is high, so it is the grammar alone that makes them fit.
"""

import json
import threading

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refollama
from refollama.engine.generate import generate
from refollama.engine.sequence import Extras
from refollama.errors import BadRequest
from refollama.loaded import load_file
from refollama.options import Options
from tests.tiny import write_model

HOT = {"temperature": 1.5, "top_k": 0, "top_p": 1, "num_predict": 200}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2, "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "pets": {"type": "array", "items": {"enum": ["the cat", "a fish"]}, "maxItems": 2},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}
TEXTS = {"type": "array", "items": {"type": "string", "maxLength": 4}, "minItems": 3, "maxItems": 6}
FORMATS = {"json": {"type": "object"}, "person": PERSON, "texts": TEXTS, "any": {}}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """The small model, with room for long answers."""
    path = write_model(tmp_path_factory.mktemp("models") / "roomy.gguf", context_length=1024)
    with load_file(path) as model:
        yield model


def asked(name):
    return "json" if name == "json" else FORMATS[name]


def fits(name, text):
    jsonschema.validate(json.loads(text), FORMATS[name], jsonschema.Draft202012Validator)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    limit=st.integers(1, 120),
    stop=st.lists(st.sampled_from(["}", '"', ",", "a", " ", "\n", "the", "é", ":"]), max_size=1),
    changes=st.sampled_from(
        [{}, {"mirostat": 2}, {"top_k": 3}, {"temperature": 0}, {"repeat_penalty": 1.5}]
    ),
)
def test_the_answer_is_whole_or_its_reason_is_length(llm, name, seed, limit, stop, changes):
    options = HOT | {"seed": seed, "num_predict": limit, "stop": stop} | changes
    text, record = llm.generate("the", options, format=asked(name))
    assert record.done_reason in ("stop", "length")
    if record.done_reason == "stop":
        fits(name, text)
    assert not any(each in text for each in stop)
    assert record.stats.eval_count <= limit


@pytest.mark.parametrize("name", ["person", "texts"])
def test_answers_do_come_to_an_end(llm, name):
    """Else the law above would be empty."""
    ends = [
        llm.generate("the", HOT | {"seed": seed}, format=asked(name)).record.done_reason
        for seed in range(10)
    ]
    assert ends.count("stop") >= 9


def test_an_answer_that_a_stop_string_cuts_is_not_whole(llm):
    text, record = llm.generate("the", HOT | {"seed": 1, "stop": ['"age']}, format=PERSON)
    assert record.done_reason == "length" and text.startswith("{") and '"name"' in text
    free = llm.generate("the", HOT | {"seed": 1, "stop": ["e", "a", " "]})
    assert free.record.done_reason == "stop"


def test_the_last_token_may_end_it(llm):
    """`num_predict` is exact, and an object ends with its brace: no token more is needed."""
    text, record = llm.generate("the", HOT | {"seed": 1}, format=PERSON)
    count = record.stats.eval_count
    again = llm.generate("the", HOT | {"seed": 1, "num_predict": count}, format=PERSON)
    assert again.text == text and again.record.done_reason == "stop"
    short = llm.generate("the", HOT | {"seed": 1, "num_predict": count - 1}, format=PERSON)
    assert text.startswith(short.text) and short.record.done_reason == "length"


def test_no_tokens_at_all_are_no_object(llm):
    text, record = llm.generate("the", HOT | {"num_predict": 0}, format="json")
    assert text == "" and record.done_reason == "length"


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_seed_gives_the_same_text_whatever_is_known_of_the_prompt(llm, name):
    prompt = "the rest is on the sand and the wind is here"
    options = HOT | {"seed": 11, "num_predict": 60}
    llm.forget()
    fresh = llm.generate(prompt, options, format=asked(name))
    known = llm.generate(prompt, options, format=asked(name))
    assert fresh.record.stats.prompt_cached_count == 0 < known.record.stats.prompt_cached_count
    assert fresh.text == known.text and fresh.record.context == known.record.context
    assert "".join(llm.stream(prompt, options, format=asked(name))) == fresh.text


def test_answers_side_by_side_do_not_mix_their_forms(llm):
    with load_file_with_slots(llm) as many:
        found = {}

        def ask(name, seed):
            options = HOT | {"seed": seed}
            found[name, seed] = many.generate("the", options, format=asked(name)).text

        jobs = [(name, seed) for name in FORMATS for seed in (1, 2)]
        threads = [threading.Thread(target=ask, args=job) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for name, seed in jobs:
        alone = llm.generate("the", HOT | {"seed": seed}, format=asked(name)).text
        assert found[name, seed] == alone


def load_file_with_slots(llm):
    from refollama.loaded import LoadedModel

    return LoadedModel(llm.net, llm.tokenizer, slots=3)


def test_half_a_character_before_the_answer_is_no_part_of_it(llm):
    """As an earlier answer leaves it, when its last token was the first byte of an é."""
    half = 3 + 0xC3
    prompt = [*llm.tokens("the"), half]
    assert llm.tokenizer.piece(half) == b"\xc3"
    options = Options().updated(HOT | {"seed": 5})
    chunks = list(llm.answer(prompt, options, Extras(grammar=llm.grammar(PERSON))))
    assert chunks[-1].done_reason == "stop"
    fits("person", "".join(chunk.text for chunk in chunks))


def test_characters_come_whole_also_when_they_are_drawn_byte_by_byte(llm):
    """Most of the vocabulary is single bytes."""
    answers = [llm.generate("the", HOT | {"seed": seed}, format=TEXTS) for seed in range(10)]
    whole = [text for text, record in answers if record.done_reason == "stop"]
    assert any(not text.isascii() for text in whole)
    assert not any("\ufffd" in text for text in whole)


def test_a_context_goes_on_after_a_form(llm):
    text, record = llm.generate("the", HOT | {"seed": 2}, format=PERSON)
    assert llm.tokenizer.decode(record.context) == "the" + text


def test_a_full_context_is_shifted_and_the_form_kept(llm):
    long = {"type": "string", "minLength": 150}
    text, record = llm.generate(
        "the", HOT | {"seed": 4, "num_ctx": 32, "num_predict": 400}, format=long
    )
    assert record.stats.eval_count > 64 and text.startswith('"') and '"' not in text[1:-1]


def test_log_probabilities_are_those_of_the_model(llm):
    """What the grammar leaves has nothing to do with how likely the model thinks it."""
    _, record = llm.generate("the", {"temperature": 0, "f16_kv": False}, format="json", logprobs=1)
    first = record.logprobs[0]
    assert first.token == "{" and first.top[0].logprob >= first.logprob
    scores = llm.score([*llm.tokens("the"), first.id])
    assert first.logprob == pytest.approx(float(scores[-1]), abs=1e-4)


def test_what_the_grammar_leaves_can_be_watched(llm):
    seen = []
    llm.generate(
        "the",
        {"num_predict": 1, "seed": 1},
        format="json",
        on_stage=lambda name, left: seen.append((name, len(left.ids))),
    )
    names = [name for name, _ in seen]
    assert names.index("penalties") + 1 == names.index("grammar") < names.index("top_k")
    assert dict(seen)["grammar"] == 1


@pytest.mark.parametrize("format", ["yaml", 3, ["json"], {"not": {}}])
def test_a_format_that_cannot_be_met_is_refused(llm, format):
    with pytest.raises(BadRequest, match="format|JSON schema"):
        llm.generate("the", format=format)
    with pytest.raises(BadRequest, match="format|JSON schema"):
        next(llm.stream("the", format=format))


def test_the_textbook_loop_draws_the_same_form(llm):
    options = Options().updated(HOT | {"seed": 3})
    grammar = llm.grammar(PERSON)
    prompt = llm.tokens("the")
    drawn = list(generate(llm.net, prompt, options, llm._marks(), grammar))
    text = llm.tokenizer.decode([*prompt, *drawn]).removeprefix(llm.tokenizer.decode(prompt))
    assert text == llm.generate("the", HOT | {"seed": 3}, format=PERSON).text
    fits("person", text)


def test_the_vocabulary_is_laid_out_once(llm):
    llm.generate("the", HOT | {"num_predict": 1}, format="json")
    before = llm._spellings
    llm.generate("the", HOT | {"num_predict": 1}, format=PERSON)
    assert llm._spellings is before


def test_a_real_model_tells_an_object(oracles):
    """A storyteller that has never seen JSON writes what a schema asks for."""
    with refollama.load(oracles / "stories260K.gguf") as llm:
        options = {"temperature": 0.8, "seed": 3, "num_predict": 200}
        text, record = llm.generate("Once upon a time", options, format=PERSON)
    assert record.done_reason == "stop"
    fits("person", text)
