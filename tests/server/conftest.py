"""A server in this process: the app, a client without sockets, and a store with one model."""

import contextlib
import json
import time

import httpx
import pytest

from refollama.messages import Create
from refollama.server.app import create_app
from refollama.service import Service
from refollama.shelf import LoadedModels
from refollama.store import Store
from tests.tiny import write_model

TEMPLATE = "{{ if .System }}<{{ .System }}>{{ end }}{{ .Prompt }}"
GREEDY = {"temperature": 0, "repeat_penalty": 1, "num_predict": 12}


@pytest.fixture
def service(tiny):
    """A service whose store holds `tiny`, and `shy`, which has a template and a system text."""
    one = Service(Store.default(), LoadedModels(), local_files=True)
    for name, more in {
        "tiny": "",
        "shy": f'TEMPLATE """{TEMPLATE}"""\nSYSTEM be brief\nPARAMETER num_predict 3\n'
        "PARAMETER temperature 0\n",
    }.items():
        list(one.create(Create(name, f"FROM {tiny}\n{more}")))
    yield one
    one.close()


@pytest.fixture
def app(service):
    return create_app(service)


@pytest.fixture
def http(app):
    """An httpx client that calls the app directly."""
    with httpx.Client(
        transport=httpx.WSGITransport(app, raise_app_exceptions=False), base_url="http://localhost"
    ) as client:
        yield client


@pytest.fixture
def ask(http):
    """POST /api/generate → the records of the answer; several if it was streamed."""

    def post(**body):
        response = http.post("/api/generate", json=body)
        assert response.status_code == 200, response.text
        return [json.loads(line) for line in response.text.splitlines()]

    return post


ENDLESS = {"num_predict": -1, "num_ctx": 0, "temperature": 0, "repeat_penalty": 1}


def endless(folder):
    """A model that, greedily, goes on for thousands of tokens; its context holds a million."""
    path = folder / "endless.gguf"
    return write_model(path, seed=3, claims={"llama.context_length": 1_000_000})


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@contextlib.contextmanager
def unchanged(store):
    """Whatever happens inside leaves every file of the store as it was."""

    def snapshot():
        return {
            path.relative_to(store.root): path.read_bytes()
            for path in store.root.rglob("*")
            if path.is_file()
        }

    before = snapshot()
    yield
    assert snapshot() == before
