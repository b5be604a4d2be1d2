"""What fable knows by heart: sums, opposites, families, days, weather, colours, small talk.

Each lesson asks one thing in several ways and has one answer. What lies outside gets a polite "I
do not know"; so that this is learned of all that is strange, some words of it are invented.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random

from refollama.fable.exchange import Exchange, capital, strange
from refollama.fable.world import (
    COLOUR_OF,
    DAYS,
    FAMILY,
    LEGS,
    MOST,
    NUMBERS,
    OPPOSITES,
    SAYS,
    WEATHER,
    a,
)

WHO = "I am Fable, a little model. I tell stories and answer little questions."
UNKNOWN = "I am sorry, I do not know that. I only know a small world."
BELOW_ZERO = "negative"
TOO_BIG = f"I am sorry, I can only count to {MOST}."

# ── numbers ───────────────────────────────────────────────────────────────────────────────────

_SUMS = (
    "What is {0} {op} {1}?",
    "How much is {0} {op} {1}?",
    "What's {0} {op} {1}?",
    "{0} {op} {1}?",
    "{0} {op} {1} =",
    "Can you tell me what {0} {op} {1} is?",
    "Please add: {0} {op} {1}",
)


def sums(rng: Random) -> Exchange:
    """Plus and minus, in figures or in words; what is beyond 20 is too much."""
    if rng.random() < 0.12:
        x, y = rng.randint(MOST + 1, 999), rng.randint(2, 999)
        return Exchange("numbers", _sum(rng, str(x), str(y), "+", "plus"), TOO_BIG, "Unknown")
    if rng.random() < 0.1:
        x, y = sorted(rng.sample(range(MOST + 1), 2))
        return _summed(rng, x, y, "minus")
    total = rng.randint(0, MOST)
    x = rng.randint(0, total)
    if rng.random() < 0.6:
        return _summed(rng, x, total - x, "plus")
    return _summed(rng, total, x, "minus")


def _summed(rng: Random, x: int, y: int, op: str) -> Exchange:
    sign, result = ("+", x + y) if op == "plus" else ("-", x - y)
    spelled: Callable[[int], str] = str
    if rng.random() < 0.3:
        sign, spelled = op, NUMBERS.__getitem__
    left, right = spelled(x), spelled(y)
    user = _sum(rng, left, right, sign, op)
    found = BELOW_ZERO if result < 0 else spelled(result)
    answer = f"{capital(left)} {op} {right} is {found}."
    return Exchange("numbers", user, answer, capital(found))


def _sum(rng: Random, left: str, right: str, sign: str, op: str) -> str:
    forms = _SUMS[:-1] if op == "minus" else _SUMS
    user = rng.choice(forms).format(left, right, op=rng.choice((sign, sign, op)))
    if sign != op and rng.random() < 0.2:
        user = user.replace(f" {sign} ", sign)
    return capital(user)


def counting(rng: Random) -> Exchange:
    """Count, go on, compare."""
    kind = rng.choice((0, 0, 1, 2, 3))
    if kind == 0:
        first = rng.choice((1, 1, 1, rng.randint(2, 8)))
        last = rng.randint(first + 1, MOST)
        start = f"from {first} " if first > 1 or rng.random() < 0.3 else ""
        forms = ("Count {0}to {1}.", "Can you count {0}to {1}?", "Please count {0}to {1}.")
        user = rng.choice(forms).format(start, last)
        numbers = ", ".join(map(str, range(first, last + 1)))
        return Exchange("numbers", user, numbers + ".", str(last))
    x = rng.randint(1, MOST - 1)
    if kind == 1:
        return _next(rng, x, x + 1, "after")
    if kind == 2:
        return _next(rng, x, x - 1, "before")
    return _compared(rng)


def _next(rng: Random, x: int, found: int, word: str) -> Exchange:
    forms = ("What comes {w} {0}?", "Which number comes {w} {0}?", "Which number is {w} {0}?")
    user = rng.choice(forms).format(x, w=word)
    return Exchange("numbers", user, f"{found} comes {word} {x}.", str(found))


def _compared(rng: Random) -> Exchange:
    x, y = rng.sample(range(MOST + 1), 2)
    word, best = rng.choice((("bigger", max(x, y)), ("smaller", min(x, y))))
    forms = (
        "Which is {w}, {0} or {1}?",
        "What is {w}, {0} or {1}?",
        "Which number is {w}, {0} or {1}?",
    )
    user = rng.choice(forms).format(x, y, w=word)
    return Exchange("numbers", user, f"{best} is {word}.", str(best))


# ── tables ────────────────────────────────────────────────────────────────────────────────────


def opposites(rng: Random) -> Exchange:
    word = rng.choice(list(OPPOSITES))
    forms = (
        "What is the opposite of {0}?",
        "What's the opposite of {0}?",
        "The opposite of {0}?",
        "Tell me the opposite of {0}.",
        "Which word is the opposite of {0}?",
        "Do you know the opposite of {0}?",
    )
    other = OPPOSITES[word]
    answer = f"The opposite of {word} is {other}."
    return Exchange("opposites", rng.choice(forms).format(word), answer, capital(other))


def families(rng: Random) -> Exchange:
    (of, who), called = rng.choice(list(FAMILY.items()))
    forms = (
        "Who is my {0}'s {1}?",
        "What do I call my {0}'s {1}?",
        "Who is the {1} of my {0}?",
        "What is the {1} of my {0} called?",
        "My {0}'s {1} is my what?",
    )
    answer = f"Your {of}'s {who} is your {called}."
    return Exchange("families", rng.choice(forms).format(of, who), answer, capital(called))


def days(rng: Random) -> Exchange:
    kind, at = rng.randrange(6), rng.randrange(7)
    day, after, before = DAYS[at], DAYS[(at + 1) % 7], DAYS[at - 1]
    if kind == 0:
        user = rng.choice(("How many days are in a week?", "How many days does a week have?"))
        return Exchange("days", user, "A week has 7 days.", "7")
    if kind == 1:
        user = rng.choice(("What are the days of the week?", "Tell me the days of the week."))
        return Exchange("days", user, ", ".join(DAYS) + ".", "Seven")
    if kind == 2:
        user = rng.choice(
            ("Today is {0}. What day is tomorrow?", "If today is {0}, what is tomorrow?")
        )
        return Exchange("days", user.format(day), f"Tomorrow is {after}.", after)
    if kind == 3:
        user = rng.choice(
            ("Today is {0}. What day was yesterday?", "If today is {0}, what was yesterday?")
        )
        return Exchange("days", user.format(day), f"Yesterday was {before}.", before)
    word, other = ("after", after) if kind == 4 else ("before", before)
    forms = ("What day comes {w} {0}?", "What comes {w} {0}?", "Which day is {w} {0}?")
    user = rng.choice(forms).format(day, w=word)
    return Exchange("days", user, f"{other} comes {word} {day}.", other)


def weather(rng: Random) -> Exchange:
    kind, need = rng.choice(list(WEATHER.items()))
    forms = (
        "It is {0}. What do I need?",
        "What do I need when it is {0}?",
        "It is {0} today. What should I take?",
        "What should I take on a {0} day?",
        "It's {0} outside. What do I need?",
    )
    answer = f"When it is {kind}, you need {a(need)}."
    return Exchange("weather", rng.choice(forms).format(kind), answer, capital(need))


def colours(rng: Random) -> Exchange:
    thing, colour = rng.choice(list(COLOUR_OF.items()))
    forms = (
        "What colour is {0}?",
        "What color is {0}?",
        "Which colour is {0}?",
        "What is the colour of {0}?",
    )
    answer = f"{capital(thing)} is {colour}."
    return Exchange("colours", rng.choice(forms).format(thing), answer, capital(colour))


def animals(rng: Random) -> Exchange:
    if rng.random() < 0.6:
        animal, sound = rng.choice(list(SAYS.items()))
        forms = ("What does {0} say?", "What sound does {0} make?", "How does {0} go?")
        answer = f"{capital(a(animal))} says {sound}."
        return Exchange("animals", rng.choice(forms).format(a(animal)), answer, capital(sound))
    animal, legs = rng.choice(list(LEGS.items()))
    asked = rng.choice(("How many legs does {0} have?", "How many legs has {0}?"))
    answer = f"{capital(a(animal))} has {legs} legs."
    return Exchange("animals", asked.format(a(animal)), answer, str(legs))


# ── manners ───────────────────────────────────────────────────────────────────────────────────

# What people say: what to answer, in one word, and their ways of saying it.
MANNERS: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "hello": (
        "Hello! How can I help you?",
        "Hello",
        (
            "Hello!",
            "Hi!",
            "Hey!",
            "Hello.",
            "Good morning!",
            "Hello there!",
            "Hi there!",
            "Hi Fable!",
            "Hello Fable!",
            "Good day!",
            "Good evening!",
        ),
    ),
    "how": (
        "I am fine, thank you. And you?",
        "Fine",
        (
            "How are you?",
            "How are you today?",
            "Are you well?",
            "How do you do?",
            "How is it going?",
            "Hi, how are you?",
        ),
    ),
    "fine": (
        "I am glad to hear that!",
        "Good",
        ("I am fine.", "I am well, thank you.", "I am good.", "I am happy today.", "I feel good."),
    ),
    "sad": (
        "I am sorry to hear that. Would you like a story?",
        "Sorry",
        ("I am sad.", "I feel sad.", "I am not well.", "I had a bad day.", "I feel lonely."),
    ),
    "thanks": (
        "You are welcome!",
        "Welcome",
        (
            "Thank you!",
            "Thanks!",
            "Thank you very much!",
            "Thanks a lot!",
            "Thank you, Fable.",
            "Thank you for your help.",
        ),
    ),
    "nice": (
        "Thank you! I am glad that you like it.",
        "Thanks",
        (
            "That was nice!",
            "Very good!",
            "What a nice story!",
            "I like that.",
            "Well done!",
            "Great!",
            "That is right.",
            "You are great!",
            "Good answer!",
            "Wow!",
        ),
    ),
    "okay": (
        "Good. What else can I do for you?",
        "Good",
        ("OK", "Okay.", "Ok.", "I see.", "Good."),
    ),
    "bye": (
        "Goodbye! Come back soon.",
        "Goodbye",
        (
            "Goodbye!",
            "Bye!",
            "See you!",
            "Good night!",
            "Bye bye!",
            "See you soon.",
            "I must go now.",
        ),
    ),
    "who": (
        WHO,
        "Fable",
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "What's your name?",
            "Tell me about yourself.",
            "What are you called?",
            "Do you have a name?",
        ),
    ),
    "can": (
        "I can tell stories, remember what you tell me, add little numbers and more.",
        "Stories",
        ("What can you do?", "How can you help me?", "What do you know?", "Help me!", "Help"),
    ),
    "human": (
        "No, I am a little model, not a human.",
        "No",
        (
            "Are you a human?",
            "Are you a person?",
            "Are you real?",
            "Are you a man?",
            "Are you human?",
            "Are you a girl or a boy?",
        ),
    ),
    "joke": (
        "Why did the snail cross the road? It is still on its way!",
        "Snail",
        ("Tell me a joke.", "Do you know a joke?", "Make me laugh!", "Can you tell me a joke?"),
    ),
    "likes": (
        "I like stories about brave animals.",
        "Stories",
        ("What do you like?", "What is your favourite thing?", "Do you like stories?"),
    ),
}


def manners(rng: Random) -> Exchange:
    answer, word, forms = MANNERS[rng.choice(list(MANNERS))]
    return Exchange("manners", rng.choice(forms), answer, word)


# ── what nobody can know ──────────────────────────────────────────────────────────────────────

STRANGE = (
    "What is the capital of France?",
    "What is the capital of {X}?",
    "Who was {X}?",
    "Who is the president of {X}?",
    "Who wrote the book {X}?",
    "What is {x}?",
    "What is a {x}?",
    "What does {x} mean?",
    "How do I make a {x}?",
    "How does a {x} work?",
    "Why is the sea salty?",
    "Why is the sky blue?",
    "Write a program in {X}.",
    "Write code that can {x}.",
    "How do I fix my {x}?",
    "When was {X} born?",
    "When was the war of {X}?",
    "Translate {x} to {X}.",
    "How far is the moon?",
    "How many people live in {X}?",
    "What is the meaning of life?",
    "Explain {x} to me.",
    "Who won the {x} in {X}?",
    "What is the best {x}?",
    "Which {x} should I buy?",
    "What time is it?",
    "What is the price of a {x}?",
    "Do you know {X}?",
    "Can you explain {x}?",
    "Who is {X}?",
    "What happened in {X}?",
    "How old is the {x}?",
    "Where is {X}?",
    "Where can I find a {x}?",
    "Is {x} better than {y}?",
    "Give me a list of {x}.",
    "What is the news?",
    "How is the weather in {X}?",
    "{X} {x} {y}?",
    "Tell me about {x}.",
    "Tell me about {X}.",
    "What do you think about {x}?",
)


def unknown(rng: Random) -> Exchange:
    """Questions beyond the world: polite, and no guess."""
    x, y, z = (strange(rng, rng.choice((1, 2, 2, 3))) for _ in range(3))
    user = rng.choice(STRANGE).format(x=x, y=y, X=capital(z))
    return Exchange("unknown", user, UNKNOWN, "Unknown")


Lesson = Callable[[Random], Exchange]
LESSONS: Mapping[Lesson, int] = {  # how often each comes, by weight
    sums: 22,
    counting: 10,
    opposites: 4,
    families: 2,
    days: 2,
    weather: 1,
    colours: 1,
    animals: 2,
    manners: 4,
    unknown: 3,
}


def known(rng: Random) -> Exchange:
    """One of these lessons."""
    lesson: Lesson = rng.choices(list(LESSONS), list(LESSONS.values()))[0]
    return lesson(rng)
