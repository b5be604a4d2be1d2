"""Pull and push over HTTP, against a registry on a socket: lines, statuses, what is left behind."""

import itertools
import json
import logging
import threading
import time

import httpx
import ollama
import pytest

from refollama.server.app import create_app
from refollama.service import Service
from refollama.shelf import LoadedModels
from refollama.store import Name, Store
from refollama.store.registry.pull import pull
from tests.registry.fake import FakeRegistry
from tests.server.conftest import GREEDY, unchanged, wait_until
from tests.store.helpers import snapshot
from tests.test_client import refused_port

TINY = "registry.ollama.ai/library/tiny/latest"
END = ["verifying sha256 digest", "writing manifest", "removing any unused layers", "success"]


@pytest.fixture
def registry():
    with FakeRegistry() as one:
        yield one


@pytest.fixture
def stocked(registry, service):
    """The registry has the store's `tiny` as `me/tale`; → the name of it there."""
    registry.add_from(service.store.root, "me/tale", like=TINY)
    return f"{registry.host}/me/tale"


@pytest.fixture
def empty(tmp_path):
    """A service of a store of its own, in which nothing is."""
    one = Service(Store(tmp_path / "empty"), LoadedModels(), local_files=True)
    yield one
    one.close()


@pytest.fixture
def fresh(empty):
    """An httpx client of that service."""
    yield from client_of(empty)


def client_of(service):
    transport = httpx.WSGITransport(create_app(service), raise_app_exceptions=False)
    with httpx.Client(transport=transport, base_url="http://localhost") as client:
        yield client


def ask(http, route, model, **body):
    return http.post(f"/api/{route}", json={"model": model, "insecure": True, **body})


def records(response):
    assert response.status_code == 200, response.text
    assert response.headers["Content-Type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


def statuses(found):
    """Each once, however often it comes in a row."""
    return [status for status, _ in itertools.groupby(record["status"] for record in found)]


def layers_of(service, name="tiny"):
    manifest = service.store.manifests.read(Name.parse(name)).manifest
    return [*manifest.layers, manifest.config]


# --- create ----------------------------------------------------------------------------------


@pytest.fixture
def by_http(monkeypatch):
    """FROM cannot say `insecure`, and the registries of the tests have no certificates."""
    monkeypatch.setattr(
        "refollama.service.pull", lambda *args, **given: pull(*args, **{**given, "insecure": True})
    )


@pytest.mark.usefixtures("by_http")
def test_what_from_names_is_pulled_first(fresh, empty, stocked):
    """As in Ollama, whose clients do not end at the first success either."""
    modelfile = f"FROM {stocked}\nSYSTEM You are a mouse."
    found = records(fresh.post("/api/create", json={"model": "mouse", "modelfile": modelfile}))
    told = statuses(found)
    assert told[:2] == ["pulling model", "pulling manifest"] and told.count("success") == 2
    assert told[told.index("success") + 1] == "reading model metadata" and told[-1] == "success"
    assert {str(one.name) for one in empty.tags()} == {"mouse:latest", f"{stocked}:latest"}
    again = fresh.post("/api/create", json={"model": "m", "from": stocked, "stream": False})
    assert again.json() == {"status": "success"}


@pytest.mark.usefixtures("by_http")
def test_what_from_names_and_no_registry_has(fresh, empty, registry):
    name = f"{registry.host}/me/nobody"
    with unchanged(empty.store):
        found = records(fresh.post("/api/create", json={"model": "m", "from": name}))
        once = fresh.post("/api/create", json={"model": "m", "from": name, "stream": False})
    assert statuses(found[:-1]) == ["pulling model", "pulling manifest"]
    said = f"model '{name}:latest' not found, and not to be pulled: pull model manifest: "
    assert found[-1] == {"error": f"{said}file does not exist"}
    assert (once.status_code, once.json()) == (404, found[-1])


# --- pull ------------------------------------------------------------------------------------


def test_a_pull_tells_every_step_and_brings_the_model(service, stocked, fresh, empty):
    found = records(ask(fresh, "pull", stocked))
    layers = layers_of(service)
    bars = [f"pulling {layer.digest[7:19]}" for layer in layers]
    assert statuses(found) == ["pulling manifest", *bars, *END]
    for layer in layers:
        told = [record for record in found if record.get("digest") == layer.digest]
        assert {record["total"] for record in told} == {layer.size}
        done = [record.get("completed", 0) for record in told]
        assert done == sorted(done) and done[-1] == layer.size
    assert layers_of(empty, stocked) == layers


def test_the_model_answers_as_the_one_that_it_came_from(http, stocked, fresh):
    assert ask(fresh, "pull", stocked, stream=False).json() == {"status": "success"}
    said = {"prompt": "the", "options": GREEDY, "stream": False}
    here, there = (
        client.post("/api/generate", json={"model": name, **said}).json()["response"]
        for client, name in ((http, "tiny"), (fresh, stocked))
    )
    assert here == there != ""


def test_a_second_pull_fetches_no_blob(registry, stocked, fresh):
    ask(fresh, "pull", stocked)
    before = registry.sent()
    found = records(ask(fresh, "pull", stocked))
    assert registry.sent() == before > 0
    assert [record["completed"] for record in found if "digest" in record] == [
        record["total"] for record in found if "digest" in record
    ]
    assert found[-1] == {"status": "success"}


def test_old_and_new_names_of_the_field(registry, stocked, fresh):
    """The document of 2023 has `name`; whatever else it allows is allowed, too."""
    body = {"name": stocked, "insecure": True, "username": "me", "password": "secret"}
    assert records(fresh.post("/api/pull", json=body))[-1] == {"status": "success"}


def test_a_password_is_not_logged(stocked, fresh, caplog):
    caplog.set_level(logging.DEBUG)
    assert ask(fresh, "pull", stocked, username="me", password="se-cret").status_code == 200
    assert "password has no effect" in caplog.text
    assert "se-cret" not in caplog.text


# --- push ------------------------------------------------------------------------------------


def test_a_push_tells_every_step_and_takes_the_model_there(registry, service, http):
    name = f"{registry.host}/me/tale"
    http.post("/api/copy", json={"source": "tiny", "destination": name})
    found = records(ask(http, "push", name))
    layers = layers_of(service)
    bars = [f"pushing {layer.digest[7:19]}" for layer in layers]
    steps = [step for bar in bars for step in ("starting upload", bar)]
    assert statuses(found) == ["retrieving manifest", *steps, "pushing manifest", "success"]
    for layer in layers:
        *_, last = (record for record in found if record.get("digest") == layer.digest)
        assert last["completed"] == last["total"] == layer.size
        assert registry.bytes_of(layer.digest, 0, layer.size) == (
            service.store.blobs.path(layer.digest).read_bytes()
        )
    assert json.loads(registry.manifests["me/tale", "latest"])["layers"]


def test_there_and_back_nothing_has_changed(registry, service, http):
    name = f"{registry.host}/me/tale:mine"
    http.post("/api/copy", json={"source": "shy", "destination": name})
    assert ask(http, "push", name, stream=False).json() == {"status": "success"}
    before = {model["name"]: model["digest"] for model in http.get("/api/tags").json()["models"]}
    for model in before:
        http.request("DELETE", "/api/delete", json={"model": model})
    assert http.get("/api/tags").json() == {"models": []}
    assert ask(http, "pull", name, stream=False).json() == {"status": "success"}
    (back,) = http.get("/api/tags").json()["models"]
    assert layers_of(service, name)
    assert back["name"] == name
    again = f"{registry.host}/me/tale:again"
    http.post("/api/copy", json={"source": name, "destination": again})
    sent = registry.count("PATCH") + registry.count("POST")
    assert ask(http, "push", again, stream=False).json() == {"status": "success"}
    assert registry.count("PATCH") + registry.count("POST") == sent
    assert registry.manifests["me/tale", "mine"] == registry.manifests["me/tale", "again"]


# --- what goes wrong -------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["pull", "push"])
@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "model is required"),
        ({"model": ""}, "model is required"),
        ({"model": "a b"}, "is no model of a model name"),
        ({"model": "../../x"}, "is no"),
        ({"model": 3}, "model must be a string"),
        ({"model": "tiny", "insecure": "yes"}, "insecure must be true or false"),
        ({"model": "tiny", "stream": 1}, "stream must be true or false"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_a_wrong_request_is_a_400(http, route, body, sentence, stream):
    response = http.post(f"/api/{route}", json={"stream": stream} | body)
    assert response.status_code == 400
    assert response.headers["Content-Type"] == "application/json; charset=utf-8"
    assert sentence in response.json()["error"]


def refusals(http, route, model, *, first):
    """The error of a stream, behind its first line; and the one of the answer in one piece."""
    *begin, last = records(ask(http, route, model))
    assert [record["status"] for record in begin][: len(first)] == first
    whole = ask(http, route, model, stream=False)
    assert whole.status_code == 500
    assert whole.headers["Content-Type"] == "application/json"
    assert whole.json() == last
    return last["error"]


def test_a_model_that_the_registry_does_not_have(registry, fresh, empty):
    name = f"{registry.host}/me/nothing"
    error = refusals(fresh, "pull", name, first=["pulling manifest"])
    assert error == "pull model manifest: file does not exist"
    assert not [path for path in snapshot(empty.store.root) if "nothing" in path]


def test_a_model_that_we_do_not_have(registry, http):
    name = f"{registry.host}/me/nothing"
    told = ["retrieving manifest", "couldn't retrieve manifest"]
    error = refusals(http, "push", name, first=told)
    assert f"model '{name}' not found" in error
    assert registry.asked == []


@pytest.mark.parametrize("route", ["pull", "push"])
def test_a_registry_that_is_not_there(http, route):
    with refused_port() as host:
        http.post("/api/copy", json={"source": "tiny", "destination": f"{host}/me/tale"})
        error = refusals(http, route, f"{host}/me/tale", first=[])
        assert f"cannot reach {host}: connection refused" in error


def test_http_is_spoken_only_where_it_is_asked_for(registry, stocked, fresh):
    for name, status, sentence in (
        (f"http://{stocked}", 400, "insecure protocol http"),
        (stocked, 500, "it does not speak https"),
    ):
        response = fresh.post("/api/pull", json={"model": name, "stream": False})
        assert response.status_code == status
        assert sentence in response.json()["error"]
    assert registry.asked == []
    found = records(ask(fresh, "pull", f"http://{stocked}"))
    assert found[-1] == {"status": "success"}


def test_a_blob_that_is_not_what_its_name_says_is_not_kept(registry, service, stocked, fresh):
    digest, size = layers_of(service)[0].digest, layers_of(service)[0].size
    registry.blobs[digest] = bytes(size)
    error = refusals(fresh, "pull", stocked, first=["pulling manifest"])
    assert "digest mismatch" in error
    assert fresh.get("/api/tags").json() == {"models": []}
    assert fresh.head(f"/api/blobs/{digest}").status_code == 404


# --- who leaves, and who comes at the same time ----------------------------------------------


@pytest.fixture
def large(registry):
    """A layer of 3 MB that takes a second and a half to come."""
    registry.rate = 2_000_000
    digest, _ = registry.add("me/large", "latest", [bytes(range(250)) * 12_000])
    return f"{registry.host}/me/large", digest


def lines(http, model, until):
    """The records of a pull until one of them pleases; then the client hangs up."""
    body = {"model": model, "insecure": True}
    with http.stream("POST", "/api/pull", json=body) as response:
        for line in response.iter_lines():
            record = json.loads(line)
            yield record
            if until(record):
                return


def test_bytes_that_move_are_told_at_least_twice_a_second(fresh, large):
    model, digest = large
    moments = []
    for record in lines(fresh, model, lambda record: record["status"] == "success"):
        moments += [time.monotonic()] if record.get("digest") == digest else []
    gaps = [b - a for a, b in itertools.pairwise(moments)]
    assert len(moments) >= 4 and max(gaps) < 0.5


def test_what_was_fetched_stays_when_the_client_leaves(registry, fresh, large):
    model, digest = large
    *_, last = lines(fresh, model, lambda record: record.get("completed", 0) > 500_000)
    assert last["digest"] == digest
    wait_until(lambda: settled(registry))
    left = registry.sent(digest)
    assert left < last["total"]
    registry.rate = None
    found = [record for record in records(ask(fresh, "pull", model)) if "digest" in record]
    first = next(record for record in found if record["digest"] == digest)
    assert first["resumed"] == first["completed"] >= 500_000
    # What was on its way when the client left may be fetched again; nothing else is.
    assert registry.sent(digest) - last["total"] <= left - first["resumed"]


def settled(registry):
    """Has nothing left it for a moment?"""
    before = registry.sent()
    time.sleep(0.2)
    return registry.sent() == before


def test_pulls_of_one_model_share_the_work(registry, fresh, large):
    model, digest = large
    ends = []

    def pull():
        ends.append(records(ask(fresh, "pull", model))[-1])

    threads = [threading.Thread(target=pull) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends == [{"status": "success"}] * 4
    assert registry.sent(digest) == registry.size(digest)


def test_a_server_that_stops_ends_a_pull_with_a_sentence(empty, fresh, large):
    model, _ = large

    def stop(record):
        if record.get("completed", 0) > 0:
            empty.close()
        return False

    *_, last = lines(fresh, model, stop)
    assert last == {"error": "the server stops; what was transferred stays"}


# --- the official client ---------------------------------------------------------------------


@pytest.fixture
def official(app):
    return ollama.Client("http://localhost", transport=httpx.WSGITransport(app))


def test_the_official_client_pulls_and_pushes(registry, stocked, official):
    parts = list(official.pull(stocked, insecure=True, stream=True))
    assert parts[0].status == "pulling manifest" and parts[-1].status == "success"
    assert any(part.completed == part.total and part.digest for part in parts)
    assert official.pull(stocked, insecure=True).status == "success"
    name = f"{registry.host}/you/tale"
    official.copy(stocked, name)
    parts = list(official.push(name, insecure=True, stream=True))
    assert parts[0].status == "retrieving manifest" and parts[-1].status == "success"
    assert official.push(name, insecure=True).status == "success"
    assert ("you/tale", "latest") in registry.manifests


@pytest.mark.parametrize("stream", [True, False])
def test_the_official_client_raises_what_went_wrong(registry, official, stream):
    with pytest.raises(ollama.ResponseError, match="file does not exist") as caught:
        answer = official.pull(f"{registry.host}/me/nothing", insecure=True, stream=stream)
        list(answer)
    assert caught.value.status_code == (-1 if stream else 500)
