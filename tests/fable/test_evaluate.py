"""The judge, judged: right and wrong answers made by hand."""

import pytest

from refollama.fable.evaluate import (
    MARKS,
    Case,
    contradictions,
    evaluate,
    keys_of,
    right,
    totals,
)
from refollama.fable.exchange import Exchange

TEXT = set(MARKS) - {"vision"}
STORY = (
    "Once upon a time there was a brave fox called Ann. "
    "Ann the fox was red and lived in the forest. "
    "One sunny Monday, Ann met a frog called Tim. Tim the frog was green. Ann was happy. "
    "From that day on, Ann the red fox and Tim the frog were good friends."
)
CHILD = (
    "Once there was a shy girl by the sea. The girl was called Mia. Mia the girl had a blue coat. "
    "She met a fox called Tim. Tim the fox was red."
)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Ann was happy", "Lily was happy"),  # a third name
        ("Ann was happy", "The bear was happy"),  # a third animal
        ("Ann the red fox", "Ann the blue fox"),  # another colour
        ("Ann the red fox", "Ann the frog"),  # another animal
        ("Ann was happy", "Ann was white"),  # another colour, said
        ("Tim", "Ann"),  # a friend of the same name
        ("frog", "fox"),  # and of the same kind
    ],
)
def test_a_story_that_contradicts_itself_is_found_out(old, new):
    assert contradictions(STORY) == []
    assert contradictions(STORY.replace(old, new)) != []


@pytest.mark.parametrize("wish", ["red", "fox", "Ann", "forest", "brave"])
def test_wishes_that_are_kept(wish):
    assert contradictions(STORY, [wish]) == []


@pytest.mark.parametrize("wish", ["green", "frog", "Tim", "castle", "lazy"])
def test_wishes_that_are_not_kept_by_the_hero(wish):
    assert contradictions(STORY, [wish]) == [f"no {wish}"]


def test_a_child_has_a_coat_and_nobody_is_no_hero():
    assert contradictions(CHILD, ["girl", "Mia", "sea", "shy"]) == []
    assert contradictions("Once upon a time.") == ["no hero"]


def test_stories_of_the_lessons_do_not_contradict_themselves(talks, held):
    stories = [t for talk in talks + held for t in talk.turns if t.lesson == "story"]
    assert len(stories) > 90
    assert [(s.answer, p) for s in stories if (p := contradictions(s.answer, s.wishes))] == []


@pytest.mark.parametrize(
    ("answer", "keys"),
    [
        ('{"name": "Ann", "pet": null}', ["name", "pet"]),
        ("[1]", None),
        ('{"name": ', None),
        ("Your name is Ann.", None),
    ],
)
def test_keys_of_an_object(answer, keys):
    assert keys_of(answer) == keys


def case(mark, said):
    return Case(mark, mark, [], said)


def test_answers_are_right_word_by_word():
    said = Exchange("memory: name", "What is my name?", "Your name is Ann.", "Ann")
    assert right(case("memory", said), " Your name is Ann.")
    assert not right(case("memory", said), "Your name is Anna.")
    assert not right(case("memory", said), "Your name is Ann. Your name is Ann.")


def test_objects_are_right_by_their_keys_in_order():
    said = Exchange("json", "…", '{"name": "Ann", "age": 7}', wishes=("name", "age"))
    assert right(case("json", said), '{"name": "Tim", "age": 8}')
    assert not right(case("json", said), '{"age": 7, "name": "Ann"}')


class Oracle:
    """Says what it should, but for one lesson."""

    def __init__(self, asked, wrong=""):
        self.answers = {
            str(one.messages): one.said.answer if one.lesson != wrong else "No." for one in asked
        }
        self.formats = []

    def chat(self, messages, options=None, *, format=None):
        self.formats.append(format)
        return self.answers[str(messages)], None


def test_who_answers_right_gets_all_marks_and_a_wrong_lesson_shows(asked):
    oracle = Oracle(asked)
    assert totals(evaluate(oracle, asked)) == dict.fromkeys(TEXT, 100.0)
    assert "json" in oracle.formats
    scores = evaluate(Oracle(asked, wrong="memory: name"), asked)
    assert scores["memory: name"].percent == 0
    assert totals(scores)["memory"] < 100 == totals(scores)["questions"]
    assert scores["memory: name"].wrong[0]["answered"] == "No."


def test_every_lesson_is_asked_equally_often(asked):
    lessons = [one.lesson for one in asked]
    assert {lessons.count(lesson) for lesson in lessons} == {3}
    assert {one.mark for one in asked} == TEXT - {"format", "values"}
    assert all(one.messages[-1].role == "user" for one in asked)
