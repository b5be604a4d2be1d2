"""What users say of themselves, and ask back later.

Person ── state ──► "My name is Ann."      ack ──► "Nice to meet you, Ann!"
       ── recall ─► "What is my name?"         ──► "Your name is Ann."
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from refollama.fable.exchange import Exchange, capital, choose, strange
from refollama.fable.world import CITIES, COLOURS, FRUITS, GIRLS, MOST, NAMES, PETS, kept_out

STRANGE_NAMES = 0.3  # how often people have names that nobody knows


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that a user may tell.  {0} is the value, {pet} the kind of animal."""

    states: tuple[str, ...]
    asks: tuple[str, ...]
    answer: str
    thanks: str  # what to say when it is told
    unknown: str  # what has not been told, in words


FACTS: Mapping[str, Fact] = {
    "name": Fact(
        (
            "My name is {0}.",
            "I am {0}.",
            "I'm {0}.",
            "You can call me {0}.",
            "Hi, I am {0}.",
            "Hello, my name is {0}.",
            "Hello! I am {0}.",
            "People call me {0}.",
        ),
        (
            "What is my name?",
            "What's my name?",
            "Do you know my name?",
            "What am I called?",
            "Do you remember my name?",
            "Who am I?",
            "Can you tell me my name?",
        ),
        "Your name is {0}.",
        "Nice to meet you, {0}!",
        "your name",
    ),
    "city": Fact(
        (
            "I live in {0}.",
            "My home is in {0}.",
            "I am from {0}.",
            "I come from {0}.",
            "My house is in {0}.",
            "I'm from {0}.",
        ),
        (
            "Where do I live?",
            "Where is my home?",
            "Where am I from?",
            "Which city do I live in?",
            "Do you remember where I live?",
            "What city do I live in?",
            "Where do I come from?",
        ),
        "You live in {0}.",
        "{0} is a nice place!",
        "where you live",
    ),
    "pet": Fact(
        (
            "I have a {pet} called {0}.",
            "My {pet} is called {0}.",
            "My {pet}'s name is {0}.",
            "I have a {pet}. Its name is {0}.",
            "The name of my {pet} is {0}.",
            "I have a {pet} named {0}.",
        ),
        (
            "What is my {pet} called?",
            "What is the name of my {pet}?",
            "What is my {pet}'s name?",
            "What's my {pet}'s name?",
            "Do you remember the name of my {pet}?",
            "How is my {pet} called?",
            "Who is my {pet}?",
        ),
        "Your {pet} is called {0}.",
        "{0} is a lovely name for a {pet}!",
        "the name of your {pet}",
    ),
    "colour": Fact(
        (
            "My favourite colour is {0}.",
            "My favorite color is {0}.",
            "I like the colour {0}.",
            "I love the color {0}.",
            "{0} is my favourite colour.",
        ),
        (
            "What is my favourite colour?",
            "What is my favorite color?",
            "Which colour do I like?",
            "Do you remember my favourite colour?",
            "What colour do I like?",
        ),
        "Your favourite colour is {0}.",
        "Oh, {0} is a nice colour!",
        "your favourite colour",
    ),
    "food": Fact(
        ("I like {0}.", "I like to eat {0}.", "My favourite food is {0}.", "I love {0}."),
        (
            "What do I like to eat?",
            "What food do I like?",
            "What is my favourite food?",
            "What do I like?",
            "Do you remember what I like to eat?",
        ),
        "You like {0}.",
        "Yes, {0} are very good!",
        "what you like to eat",
    ),
    "friend": Fact(
        (
            "My friend is called {0}.",
            "My best friend is {0}.",
            "My friend's name is {0}.",
            "I have a friend called {0}.",
            "My best friend is called {0}.",
        ),
        (
            "What is my friend called?",
            "Who is my friend?",
            "What is my friend's name?",
            "Who is my best friend?",
            "What is the name of my friend?",
        ),
        "Your friend is called {0}.",
        "I am glad that {0} is your friend!",
        "the name of your friend",
    ),
    "sister": Fact(
        ("My sister is called {0}.", "I have a sister called {0}.", "My sister's name is {0}."),
        (
            "What is my sister called?",
            "Who is my sister?",
            "What is my sister's name?",
            "What is the name of my sister?",
        ),
        "Your sister is called {0}.",
        "Please say hello to {0}!",
        "the name of your sister",
    ),
    "age": Fact(
        ("I am {0} years old.", "I'm {0} years old.", "My age is {0}.", "I am {0}."),
        ("How old am I?", "What is my age?", "Do you remember how old I am?"),
        "You are {0} years old.",
        "It is good to be {0}!",
        "how old you are",
    ),
}
TABLES: Mapping[str, Sequence[str]] = {
    "name": NAMES,
    "city": CITIES,
    "pet": NAMES,
    "colour": COLOURS,
    "food": FRUITS,
    "friend": NAMES,
    "sister": GIRLS,
    "age": [str(years) for years in range(3, MOST + 1)],
}
SEVERAL = "Thank you, I will remember that."  # to more than one fact at once


@dataclass(frozen=True, slots=True)
class Person:
    """A user: what there is to tell."""

    values: Mapping[str, str]
    pet: str  # the kind of animal
    strange: bool = False  # is a name among the values that nobody knows?


def person(rng: Random, held: bool, known: Container[str] = ()) -> Person:
    """Somebody whose name, city and kind of pet are kept out of training together, or not."""
    free = [name for name in NAMES if name not in known]
    name, city, pet = choose(rng, held, free, CITIES, PETS)
    sister = rng.choice([girl for girl in GIRLS if girl in free and girl != name])
    names = [name, sister, *rng.sample([n for n in free if n not in (name, sister)], 2)]
    odd = rng.random() < STRANGE_NAMES
    if odd:
        names = [capital(strange(rng)) for _ in names]
    values = {key: rng.choice(TABLES[key]) for key in ("colour", "food", "age")}
    values |= dict(zip(("name", "sister", "pet", "friend"), names, strict=True))
    values["city"] = city
    return Person(values, pet, odd)


def state(rng: Random, one: Person, keys: Sequence[str]) -> Exchange:
    """The user tells these facts."""
    said = [rng.choice(FACTS[key].states).format(one.values[key], pet=one.pet) for key in keys]
    first = capital(said[0])
    if len(said) == 1:
        answer = FACTS[keys[0]].thanks.format(one.values[keys[0]], pet=one.pet)
        return Exchange("told", first, answer, "Thanks", spelled=one.strange)
    rest = [capital(text) for text in said[1:]]
    if len(rest) == 1 and rest[0].startswith(("I ", "My ")) and rng.random() < 0.5:
        joined = rest[0].replace("My ", "my ", 1) if rest[0].startswith("My") else rest[0]
        return Exchange(
            "told", f"{first[:-1]} and {joined}", SEVERAL, "Thanks", spelled=one.strange
        )
    user = " ".join((first, *rest))
    return Exchange("told", user, SEVERAL, "Thanks", spelled=one.strange)


def recall(rng: Random, one: Person, key: str, told: bool) -> Exchange:
    """The user asks for a fact; what was never told is not known."""
    fact, value = FACTS[key], one.values[key]
    user = rng.choice(fact.asks).format(pet=one.pet)
    if not told:
        unknown = fact.unknown.format(pet=one.pet)
        return Exchange("memory: not told", user, f"You have not told me {unknown} yet.", "Unknown")
    answer = fact.answer.format(value, pet=one.pet)
    return Exchange(f"memory: {key}", user, answer, capital(value), spelled=one.strange)


def changed(
    rng: Random, one: Person, key: str, held: bool, known: Container[str] = ()
) -> tuple[Exchange, Person] | None:
    """The user takes back a fact and tells another; the later one counts.  None: there is none."""

    def good(value: str) -> bool:
        values = {**one.values, key: value}
        free = one.strange and key != "name"  # no combination with a name that nobody knows
        sides = free or kept_out(values["name"], values["city"], one.pet) is held
        return sides and value not in one.values.values() and value not in known

    if not (left := [value for value in TABLES[key] if good(value)]):
        return None
    value = rng.choice(left)
    text = rng.choice(FACTS[key].states[:2]).format(value, pet=one.pet)
    user = rng.choice(("No, {0}", "Sorry, {0}", "No, wait: {0}", "I was wrong. {0}")).format(text)
    new = Person({**one.values, key: value}, one.pet, one.strange)
    return Exchange("told", user, SEVERAL, "Thanks", spelled=one.strange), new
