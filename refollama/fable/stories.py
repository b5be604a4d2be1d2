"""Stories with a hero who stays the same, and questions about them.

Hero + Hero + props ── Story ──► text
                           └───► questions, each with its answer
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from refollama.fable.exchange import Exchange, capital, choose
from refollama.fable.world import (
    ANIMALS,
    BOYS,
    COLOURS,
    DAYS,
    FOODS,
    GIRLS,
    HIDING,
    NAMES,
    PEOPLE,
    PLACES,
    TAME,
    THINGS,
    VIRTUES,
    WEATHER,
    WILD,
    a,
    at,
)

HEROES = ANIMALS + PEOPLE
# Whom a hero meets has one of these names, and no hero of a story has. A small model that always
# says what is likeliest would call both the same, if any other name were as likely as any.
FRIENDS = GIRLS[:6] + BOYS[:6]
HEROIC = tuple(name for name in NAMES if name not in FRIENDS)


class Tense(NamedTuple):
    """The verbs of an answer: those of its question, whenever it was told."""

    be: str
    have: str
    live: str


PRESENT, PAST = Tense("is", "has", "lives"), Tense("was", "had", "lived")


def tense_of(question: str) -> Tense:
    """Is it asked what was?"""
    return PAST if {"was", "did"} & set(question.lower().split()) else PRESENT


@dataclass(frozen=True, slots=True)
class Hero:
    """Somebody in a story.  A child is no colour; it wears a coat of that colour."""

    name: str
    animal: str
    colour: str
    place: str
    virtue: str

    @property
    def in_full(self) -> str:
        """'Tim the fox': who it is comes first, so that what is asked for can be read off it."""
        return f"{self.name} the {self.animal}"

    @property
    def is_child(self) -> bool:
        return self.animal in PEOPLE

    @property
    def subjects(self) -> tuple[tuple[str, str], ...]:
        """How a question may name it, and how its answer begins then: in the words of the text,
        that what follows can be read off it."""
        return (self.name, self.in_full), (f"the {self.animal}", f"The {self.animal}")

    def coloured(self, tense: Tense) -> str:
        """'was red', 'had a red coat'."""
        coat = f"{tense.have} {a(self.colour)} coat"
        return coat if self.is_child else f"{tense.be} {self.colour}"

    def kind(self) -> str:
        """'red fox'; a child's colour goes unsaid."""
        return self.animal if self.is_child else f"{self.colour} {self.animal}"


NOBODY: Container[str] = ()


def hero(
    rng: Random,
    held: bool,
    others: Sequence[Hero] = (),
    known: Container[str] = NOBODY,
    table: Sequence[str] = HEROES,
    names: Sequence[str] = NAMES,
) -> Hero:
    """A hero with nothing in common with the others, of a combination kept out of training or not.

    known: names and animals that the conversation has already; table: the animals to choose from,
    and names: theirs.
    """

    def free(what: str, words: Sequence[str]) -> Sequence[str]:
        taken = {getattr(other, what) for other in others}
        return [word for word in words if word not in taken and word not in known]

    places, colours = free("place", list(PLACES)), free("colour", COLOURS)
    animal, place, colour = choose(rng, held, free("animal", table), places, colours)
    if animal in PEOPLE:
        of_its_kind = GIRLS if animal == "girl" else BOYS
        names = [name for name in names if name in of_its_kind] or of_its_kind
    name = rng.choice(free("name", names) or names)
    virtue = rng.choice(free("virtue", VIRTUES))
    return Hero(name, animal, colour, place, virtue)


def friend(rng: Random, held: bool, one: Hero, known: Container[str] = NOBODY) -> Hero:
    """Whom a hero meets: one from the wild if the hero is at home among people, else one from
    there; to a girl's name a boy's.
    """
    child, table_of_names = ("boy", BOYS) if one.name in GIRLS else ("girl", GIRLS)
    names = [name for name in table_of_names if name in FRIENDS and name not in known]
    table = (*TAME, child) if one.animal in WILD else WILD
    free = [animal for animal in table if animal not in known]
    return hero(rng, held, [one], known, free or HEROES, names or table_of_names)


@dataclass(frozen=True, slots=True)
class Story:
    """A hero meets a friend, and something happens.  `text` is the whole of it."""

    hero: Hero
    friend: Hero
    plot: str
    weather: str
    day: str
    thing: str
    thing_colour: str
    hiding: str
    food: str
    text: str


def story(rng: Random, held: bool, one: Hero, known: Container[str] = NOBODY) -> Story:
    """A story about this hero."""
    other = friend(rng, held, one, known)
    plot = rng.choice(list(PLOTS))
    spare = [c for c in COLOURS if c not in (one.colour, other.colour)]
    words = {
        "weather": rng.choice(list(WEATHER)),
        "day": rng.choice(DAYS),
        "thing": rng.choice(THINGS),
        "thing_colour": rng.choice(spare),
        "hiding": rng.choice(HIDING),
        "food": rng.choice(FOODS),
    }
    parts = (rng.choice(OPENINGS), rng.choice(MEETINGS), PLOTS[plot], rng.choice(ENDINGS))
    return Story(
        one, other, plot, **words, text=" ".join(_filled(p, one, other, words) for p in parts)
    )


def _filled(part: str, one: Hero, other: Hero, words: dict[str, str]) -> str:
    return part.format(
        N=one.name,
        a_virtue=a(f"{one.virtue} {one.animal}"),
        kind=one.kind(),
        a_kind=a(one.kind()),
        animal=one.animal,
        looks=f"{one.in_full} {one.coloured(PAST)}",
        place=at(one.place),
        F=other.name,
        a_friend=a(other.animal),
        friend=other.animal,
        friend_looks=f"{other.in_full} {other.coloured(PAST)}",
        **words,
    )


# What is asked about later stands here in the words of the answer.
OPENINGS = (
    "Once upon a time there was {a_virtue}. The {animal} was called {N}. {looks} and lived "
    "{place}.",
    "Once {a_virtue} lived {place}. The {animal} was called {N}. {looks}.",
    "Long ago {a_virtue} lived {place}. {looks}. The {animal} was called {N}.",
    "There once was {a_virtue}. {looks} and lived {place}. The {animal} was called {N}.",
)
MEETINGS = (
    "One {weather} {day}, {N} met {a_friend}. The {friend} was called {F}. {friend_looks}.",
    "It was {day}, and it was {weather}. {N} went out and met {a_friend}. {friend_looks}. "
    "The {friend} was called {F}.",
    "On a {weather} {day} the {animal} met {a_friend}. The {friend} was called {F}. "
    "{friend_looks}.",
)
PLOTS = {
    "lost": (
        '{F} was sad. "I lost my {thing_colour} {thing}," said {F}. {N} looked and looked, and '
        "found the {thing} {hiding}. {F} was very happy and gave {N} some {food}."
    ),
    "race": (
        '"Let us run to the river," said {F}. They ran and ran. {N} was fast and won. '
        "Then they ate some {food} together."
    ),
    "gift": (
        '"I made some {food}," said {F}. "Are you hungry?" {N} said yes, and they ate together. '
        "Then {N} gave {F} a {thing_colour} {thing}."
    ),
    "help": (
        '"Help!" said {F}. "I can not get out!" {F} sat {hiding} and could not move. {N} came and '
        "helped. {F} was free, and gave {N} some {food}."
    ),
}
ENDINGS = (
    "From that day on, {N} the {kind} and {F} the {friend} were good friends.",
    "In the evening the {kind} went home and slept well. The end.",
    "{N} and {F} were happy. What a good day for {a_kind}!",
    "So {N} the {animal} found a friend, and {F} did too. The end.",
)


# ── asking for a story ────────────────────────────────────────────────────────────────────────

ASKED = (
    "Tell me a story{about}.",
    "Tell me a story{about}!",
    "Can you tell me a story{about}?",
    "Please tell me a story{about}.",
    "I want to hear a story{about}.",
    "Write a short story{about}.",
    "Write a story{about}.",
    "Tell a story{about}.",
    "Make up a story{about}.",
    "Once more, a story{about}, please.",
    "Tell me a tale{about}.",
    "Give me a story{about}.",
)


def tell(rng: Random, held: bool, known: Container[str] = NOBODY) -> tuple[Exchange, Story]:
    """The user asks for a story, with more or less of a subject."""
    one = hero(rng, held, known=known, names=HEROIC)
    told = story(rng, held, one, known)
    about, wishes = _subject(rng, one)
    user = rng.choice(ASKED).format(about=about)
    return Exchange("story", user, told.text, exact=False, wishes=wishes), told


def _subject(rng: Random, one: Hero) -> tuple[str, tuple[str, ...]]:
    """What of the hero is asked for, as words and as a list of them."""
    kind = rng.random()
    if kind < 0.15:
        return "", ()
    if kind < 0.25:
        return f" about {one.name}", (one.name,)
    wishes = [w for w in (one.virtue, one.colour) if rng.random() < 0.45]
    if one.is_child:
        wishes = [w for w in wishes if w != one.colour]
    wishes.append(one.animal)
    text = f" about {a(' '.join(wishes))}"
    if rng.random() < 0.35:
        text += f" {rng.choice(('called', 'named'))} {one.name}"
        wishes.append(one.name)
    if rng.random() < 0.35:
        text += rng.choice((" who lives ", " ", " that lives ")) + at(one.place)
        wishes.append(one.place)
    return text, tuple(wishes)


# ── questions about a story ───────────────────────────────────────────────────────────────────


def ask(rng: Random, told: Story) -> Exchange:
    """A question about the story."""
    return rng.choice(QUESTIONS)(rng, told)


def _someone(rng: Random, told: Story) -> Hero:
    return told.hero if rng.random() < 0.65 else told.friend


def ask_name(rng: Random, told: Story) -> Exchange:
    one = _someone(rng, told)
    forms = [
        "What is the {0} called?",
        "What is the name of the {0}?",
        "What is the {0}'s name?",
        "What was the {0} called?",
        "Who is the {0}?",
        "Do you remember the name of the {0}?",
    ]
    if one is told.hero:
        forms += ["Who is the hero?", "What is the hero's name?", "Who is the story about?"]
    user = rng.choice(forms).format(one.animal)
    answer = f"The {one.animal} {tense_of(user).be} called {one.name}."
    return Exchange("story: name", user, answer, one.name)


def ask_animal(rng: Random, told: Story) -> Exchange:
    one = _someone(rng, told)
    forms = ["What animal is {0}?", "What is {0}?", "What kind of animal is {0}?", "Who is {0}?"]
    user = rng.choice(forms[1::2] if one.is_child else forms).format(one.name)
    return Exchange("story: animal", user, f"{one.name} is {a(one.animal)}.", capital(one.animal))


def ask_colour(rng: Random, told: Story) -> Exchange:
    return colour_of(rng, _someone(rng, told), "story: colour")


def colour_of(rng: Random, one: Hero, lesson: str) -> Exchange:
    """What colour somebody is, by name or by kind; of a child, what colour its coat is."""
    who, subject = rng.choice(one.subjects)
    if one.is_child:
        who += "'s coat"
    forms = ("What colour is {0}?", "What color is {0}?", "What colour was {0}?")
    user = rng.choice(forms).format(who)
    answer = f"{subject} {one.coloured(tense_of(user))}."
    return Exchange(lesson, user, answer, capital(one.colour))


def ask_place(rng: Random, told: Story) -> Exchange:
    return place_of(rng, told.hero, "story: place")


def place_of(rng: Random, one: Hero, lesson: str) -> Exchange:
    """Where somebody lives."""
    who, subject = rng.choice(one.subjects)
    forms = ("Where does {0} live?", "Where did {0} live?", "Where is the home of {0}?")
    user = rng.choice(forms).format(who)
    answer = f"{subject} {tense_of(user).live} {at(one.place)}."
    return Exchange(lesson, user, answer, capital(one.place))


def ask_met(rng: Random, told: Story) -> Exchange:
    who, subject = rng.choice(told.hero.subjects)
    forms = ("Who did {0} meet?", "Whom did {0} meet?", "Who is the friend of {0}?")
    answer = f"{subject} met {told.friend.in_full}."
    return Exchange("story: friend", rng.choice(forms).format(who), answer, told.friend.name)


def ask_weather(rng: Random, told: Story) -> Exchange:
    forms = ("How was the weather?", "What was the weather like?", "How was the weather that day?")
    answer = f"It was {told.weather}."
    return Exchange("story: weather", rng.choice(forms), answer, capital(told.weather))


def ask_day(rng: Random, told: Story) -> Exchange:
    forms = ("What day was it?", "Which day was it?", "On which day did they meet?")
    return Exchange("story: day", rng.choice(forms), f"It was {told.day}.", told.day)


def ask_food(rng: Random, told: Story) -> Exchange:
    if told.plot in ("race", "gift"):
        forms = ("What did they eat?", "What did they eat together?")
        return Exchange(
            "story: food", rng.choice(forms), f"They ate some {told.food}.", capital(told.food)
        )
    user = rng.choice(("What did {0} give {1}?", "What did {1} get?", "What did {1} get from {0}?"))
    user = user.format(told.friend.name, told.hero.name)
    answer = f"{told.hero.name} got some {told.food}."
    return Exchange("story: food", user, answer, capital(told.food))


def ask_plot(rng: Random, told: Story) -> Exchange:
    """What happened: another question for each plot."""
    one, other = told.hero.name, told.friend.name
    if told.plot == "race":
        forms = ("Who won?", "Who was fast?", "Who won the race?")
        return Exchange("story: plot", rng.choice(forms), f"{one} was fast and won.", one)
    if told.plot == "help":
        answer = f"{other} sat {told.hiding}."
        return Exchange("story: plot", f"Where did {other} sit?", answer, _last(told.hiding))
    if told.plot == "gift":
        user = rng.choice(("What did {0} give {1}?", "What did {1} get?")).format(one, other)
        answer = f"{other} got a {told.thing_colour} {told.thing}."
        return Exchange("story: plot", user, answer, capital(told.thing))
    return _ask_lost(rng, told)


def _ask_lost(rng: Random, told: Story) -> Exchange:
    thing, other = told.thing, told.friend.name
    kind = rng.randrange(3)
    if kind == 0:
        answer = f"{other} lost a {told.thing_colour} {thing}."
        return Exchange("story: plot", f"What did {other} lose?", answer, capital(thing))
    if kind == 1:
        user = rng.choice((f"Where was the {thing}?", f"Where did they find the {thing}?"))
        return Exchange("story: plot", user, f"The {thing} was {told.hiding}.", _last(told.hiding))
    user = rng.choice((f"What colour is the {thing}?", f"What color was the {thing}?"))
    answer = f"The {thing} {tense_of(user).be} {told.thing_colour}."
    return Exchange("story: plot", user, answer, capital(told.thing_colour))


def _last(words: str) -> str:
    return capital(words.split()[-1])


def ask_whether(rng: Random, told: Story) -> Exchange:
    return whether(rng, told.hero, [told.friend], "story: whether")


def whether(rng: Random, one: Hero, others: Sequence[Hero], lesson: str) -> Exchange:
    """Is he that, does he live there?  What was told comes first, then what follows from it."""
    if rng.random() < 0.5:
        animals = [one.animal, *(other.animal for other in others[:1]), rng.choice(ANIMALS)]
        asked = rng.choice(animals)
        user, right = f"Is {one.name} {a(asked)}?", asked == one.animal
        reason = f"{one.name} is {a(one.animal)}"
    else:
        asked = rng.choice((one.place, rng.choice(list(PLACES))))
        asks = rng.choice(("Does", "Does", "Did"))
        user, right = f"{asks} {one.name} live {at(asked)}?", asked == one.place
        reason = f"{one.in_full} {tense_of(user).live} {at(one.place)}"
    word = "yes" if right else "no"
    return Exchange(lesson, user, f"{reason}, so {word}.", capital(word))


QUESTIONS = (
    (ask_name, ask_animal, ask_colour, ask_plot) * 3
    + (ask_place, ask_weather, ask_food, ask_whether) * 2
    + (ask_met, ask_day)
)


# ── what the user tells, and asks about at once ───────────────────────────────────────────────

SHUFFLED = 0.75  # of all passages: whoever was named last is not always meant next


def passage(rng: Random, held: bool, known: Container[str] = NOBODY) -> tuple[Exchange, list[Hero]]:
    """One to three animals (a child would be no "it") in a few words, and a question about one."""
    heroes: list[Hero] = []
    for _ in range(rng.choice((1, 2, 2, 3))):
        heroes.append(hero(rng, held, heroes, known, ANIMALS))
    told = [sentence for one in heroes for sentence in _told_of(rng, one)]
    if rng.random() < SHUFFLED:
        rng.shuffle(told)
    asked = about(rng, heroes)
    said = Exchange("passage", f"{' '.join(told)} {asked.user}", asked.answer, asked.word)
    return said, heroes


def _told_of(rng: Random, one: Hero) -> list[str]:
    """In the words of the answers."""
    lives = f"{one.in_full} lives {at(one.place)}."
    looks = f"{one.in_full} {one.coloured(PRESENT)}."
    called = f"The {one.animal} is called {one.name}."
    return rng.sample((lives, looks, called), 3)


def about(rng: Random, heroes: Sequence[Hero]) -> Exchange:
    """A question about one of those of a passage."""
    one, kind = rng.choice(heroes), rng.randrange(6)
    if kind == 0:
        return colour_of(rng, one, "passage")
    if kind == 1:
        return place_of(rng, one, "passage")
    if kind == 2:
        user = rng.choice(("What is the {0} called?", "What is the name of the {0}?"))
        answer = f"The {one.animal} is called {one.name}."
        return Exchange("passage", user.format(one.animal), answer, one.name)
    if kind == 3:
        user = rng.choice(("What animal is {0}?", "What is {0}?")).format(one.name)
        return Exchange("passage", user, f"{one.name} is {a(one.animal)}.", capital(one.animal))
    if kind == 4:
        others = [other for other in heroes if other is not one]
        return whether(rng, one, others, "passage")
    # Four words before the place stands the animal, and two before that its name.
    answer = f"{capital(at(one.place))} lives the {one.animal} called {one.name}."
    return Exchange("passage", f"Who lives {at(one.place)}?", answer, capital(one.animal))
