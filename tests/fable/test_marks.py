"""The README tells of the models what was measured, and they were measured as they are shipped."""

import json
import re
from pathlib import Path

import pytest

from refollama.fable.bundled import FOLDER, bundled
from refollama.fable.evaluate import MARKS

README = (Path(__file__).parents[2] / "README.md").read_text()
NAMES = tuple(bundled())
ROW = re.compile(
    r"^\| [^|]+ \| `(?P<mark>\w+)` \| (?P<percent>[\d.]+) % \| (?P<asked>\d+) \|$", re.MULTILINE
)


def marks(name):
    return json.loads((FOLDER / name / "marks.json").read_text())


def test_the_readme_has_the_marks_that_were_measured():
    told = {row["mark"]: (float(row["percent"]), int(row["asked"])) for row in ROW.finditer(README)}
    measured = {}
    for name in NAMES:
        found = marks(name)
        for mark, percent in found["marks"].items():
            lessons = [one for one in found["lessons"].values() if one["mark"] == mark]
            measured[mark] = (round(percent, 1), sum(one["asked"] for one in lessons))
    assert told == measured
    assert told.keys() == MARKS.keys()


@pytest.mark.parametrize("name", NAMES)
def test_marks_add_up(name):
    found = marks(name)
    for mark, percent in found["marks"].items():
        lessons = [one for one in found["lessons"].values() if one["mark"] == mark]
        right, asked = (sum(one[key] for one in lessons) for key in ("right", "asked"))
        assert percent == pytest.approx(100 * right / asked, abs=0.01)
        assert sum(len(one["wrong"]) for one in lessons) == asked - right


@pytest.mark.parametrize("name", NAMES)
def test_how_they_learned_is_told(name):
    told = json.loads((FOLDER / name / "training.json").read_text())
    assert 0 < told["minutes"] * told["threads"] <= 2 * 90  # an hour and a half of two cores
    assert told["losses"][-1] < told["losses"][0] / 5
    assert told["marks"][-1]["step"] <= told["plan"]["steps"]
