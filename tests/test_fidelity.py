"""docs/fidelity.md names everything that there is; and how the numbers get there."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import fidelity_page
from tests.fidelity import Record, larger

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "fidelity.md"


@pytest.mark.parametrize("section", fidelity_page.required())
def test_the_page_has_every_type_tokenizer_variant_and_option(section):
    """What is new must be measured: then `make fidelity` writes the page again."""
    on_page = fidelity_page.subjects(PAGE.read_text(encoding="utf-8"))[section]
    assert set(fidelity_page.required()[section]) <= on_page


def test_the_page_has_nothing_that_is_gone():
    """In the sections that the code's own tables make up; others name real models, too."""
    on_page = fidelity_page.subjects(PAGE.read_text(encoding="utf-8"))
    for section in ("unpacking", "packing", "word patterns", "options"):
        assert on_page[section] <= set(fidelity_page.required()[section])


def test_the_largest_deviation_of_a_subject_counts_and_cases_are_added():
    record = Record()
    for deviation, cases in ((1e-6, 3), (4e-6, 2), (2e-6, 1)):
        record.add("models", "yarn", "float64", deviation, cases)
    record.add("models", "yarn", "transformers", 1e-5)
    first, second = record.rows
    assert (first.deviation, first.cases) == (4e-6, 6)
    assert (second.judge, second.deviation, second.cases) == ("transformers", 1e-5, 1)
    (test,) = first.tests
    assert test.endswith("::test_the_largest_deviation_of_a_subject_counts_and_cases_are_added")


@pytest.mark.parametrize(("a", "b"), [("equal", "bit for bit"), ("equal", 0.0), (0.0, "equal")])
def test_words_that_differ_have_no_largest(a, b):
    with pytest.raises(AssertionError, match="measured as"):
        larger(a, b)


@pytest.mark.parametrize(
    "wrong",
    [
        ("model", "x", "float64", 0.0),
        ("models", "x", "floats", 0.0),
        ("models", "x", "float64", float("nan")),
    ],
)
def test_names_without_an_explanation_and_no_numbers_are_refused_in_every_run(measured, wrong):
    with pytest.raises(AssertionError):
        measured(*wrong)


@pytest.mark.parametrize(
    ("deviation", "said"),
    [(2.44e-6, "2e-06"), (0.0, "0"), (0.0123, "0.01"), ("bit for bit", "bit for bit")],
)
def test_one_digit_is_shown(deviation, said):
    assert fidelity_page.shown(deviation) == said


def test_a_table_is_aligned_and_keeps_its_columns():
    lines = fidelity_page.table(("name", "cases"), [("a|b", "1"), ("long name", "12,000")])
    assert lines.splitlines() == [
        "| name      |  cases |",
        "| --------- | -----: |",
        "| a\\|b      |      1 |",
        "| long name | 12,000 |",
    ]


def test_an_option_is_proved_wherever_its_name_was_measured():
    record = Record()
    record.add("sampling", "top_k", "enumeration", "equal")
    (row,) = fidelity_page.of("options", record.rows)
    assert row.subject == "top_k"
    (line,) = [line for line in fidelity_page.missing(record.rows) if "options" in line]
    assert "top_k" not in line and "top_p" in line


def test_the_page_is_the_same_whatever_ran_first():
    measurements: list[tuple[Any, ...]] = [
        ("unpacking", "Q4_0", "gguf", "bit for bit", 7),
        ("models", "yarn", "float64", 2.4e-6, 40),
        ("models", "plain", "float64", 3e-6, 40),
        ("models", "plain", "all at once", 1e-6, 40),
        ("options", "seed", "definition", "equal"),
    ]
    pages = set()
    for order in (measurements, measurements[::-1]):
        record = Record()
        for measurement in order:
            record.add(*measurement)
        record.skipped = {"tests/x.py::test_y[1]": "no file", "tests/x.py::test_y[2]": "no file"}
        pages.add(fidelity_page.page(record))
    (page,) = pages
    assert page.index("| plain   | all at once") < page.index("| plain   | float64")
    assert page.index("| plain   | float64") < page.index("| yarn    | float64")
    assert "| `tests/x.py::test_y` |     2 | no file |" in page
    assert "needs the recorded answers, not run" in page


MEASURES = """
def test_it(measured):
    measured("models", "yarn", "float64", 1e-6)
    {then}

def test_another():
    raise AssertionError("measures nothing, so it does not run")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("then", "said"), [("assert False", "not all tests passed"), ("", "options: num_ctx, ")]
)
def test_the_page_is_not_written_unless_all_is_measured_and_passes(tmp_path, then, said):
    (tmp_path / "test_one.py").write_text(MEASURES.format(then=then))
    page = tmp_path / "page.md"
    command = [sys.executable, "-m", "pytest", "-p", "tests.fidelity", f"--fidelity={page}"]
    places = ["--rootdir", tmp_path, tmp_path]
    run = subprocess.run([*command, *places], cwd=ROOT, capture_output=True)
    assert run.returncode == 1 and said in run.stdout.decode()
    assert not page.exists()
