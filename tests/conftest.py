"""Fixtures for everybody: small models, a home of its own, and the folder of recorded answers."""

import os
import signal
from pathlib import Path

import hypothesis
import pytest

# How long an example takes is the machine's affair; a test that hangs is ended by pytest-timeout.
hypothesis.settings.register_profile("any-machine", deadline=None)
hypothesis.settings.load_profile("any-machine")

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # Tests that run side by side share the cores; set before torch is imported, which reads it.
    share = max(1, (os.cpu_count() or 1) // workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(share))

# What a shell starts in the background ignores Ctrl-C, and our own processes would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["tests.fidelity"]


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    """Each test has its own store and home; nothing of the user's is read or written."""
    place = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setenv("OLLAMA_MODELS", str(place / "models"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name in ("HOST", "ORIGINS", "NOPRUNE", "NUM_PARALLEL", "API_KEY", "CONTEXT_LENGTH"):
        monkeypatch.delenv(f"OLLAMA_{name}", raising=False)
    monkeypatch.delenv("OLLAMA_REGISTRY_HOST", raising=False)
    # Nothing leaves this machine: what is pulled without a word of where from finds nobody.
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    return place


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A small llama with random weights, as a GGUF file."""
    from tests.tiny import write_model

    return write_model(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="session")
def oracles():
    """The folder of real weights and recorded answers; tests that need it are skipped without."""
    folder = os.environ.get("REFOLLAMA_ORACLES")
    if not folder:
        pytest.skip("REFOLLAMA_ORACLES names no folder")
    return Path(folder)
