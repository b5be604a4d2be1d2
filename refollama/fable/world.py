"""All that fable knows of: a small world, as tables.

What is true here is true everywhere: lessons ask about it, evaluation asks again. Nothing depends
on the order of a set or of a hash, so the same seed gives the same words on any machine.
"""

from __future__ import annotations

from zlib import crc32

KEPT_OUT_OF = 10  # one combination in so many is never shown while the model learns


def words(text: str) -> tuple[str, ...]:
    """The words of a text, in order."""
    return tuple(text.split())


GIRLS = words(
    "Ann Anna Bella Clara Daisy Ella Emma Eva Grace Ida Julia Kate Lily Lucy Maria Mia Nina "
    "Olga Rosa Ruby Sara Sophie Vera Zoe"
)
BOYS = words(
    "Adam Ben Bob Carl David Felix Finn Fred Hugo Jack Jim John Leo Max Noah Oscar Otto Paul "
    "Peter Sam Simon Theo Tim Tom"
)
NAMES = GIRLS + BOYS

ANIMALS = words(
    "mouse fox cat dog bear rabbit hedgehog frog owl duck horse cow pig sheep goat lion tiger "
    "elephant monkey squirrel turtle wolf bird hen dragon snail"
)
WILD = words("fox bear hedgehog frog owl lion tiger elephant monkey squirrel wolf dragon snail")
TAME = tuple(animal for animal in ANIMALS if animal not in WILD)
PETS = words("cat dog rabbit mouse horse turtle bird duck goat hen")
PEOPLE = ("girl", "boy")

COLOURS = words("red blue green yellow black white brown grey orange pink purple")
SIZES = ("little", "big", "small", "tiny", "large", "tall")
VIRTUES = words("brave kind clever shy happy lazy hungry funny young old quiet lonely")

# Where one lives or goes: the place, and the word before it.
PLACES = {
    "forest": "in",
    "garden": "in",
    "village": "in",
    "castle": "in",
    "cave": "in",
    "barn": "in",
    "town": "in",
    "valley": "in",
    "park": "in",
    "desert": "in",
    "hill": "on",
    "farm": "on",
    "island": "on",
    "mountain": "on",
    "beach": "on",
    "river": "by",
    "lake": "by",
    "sea": "by",
    "bridge": "by",
    "school": "by",
}
CITIES = words(
    "London Paris Rome Berlin Madrid Vienna Oslo Prague Athens Dublin Lisbon Warsaw Cairo "
    "Delhi Tokyo Boston Chicago Zurich"
)

THINGS = words("ball hat kite book key drum cup boat bell shoe ring scarf box doll")
HIDING = ("under a tree", "behind a stone", "in a bush", "in the grass", "near a well")
FOODS = words("cheese bread honey soup cake milk rice jam corn fish")
FRUITS = words("apples pears plums cherries nuts berries carrots grapes pancakes cookies")

# How the weather is, and what one needs then.
WEATHER = {
    "sunny": "hat",
    "rainy": "umbrella",
    "snowy": "coat",
    "windy": "scarf",
    "cloudy": "jacket",
    "foggy": "lamp",
}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

NUMBERS = words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
)
MOST = 20  # as far as fable counts

_OPPOSITES = """
    big small, hot cold, day night, up down, open closed, fast slow, happy sad, old new, wet dry,
    full empty, hard soft, good bad, long short, early late, left right, loud quiet, rich poor,
    light dark, strong weak, thick thin, first last, high low, clean dirty, near far, sweet sour,
    inside outside, always never, yes no, black white, love hate
"""
OPPOSITES = {a: b for pair in _OPPOSITES.split(",") for a, b in [pair.split()]}
OPPOSITES |= {b: a for a, b in OPPOSITES.items()}

# Whose who is who.
FAMILY = {
    ("mother", "mother"): "grandmother",
    ("mother", "father"): "grandfather",
    ("father", "mother"): "grandmother",
    ("father", "father"): "grandfather",
    ("mother", "sister"): "aunt",
    ("mother", "brother"): "uncle",
    ("father", "sister"): "aunt",
    ("father", "brother"): "uncle",
    ("aunt", "son"): "cousin",
    ("aunt", "daughter"): "cousin",
    ("uncle", "son"): "cousin",
    ("uncle", "daughter"): "cousin",
    ("sister", "daughter"): "niece",
    ("sister", "son"): "nephew",
    ("brother", "daughter"): "niece",
    ("brother", "son"): "nephew",
}

COLOUR_OF = {
    "grass": "green",
    "snow": "white",
    "the sky": "blue",
    "the sun": "yellow",
    "a tomato": "red",
    "a carrot": "orange",
    "coal": "black",
    "chocolate": "brown",
    "a lemon": "yellow",
    "milk": "white",
    "a banana": "yellow",
    "blood": "red",
    "a leaf": "green",
    "the night": "black",
    "a strawberry": "red",
    "a plum": "purple",
}
SAYS = {
    "cow": "moo",
    "cat": "meow",
    "dog": "woof",
    "sheep": "baa",
    "duck": "quack",
    "pig": "oink",
    "lion": "roar",
    "bird": "tweet",
    "hen": "cluck",
    "owl": "hoot",
    "horse": "neigh",
    "frog": "croak",
}
LEGS = dict.fromkeys(words("mouse fox cat dog bear rabbit horse cow pig sheep goat lion"), 4)
LEGS |= {"bird": 2, "duck": 2, "hen": 2, "owl": 2, "spider": 8, "snail": 0, "fish": 0}


def kept_out(*words: str) -> bool:
    """Is this combination for evaluation only?  About one in ten is, by a fixed rule.

    The order of the words counts: for a hero it is animal, place, colour.
    """
    return crc32(" ".join(words).encode()) % KEPT_OUT_OF == 0


def a(word: str) -> str:
    """The word with its article: "a fox", "an owl"."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def at(place: str) -> str:
    """A place with the words before it: "on the hill"."""
    return f"{PLACES[place]} the {place}"
