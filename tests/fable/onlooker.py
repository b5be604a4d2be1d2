"""Somebody who hears a description of a picture and answers all else from that: the judge.

It knows no generator: only words, and how English says these few things.
"""

import re

from refollama.fable.world import COLOURS, NUMBERS

S = "circle|square|triangle|star|cross|ring"
C = "|".join(COLOURS)
PLACE = (
    r"(?:at|on|in) the (?:top left|top right|top|left|middle|right|bottom left|bottom right|bottom)"
)
ROWS = {"top": 0, "bottom": 2}
COLUMNS = {"left": 0, "right": 2}
ACROSS = ("on the left", "in the middle", "on the right")
DOWN = ("at the top", "in the middle", "at the bottom")


def heard(description):
    """A list of (size, colour, shape, place)."""
    return re.findall(rf"\ban? (big|small) ({C}) ({S}) ({PLACE})\b", description)


def spot(place):
    """Row and column."""
    words = place.split()
    row = next((ROWS[word] for word in words if word in ROWS), 1)
    return row, next((COLUMNS[word] for word in words if word in COLUMNS), 1)


def fits(things, colour, shape):
    return [one for one in things if colour in ("", one[1]) and shape in ("", one[2])]


def meant(things, question):
    """The things that a question names: "the star", "the red star"."""
    found = [fits(things, *name) for name in re.findall(rf"the (?:({C}) )?({S})\b", question)]
    assert all(len(one) == 1 for one in found), (things, question)
    return [one[0] for one in found]


def answer(things, ground, question):
    """What the right answer says: a part of it, or a pattern."""
    text = question.lower().rstrip("?. ").removesuffix(", please")
    for solve in (_pair, _more, _count, _ground, _there, _one, _shape, _at):
        if (found := solve(things, ground, text)) is not None:
            return found
    return None


def _pair(things, ground, text):
    if not re.search(rf"(?:the .*\b(?:{S})\b.*){{2}}", text):
        return None
    (size, colour, shape, place), other = meant(things, text)
    if "colour" in text:
        return f"is {colour} and the {other[2]} is {other[1]}, so {_yes(colour == other[1])}."
    if text.startswith(("which", "what")):
        word = "bigger" if "bigger" in text else "smaller"
        best = shape if (size == "big") == (word == "bigger") else other[2]
        return f"{best} is {word}."
    if "bigger" in text or "smaller" in text:
        yes = _yes((size == "big") == ("bigger" in text))
        return re.compile(rf"is {size} and the .* is {other[0]}, so {yes}\.$")
    (row, column), (row2, column2) = spot(place), spot(other[3])
    [word] = re.findall("left of|right of|above|below|under", text)
    ahead = {"left of": column < column2, "right of": column > column2, "above": row < row2}
    yes = _yes(ahead.get(word, row > row2))
    sideways = word in ("left of", "right of")
    first, second = (ACROSS[column], ACROSS[column2]) if sideways else (DOWN[row], DOWN[row2])
    return re.compile(rf"is {first} and the .* is {second}, so {yes}\.$")


def _more(things, ground, text):
    match = re.search(rf"more ({S})e?s than ({S})e?s", text)
    if not match:
        return None
    x, y = (len(fits(things, "", shape)) for shape in match.groups())
    first, second = (
        f"{NUMBERS[count]} {shape}{'' if count == 1 else 'e?s'}"
        for count, shape in zip((x, y), match.groups(), strict=True)
    )
    return re.compile(rf"there (?:is|are) {first} and {second}, so {_yes(x > y)}\.$")


def _count(things, ground, text):
    match = re.search(rf"(?:how many|count the) (?:({C}) )?({S}|shape|thing)e?s", text)
    if not match:
        return None
    shape = match[2] if match[2] not in ("shape", "thing") else ""
    count = len(fits(things, match[1] or "", shape))
    return f"there {'is' if count == 1 else 'are'} {NUMBERS[count] if count else 'no'} "


def _ground(things, ground, text):
    return ground if re.search("ground|behind", text) else None


def _there(things, ground, text):
    match = re.search(rf"^(?:is there|do you see|can you see|does the picture show) an? "
                      rf"(?:({C}) )?({S})", text)  # fmt: skip
    return _yes(bool(fits(things, match[1] or "", match[2]))) if match else None


def _one(things, ground, text):
    if not (re.search(rf"the (?:(?:{C}) )?(?:{S})\b", text) or text in ONLY):
        return None
    [(size, colour, _, place)] = things if text in ONLY else meant(things, text)
    if re.search("where|place", text):
        return f"is {place}."
    return f"is {colour}." if re.search("colou?r", text) else f"is {size}."


ONLY = ("what colour is it", "what color is it")


def _shape(things, ground, text):
    if re.search(r"shape (?:is it|is this|do you see)$", text):
        return things[0][2]
    match = re.search(rf"^(?:what|which) (?:shape )?is (?:the )?({C})(?: thing)?$", text)
    return fits(things, match[1], "")[0][2] if match else None


def _at(things, ground, text):
    match = re.search(rf"^(?:what is|what do you see|which shape is|what's) ({PLACE})$", text)
    if not match or match[1] == "in the picture":
        return None
    there = [one for one in things if one[3] == match[1]]
    return f"{there[0][1]} {there[0][2]} is" if there else "nothing is"


def _yes(is_so):
    return "yes" if is_so else "no"
