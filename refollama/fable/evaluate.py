"""How good is fable?  `python -m refollama.fable.evaluate fable`, or `fable-vision --vision`

    conversations of kept-out combinations ──► llm.chat, greedy ──► a judge for each lesson ──► %

Each question is asked through the same call that users make, of the packed file. What was said
before it is as it should have been said, so one mistake counts once. Nothing that is asked of
heroes, or remembered of users, was in training in this combination; single words all were. Nor
were so many such shapes of such a colour in one picture.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rich.console import Console
from rich.progress import track
from rich.table import Table

import refollama
from refollama.fable.exchange import Exchange
from refollama.fable.lessons import Conversation, conversation
from refollama.fable.seeing import Viewing, viewing, words_of
from refollama.fable.world import ANIMALS, COLOURS, NAMES, PEOPLE, PLACES, VIRTUES
from refollama.messages import Message

SEED = 1  # of the conversations; training has others, and other combinations
EACH = 60  # questions of a lesson
LEAST_READ, MOST_READ = 100, 1000  # conversations for each of these, in search of rare lessons
MOST_ABOUT = 6  # questions about one picture
SHOWN = 4  # wrong answers of a lesson
GREEDY = {"temperature": 0, "repeat_penalty": 1, "num_predict": 200}

# What must be reached, in percent, by the first word of a lesson's name.
MARKS = {"questions": 95, "memory": 95, "system": 95, "format": 100, "json": 90, "stories": 95}
MARKS |= {"values": 90, "vision": 95}  # values: of objects without `format`, all of it right


class Case(NamedTuple):
    """One question in its conversation."""

    mark: str  # a key of MARKS
    lesson: str
    messages: list[Message]
    said: Exchange


class Model(Protocol):
    """What is asked: `refollama.load(…)` gives one."""

    def chat(
        self, messages: Sequence[Any], options: Any = None, *, format: object = None
    ) -> tuple[str, Any]: ...


# ── what is asked ─────────────────────────────────────────────────────────────────────────────


def cases(seed: int = SEED, each: int = EACH) -> list[Case]:
    """So many questions of each lesson, one from a conversation: that of the rarest lesson."""
    return _gathered(each, lambda index: _cases_of(conversation(seed, index, held=True)))


def cases_of_pictures(seed: int = SEED, each: int = EACH) -> list[Case]:
    """The same about pictures."""
    return _gathered(each, lambda index: _cases_about(viewing(seed, index, held=True)))


def _gathered(each: int, cases_of: Callable[[int], Iterable[Case]]) -> list[Case]:
    found: dict[str, list[Case]] = defaultdict(list)
    for index in range(each * MOST_READ):
        case = min(cases_of(index), key=_count_in(found))
        if len(found[case.lesson]) < each:
            found[case.lesson].append(case)
        elif index > each * LEAST_READ and all(len(some) == each for some in found.values()):
            break
    return [case for lesson in sorted(found) for case in found[lesson]]


def _count_in(found: Mapping[str, list[Case]]) -> Callable[[Case], int]:
    return lambda case: len(found.get(case.lesson, ()))


def _cases_of(talk: Conversation) -> Iterator[Case]:
    """The questions of one conversation, from the last to the first."""
    for count in range(len(talk.turns), 0, -1):
        said = talk.turns[count - 1]
        mark, lesson = filed(talk, said)
        yield Case(mark, lesson, talk.messages(count), said)


def _cases_about(talk: Viewing) -> Iterator[Case]:
    """The first questions about the first picture."""
    for count in range(min(MOST_ABOUT, len(talk.turns)), 0, -1):
        said = talk.turns[count - 1]
        yield Case("vision", said.lesson, talk.messages(count), said)


def filed(talk: Conversation, said: Exchange) -> tuple[str, str]:
    """Under which mark and lesson an answer counts."""
    if said.lesson == "json":
        return "json", "json"
    if said.lesson == "story":
        return "stories", "stories"
    if said.lesson == "obey once":
        return "system", "user: a style for once"
    if talk.style != "plainly":
        return "system", f"system: {talk.style.replace('_', ' ')}"
    if said.lesson.startswith("memory"):
        return "memory", said.lesson
    return "questions", said.lesson


# ── judges ────────────────────────────────────────────────────────────────────────────────────


def right(case: Case, answer: str) -> bool:
    """Is the answer good?  Word by word what it should be; of objects the keys; of stories all
    that `contradictions` looks for."""
    if case.mark == "json":
        return keys_of(answer) == list(case.said.wishes)
    if case.mark == "stories":
        return not contradictions(answer, case.said.wishes)
    return answer.strip() == case.said.answer


def keys_of(answer: str) -> list[str] | None:
    """The keys of a JSON object, in order; None if it is none."""
    try:
        value = json.loads(answer)
    except ValueError:
        return None
    return list(value) if isinstance(value, dict) else None


_ANY_COLOUR, _ANY_NAME = "|".join(COLOURS), "|".join(NAMES)
_ANY_ANIMAL = "|".join(ANIMALS + PEOPLE)


def contradictions(story: str, wishes: Sequence[str] = ()) -> list[str]:
    """What is wrong with the hero of a story: a changed name, animal or colour, a wish not kept.

    The hero is whoever is named first; it is what it is called first.
    """
    names, animals = _found(_ANY_NAME, story), _found(_ANY_ANIMAL, story)
    if not names or not animals:
        return ["no hero"]
    name, animal = names[0], animals[0]
    colours = set(
        re.findall(rf"\b{name}(?: the {animal})? (?:was|had an?) ({_ANY_COLOUR})\b", story)
    )
    colours |= set(re.findall(rf"\b({_ANY_COLOUR}) {animal}\b", story))
    called = re.findall(rf"\b{name} the (?:(?:{_ANY_COLOUR}) )?({_ANY_ANIMAL})\b", story)
    problems = [f"names: {names}"] * (len(set(names)) != 2)
    problems += [f"animals: {animals}"] * (len(set(animals)) != 2)
    problems += [f"colours: {sorted(colours)}"] * (len(colours) != 1)
    problems += [f"{name} the {other}" for other in called if other != animal]
    return problems + _unkept(wishes, {name, animal, *colours}, story)


def _unkept(wishes: Sequence[str], hero: set[str], story: str) -> list[str]:
    """Wishes for name, animal and colour are the hero's; for virtue and place they are in it."""
    told = {word for word in (*VIRTUES, *PLACES) if re.search(rf"\b{word}\b", story)}
    return [f"no {wish}" for wish in wishes if wish not in hero | told]


def _found(pattern: str, text: str) -> list[str]:
    return re.findall(rf"\b(?:{pattern})\b", text)


# ── the table ─────────────────────────────────────────────────────────────────────────────────


@dataclass
class Score:
    """How one lesson went."""

    mark: str
    right: int = 0
    asked: int = 0
    wrong: list[dict[str, str]] = field(default_factory=list)
    taken: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # of pictures: for what

    def add(self, case: Case, answer: str, good: bool) -> None:
        """Count an answer; wrong ones are kept."""
        self.asked += 1
        self.right += good
        if self.mark == "vision":
            self.taken.update(taken_for(case.said.answer, answer))
        if not good:
            user, want = case.said.user, case.said.answer
            self.wrong.append({"asked": user, "right": want, "answered": answer})

    @property
    def percent(self) -> float:
        return 100 * self.right / max(self.asked, 1)


def evaluate(llm: Model, asked: Sequence[Case], *, quiet: bool = False) -> dict[str, Score]:
    """Ask everything; objects twice, with `format` and without.  → scores by lesson

    quiet: without a bar.
    """
    scores: dict[str, Score] = {}
    for case in track(asked, "asking", disable=quiet):
        for lesson, mark, form in _ways(case):
            answer, _ = llm.chat(case.messages, GREEDY, format=form)
            score = scores.setdefault(lesson, Score(mark))
            score.add(case, answer, right(case, answer))
            if case.mark == "json" and not form and case.said.exact:
                values = scores.setdefault("json: values too", Score("values"))
                values.add(case, answer, answer.strip() == case.said.answer)
    return scores


def _ways(case: Case) -> list[tuple[str, str, str | None]]:
    ways: list[tuple[str, str, str | None]] = [(case.lesson, case.mark, None)]
    return ways + [("json with format", "format", "json")] * (case.mark == "json")


def totals(scores: dict[str, Score]) -> dict[str, float]:
    """Percent right under each mark of which something was asked."""
    found = {}
    for mark in MARKS:
        these = [score for score in scores.values() if score.mark == mark]
        if asked := sum(score.asked for score in these):
            found[mark] = round(100 * sum(score.right for score in these) / asked, 2)
    return found


def taken_for(right: str, answer: str) -> Iterator[tuple[str, str, str]]:
    """What was taken for what: kind of word, word that is right, word that was said ("?": none).

    Example: "The star is red." and "The cross is red." give ("shape", "star", "cross") and
    ("colour", "red", "red").
    """
    for kind, wanted in words_of(right).items():
        given = words_of(answer)[kind]
        fits = len(given) == len(wanted)
        for word, other in zip(wanted, given if fits else ["?"] * len(wanted), strict=True):
            yield kind, word, other


def confusions(scores: dict[str, Score]) -> dict[str, Counter[tuple[str, str]]]:
    """For each kind of word, how often a right word was answered by another, or by itself."""
    found: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    for score in scores.values():
        for (kind, word, other), count in score.taken.items():
            found[kind][word, other] += count
    return found


def show(scores: dict[str, Score], console: Console) -> None:
    """A table by lesson, the marks, and examples of what went wrong."""
    table = Table("lesson", "right", "asked", "%", "mark")
    for lesson, score in sorted(scores.items(), key=lambda item: (item[1].mark, item[0])):
        table.add_row(
            lesson, str(score.right), str(score.asked), f"{score.percent:.1f}", score.mark
        )
    console.print(table)
    for kind, pairs in confusions(scores).items():
        console.print(_confusion(kind, pairs))
    for mark, percent in totals(scores).items():
        reached = "reached" if percent >= MARKS[mark] else "MISSED"
        console.print(f"{mark:10} {percent:6.2f} %   {MARKS[mark]} % {reached}", highlight=False)
    for lesson, score in scores.items():
        for wrong in score.wrong[:SHOWN]:
            console.print(f"\n[bold]{lesson}[/bold]", *_lines(wrong), sep="\n  ", highlight=False)


def _confusion(kind: str, pairs: Counter[tuple[str, str]]) -> Table:
    """Rows: what is there; columns: what was said."""
    rows = sorted({word for word, _ in pairs})
    columns = rows + sorted({other for _, other in pairs} - set(rows))
    table = Table(kind, *columns, title=f"{kind}: there (rows) and said (columns)")
    for row in rows:
        table.add_row(row, *(str(pairs[row, column] or "·") for column in columns))
    return table


def _lines(wrong: dict[str, str]) -> list[str]:
    return [f"{key}: {text}".replace("[", r"\[") for key, text in wrong.items()]


def main() -> None:
    """The command."""
    found = argparse.ArgumentParser(
        prog="python -m refollama.fable.evaluate",
        description="Ask fable about combinations that training never showed, and count.",
    )
    found.add_argument("model", nargs="?", default="fable", help="a file, or a name (fable)")
    found.add_argument("--each", type=int, default=EACH, help=f"questions of a lesson ({EACH})")
    found.add_argument("--vision", action="store_true", help="ask about pictures")
    found.add_argument("--projector", type=Path, help="of a file that sees: what it sees with")
    found.add_argument("--json", type=Path, help="write marks, lessons and wrong answers here")
    given = found.parse_args()
    asked = (cases_of_pictures if given.vision else cases)(each=given.each)
    scores = evaluate(refollama.load(given.model, projector=given.projector), asked)
    show(scores, Console())
    if given.json:
        given.json.write_text(json.dumps(told(scores), indent=1, ensure_ascii=False) + "\n")


def told(scores: dict[str, Score]) -> dict[str, Any]:
    """All of it for JSON."""
    lessons = {
        lesson: {"mark": s.mark, "right": s.right, "asked": s.asked, "wrong": s.wrong}
        for lesson, s in scores.items()
    }
    taken = {
        kind: [[word, other, count] for (word, other), count in sorted(pairs.items())]
        for kind, pairs in confusions(scores).items()
    }
    return {"marks": totals(scores), "lessons": lessons} | ({"confusions": taken} if taken else {})


if __name__ == "__main__":
    main()
