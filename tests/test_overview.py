"""What a server says of its models, as rows and as a page."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refollama import overview
from tests.fake_server import PS, SHOW, TAG

NOW = datetime(2023, 12, 15, tzinfo=timezone.utc)


def test_rows():
    assert overview.list_row(TAG)[:3] == ("tale:latest", "fe938a131f40", "3.8 GB")
    assert overview.ps_row(PS) == (
        "tale:latest",
        "fe938a131f40",
        "5 GB",
        "30%/70% CPU/GPU",
        "2048",
        "Forever",
    )


def test_a_server_may_say_less():
    assert overview.list_row({}) == ("", "", "0 B", "Never")
    assert overview.ps_row({}) == ("", "", "0 B", "100% CPU", "", "")
    assert overview.overview({}) == ""


@pytest.mark.parametrize(
    ("size", "on_gpu", "text"),
    [
        (0, 0, "100% CPU"),
        (10, 0, "100% CPU"),
        (10, 10, "100% GPU"),
        (10, 7, "30%/70% CPU/GPU"),
        (3, 1, "67%/33% CPU/GPU"),
        (10, 11, "Unknown"),
    ],
)
def test_processors(size, on_gpu, text):
    assert overview.processor(size, on_gpu) == text


@pytest.mark.parametrize(
    ("left", "text"),
    [
        (timedelta(minutes=5), "5 minutes from now"),
        (timedelta(days=365 * 100), "Forever"),
        (timedelta(0), "Stopping..."),
        (timedelta(seconds=-9), "Stopping..."),
    ],
)
def test_how_long_a_model_stays(left, text):
    assert overview.until(NOW + left, NOW) == text


PAGE = """\
  Model
    architecture        llama
    parameters          7.2B
    context length      32768
    embedding length    4096
    quantization        Q4_0

  Capabilities
    completion
    tools

  Parameters
    seed    7
    stop    "a b"

  System
    Be brief.

  License
    First
    Second
    ..."""


def test_the_page():
    assert overview.overview(SHOW) == PAGE


def test_the_whole_page():
    page = overview.overview(SHOW, verbose=True)
    begin, _, end = PAGE.partition("  System")
    assert page.startswith(begin) and page.endswith(end)
    between = page.removeprefix(begin).removesuffix(end)
    assert '    tokenizer.ggml.tokens      ["a", "b", "c", ...+2 more]\n' in between
    assert "    output.weight    Q6_K    [4096, 32000]\n" in between


@pytest.mark.parametrize("name", sorted(overview.PARTS))
def test_parts(name):
    assert overview.part(SHOW, name) == SHOW[name]
    assert overview.part({}, name) == overview.PARTS[name]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (999, "999"),
        (1000, "1.00K"),
        (260_032, "260.03K"),
        (124_439_808, "124.44M"),
        (7_241_732_096, "7.2B"),
    ],
)
def test_counts(number, text):
    assert overview.human_count(number) == text


def test_options_look_as_a_server_writes_them():
    """So that both stand under one another; the judge is the server's own text."""
    assert overview.parameters({"seed": 7, "stop": ["a b"]}) == SHOW["parameters"]
    two = overview.parameters({"stop": ("a", "b"), "penalize_newline": False}).splitlines()
    assert [line.split() for line in two] == [
        ["stop", '"a"'],
        ["stop", '"b"'],
        ["penalize_newline", "false"],
    ]


@given(st.dictionaries(st.text(), st.none() | st.text()))
def test_no_answer_of_a_server_breaks_the_page(record):
    known = {key: value for key, value in record.items() if key in ("system", "license")}
    assert isinstance(overview.overview(known), str)
