"""The pages in docs/ say what the code does."""

import dataclasses
import re
from pathlib import Path

import pytest

from refollama.options import Options

DOCS = Path(__file__).parent.parent / "docs"
FIELDS = {field.name: field for field in dataclasses.fields(Options)}
WORDS = {bool: "true or false", int: "any integer", float: "any number"}


def rows(page):
    """The table rows of a page whose first cell is a name: name → the other cells."""
    found = {}
    for line in (DOCS / page).read_text().splitlines():
        if match := re.fullmatch(r"\| `([a-z_0-9]+)` \| (.*) \|", line):
            assert match[1] not in found, match[1]
            found[match[1]] = [cell.strip() for cell in match[2].split(" | ")]
    return found


def test_every_option_has_its_row():
    assert list(rows("options.md")) == list(FIELDS)


@pytest.mark.parametrize("name", FIELDS)
def test_defaults_ranges_and_reasons_are_those_of_the_code(name):
    field, cells = FIELDS[name], rows("options.md")[name]
    shown = "none" if field.default == () else str(field.default)
    assert cells[0] == (shown.lower() if isinstance(field.default, bool) else shown)
    if field.metadata["idle"]:
        assert cells[1].startswith(field.metadata["idle"])
    else:
        assert cells[1] == (field.metadata["allowed"] or WORDS[type(field.default)])


def test_when_an_option_counts_is_said_truly():
    from refollama.cachekind import CacheKind
    from refollama.models.memory import Placement

    for name, cells in rows("options.md").items():
        if FIELDS[name].metadata["idle"]:
            continue
        places = {"loaded": Placement._fields, "cache": CacheKind._fields}
        assert cells[2] == next((k for k, v in places.items() if name in v), "answer")
