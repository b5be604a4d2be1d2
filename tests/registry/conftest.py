"""Fixtures of pull and push: a registry of our own, over a real socket."""

import pytest

from tests.registry.fake import FakeRegistry


@pytest.fixture
def registry():
    """It listens, and ends with the test."""
    with FakeRegistry() as one:
        yield one


@pytest.fixture
def hurry(monkeypatch):
    """What may pass is tried again at once, but twice; 0.3 seconds without a byte are a stall."""
    from refollama.store.registry import session

    assert session.retried.__kwdefaults__ is not None
    monkeypatch.setitem(session.retried.__kwdefaults__, "wait", lambda attempt: 0.01)
    monkeypatch.setitem(session.retried.__kwdefaults__, "tries", 3)
    monkeypatch.setattr(session, "STALL", 0.3)


@pytest.fixture
def small_parts(monkeypatch):
    """A blob of some hundred kilobytes has as many parts as one of gigabytes."""
    from refollama.store import parts

    monkeypatch.setattr(parts, "SMALLEST", 50_000)
