"""One question, one answer: what lessons are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from refollama.fable.world import kept_out, words

LOWERED, UNMARKED, POLITE = 0.25, 0.3, 0.08  # how often people type so


@dataclass(frozen=True, slots=True)
class Exchange:
    """What the user says, and the one right answer (for stories and jokes: a right one)."""

    lesson: str
    user: str
    answer: str
    word: str = ""  # the answer in one word; empty: it has none
    exact: bool = True  # is any other answer wrong?
    wishes: tuple[str, ...] = ()  # what a story must have, or the keys of an object
    spelled: bool = False  # has it words that are to be typed as they are?


def capital(text: str) -> str:
    """The text with a capital at its beginning."""
    return text[:1].upper() + text[1:]


def choose(rng: Random, held: bool, *tables: Sequence[str]) -> tuple[str, ...]:
    """One word of each table: a combination that is kept for evaluation if `held`, else not."""
    while kept_out(*(found := tuple(map(rng.choice, tables)))) is not held:
        pass
    return found


def typed(rng: Random, said: Exchange) -> Exchange:
    """The same as people type it: often without capitals and question mark, now and then polite."""
    text = said.user
    if rng.random() < POLITE and text.endswith("?"):
        text = text[:-1] + ", please?"
    if rng.random() < UNMARKED and text[-1] in "?.!":
        text = text[:-1]
    if rng.random() < LOWERED and not said.spelled:
        text = text.lower()
    return replace(said, user=text)


_ONSETS = words("b bl d dr f fl g gr h j k kr l m n p pl r s t tr v w z")
_VOWELS = words("a e i o u oo ai")
_CODAS = ("", "", "", "n", "r", "l", "k", "x")


def strange(rng: Random, syllables: int = 2) -> str:
    """A word that nobody knows: "drooka", "wilen"."""
    parts = (rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables))
    return "".join(parts) + rng.choice(_CODAS)
