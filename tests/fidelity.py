"""How far is each part from its judge?  The tests that measure it write docs/fidelity.md.

A test that has just computed its deviation tells it to the fixture `measured`:

    measured("models", "yarn", "float64", np.abs(found - expected).max(), cases=40)

In a usual run that goes nowhere. `pytest --fidelity=docs/fidelity.md` runs the tests that measure,
and these alone, and writes the page if all of them pass and nothing is missing that the page must
have. Hypothesis then draws the same examples each time, so the page changes with the code alone.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import pytest

from tests import fidelity_page

Deviation = str | float


class Measured(Protocol):
    """What the fixture is.  `section` and `judge` are names that tests/fidelity_page.py explains.

    `deviation` is a number, or words that are the same each time ("bit for bit"); `cases` counts
    what it was measured on, in the unit of the section. Of several reports of one subject by one
    judge the largest deviation counts, and the cases are added.
    """

    def __call__(
        self, section: str, subject: str, judge: str, deviation: Deviation, cases: int = 1
    ) -> None: ...


@dataclass
class Row:
    """One line of the page."""

    section: str
    subject: str
    judge: str
    deviation: Deviation
    cases: int = 0
    tests: set[str] = field(default_factory=set)  # path::name, without parameters


class Record:
    """Everything that one run has measured, and what it had to leave out."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str, str], Row] = {}
        self.skipped: dict[str, str] = {}  # test → reason

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    def add(
        self, section: str, subject: str, judge: str, deviation: Deviation, cases: int = 1
    ) -> None:
        """One measurement, of the test that runs now."""
        check(section, subject, judge, deviation, cases)
        key = section, subject, judge
        row = self._rows.setdefault(key, Row(section, subject, judge, deviation))
        row.deviation = larger(row.deviation, deviation)
        row.cases += cases
        row.tests.add(os.environ["PYTEST_CURRENT_TEST"].split("[")[0].split(" ")[0])


def check(section: str, subject: str, judge: str, deviation: Deviation, cases: int = 1) -> None:
    """All that `measured` does in a usual run: names that the page cannot explain are found."""
    assert section in fidelity_page.SECTIONS, f"no section {section!r}"
    assert judge in fidelity_page.JUDGES, f"no judge {judge!r}"
    assert subject and cases > 0
    assert isinstance(deviation, str) or math.isfinite(deviation)


def larger(a: Deviation, b: Deviation) -> Deviation:
    """Words cannot be compared: they must agree."""
    if isinstance(a, str) or isinstance(b, str):
        assert a == b, f"measured as {a!r} and as {b!r}"
        return a
    return max(float(a), float(b))


# ── pytest ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Measured:
    """Tell what was measured; see `Measured`."""
    writer = request.config.pluginmanager.get_plugin("fidelity-writer")
    return writer.record.add if writer else check


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fidelity", type=Path, metavar="PAGE", help="run the tests that measure; write PAGE"
    )


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--fidelity"):
        config.pluginmanager.register(Writer(path), "fidelity-writer")


class Writer:
    """Keeps the record of one run and writes the page at its end."""

    def __init__(self, path: Path) -> None:
        from hypothesis import settings

        settings.register_profile("fidelity", derandomize=True, database=None)
        settings.load_profile("fidelity")
        self.path = path
        self.record = Record()
        self.verdict = "not written: not all tests passed"

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        import torch

        measuring = [item for item in items if "measured" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=[item for item in items if item not in measuring])
        items[:] = measuring
        for item in items:
            if item.get_closest_marker("cuda") and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and isinstance(report.longrepr, tuple):
            self.record.skipped[report.nodeid] = report.longrepr[2].removeprefix("Skipped: ")

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus != pytest.ExitCode.OK:
            return
        if missing := fidelity_page.missing(self.record.rows):
            self.verdict = "\n  ".join(["not written: nothing measures", *missing])
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            return
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(fidelity_page.page(self.record), encoding="utf-8")
        self.verdict = f"written: {len(self.record.rows)} measurements"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line(f"{self.path} {self.verdict}")
