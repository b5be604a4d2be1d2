"""docs/quantising.md tables every type that there is, as the code packs it."""

import re

import pytest

from benchmarks.quantising import (
    FABLE,
    LLAMA3,
    PAGE,
    becomes,
    block_bits,
    llama3_bytes,
    normal_error,
    put,
    table,
    talks,
    tensor_bits,
)
from refollama.fable.lessons import conversation
from refollama.quantize import plan
from refollama.text import tokenizer_from
from refollama.weights.gguf import open_gguf
from refollama.weights.mixes import MIXES

TEXT = PAGE.read_text(encoding="utf-8")
# GiB of Llama 3 8B, as llama.cpp's own list of types has them, with the sizes of its own files.
PUBLISHED = {
    "Q8_0": 7.96, "Q6_K": 6.14, "Q5_K_M": 5.33, "Q5_K_S": 5.21, "Q5_1": 5.65, "Q5_0": 5.21,
    "Q4_K_M": 4.58, "Q4_K_S": 4.37, "Q4_1": 4.78, "Q4_0": 4.34, "Q3_K_L": 4.03, "Q3_K_M": 3.74,
    "Q3_K_S": 3.41, "Q2_K": 2.96,
}  # fmt: skip


def rows(name):
    """The rows of a table: type → its other cells."""
    part = TEXT.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->\n")[0]
    cells = [line[2:-2].split(" | ") for line in part.splitlines()[2:]]
    return {first.strip("`"): [cell.strip() for cell in rest] for first, *rest in cells}


@pytest.mark.parametrize("name", ["types", "fable"])
def test_every_type_has_its_row(name):
    assert list(rows(name)) == list(MIXES)


def test_every_type_is_told_when_to_take_it():
    advice = TEXT.split("## Which one?")[1].split("\n## ")[0]
    assert set(re.findall(r"`(\w+)`", advice)) >= MIXES.keys() - {"Q4_K_S", "Q5_K_S"}


@pytest.mark.parametrize("type", MIXES)
def test_bits_and_sizes_are_those_of_the_code(type):
    base, bits, _, _, size, more = rows("types")[type]
    assert (base, bits) == (MIXES[type].base, f"{block_bits(MIXES[type].base):.4g}")
    assert size == f"{llama3_bytes(type) / 2**30:.2f}"
    assert more == (f"+{LLAMA3[type]:.4f}" if type in LLAMA3 else "")


@pytest.mark.parametrize("type", PUBLISHED)
def test_sizes_are_those_that_llama_cpp_publishes(type):
    """Its files have a vocabulary besides, and its numbers two digits."""
    assert llama3_bytes(type) / 2**30 == pytest.approx(PUBLISHED[type], abs=0.02)


@pytest.mark.parametrize("type", ["Q8_0", "Q4_0", "F16"])
def test_errors_are_those_of_the_packer(type):
    assert float(rows("types")[type][2].rstrip(" %")) == pytest.approx(
        100 * normal_error(type), abs=0.02
    )


def test_what_becomes_of_fable_is_what_is_planned():
    with open_gguf(FABLE) as file:
        for type, (matrices, bits, *_) in rows("fable").items():
            work = plan(file, type, again=True)
            assert (matrices, bits) == (becomes(work), f"{tensor_bits(work):.2f}")


def test_answers_are_asked_for_and_nothing_else():
    with open_gguf(FABLE) as file:
        words = tokenizer_from(file.metadata)
    for index, talk in enumerate(talks(words, 3)):
        pieces = zip(talk.ids[1:], talk.asked.tolist(), strict=True)
        asked = b"".join(words.piece(id) if ask else b"\n" for id, ask in pieces).decode()
        turns = conversation(1, index, held=True).turns
        assert re.findall(r"[^\n]+", asked) == [turn.answer for turn in turns]


def test_a_table_is_put_in_the_place_of_the_old_one():
    page = "before\n<!-- a -->\nold\n<!-- /a -->\nbetween\n<!-- b -->\n<!-- /b -->\nafter\n"
    new = put(page, "a", table(("x", "y", "z"), [("1", "2", "3")]))
    assert new == page.replace("old\n", "| x | y | z |\n| --- | --- | --: |\n| 1 | 2 | 3 |\n")
    assert put(put(new, "b", "more\n"), "b", "") == new
