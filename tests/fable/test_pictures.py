"""The laws of the pictures and of what is asked about them."""

import hashlib
import re
import subprocess
import sys
from collections import Counter
from random import Random

import numpy as np
import pytest

from refollama.fable.drawings import (
    MEAN,
    OUTLINES,
    PAINTS,
    PLACES,
    SHAPES,
    SIDE,
    STD,
    covers,
    drawing,
    drawn,
    pixels,
    png,
)
from refollama.fable.seeing import FIRST, NO_PICTURE, closely, viewing, words_of
from refollama.fable.world import COLOURS, NUMBERS, kept_out
from refollama.pictures import pixels as pixels_of_file
from tests.fable import onlooker

DIGEST = "from random import Random; from refollama.fable.drawings import drawing, drawn; \
import hashlib; r = Random(4); \
print(hashlib.sha256(b''.join(drawn(drawing(r)).tobytes() for _ in range(20))).hexdigest())"


@pytest.fixture(scope="module")
def drawings():
    rng = Random(0)
    return [drawing(rng) for _ in range(600)]


@pytest.fixture(scope="module")
def hidden():
    rng = Random(1)
    return [drawing(rng, held=True) for _ in range(200)]


@pytest.fixture(scope="module")
def viewings():
    return [viewing(0, index) for index in range(120)]


def groups(one):
    kinds = Counter((thing.colour, thing.shape) for thing in one.things)
    return [(NUMBERS[count], *kind) for kind, count in kinds.items()]


def test_what_covers_a_patch_is_what_its_pixels_show(drawings):
    """By the colours of the picture itself, where a patch is nearly of one colour."""
    checked: Counter[bool] = Counter()
    for one in drawings[:150]:
        if one.width != one.height:
            continue
        image = np.asarray(drawn(one), np.float64)
        for at, thing in enumerate(covers(one, 12)):
            y, x = divmod(at, SIDE // 12)
            patch = image[12 * y : 12 * y + 12, 12 * x : 12 * x + 12].reshape(-1, 3)
            if patch.std(axis=0).max() > 10:
                continue
            first, second = (
                np.array(paint) for paint in PAINTS[thing.colour if thing else one.ground]
            )
            low, high = np.minimum(first, second) - 8, np.maximum(first, second) + 8
            assert ((patch.mean(axis=0) >= low) & (patch.mean(axis=0) <= high)).all()
            checked[thing is None] += 1
    assert checked[True] > 1000
    assert checked[False] > 100


def test_nearly_every_thing_covers_a_patch(drawings):
    """A small one in a picture that is no square may be too small for that."""
    things = [(covers(one, 12), thing) for one in drawings for thing in one.things]
    missed = sum(all(other is not thing for other in found) for found, thing in things)
    assert missed < 0.02 * len(things)


def test_a_seed_gives_the_same_pictures_in_every_process():
    rng = Random(4)
    ours = hashlib.sha256(b"".join(drawn(drawing(rng)).tobytes() for _ in range(20))).hexdigest()
    ran = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True)
    assert ran.stdout.strip() == ours


def test_what_is_kept_out_is_never_drawn_and_evaluation_draws_nothing_else(drawings, hidden):
    assert not any(kept_out(*group) for one in drawings for group in groups(one))
    assert all(kept_out(*group) for one in hidden for group in groups(one))
    shown = {word for one in drawings for group in groups(one) for word in group}
    assert shown == {*NUMBERS[1:5], *COLOURS, *SHAPES}


def test_every_number_has_something_that_is_kept_out():
    for number in NUMBERS[1:5]:
        assert any(kept_out(number, colour, shape) for colour in COLOURS for shape in SHAPES)


def test_the_rows_of_training_are_those_of_the_file_that_is_sent(drawings):
    for one in drawings[:20]:
        sent = pixels_of_file(png(one), SIDE, MEAN, STD)
        np.testing.assert_allclose(pixels(one), sent, atol=1e-6)


def test_a_thing_has_its_colour_in_its_middle_and_lies_where_it_is_said_to_be(drawings, hidden):
    """Of all colours its own is the nearest, and the third of the picture is that of its place."""
    for one in drawings[:200] + hidden[:50]:
        image = drawn(one)
        scale = max(image.size) / max(one.width, one.height)
        for thing in one.things:
            assert thing.column == int(3 * thing.x / one.width)
            assert thing.row == int(3 * thing.y / one.height)
            if thing.shape != "ring":
                seen = image.getpixel((int(scale * thing.x), int(scale * thing.y)))
                assert nearest(seen) == thing.colour, (one, seen)


def nearest(seen):
    """The colour between whose two shades this lies."""

    def distance(colour):
        a, b = (np.array(paint, float) for paint in PAINTS[colour])
        part = np.clip(np.dot(seen - a, b - a) / np.dot(b - a, b - a), 0, 1)
        return np.linalg.norm(seen - (a + part * (b - a)))

    return min(PAINTS, key=distance)


def test_things_do_not_touch_and_none_is_cut_off(drawings):
    for one in drawings:
        for thing in one.things:
            assert thing.r < thing.x < one.width - thing.r
            assert thing.r < thing.y < one.height - thing.r
            others = [other for other in one.things if other is not thing]
            for other in others:
                apart = max(abs(thing.x - other.x), abs(thing.y - other.y))
                assert apart > thing.r + other.r


def test_big_and_small_are_never_confused(drawings):
    for one in drawings:
        big, small = ([t.r for t in one.things if t.size == size] for size in ("big", "small"))
        assert not big or not small or min(big) > 1.3 * max(small)


def test_outlines_have_their_area():
    """By the shoelace: of a circle π, of a regular polygon its own, of a ring what is left."""
    areas = {shape: area(points()) for shape, points in OUTLINES.items()}
    assert areas["circle"] == pytest.approx(np.pi, rel=0.01)
    assert areas["ring"] == pytest.approx(np.pi * (1 - 0.55**2), rel=0.01)
    assert areas["square"] == pytest.approx(2 * 1.25**2)
    assert areas["triangle"] == pytest.approx(3 * np.sqrt(3) / 4 * 1.1**2)
    assert areas["cross"] == pytest.approx(4 * 0.68 * 0.66 + 0.68**2)
    assert len({round(value, 2) for value in areas.values()}) == len(SHAPES)


def area(points):
    x, y = np.array(points).T
    return abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


# ── what is asked ─────────────────────────────────────────────────────────────────────────────


def test_who_only_hears_a_description_answers_the_same(viewings):
    agreed: Counter[str] = Counter()
    for talk in viewings + [viewing(1, index, held=True) for index in range(40)]:
        now = None
        for turn, said in enumerate(talk.turns):
            now = talk.drawings.get(turn, now)
            if now is None or said.lesson in ("what", "describe", "manners"):
                continue
            things = onlooker.heard(closely(Random(0), now).answer)
            assert len(things) == len(now.things)
            expected = onlooker.answer(things, now.ground, said.user)
            assert expected is not None, said
            found = said.answer.lower()
            pattern = re.compile(re.escape(expected)) if isinstance(expected, str) else expected
            assert pattern.search(found), (said, things)
            if expected in ("yes", "no"):
                assert found.startswith(expected)
            agreed[said.lesson] += 1
    assert len(agreed) == len(FIRST) - 2
    assert min(agreed.values()) > 20, agreed


def test_yes_is_as_frequent_as_no():
    """Who always says yes is right half of the time, in each lesson."""
    answers: dict[str, list[bool]] = {}
    for index in range(300):
        for said in viewing(7, index).turns:
            said_so = re.search(r"^(yes|no), |, so (yes|no)\.$", said.answer.lower())
            if said_so and said.lesson != "manners":
                answers.setdefault(said.lesson, []).append("yes" in said_so.groups())
    assert {"is there", "bigger", "beside"} <= set(answers)
    for lesson in ("is there", "bigger", "beside"):
        assert 0.35 < np.mean(answers[lesson]) < 0.65, lesson


def test_who_has_no_picture_says_so(viewings):
    before = [
        said for talk in viewings for said in talk.turns[: next(iter(talk.drawings))]
    ]  # fmt: skip
    asked = [said for said in before if said.lesson != "manners"]
    assert len(asked) > 3
    assert {said.answer for said in asked} == {NO_PICTURE}


def test_messages_hold_the_picture_where_it_stands(viewings):
    talk = next(talk for talk in viewings if len(talk.drawings) == 2)
    shown = [at for at, message in enumerate(talk.messages()) if message.images]
    assert shown == [2 * turn for turn in talk.drawings]
    assert len(talk.messages(3)) == 5


def test_words_of_a_text_in_their_order():
    found = words_of("I see two red crosses at the top left and a pink star at the top.")
    assert found["shape"] == ["cross", "star"]
    assert found["colour"] == ["red", "pink"]
    assert found["number"] == ["two"]
    assert found["place"] == [PLACES[0], PLACES[1]]
