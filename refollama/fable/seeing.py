"""What may be asked about a picture: lessons for fable-vision, each with its one right answer.

    seed, index ──► Viewing: a drawing, questions about it, now and then a second drawing
                    "How many red circles are there?"    "There are two red circles."

A question is only asked where it has an answer that nobody could dispute: "the star" where there is
one star, "bigger" where one is big and the other small.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from refollama.fable import knowledge
from refollama.fable.drawings import PLACES, SHAPES, Drawing, Thing, drawing, png
from refollama.fable.exchange import Exchange, capital, typed
from refollama.fable.world import COLOURS, NUMBERS, a
from refollama.messages import Message

LONGEST = 1300  # characters: a little more than a row of training holds
LATER = 0.12  # how often something is said before the picture comes
SECOND = 0.12  # how often there is another one
APART = 0.6  # of conversations teach to look, not to remember what was said of the picture
ONCE = ("what", "describe", "background")
CHATTY = 0.04  # of questions are about something else
NO_PICTURE = "I see no picture."

Lesson = Callable[[Random, Drawing], Exchange | None]  # None: it does not fit this drawing


# ── words ─────────────────────────────────────────────────────────────────────────────────────


def plural(kind: str) -> str:
    """red circles, crosses"""
    return kind + ("es" if kind.endswith("s") else "s")


def counted(count: int, kind: str) -> str:
    """a red circle, two red circles"""
    return a(kind) if count == 1 else f"{NUMBERS[count]} {plural(kind)}"


def joined(parts: Sequence[str]) -> str:
    """a, b and c"""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


KINDS = {"shape": SHAPES, "colour": COLOURS, "number": ("no", *NUMBERS[1:5]), "place": PLACES}


def words_of(text: str) -> dict[str, list[str]]:
    """Shapes, colours, numbers and places that a text speaks of, in order."""
    return {kind: _matches(words, text) for kind, words in KINDS.items()}


def _matches(words: Sequence[str], text: str) -> list[str]:
    longest_first = sorted(words, key=len, reverse=True)  # "at the top left" before "at the top"
    return re.findall(rf"\b({'|'.join(longest_first)})(?:e?s)?\b", text)


def named(rng: Random, one: Drawing) -> list[tuple[str, Thing]]:
    """The things that words can single out, with such words: "the star", "the red star"."""
    found = []
    for thing in one.things:
        if one.count(thing.colour, thing.shape) > 1:
            continue
        short = one.count(shape=thing.shape) == 1 and rng.random() < 0.5
        found.append((f"the {thing.shape if short else thing.kind}", thing))
    rng.shuffle(found)
    return found


def _ask(rng: Random, lesson: str, forms: Sequence[str], answer: str, **words: object) -> Exchange:
    return Exchange(lesson, capital(rng.choice(forms).format(**words)), capital(answer))


# ── one thing ─────────────────────────────────────────────────────────────────────────────────


def what(rng: Random, one: Drawing) -> Exchange:
    """All that is there, like things together."""
    kinds = dict.fromkeys((thing.colour, thing.shape) for thing in one.things)
    parts = [counted(one.count(*kind), " ".join(kind)) for kind in kinds]
    forms = (
        "What is in this picture?",
        "What is in the picture?",
        "What do you see?",
        "What can you see in this picture?",
        "What is this?",
        "What does the picture show?",
        "Tell me what you see.",
        "What is on this picture?",
        "What's in this picture?",
        "What do you see in the picture?",
        "What is in this image?",
    )
    return _ask(rng, "what", forms, f"I see {joined(parts)}.")


def closely(rng: Random, one: Drawing) -> Exchange:
    """Each thing with its size and place, in the order of reading."""
    parts = [f"{a(f'{thing.size} {thing.kind}')} {PLACES[thing.place]}" for thing in one.things]
    forms = (
        "Describe the picture.",
        "Describe this picture.",
        "Describe the image.",
        "Please describe the picture.",
        "Can you describe what you see?",
        "Tell me all about this picture.",
        "Look closely. What do you see?",
        "Describe what you see.",
    )
    return _ask(rng, "describe", forms, f"I see {joined(parts)}.")


def shape(rng: Random, one: Drawing) -> Exchange | None:
    if len(one.things) == 1:
        forms = ("What shape is it?", "What shape is this?", "Which shape do you see?")
        return _ask(rng, "shape", forms, f"It is {a(one.things[0].shape)}.")
    alone = [thing for thing in one.things if one.count(colour=thing.colour) == 1]
    if not alone:
        return None
    thing = rng.choice(alone)
    several = (
        "What shape is the {0} thing?",
        "Which shape is {0}?",
        "What is {0}?",
        "What shape is {0}?",
        "What is the {0} thing?",
    )
    asked = [form.replace("{0}", thing.colour) for form in several]
    return _ask(rng, "shape", asked, f"the {thing.colour} thing is {a(thing.shape)}.")


def colour(rng: Random, one: Drawing) -> Exchange | None:
    alone = [thing for thing in one.things if one.count(shape=thing.shape) == 1]
    if not alone:
        return None
    thing = rng.choice(alone)
    forms = (
        "What colour is the {0}?",
        "What color is the {0}?",
        "Which colour is the {0}?",
        "Which colour has the {0}?",
        "What is the colour of the {0}?",
        "Tell me the colour of the {0}.",
    )
    asked = [form.replace("{0}", thing.shape) for form in forms]
    if len(one.things) == 1:
        asked += ["What colour is it?", "What color is it?"]
    return _ask(rng, "colour", asked, f"the {thing.shape} is {thing.colour}.")


def ground(rng: Random, one: Drawing) -> Exchange:
    forms = (
        "What colour is the background?",
        "What color is the background?",
        "Which colour is the background?",
        "What is the colour of the background?",
        "What colour is behind the shapes?",
        "What colour is the ground?",
    )
    return _ask(rng, "background", forms, f"the background is {one.ground}.")


def size(rng: Random, one: Drawing) -> Exchange | None:
    for name, thing in named(rng, one):
        forms = ("Is {it} big or small?", "How big is {it}?", "What size is {it}?")
        return _ask(rng, "size", forms, f"{name} is {thing.size}.", it=name)
    return None


# ── how many, where ───────────────────────────────────────────────────────────────────────────


def many(rng: Random, one: Drawing) -> Exchange:
    """Of all, of a shape, of a colour, or of both; half of the time of what is there."""
    kind = rng.choice(("all", "shape", "shape", "colour", "both", "both"))
    seen = rng.choice(one.things)
    there = rng.random() < 0.7
    asked_shape = seen.shape if there else rng.choice(SHAPES)
    asked_colour = seen.colour if there or kind == "both" else rng.choice(COLOURS)
    if kind == "all":
        asked_colour = asked_shape = ""
    elif kind == "shape":
        asked_colour = ""
    elif kind == "colour":
        asked_shape = ""
    count = one.count(asked_colour, asked_shape)
    noun = f"{asked_colour} {asked_shape or rng.choice(('shape', 'thing'))}".strip()
    forms = (
        "How many {them} are there?",
        "How many {them} do you see?",
        "How many {them} are in the picture?",
        "How many {them} can you see?",
        "Count the {them}.",
        "How many {them}?",
    )
    return _ask(rng, "count", forms, _there_are(count, noun), them=plural(noun))


def _there_are(count: int, noun: str) -> str:
    if count == 0:
        return f"there are no {plural(noun)}."
    return f"there is one {noun}." if count == 1 else f"there are {NUMBERS[count]} {plural(noun)}."


def where(rng: Random, one: Drawing) -> Exchange | None:
    for name, thing in named(rng, one):
        forms = (
            "Where is {it}?",
            "Where is {it} in the picture?",
            "Where do you see {it}?",
            "Can you tell me where {it} is?",
            "In which place is {it}?",
        )
        return _ask(rng, "where", forms, f"{name} is {PLACES[thing.place]}.", it=name)
    return None


def at(rng: Random, one: Drawing) -> Exchange:
    """What is at a place: half of the time something."""
    full = {thing.place: thing for thing in one.things}
    free = [place for place in range(9) if place not in full]
    place = rng.choice(list(full)) if rng.random() < 0.7 else rng.choice(free)
    it = PLACES[place]
    forms = ("What is {it}?", "What do you see {it}?", "Which shape is {it}?", "What's {it}?")
    what = a(full[place].kind) if place in full else "nothing"
    return _ask(rng, "what is at", forms, f"{what} is {it}.", it=it)


def there(rng: Random, one: Drawing) -> Exchange:
    """Yes or no, as often; what is not there is like something that is."""
    seen, other = rng.choice(one.things), rng.choice(one.things)
    noun = rng.choice((seen.kind, seen.kind, seen.shape))
    if rng.random() < 0.7:  # a third of these is there by chance
        near = (f"{seen.colour} {rng.choice(SHAPES)}", f"{rng.choice(COLOURS)} {seen.shape}")
        noun = rng.choice((*near, f"{seen.colour} {other.shape}", rng.choice(SHAPES)))
    colour, _, shape = noun.rpartition(" ")
    forms = (
        "Is there {it}?",
        "Is there {it} in the picture?",
        "Do you see {it}?",
        "Can you see {it}?",
        "Does the picture show {it}?",
    )
    yes = f"yes, there is {a(noun)}."
    answer = yes if one.count(colour, shape) else f"no, there is no {noun}."
    return _ask(rng, "is there", forms, answer, it=a(noun))


# ── compare: what is seen first, then what follows from it ────────────────────────────────────────


def bigger(rng: Random, one: Drawing) -> Exchange | None:
    things = named(rng, one)
    pairs = [(x, y) for x in things for y in things if x[1].size == "big" and y[1].size == "small"]
    if not pairs:
        return None
    (big, _), (small, _) = rng.choice(pairs)
    left, right = rng.sample((big, small), 2)
    word, best = rng.choice((("bigger", big), ("smaller", small)))
    sizes = {big: "big", small: "small"}
    reason = f"{left} is {sizes[left]} and {right} is {sizes[right]}"
    if rng.random() < 0.5:
        forms = ("Which is {w}, {x} or {y}?", "What is {w}, {x} or {y}?")
        answer = f"{reason}, so {best} is {word}."
        return _ask(rng, "bigger", forms, answer, w=word, x=left, y=right)
    answer = f"{reason}, so {_yes(left == best)}."
    return _ask(rng, "bigger", ("Is {x} {w} than {y}?",), answer, w=word, x=left, y=right)


def _yes(right: bool) -> str:
    return "yes" if right else "no"


COLUMNS = ("on the left", "in the middle", "on the right")
ROWS = ("at the top", "in the middle", "at the bottom")
LEFT, RIGHT, ABOVE, BELOW = ("column", -1), ("column", 1), ("row", -1), ("row", 1)
SIDES: Mapping[str, tuple[str, int]] = {  # which number of a place counts, and whether it is less
    "to the left of": LEFT,
    "to the right of": RIGHT,
    "left of": LEFT,
    "right of": RIGHT,
    "above": ABOVE,
    "below": BELOW,
    "under": BELOW,
}


def beside(rng: Random, one: Drawing) -> Exchange | None:
    """Which side one is of the other, where they are not in one line: only that line is told."""
    things, word = named(rng, one), rng.choice(list(SIDES))
    number, sign = SIDES[word]
    lines = {"column": COLUMNS, "row": ROWS}[number]
    spots = [(name, getattr(thing, number)) for name, thing in things]
    pairs = [(x, y) for x in spots for y in spots if x[1] != y[1]]
    if not pairs:
        return None
    (name, x), (other, y) = rng.choice(pairs)
    answer = f"{name} is {lines[x]} and {other} is {lines[y]}, so {_yes((x - y) * sign > 0)}."
    return _ask(rng, "beside", ("Is {x} {w} {y}?",), answer, x=name, y=other, w=word)


def more(rng: Random, one: Drawing) -> Exchange | None:
    shapes = list(dict.fromkeys(thing.shape for thing in one.things))
    if len(shapes) < 2:
        return None
    x, y = rng.sample(shapes, 2)
    left, right = one.count(shape=x), one.count(shape=y)
    forms = ("Are there more {x} than {y}?", "Do you see more {x} than {y}?")
    other = f"one {y}" if right == 1 else f"{NUMBERS[right]} {plural(y)}"
    answer = f"{_there_are(left, x)[:-1]} and {other}, so {_yes(left > right)}."
    return _ask(rng, "more", forms, answer, x=plural(x), y=plural(y))


def same(rng: Random, one: Drawing) -> Exchange | None:
    alone = [thing for thing in one.things if one.count(shape=thing.shape) == 1]
    if len(alone) < 2:
        return None
    x, y = rng.sample(alone, 2)
    forms = (
        "Do the {x} and the {y} have the same colour?",
        "Are the {x} and the {y} of the same colour?",
        "Is the {x} of the same colour as the {y}?",
    )
    yes = _yes(x.colour == y.colour)
    answer = f"the {x.shape} is {x.colour} and the {y.shape} is {y.colour}, so {yes}."
    return _ask(rng, "same colour", forms, answer, x=x.shape, y=y.shape)


LESSONS: Mapping[Lesson, float] = {
    what: 3,
    closely: 3,
    shape: 1,
    colour: 1,
    ground: 0.5,
    size: 1.5,
    many: 4,
    where: 3,
    at: 2.5,
    there: 1.5,
    bigger: 8,
    beside: 9,
    more: 5,
    same: 6,
}
FIRST: Mapping[Lesson, float] = {**LESSONS, what: 12, closely: 6}  # what people ask first


# ── a conversation ────────────────────────────────────────────────────────────────────────────


@dataclass
class Viewing:
    """What was said about one drawing or two; each stands before the question of its turn."""

    turns: list[Exchange] = field(default_factory=list)
    drawings: dict[int, Drawing] = field(default_factory=dict)
    apart: bool = False  # does training show each question with nothing but the drawing?

    def messages(self, turns: int | None = None) -> list[Message]:
        """As `Conversation.messages`; drawings as PNG files."""
        found = []
        for at, turn in enumerate(self.turns[:turns]):
            shown = (png(self.drawings[at]),) if at in self.drawings else ()
            found += [Message("user", turn.user, images=shown), Message("assistant", turn.answer)]
        return found if turns is None else found[:-1]


def viewing(seed: int, index: int, held: bool = False) -> Viewing:
    """The conversation of this number; `held`: of combinations that training never shows."""
    rng = Random(f"seeing:{seed}:{index}:{held}")
    comes = rng.choice((1, 2)) if rng.random() < LATER else 0
    again = rng.randint(3, 7) if rng.random() < SECOND else -1
    found, length = Viewing(apart=again < 0 == comes and rng.random() < APART), 0
    asked: list[str] = []  # lessons, since the picture came
    while length < LONGEST:
        turn = len(found.turns)
        if turn in (comes, again):
            found.drawings[turn], asked = drawing(rng, held), []
        now = next(reversed(found.drawings.values()), None)
        said = typed(rng, question(rng, now, asked) if now else blind(rng))
        asked.append(said.lesson)
        found.turns.append(said)
        length += len(said.user) + len(said.answer)
    return found


def question(rng: Random, now: Drawing, asked: Sequence[str]) -> Exchange:
    """One that has an answer; what has only one answer is asked once."""
    if asked and rng.random() < CHATTY:
        return knowledge.manners(rng)
    table = LESSONS if asked else FIRST
    while True:
        lesson = rng.choices(list(table), list(table.values()))[0]
        said = lesson(rng, now)
        if said is not None and not (said.lesson in ONCE and said.lesson in asked):
            return said


def blind(rng: Random) -> Exchange:
    """Before there is a picture: manners, or a question about what nobody can see."""
    if rng.random() < 0.5:
        return knowledge.manners(rng)
    lesson = rng.choice((what, closely, many, ground, there, at))
    said = lesson(rng, drawing(rng))
    assert said is not None
    return Exchange("no picture", said.user, NO_PICTURE)
