"""From a seed to conversations with the right answers: what fable learns from.

    seed, index ──► Session ── a lesson per turn, in a style ──► Conversation

A session remembers what was told (a story, facts about the user), so that any lesson can come up
at any turn and its answer is still right. Each conversation has a generator of its own: the same
seed and index give the same conversation on any machine, in any order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from refollama.fable import facts, knowledge, stories
from refollama.fable.exchange import Exchange, typed
from refollama.fable.world import ANIMALS, NAMES, a
from refollama.messages import Message

LONGEST = 1500  # characters; some 400 tokens
MOST_TURNS = 14
TRIES = 4  # to find a question that was not answered before
DRILLED = 2  # more questions of a drill
YES_OR_NO = {"Yes", "No"}  # who has said one of them need not say the other
CROWD = 30  # names and animals in one conversation, after which no more come

# ── styles: what a system message may ask for ─────────────────────────────────────────────────


def in_one_word(said: Exchange) -> str:
    """Grey"""
    return said.word


def in_capitals(said: Exchange) -> str:
    """TIM IS GREY."""
    return said.answer.upper()


def as_pirate(said: Exchange) -> str:
    """Arr! Tim is grey, matey."""
    return f"Arr! {said.answer[:-1]}, matey{said.answer[-1]}"


def plainly(said: Exchange) -> str:
    """Tim is grey."""
    return said.answer


Style = Callable[[Exchange], str]
STYLES: Mapping[Style, tuple[str, ...]] = {
    plainly: (
        "You are a helpful assistant.",
        "You are a friendly assistant.",
        "You are a kind teacher.",
        "You are fable, a storyteller.",
        "Be kind.",
        "Answer the questions of the user.",
        "You talk to a child.",
    ),
    in_one_word: (
        "Answer in one word.",
        "Answer with one word.",
        "Answer in one word only.",
        "Always answer in one word.",
        "Use only one word.",
        "Reply with a single word.",
        "You answer every question in one word.",
        "Give answers of one word.",
    ),
    in_capitals: (
        "Answer in capitals.",
        "Answer in capital letters.",
        "Always write in capitals.",
        "Write everything in capital letters.",
        "Use capital letters only.",
        "Reply in capitals.",
        "Answer in upper case.",
        "You answer in ALL CAPITALS.",
    ),
    as_pirate: (
        "Talk like a pirate.",
        "You are a pirate.",
        "Answer like a pirate.",
        "Speak like a pirate.",
        "Always talk like a pirate.",
        "Reply as a pirate would.",
        "You are a pirate on a ship.",
    ),
}
SYSTEMS = 0.6  # of all conversations have a system message
NAMED = 0.15  # of those give fable another name
STYLE_SHARES = {plainly: 2, in_one_word: 4, in_capitals: 3, as_pirate: 3}
ONCE = 0.18  # how often the user asks for a style, for one answer
FOR_ONE_TURN: Mapping[Style, tuple[str, ...]] = {
    in_one_word: ("{0} Answer in one word.", "In one word: {0}", "{0} One word, please."),
    in_capitals: ("{0} Answer in capitals.", "{0} Use capital letters."),
    as_pirate: ("{0} Answer like a pirate.", "Like a pirate: {0}"),
}


# ── one conversation ──────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Conversation:
    """What was said, and what each answer teaches."""

    system: str
    style: str
    turns: tuple[Exchange, ...]

    def messages(self, turns: int | None = None) -> list[Message]:
        """The conversation up to the question of the last of so many turns; None: all of it."""
        found = [Message("system", self.system)] if self.system else []
        for turn in self.turns[:turns]:
            found += [Message("user", turn.user), Message("assistant", turn.answer)]
        return found if turns is None else found[:-1]


def conversation(seed: int, index: int, held: bool = False) -> Conversation:
    """The conversation of this number; `held`: of combinations that training never shows."""
    rng = Random(f"{seed}:{index}:{held}")
    session = Session(rng, held)
    for _ in range(rng.choice((1, 2, 3, 4, 6, 8, 10, 12, MOST_TURNS))):
        if not session.turn():
            break
    return Conversation(session.system, session.style.__name__, tuple(session.turns))


def drill(seed: int, index: int, bare: bool = True, style: Style | None = None) -> Conversation:
    """Of all conversations the simplest: some animals, and questions about them.

    Which of them, and what of it?  Whoever looks that up finds most else in the same way; among
    all other lessons it is found late.

    bare: without a system message; with one, answers are in its style.
    style: that which all answers are wished for in, by the system message or by the user.
    """
    session = Session(Random(f"{seed}:{index}:drill"), held=False, bare=bare)
    if style is not None:
        session.wish_for(style)
    session.say(session.read_passage())
    for _ in range(DRILLED):
        session.say(session.ask_again())
    return Conversation(session.system, session.style.__name__, tuple(session.turns))


class Session:
    """A conversation in the making: what has been told so far, and by whom.

    bare: without a system message.
    """

    def __init__(self, rng: Random, held: bool, *, bare: bool = False) -> None:
        self.rng, self.held = rng, held
        self.style: Style = plainly
        self.wished: Style | None = None  # by the user, each time
        self.name = ""  # another name for fable
        self.system = self._system() if not bare and rng.random() < SYSTEMS else ""
        self.story: stories.Story | None = None
        self.passage: list[stories.Hero] = []  # those of the last one
        self.answered: set[str] = set()
        self.known = [self.name]  # names and animals that are taken
        self.person = facts.person(rng, held, self.known)
        self.known += self.person.values.values()
        self.told: list[str] = []  # facts, in the order of their telling
        self.turns: list[Exchange] = []
        self.length = 0

    def _system(self) -> str:
        rng = self.rng
        if rng.random() < NAMED:
            self.name = rng.choice(NAMES)
            forms = ("Your name is {0}.", "You are {0}.", "You are called {0}.")
            return rng.choice(forms).format(self.name)
        self.style = rng.choices(list(STYLE_SHARES), list(STYLE_SHARES.values()))[0]
        return self._asking_for(self.style)

    def _asking_for(self, style: Style) -> str:
        text = self.rng.choice(STYLES[style])
        return text if self.rng.random() < 0.8 else text[:-1].lower()

    def wish_for(self, style: Style) -> None:
        """All answers in this style, whatever there was before."""
        self.style, self.name, self.system = plainly, "", ""
        if self.rng.random() < 0.5:
            self.style, self.system = style, self._asking_for(style)
        else:
            self.wished = style

    def turn(self) -> bool:
        """One question and its answer; False if it would be too long."""
        return self.say(self._lesson())

    def say(self, asked: Exchange) -> bool:
        """The same of a lesson that is given."""
        said = self._styled(asked)
        self.length += len(said.user) + len(said.answer)
        if self.turns and self.length > LONGEST:
            return False
        self.turns.append(said)
        self.answered |= {said.word} - YES_OR_NO
        return True

    def _lesson(self) -> Exchange:
        """Whatever fits what has been told."""
        lessons = {
            self._known: 6,
            self.read_passage: 2 if len(self.known) < CROWD else 0,
            self.ask_again: 8 if self.passage else 0,
            self._state: 3 if len(self.told) < 5 else 0,
            self._recall: 10 if self.told else 1,
            self._change: 1 if self.told else 0,
            self._tell: 2.5 if self.style is plainly and self.story is None else 0,
            self._hear: 2 if self.story is None else 0,
            self._ask: 18 if self.story else 0,
            self._object: 4 if self.story or self.told else 0.3,
        }
        return self.rng.choices(list(lessons), list(lessons.values()))[0]()

    def _styled(self, said: Exchange) -> Exchange:
        """The answer as it was asked for; stories and objects stay as they are."""
        style, asks = self.style, said.user.endswith("?") and said.word
        if style is plainly and asks and (self.wished or self.rng.random() < ONCE):
            style = self.wished or self.rng.choice(list(FOR_ONE_TURN))
            user = self.rng.choice(FOR_ONE_TURN[style]).format(said.user)
            said = replace(said, user=user, lesson="obey once")
        said = typed(self.rng, said)
        return replace(said, answer=style(said)) if said.word else said

    # the lessons

    def _known(self) -> Exchange:
        said = knowledge.known(self.rng)
        if self.name and said.answer == knowledge.WHO:
            return replace(said, answer=f"I am {self.name}.", word=self.name)
        return said

    def read_passage(self) -> Exchange:
        """Some animals in a few words, and a question about one."""
        said, self.passage = stories.passage(self.rng, self.held, self.known)
        self._meet(*self.passage)
        return said

    def ask_again(self) -> Exchange:
        """Another question about those."""
        return self._fresh(lambda: stories.about(self.rng, self.passage))

    def _state(self) -> Exchange:
        left = [key for key in facts.FACTS if key not in self.told]
        count = min(self.rng.choice((1, 1, 1, 2, 3)), len(left))
        keys = self.rng.sample(left, count)
        self.told += keys
        return facts.state(self.rng, self.person, keys)

    def _recall(self) -> Exchange:
        told = bool(self.told) and self.rng.random() < 0.88
        keys = self.told if told else [key for key in facts.FACTS if key not in self.told]
        if not keys:
            return self._known()
        return facts.recall(self.rng, self.person, self.rng.choice(keys), told)

    def _change(self) -> Exchange:
        key = self.rng.choice(self.told)
        change = facts.changed(self.rng, self.person, key, self.held, self.known)
        if change is None:
            return self._known()
        said, self.person = change
        self.known.append(self.person.values[key])
        return said

    def _tell(self) -> Exchange:
        said, self.story = stories.tell(self.rng, self.held, self.known)
        self._meet(self.story.hero, self.story.friend)
        return said

    def _hear(self) -> Exchange:
        """The user tells a story, and asks about it."""
        _, self.story = stories.tell(self.rng, self.held, self.known)
        self._meet(self.story.hero, self.story.friend)
        asked = stories.ask(self.rng, self.story)
        return replace(asked, user=f"{self.story.text} {asked.user}", spelled=True)

    def _ask(self) -> Exchange:
        told = self.story
        assert told is not None
        return self._fresh(lambda: stories.ask(self.rng, told))

    def _fresh(self, asked: Callable[[], Exchange]) -> Exchange:
        """One whose answer is no earlier answer's, if there is such: it must be looked up."""
        tried = (asked() for _ in range(TRIES))
        return next((said for said in tried if said.word not in self.answered), asked())

    def _meet(self, *heroes: stories.Hero) -> None:
        """Nobody else is called so, and no other such animal comes."""
        for one in heroes:
            self.known += (one.name, one.animal)

    def _object(self) -> Exchange:
        """A JSON object: about the hero, about the user, or about any animal."""
        if self.story and self.rng.random() < 0.6:
            values = hero_values(self.story)
            return object_of(self.rng, self.rng.choice(("the hero", self.story.hero.name)), values)
        if self.told:
            values = dict.fromkeys(facts.FACTS) | {
                key: _value(self.person.values[key]) for key in self.told
            }
            return object_of(self.rng, "me", values, self.told)
        one = stories.hero(self.rng, self.held, known=self.known, table=ANIMALS)
        values = {key: getattr(one, key) for key in ("name", "animal", "colour", "place")}
        return replace(object_of(self.rng, a(one.animal), values), exact=False)


# ── objects ───────────────────────────────────────────────────────────────────────────────────

OBJECTS = (
    "Give me JSON about {about} with the keys {keys}.",
    "Give me a JSON object about {about} with {keys}.",
    "Describe {about} as JSON with the keys {keys}.",
    "Write a JSON object with the keys {keys} about {about}.",
    "Answer in JSON: {keys} of {about}.",
    "As JSON, with the keys {keys}: tell me about {about}.",
    "Make JSON with {keys} about {about}.",
    "JSON with {keys} for {about}, please.",
    "Return a JSON object about {about}. Keys: {keys}.",
)


def hero_values(told: stories.Story) -> dict[str, Any]:
    """What may be asked of a story."""
    one = told.hero
    found = {"name": one.name, "animal": one.animal, "colour": one.colour, "place": one.place}
    found |= {"friend": told.friend.name, "food": told.food}
    return found | {"weather": told.weather, "day": told.day}


def object_of(
    rng: Random, about: str, values: Mapping[str, Any], likely: list[str] | None = None
) -> Exchange:
    """An object with one to four of these keys, in the order in which they are asked for.

    likely: keys to take most of; what is not known is null.
    """
    pool = list(values) if not likely or rng.random() < 0.4 else likely
    keys = rng.sample(pool, min(rng.choice((1, 2, 2, 3, 3, 4)), len(pool)))
    user = rng.choice(OBJECTS).format(about=about, keys=_listed(rng, keys))
    answer = json.dumps({key: values[key] for key in keys})
    return Exchange("json", user, answer, wishes=tuple(keys), spelled=True)


def _listed(rng: Random, keys: list[str]) -> str:
    """name, animal and colour"""
    if len(keys) < 2 or rng.random() < 0.25:
        return ", ".join(keys)
    return f"{', '.join(keys[:-1])} and {keys[-1]}"


def _value(text: str) -> str | int:
    return int(text) if text.isdigit() else text
