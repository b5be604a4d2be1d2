"""A small reader who answers from the text of a conversation alone: the judge of the lessons.

It knows no generator: only the tables of the world, and how English says these few things. It
answers in one word, or with None where it has no opinion.
"""

import re

from refollama.fable.world import (
    ANIMALS,
    COLOUR_OF,
    COLOURS,
    DAYS,
    FAMILY,
    LEGS,
    NUMBERS,
    OPPOSITES,
    PEOPLE,
    PLACES,
    SAYS,
    WEATHER,
)

BEING = "|".join(ANIMALS + PEOPLE)
COLOUR = "|".join(COLOURS)
PLACE = "|".join(PLACES)
DAY = "|".join(DAYS).lower()

TOLD = {  # how facts are told; the name of a fact, and what follows
    "city": r"(?:i live in|my (?:home|house) is in|i am from|i'm from|i come from) (\w+)",
    "age": r"(?:i am|i'm|my age is) (\d+)",
    "pet": r"(?:i have an? (?!friend|sister)\w+(?: called| named|\. its name is)"
    r"|my (?!friend|sister|best)\w+(?: is called|'s name is)|name of my \w+ is) (\w+)",
    "friend": r"(?:my (?:best )?friend(?: is called| is|'s name is)|i have a friend called) (\w+)",
    "sister": r"(?:my sister(?: is called|'s name is)|i have a sister called) (\w+)",
    "colour": rf"(?:favou?rite colou?r is|(?:like|love) the colou?r) ({COLOUR})"
    rf"|({COLOUR}) is my favourite colour",
    "food": r"(?:\bi like(?: to eat)?|favourite food is|i love) (?!the|stories|that)(\w+)",
    "name": r"(?:my name is|(?:^|[,.!:] |and )i am|(?:^|[,.!:] |and )i'm|call me)"
    r" (?!from|\d|sad|fine|well|good|not|happy)(\w+)",
}
ASKED = {  # what is asked, by words of the question
    "pet": r"^(?:do you remember the name of|(?:what|who|how).*) my (?!friend|sister|best|name|age"
    r"|home|fav|mother|father|aunt|uncle|brother)\w+",
    "friend": r"my (?:best )?friend",
    "sister": r"my sister(?!'s (?:son|daughter)| called\?? my|.*niece)",
    "colour": r"my favou?rite colou?r|wh.*colou?r do i like",
    "food": r"do i like|i like to eat|my favourite food",
    "age": r"how old (?:am i|i am)|my age",
    "city": r"do i live|where i live|my home|am i from|do i come from",
    "name": r"(?:what is|what's|know|remember) my name|am i called|who am i|tell me my name",
}


def first(pattern: str, text: str) -> str:
    """What the pattern's brackets find first, or nothing."""
    found = re.search(pattern, text)
    return found[1] if found else ""


def facts(users: list[str]) -> dict[str, str]:
    """What users told of themselves; the last word counts."""
    found = {}
    for text in users:
        asked = re.sub("^(?:in one word|like a pirate): ", "", text.lower())
        if re.match("what|which|where|who|how|do |does|can |is |tell|give|describe", asked):
            continue  # a question
        for key, pattern in TOLD.items():
            for match in re.finditer(pattern, text.lower()):
                found[key] = next(filter(None, match.groups()))
    return found


def memory(users: list[str]) -> str | None:
    """The answer to a question about the user, the last of these texts, in one word."""
    question = users[-1].lower()
    for key, pattern in ASKED.items():
        if re.search(pattern, question):
            return facts(users[:-1]).get(key, "unknown")
    return None


def beings(text: str) -> list[dict[str, str]]:
    """Those of whom a passage tells, each in some sentences that name it."""
    patterns = {
        "animal": rf"\b({BEING})\b",
        "colour": rf"\b({COLOUR})\b",
        "place": rf"\b({PLACE})\b",
    }
    found: dict[str, dict[str, str]] = {}
    for part in re.split(r"(?<=[a-z])\. ", text.lower()):
        if name := first(r"called (\w+)", part) or first(rf"(\w+) the (?:{BEING})\b", part):
            values = {key: first(pattern, part) for key, pattern in patterns.items()}
            found.setdefault(name, {}).update({key: v for key, v in values.items() if v})
    return [{"name": name, **of} for name, of in found.items() if len(of) == len(patterns)]


def passage(text: str) -> str | None:
    """The answer to the question that ends a passage."""
    told, _, question = text.lower().rstrip("?. ").removesuffix(", please").rpartition(". ")
    if question == "please":
        return None
    if doubted := re.search(r"\b(?:is|does|did) (\w+) (?:an?|live \w+ the) (\w+)$", question):
        name, what = doubted.groups()
        who = [one for one in beings(told + ".") if one["name"] == name]
        return None if len(who) != 1 else "yes" if what in who[0].values() else "no"
    who = [one for one in beings(told + ".") if _is_meant(one, question)]
    if len(who) != 1:
        return None
    for word, key in (("colo", "colour"), ("called", "name"), ("name of", "name")):
        if word in question:
            return who[0][key]
    if "where" in question:
        return who[0]["place"]
    return who[0]["animal"]


def _is_meant(one: dict[str, str], question: str) -> bool:
    key = "place" if question.startswith("who lives") else None
    marks = [one[key]] if key else [one["name"], one["animal"]]
    return any(re.search(rf"\b{mark}\b", question) for mark in marks)


def known(question: str) -> str | None:
    """The answer to a question about the tables of the world."""
    text = question.lower().rstrip("?. =")
    for solve in (_sum, _opposite, _family, _day, _animal, _weather, _colour):
        if (found := solve(text.removesuffix(", please"))) is not None:
            return found.lower()
    return None


def _sum(text):
    figures = "|".join(sorted((*NUMBERS, r"\d+"), key=len, reverse=True))
    match = re.search(rf"\b({figures}) ?(\+|-|plus|minus) ?({figures})\b", text)
    if not match:
        return None
    x, y = (int(n) if n.isdigit() else NUMBERS.index(n) for n in (match[1], match[3]))
    total = x + y if match[2] in "+plus" else x - y
    if total < 0:
        return "negative"
    if total > 20 or x > 20:
        return "unknown"
    return str(total) if match[1].isdigit() else NUMBERS[total]


def _opposite(text):
    match = re.search(r"opposite of (\w+)", text)
    return match and OPPOSITES[match[1]]


def _family(text):
    for (of, who), called in FAMILY.items():
        if re.search(rf"my {of}'s {who}|{who} of my {of}", text):
            return called
    return None


def _day(text):
    match = re.search(rf"\b({DAY})\b", text)
    if not match or not re.search("tomorrow|yesterday|after|before", text):
        return None
    step = 1 if re.search("tomorrow|after", text) else -1
    return DAYS[([day.lower() for day in DAYS].index(match[1]) + step) % 7]


def _animal(text):
    match = re.search(r"\b(?:does|has) an? (\w+)", text)
    if not match or match[1] not in SAYS | LEGS:
        return None
    return str(LEGS[match[1]]) if "legs" in text else SAYS[match[1]]


def _weather(text):
    match = re.search(rf"\b({'|'.join(WEATHER)})\b", text)
    return WEATHER[match[1]] if match and re.search("need|take", text) else None


def _colour(text):
    match = re.search(r"colou?r (?:is|of) (.+)", text)
    return COLOUR_OF.get(match[1]) if match else None
