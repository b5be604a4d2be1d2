"""docs/tokenizers.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from refollama.errors import UnsupportedModel
from refollama.text import tokenizer_from
from refollama.text.bpe import PATTERNS
from refollama.text.tokenizer import END_KEYS, END_MARKERS

PAGE = (Path(__file__).parents[2] / "docs/tokenizers.md").read_text()


def between(mark: str) -> str:
    return PAGE.split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0]


def code(text: str) -> list[str]:
    return re.findall("`([^`]+)`", text)


def test_the_names_of_cuts_are_those_that_the_code_knows():
    rows = [code(line) for line in between("pre").splitlines() if line]
    names = [name for row in rows for name in row]
    assert sorted(names) == sorted(PATTERNS)
    cuts = [{PATTERNS[name].patterns for name in row} for row in rows]
    assert all(len(cut) == 1 for cut in cuts)
    assert len(set.union(*cuts)) == len(rows)  # each on one line


def test_the_names_that_put_a_bos_in_front():
    (row,) = (line for line in PAGE.splitlines() if "whether BOS is put" in line)
    assert sorted(code(row)) == sorted(name for name, cut in PATTERNS.items() if cut.add_bos)


def test_the_ends():
    assert sorted(code(between("ends"))) == sorted(END_MARKERS)
    assert all(f"`{key}_token_id`" in PAGE for key in END_KEYS)


def test_the_kinds():
    rows = re.findall(r"^\| `(\w+)` \|.*`(text/\w+\.py)` \|$", PAGE, re.MULTILINE)
    with pytest.raises(UnsupportedModel) as refusal:
        tokenizer_from({"tokenizer.ggml.model": "another"})
    known = str(refusal.value).split("supported: ")[1]
    assert [repr(kind) for kind, _ in rows] == known.split(", ")
    assert all((Path(__file__).parents[2] / "refollama" / file).exists() for _, file in rows)
