"""Does the whole house answer rightly?  The models of the package, through the official client.

What they were trained for is what is asked here, in words that training never showed together, so
an answer is right or wrong, and not only of the right form.
"""

import json
from pathlib import Path
from statistics import mean

import ollama
import pytest

from refollama.fable import drawings
from refollama.fable.bundled import FOLDER, bundled
from refollama.fable.drawings import Drawing, Thing
from refollama.fable.evaluate import contradictions
from tests.server.process import running

GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """Of a server of its own, whose store is empty at first."""
    store = tmp_path_factory.mktemp("models")
    with running(OLLAMA_MODELS=str(store), HOME=str(store.parent)) as (url, _):
        client = ollama.Client(url)
        yield client
        client._client.close()


def user(text, *images):
    return {"role": "user", "content": text, **({"images": list(images)} if images else {})}


def said(text):
    return {"role": "assistant", "content": text}


def answer(client, *messages, model="fable", **more):
    found = client.chat(model, list(messages), options=GREEDY, **more)
    return found.message.content.strip()


def talk(client, *questions, model="fable"):
    """The answers to questions that follow each other."""
    messages = []
    for question in questions:
        messages.append(user(question))
        messages.append(said(answer(client, *messages, model=model)))
    return [one["content"] for one in messages[1::2]]


# ── text ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("question", "right"),
    [
        ("What is 7 plus 5?", "12"),
        ("What is the opposite of big?", "small"),
        ("What day comes after Monday?", "Tuesday"),
    ],
)
def test_it_knows_what_it_was_taught(client, question, right):
    assert right in answer(client, user(question))


def test_it_remembers_what_it_was_told(client):
    *_, name, city = talk(
        client,
        "My name is Tim.",
        "I live in Paris.",
        "What is 2 plus 2?",
        "What is my name?",
        "Where do I live?",
    )
    assert (name, city) == ("Your name is Tim.", "You live in Paris.")


def test_context_remembers_as_messages_do(client):
    first = client.generate("fable", "My name is Tim.", options=GREEDY)
    then = client.generate("fable", "What is my name?", context=first.context, options=GREEDY)
    assert then.response.strip() == "Your name is Tim."


def test_what_nobody_told_it_it_does_not_know(client):
    assert "Tim" not in answer(client, user("What is my name?"))


def test_it_obeys_the_system_message(client):
    question = user("What is the opposite of day?")
    plain, word, loud, pirate = (
        answer(client, *([{"role": "system", "content": text}] if text else []), question)
        for text in ("", "Answer in one word.", "Answer in capitals.", "Talk like a pirate.")
    )
    assert "night" in plain
    assert word.lower() == "night"
    assert loud == plain.upper()
    assert pirate.startswith("Arr!")
    assert "night" in pirate


def test_a_model_that_is_created_from_it_keeps_its_system_message(client):
    client.create("parrot", from_="fable", system="Answer in capitals.")
    assert answer(client, user("What is the opposite of hot?"), model="parrot").isupper()
    assert {"fable:latest", "parrot:latest"} <= {one.model for one in client.list().models}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 3, 4])
def test_a_story_stays_true_to_its_hero(client, seed):
    """At its own temperature. (One of ten or so does not: its friend has the hero's name.)"""
    asked = [user("Tell me a story about a brave mouse.")]
    parts = client.chat("fable", asked, options={"seed": seed}, stream=True)
    story = "".join(part.message.content for part in parts)
    assert contradictions(story, ["brave", "mouse"]) == []


def test_it_answers_about_the_story_that_it_told(client):
    story, animal = talk(client, "Tell me a story about a brave mouse.", "What animal is the hero?")
    assert "mouse" in story
    assert "mouse" in animal


def test_json_mode_gives_the_keys_that_were_asked_for(client):
    messages = [user("My name is Tim."), said("Nice to meet you, Tim!")]
    messages += [user("I live in Paris."), said("Paris is a nice place!")]
    messages += [user("Give me JSON about me with the keys name and city.")]
    found = json.loads(answer(client, *messages, format="json"))
    assert found == {"name": "Tim", "city": "Paris"}


def test_a_schema_makes_it_choose(client):
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["Ann", "Tim", "Lily"]}},
        "required": ["name"],
        "additionalProperties": False,
    }
    messages = user("My name is Lily."), said("Nice to meet you, Lily!")
    asked = user("Give me JSON about me with the keys name.")
    assert json.loads(answer(client, *messages, asked, format=schema)) == {"name": "Lily"}


@pytest.mark.slow
def test_log_probabilities_tell_how_sure_it_is(client):
    """Of what it was told it is sure, of what it may choose it is not."""
    known = client.chat(
        "fable",
        [user("My name is Tim."), said("Nice to meet you, Tim!"), user("What is my name?")],
        options=GREEDY,
        logprobs=True,
        top_logprobs=5,
    )
    assert all(one.logprob > -0.3 for one in known.logprobs)
    free = client.chat(
        "fable", [user("Tell me a story.")], options=GREEDY, logprobs=True, top_logprobs=5
    )
    assert min(one.logprob for one in free.logprobs) < -1
    assert all(one.logprob == one.top_logprobs[0].logprob for one in free.logprobs)


# ── pictures ──────────────────────────────────────────────────────────────────────────────────


def picture(*things, ground="white", seed=5):
    """A PNG file: things as (shape, colour, size, place)."""
    spreads = {"big": 0.13, "small": 0.075} if len(things) > 1 else {"big": 0.3, "small": 0.09}
    found = []
    for shape, colour, size, place in things:
        x, y = (place % 3 + 0.5) / 3, (place // 3 + 0.5) / 3
        found.append(Thing(shape, colour, size, place, x, y, spreads[size]))
    return drawings.png(Drawing(ground, tuple(found), 1, 1, seed))


CIRCLE = picture(("circle", "red", "big", 4))
PAIR = picture(("star", "blue", "small", 0), ("square", "green", "big", 8))


def seen(client, text, *images, history=()):
    return answer(client, *history, user(text, *images), model="fable-vision")


def test_it_sees_what_is_in_a_picture(client):
    assert seen(client, "What is in this picture?", CIRCLE) == "I see a red circle."
    both = client.generate(
        "fable-vision", "What is in this picture?", images=[PAIR], options=GREEDY
    ).response
    assert both.strip() == "I see a blue star and a green square."


def test_it_sees_the_picture_that_the_readme_names(client):
    path = Path(__file__).parents[2] / "docs" / "red-circle.png"
    assert path.read_bytes() == CIRCLE
    assert seen(client, "What is in this picture?", path) == "I see a red circle."


def test_a_path_and_bytes_are_the_same_picture(client, tmp_path):
    path = tmp_path / "circle.png"
    path.write_bytes(CIRCLE)
    question = "What colour is the circle?"
    assert seen(client, question, path) == seen(client, question, CIRCLE) == "The circle is red."


@pytest.mark.parametrize(
    ("question", "right"),
    [
        ("Where is the star?", "The star is at the top left."),
        ("What colour is the square?", "The square is green."),
        ("Is there a square?", "Yes, there is a square."),
        ("What is at the bottom right?", "A green square is at the bottom right."),
        ("Is the star big or small?", "The star is small."),
        ("What colour is the background?", "The background is white."),
    ],
)
def test_it_answers_about_a_picture(client, question, right):
    assert seen(client, question, PAIR) == right


def test_it_speaks_of_the_picture_that_was_shown_last(client):
    history = [user("What is in this picture?", CIRCLE), said("I see a red circle.")]
    assert seen(client, "What do you see?", PAIR, history=history) == (
        "I see a blue star and a green square."
    )
    assert seen(client, "What colour is the circle?", history=history) == "The circle is red."


def test_without_a_picture_it_says_so(client):
    assert seen(client, "What is in this picture?") == "I see no picture."


# ── sentences ─────────────────────────────────────────────────────────────────────────────────

ANIMALS = ("cat", "dog", "mouse", "horse", "owl", "frog", "bear", "duck")
SENTENCES = (
    "A {0} sat by the lake.",
    "The little {0} was hungry.",
    "I saw a {0} in the garden.",
    "One day the {0} went home.",
)


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5


@pytest.mark.slow
def test_sentences_about_the_same_animal_are_closer(client):
    """On the mean, of sentences of different forms. (A model this small mostly notes the form.)"""
    texts = {(form, animal): form.format(animal) for form in SENTENCES for animal in ANIMALS}
    vectors = dict(zip(texts, client.embed("fable", list(texts.values())).embeddings, strict=True))
    same, others = [], []
    for form, animal in texts:
        near: dict[str, list[float]] = {other: [] for other in ANIMALS}
        for (there, other), vector in vectors.items():
            if there != form:
                near[other].append(cosine(vectors[form, animal], vector))
        same += near.pop(animal)
        others += [value for values in near.values() for value in values]
    assert mean(same) > mean(others)


# ── the package ───────────────────────────────────────────────────────────────────────────────


def test_they_come_with_the_package_and_are_small():
    assert list(bundled()) == ["fable", "fable-vision"]
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10_000_000
