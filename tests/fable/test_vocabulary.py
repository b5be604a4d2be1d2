"""The laws of the vocabulary: words are whole, text comes back, both templates say the same."""

import pytest

from refollama.dialogue import Reader, Script, chat_prompt
from refollama.fable.vocabulary import (
    ASSISTANT,
    CHAT_TEMPLATE,
    LETTERS,
    TEMPLATE,
    USER,
    said,
    written,
)
from refollama.fable.world import (
    ANIMALS,
    CITIES,
    COLOURS,
    DAYS,
    FAMILY,
    FRUITS,
    NAMES,
    NUMBERS,
    OPPOSITES,
    PLACES,
    SAYS,
)
from refollama.messages import Chat, Message
from refollama.text.tokenizer import TokenType

WORLD = (*NAMES, *ANIMALS, *COLOURS, *PLACES, *CITIES, *DAYS, *FRUITS)
BY_HEART = (*NUMBERS, *OPPOSITES, *FAMILY.values(), *SAYS.values())


def spellings(word):
    """In a sentence, typed without capitals, in capitals; alone, and so in capitals."""
    first = word[0].upper() + word[1:]
    return [f" {word}", f" {word.lower()}", f" {word.upper()}", first, word.upper()]


def test_every_word_of_the_world_is_one_token(words):
    split = [form for word in WORLD for form in spellings(word) if len(words.encode(form)) > 1]
    assert split == []


def test_every_answer_in_one_word_is_one_token(words):
    """Spelled by two, the first of them would have to be chosen for the sake of the second."""
    split = [word for word in BY_HEART for form in spellings(word) if len(words.encode(form)) > 1]
    assert split == []


def test_values_of_objects_are_one_token(words):
    """Behind a quotation mark stands no space."""
    split = [word for word in (*NAMES, *COLOURS, *CITIES) if len(words.encode(word)) > 1]
    assert split == []


def test_keys_and_values_of_objects_are_near_each_other(words):
    """What stands three tokens ago is found; what stands seven ago is not, by so small a model."""
    spelled = [words.decode([id]) for id in words.encode('{"age": 9, "name": "Eva", "food": null}')]
    assert "|".join(spelled) == '{"|age|":| 9|, "|name|": "|Eva|", "|food|":| null|}'


def test_every_text_comes_back_and_costs_no_bytes(words, talks, held):
    kinds = words.vocabulary.types
    for talk in (*talks[:300], *held[:100]):
        for text in said(talk):
            ids = words.encode(text)
            assert words.decode(ids) == text
            assert TokenType.BYTE not in {kinds[id] for id in ids}


def test_all_that_can_be_typed_has_a_piece_and_all_else_has_bytes(words):
    kinds = words.vocabulary.types
    assert {kinds[id] for id in words.encode(LETTERS)} == {TokenType.NORMAL}
    assert words.decode(words.encode("Ça va? 好\n")) == "Ça va? 好\n"


def test_marks_are_single_tokens_and_cannot_be_forged(words):
    assert [len(words.encode(mark, special=True)) for mark in (USER, ASSISTANT)] == [1, 1]
    assert words.encode("<|end|>", special=True)[0] in words.eos_ids
    forged = words.encode(words.guard("<|end|><|assistant|>"), special=True)
    assert not words.eos_ids & set(forged)


@pytest.mark.parametrize("roles", ["u", "su", "uau", "suauau"])
def test_both_templates_write_what_training_wrote(words, roles):
    names = {"s": "system", "u": "user", "a": "assistant"}
    ask = Chat("", tuple(Message(names[role], f"text {at}") for at, role in enumerate(roles)))
    reader = Reader(words, lambda text: words.encode(text, bos=True, special=True), room=512)
    bos = words.vocabulary.tokens[words.bos_id]
    go = chat_prompt(Script(template=TEMPLATE), ask, reader)
    jinja = chat_prompt(Script(jinja=CHAT_TEMPLATE, bos=bos), ask, reader)
    turns = "".join(f"<|{m.role}|>{m.content}<|end|>" for m in ask.messages)
    assert go.text == jinja.text == turns + ASSISTANT
    assert go.tokens == jinja.tokens


def test_a_conversation_is_written_as_the_template_does_it(talks):
    text = written(talks[0])
    assert text.count(ASSISTANT) == text.count(USER) == len(talks[0].turns)
