"""A model to its registry: statuses in order, nothing twice, nothing half, and who may not."""

import itertools
import threading
import time

import pytest

from refollama.errors import (
    Abandoned,
    BadName,
    BadRequest,
    ModelNotFound,
    RegistryError,
    StoreError,
    Unauthorized,
)
from refollama.store import Name, Store
from refollama.store.registry import push
from tests.registry.models import contents, fill, some_bytes

pytestmark = pytest.mark.usefixtures("hurry", "small_parts")
DATA = some_bytes(220_000)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "models")


@pytest.fixture
def name(registry):
    return f"{registry.host}/me/tale:7b"


def statuses(progress):
    """Each status once, in order."""
    return list(dict.fromkeys(one.status for one in progress))


def test_a_model_arrives_whole_and_says_how(registry, store, name):
    made = fill(store, name, DATA)
    before = contents(store.root)
    progress = list(push(store, name, insecure=True))
    blobs = [*made.layers, made.config]
    pushing = [f"pushing {layer.digest[7:19]}" for layer in blobs]
    begin, end = "starting upload", ["pushing manifest", "success"]
    assert [status for status in statuses(progress) if status != begin] == [
        "retrieving manifest",
        *pushing,
        *end,
    ]
    for layer, status in zip(blobs, pushing, strict=True):
        ours = [one for one in progress if one.status == status]
        assert {(one.digest, one.total) for one in ours} == {(layer.digest, layer.size)}
        (start,) = [one for one in progress if one.status == begin and one.digest == layer.digest]
        assert start.total == layer.size and progress.index(start) < progress.index(ours[0])
        assert ours[-1].completed == layer.size
        assert registry.blobs[layer.digest] == store.blobs.read(layer.digest, 1 << 20)
    assert registry.manifests["me/tale", "7b"] == made.to_bytes(newline=False)
    assert contents(store.root) == before


def test_a_second_push_sends_the_manifest_alone(registry, store, name):
    made = fill(store, name, DATA)
    list(push(store, name, insecure=True))
    registry.asked.clear()
    progress = list(push(store, name, insecure=True))
    assert registry.count("POST") == registry.count("PATCH") == 0
    assert registry.count("PUT") == 1
    there = [one for one in progress if one.digest]
    assert len(there) == len(made.layers) + 1  # one event for each blob
    assert all(one.completed == one.total for one in there)


def test_what_broke_off_goes_on_with_the_blobs_that_are_missing(registry, store, name):
    fill(store, name, DATA, some_bytes(120_000))

    def refuse_manifest(exchange):
        if "/manifests/" in exchange.path:
            exchange.body()
            exchange.answer(400, b"not today")
            return True
        return False

    registry.hook = refuse_manifest
    with pytest.raises(RegistryError, match="400: not today"):
        list(push(store, name, insecure=True))
    registry.hook = lambda exchange: False
    registry.asked.clear()
    assert list(push(store, name, insecure=True))[-1].status == "success"
    assert registry.count("PATCH") == 0


def test_progress_comes_often_while_bytes_move(registry, store, name):
    fill(store, name, DATA)

    def slow(exchange):
        if exchange.command == "PATCH":
            registry.stopped.wait(0.15)
        return False

    registry.hook = slow
    times = [time.monotonic() for one in push(store, name, insecure=True) if one.total == len(DATA)]
    assert times[-1] - times[0] > 0.5
    assert max(b - a for a, b in itertools.pairwise(times)) < 0.5


# -------------------------------------------------------------------- what cannot be pushed


def test_a_model_that_is_not_here(registry, store, name):
    work = push(store, name, insecure=True)
    seen = [next(work).status, next(work).status]
    assert seen == ["retrieving manifest", "couldn't retrieve manifest"]
    with pytest.raises(ModelNotFound):
        next(work)
    assert registry.count() == 0


@pytest.mark.parametrize("harm", ["missing", "shorter"])
def test_nothing_is_sent_of_a_model_that_is_not_whole(registry, store, name, harm):
    made = fill(store, name, DATA)
    path = store.blobs.path(made.config.digest)  # the last one to be sent
    path.unlink() if harm == "missing" else path.write_bytes(b"{")
    with pytest.raises(StoreError, match="is missing" if harm == "missing" else "has 1 bytes"):
        list(push(store, name, insecure=True))
    assert registry.count() == 0


def test_http_must_be_asked_for(registry, store, name):
    fill(store, name, DATA)
    work = push(store, f"http://{name}")
    assert next(work).status == "retrieving manifest"
    with pytest.raises(BadRequest, match="insecure protocol http"):
        next(work)
    assert registry.count() == 0


def test_a_name_that_is_none(store):
    with pytest.raises(BadName):
        next(push(store, "../../etc/passwd"))


class Closed:
    """Lets nobody in."""

    def __init__(self, challenge):
        self.answer = challenge

    def challenge(self, authorization, repository, action):
        return self.answer


def test_who_may_not_is_told_so(registry, store, name):
    fill(store, name, DATA)
    registry.guard = Closed('Basic realm="here"')
    with pytest.raises(Unauthorized) as caught:
        list(push(store, name, insecure=True))
    sentence = str(caught.value)
    assert sentence.startswith(
        "unable to push me/tale, make sure this namespace exists and you are authorized to "
        "push to it: "
    )
    assert f"refollama login {registry.host}" in sentence


def test_a_manifest_that_is_not_taken_is_tried_again_or_told(registry, store, name):
    made = fill(store, name, DATA)
    answers = [503, 500]

    def hook(exchange):
        if "/manifests/" not in exchange.path or not answers:
            return False
        exchange.body()
        exchange.answer(answers.pop())
        return True

    registry.hook = hook
    list(push(store, name, insecure=True))
    assert registry.manifests["me/tale", "7b"] == made.to_bytes(newline=False)


def test_a_blob_that_another_is_still_sending_is_waited_for(registry, store, name):
    """The registry knew it when we asked, and does not know it yet when the manifest comes."""
    made, refusals = fill(store, name, DATA), ["MANIFEST_BLOB_UNKNOWN"]

    def hook(exchange):
        if "/manifests/" not in exchange.path or not refusals:
            return False
        exchange.body()
        exchange.error(400, refusals.pop())
        return True

    registry.hook = hook
    list(push(store, name, insecure=True))
    assert registry.manifests["me/tale", "7b"] == made.to_bytes(newline=False)


def test_a_redirected_manifest_is_no_success(registry, store, name):
    fill(store, name, DATA)

    def hook(exchange):
        if "/manifests/" in exchange.path:
            exchange.body()
            exchange.answer(307, Location=f"http://{registry.elsewhere}/")
            return True
        return False

    registry.hook = hook
    with pytest.raises(RegistryError, match="answers PUT with 307 Temporary Redirect"):
        list(push(store, name, insecure=True))


# -------------------------------------------------------------------- leaving


@pytest.mark.parametrize("method", ["HEAD", "PATCH", "PUT"])
def test_whoever_has_gone_is_not_waited_for(registry, store, name, method):
    """At every step: the question, the bytes, the end."""
    fill(store, name, DATA)
    gone, there = threading.Event(), threading.Event()

    def hook(exchange):
        if exchange.command == method:
            gone.set()
            there.set()
            registry.stopped.wait(5)
            raise ConnectionError
        return False

    registry.hook = hook
    seen: list[float] = []

    def asked():
        if gone.is_set() and not seen:
            seen.append(time.monotonic())
        return gone.is_set()

    with pytest.raises(Abandoned):
        list(push(store, name, insecure=True, gone=asked))
    assert there.is_set() and time.monotonic() - seen[0] < 1


def test_closing_ends_the_threads_and_lets_go_of_the_blobs(registry, store, name):
    made = fill(store, name, DATA)

    def hook(exchange):
        if exchange.command == "PATCH":
            registry.stopped.wait(5)
            raise ConnectionError
        return False

    registry.hook = hook
    work = push(store, name, insecure=True)
    for progress in work:
        if progress.digest:
            break
    store.remove(Name.parse(name))
    assert store.blobs.has(made.layers[0].digest)  # held
    start = time.monotonic()
    work.close()
    assert time.monotonic() - start < 1
    assert not store.blobs.has(made.layers[0].digest)
    assert "transfer" not in {thread.name for thread in threading.enumerate()}
