"""A model comes from its registry: what is told meanwhile, and what is in the store at the end."""

import itertools
import json
import shutil
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest

from refollama.errors import Abandoned, BadName, BadRequest, RegistryError, StoreError
from refollama.messages import Progress
from refollama.store import Name, Store
from refollama.store.manifest import MANIFEST, MODEL, TEMPLATE
from refollama.store.parts import PartFiles
from refollama.store.registry import Downloads, incoming, session
from refollama.store.registry.pull import pull as pull_of_model
from tests.registry.fake import FakeRegistry
from tests.registry.models import contents, is_sound, some_bytes
from tests.registry.parts import claimed

pytestmark = pytest.mark.usefixtures("hurry")
DATA = some_bytes(600_000)
SPARE = 64 << 20  # bytes that are left free
END = ["verifying sha256 digest", "writing manifest", "removing any unused layers", "success"]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "models")


@pytest.fixture
def pulling(store, registry):
    """Pulls of `library/tale` into the store, as steps; all of them share their downloads."""
    downloads = Downloads(store.blobs)

    def begin(model="library/tale", **more):
        name = f"{registry.host}/{model}"
        return pull_of_model(store, name, insecure=True, downloads=downloads, **more)

    return begin


def statuses(steps):
    """Each once, however often it comes in a row."""
    return [status for status, _ in itertools.groupby(step.status for step in steps)]


def of(steps, digest):
    return [step for step in steps if step.digest == digest]


def short(digest):
    return digest.removeprefix("sha256:")[:12]


def ended(store):
    """Wait until nobody writes to the store any more."""
    end = time.monotonic() + 5
    while any(one.name == "download" for one in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.01)


# -------------------------------------------------------------------- what is told


def test_every_step_is_told_in_its_order(registry, pulling, store):
    """Source: the notes on Ollama, 7.2."""
    digests = registry.add("library/tale", "latest", [DATA, b"{{ .Prompt }}"], kinds=[MODEL])
    steps = list(pulling())
    assert statuses(steps) == ["pulling manifest", *(f"pulling {short(d)}" for d in digests), *END]
    for digest in digests:
        size = registry.size(digest)
        told = of(steps, digest)
        assert {step.total for step in told} == {size}
        assert [step.completed for step in told] == sorted(step.completed for step in told)
        assert told[-1].completed == size
    assert is_sound(store.root)


def test_what_is_here_is_told_once_and_not_fetched(registry, pulling):
    digests = registry.add("library/tale", "latest", [DATA])
    list(pulling())
    registry.asked.clear()
    steps = list(pulling())
    for digest in digests:
        size = registry.size(digest)
        assert of(steps, digest) == [Progress(f"pulling {short(digest)}", digest, size, size)]
    assert registry.count(inside="/blobs/") == 0


def test_bytes_that_move_are_told_often(registry, pulling):
    registry.rate = 700_000
    digest, _ = registry.add("library/tale", "latest", [DATA])
    moments = [time.monotonic() for step in pulling() if step.digest == digest]
    gaps = [b - a for a, b in itertools.pairwise(moments)]
    assert len(moments) > 4 and max(gaps) < 0.5


def test_the_manifest_is_ollamas_to_the_byte(registry, pulling, store):
    """Unknown fields vanish, `from` stays, and no newline ends it: the id is the hash of this."""
    digest, _ = registry.add("library/tale", "latest", [DATA])
    top = json.loads(registry.manifests["library/tale", "latest"])
    top["layers"][0] |= {"annotations": {"a": "b"}, "from": "library/other"}
    top |= {"more": [1]}
    registry.manifests["library/tale", "latest"] = json.dumps(top, indent=2).encode()
    list(pulling())
    found = contents(store.root)[f"manifests/{registry.host}/library/tale/latest"]
    layer = f'{{"mediaType":"{MODEL}","digest":"{digest}","size":600000,"from":"library/other"}}'
    start = f'{{"schemaVersion":2,"mediaType":"{MANIFEST}","config":{{"mediaType":'
    assert found.startswith(start.encode()) and found.endswith(f'"layers":[{layer}]}}'.encode())


def test_a_digest_that_is_named_twice_is_fetched_once(registry, pulling, store):
    digest, *_ = registry.add(
        "library/tale", "latest", [DATA, DATA], config=DATA, kinds=[MODEL, TEMPLATE]
    )
    steps = list(pulling())
    assert registry.sent() == len(DATA)
    assert of(steps, digest)[-1].completed == len(DATA)
    assert is_sound(store.root)


@pytest.mark.parametrize("size", [4, 5])
def test_a_present_blob_of_another_size_is_fetched_anew(registry, pulling, store, size):
    digest, _ = registry.add("library/tale", "latest", [b"tale!"])
    list(pulling())
    store.blobs.path(digest).write_bytes(b"wrong"[:size])
    list(pulling())
    assert store.blobs.verify(digest) == (size == 4)  # of the right size: its bytes are not read


def test_blobs_at_another_host(registry, pulling, store):
    registry.redirect = True
    registry.add("library/tale", "latest", [DATA])
    list(pulling())
    assert is_sound(store.root)


# -------------------------------------------------------------------- what goes


def versions(registry, pulling, store):
    """An old and a new version of a model; all share DATA. → the digests of the old one alone."""
    registry.add("library/other", "latest", [DATA, b"shared"], config=b"{ }")
    _, old, shared, config = registry.add("library/tale", "latest", [DATA, b"old", b"shared"])
    list(pulling())
    list(pulling("library/other"))
    registry.add("library/tale", "latest", [DATA, b"new"], config=b"{  }")
    assert store.blobs.has(shared)
    return shared, {old, config}


def test_what_the_old_version_alone_used_is_removed(registry, pulling, store):
    shared, gone = versions(registry, pulling, store)
    assert statuses(pulling())[-2:] == END[-2:]
    assert store.blobs.has(shared)
    assert not any(store.blobs.has(digest) for digest in gone)
    assert is_sound(store.root)


def test_nothing_is_removed_where_that_is_not_wanted(registry, tmp_path):
    """OLLAMA_NOPRUNE: nor is it told."""
    store = Store(tmp_path, prune=False)
    downloads = Downloads(store.blobs)

    def pulling(model="library/tale"):
        name = f"{registry.host}/{model}"
        return pull_of_model(store, name, insecure=True, downloads=downloads)

    _, kept = versions(registry, pulling, store)
    assert statuses(pulling())[-3:] == [END[0], END[1], END[3]]
    assert all(store.blobs.has(digest) for digest in kept)


def test_a_model_that_is_removed_meanwhile_takes_no_blob_along(registry, pulling, store):
    """The new model shares a blob with the one that goes while its other blob is on the way."""
    registry.add("library/other", "latest", [b"shared"])
    list(pulling("library/other"))
    registry.rate = 1_000_000
    registry.add("library/tale", "latest", [b"shared", DATA])
    for step in pulling():
        if step.total == len(DATA) and store.blobs.has(registry.add_blob("x", b"shared")[0]):
            other = Name.parse(f"{registry.host}/library/other")
            if other in store.manifests.names():
                store.remove(other)
    assert step.status == "success"
    assert is_sound(store.root) and len(contents(store.root)) == 4


def test_with_the_last_model_that_names_a_blob_go_its_parts(registry, pulling, store):
    """Not those that somebody is writing, be it another process, nor those of other blobs."""
    digest, small, config = registry.add("library/tale", "latest", [DATA, b"small"])
    registry.add("library/other", "latest", [b"small"], config=b"{ }")
    list(pulling())
    list(pulling("library/other"))
    left = [PartFiles(store.blobs, one, 9) for one in (digest, small, config)]
    for parts in left:
        assert parts.open()
        parts.begin()
    left[0].close()
    left[1].close()
    store.remove(Name.parse(f"{registry.host}/library/tale"))
    kept = {one.replace(":", "-") for one in (small, config)}
    partial = [path.name for path in store.blobs.folder.glob("*-partial*")]
    assert sorted(partial) == sorted(f"{one}-partial{end}" for one in kept for end in ("", "-0"))
    left[2].close()


# -------------------------------------------------------------------- who leaves


@pytest.mark.parametrize("how", ["closed", "gone"])
def test_what_came_stays_and_the_next_goes_on(registry, pulling, store, how):
    registry.rate = 1_000_000
    digest, _ = registry.add("library/tale", "latest", [DATA])
    gone = threading.Event()
    steps = pulling(gone=gone.is_set)
    for step in steps:
        if step.completed > 100_000 and how == "closed":
            steps.close()
        if step.completed > 100_000 and how == "gone":
            gone.set()
            start = time.monotonic()
            with pytest.raises(Abandoned):
                list(steps)
            assert time.monotonic() - start < 1
    ended(store)
    assert list(store.manifests.names()) == []
    left = sum(end - first for first, end in claimed(store.root, digest))
    registry.rate = None
    registry.asked.clear()
    told = of(list(pulling()), digest)
    assert told[0].completed == told[0].resumed == left > 100_000
    assert registry.sent(digest) == len(DATA) - left
    assert is_sound(store.root)


def test_blobs_that_were_whole_stay(registry, pulling, store):
    """Of a pull that ended before its manifest: the next does not fetch them again."""
    small, large, _ = registry.add("library/tale", "latest", [b"small", DATA])
    registry.rate = 1_000_000
    steps = pulling()
    next(step for step in steps if step.digest == large)
    steps.close()
    ended(store)
    assert store.blobs.has(small)
    registry.rate = None
    registry.asked.clear()
    list(pulling())
    assert registry.sent(small) == 0


def test_whoever_asked_may_leave_before_the_manifest_comes(registry, pulling):
    registry.hook = lambda exchange: registry.stopped.wait(8) or True
    gone = threading.Event()
    steps = pulling(gone=gone.is_set)
    assert next(steps).status == "pulling manifest"
    gone.set()
    start = time.monotonic()
    with pytest.raises(Abandoned):
        next(steps)
    assert time.monotonic() - start < 1


def test_pulls_of_models_that_share_a_blob_share_its_download(registry, pulling, store):
    registry.rate = 1_000_000
    digest, *_ = registry.add("library/tale", "latest", [DATA, b"one"])
    registry.add("me/other", "latest", [DATA, b"two"])
    ends = []

    def run(model):
        ends.append(list(pulling(model)))

    threads = [threading.Thread(target=run, args=(m,)) for m in ("library/tale", "me/other") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [steps[-1].status for steps in ends] == ["success"] * 4
    assert all(len(of(steps, digest)) > 3 for steps in ends)
    assert registry.sent(digest) == len(DATA)
    assert is_sound(store.root)


def test_a_failure_of_another_registry_is_not_ours(registry, store, monkeypatch):
    """We join what another model has begun; when its registry fails, ours is asked for the rest."""
    monkeypatch.setattr(session, "STALL", 10.0)
    monkeypatch.setattr(incoming, "GATHERED", 10_000)
    downloads, broken = Downloads(store.blobs), threading.Event()
    with FakeRegistry() as other:
        digest, _ = other.add("me/bad", "latest", [DATA])
        registry.add("library/tale", "latest", [DATA])
        names = (f"{other.host}/me/bad", f"{registry.host}/library/tale")
        bad, good = (
            pull_of_model(store, name, insecure=True, downloads=downloads) for name in names
        )
        other.hook = partial(half, data=DATA, broken=broken)
        next(step for step in bad if step.completed)
        next(step for step in good if step.completed)
        broken.set()
        assert list(good)[-1].status == "success"
        with pytest.raises(RegistryError, match="403"):
            list(bad)
    assert registry.sent(digest) == len(DATA) // 2
    assert is_sound(store.root)


def half(exchange, data, broken):
    """Half of a blob, in a stream that is silent until it breaks; then nothing more."""
    if "/blobs/" not in exchange.path:
        return False
    if broken.is_set():
        exchange.error(403, "DENIED")
        return True
    exchange.send_response(206)
    exchange.send_header("Content-Length", str(len(data)))
    exchange.send_header("Content-Range", f"bytes 0-{len(data) - 1}/{len(data)}")
    exchange.end_headers()
    exchange.wfile.write(data[: len(data) // 2])
    broken.wait(5)
    exchange.close_connection = True
    return True


# -------------------------------------------------------------------- what goes wrong


def error_of(steps, kind=RegistryError):
    """The sentence; behind the first line, as every error of a registry."""
    assert next(steps).status == "pulling manifest"
    with pytest.raises(kind) as caught:
        list(steps)
    return str(caught.value)


def test_a_model_that_is_not_there(pulling):
    assert error_of(pulling()) == "pull model manifest: file does not exist"


@pytest.mark.parametrize(("status", "again"), [(403, False), (500, True)])
def test_a_manifest_that_is_refused(registry, pulling, status, again):
    registry.hook = lambda exchange: exchange.answer(status, b"no\nway") or True
    said = error_of(pulling())
    assert said.startswith("pull model manifest: ") and said.endswith(f"{status}: no way")
    assert (registry.count() > 1) == again


def test_a_manifest_that_comes_at_the_second_try(registry, pulling, store):
    registry.add("library/tale", "latest", [DATA])
    tries = iter([True])
    registry.hook = lambda exchange: bool(next(tries, False) and not exchange.error(503, "BUSY"))
    assert list(pulling())[-1].status == "success"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"schemaVersion": 1}, "schemaVersion must be 2"),
        ({"layers": [{}]}, "size must be a number of bytes"),
        ({"layers": 7}, "layers must be a list"),
    ],
)
def test_a_manifest_of_odd_shape(registry, pulling, change, sentence):
    registry.add("library/tale", "latest", [DATA])
    top = json.loads(registry.manifests["library/tale", "latest"])
    registry.manifests["library/tale", "latest"] = json.dumps(top | change).encode()
    assert error_of(pulling()) == f"pull model manifest: manifest: {sentence}"
    assert registry.count(inside="/blobs/") == 0


def test_more_layers_than_any_model_has(registry, pulling):
    registry.add("library/tale", "latest", [bytes([i % 256, i // 256]) for i in range(1001)])
    assert "1001 layers" in error_of(pulling())
    assert registry.count(inside="/blobs/") == 0


def test_one_blob_with_two_sizes(registry, pulling):
    registry.add("library/tale", "latest", [DATA, DATA])
    top = json.loads(registry.manifests["library/tale", "latest"])
    top["layers"][1]["size"] += 1
    registry.manifests["library/tale", "latest"] = json.dumps(top).encode()
    assert "two sizes" in error_of(pulling())


def test_http_is_spoken_only_if_that_is_allowed(registry, store):
    """Before the first line, so that the request fails."""
    name = f"http://{registry.host}/library/tale"
    with pytest.raises(BadRequest, match="insecure protocol http"):
        next(pull_of_model(store, name, downloads=Downloads(store.blobs)))
    with pytest.raises(BadName):
        next(pull_of_model(store, "a/b/c/d", downloads=Downloads(store.blobs)))
    assert registry.asked == [] and not store.root.exists()


def test_a_disk_that_is_too_small_is_told_before_the_first_byte(registry, pulling, room):
    registry.add("library/tale", "latest", [DATA])
    room(SPARE + len(DATA))  # and the config has two bytes
    assert "68 MB are needed, but only 68 MB are free" in error_of(pulling(), StoreError)
    assert registry.count(inside="/blobs/") == 0
    room(SPARE + len(DATA) + 2)
    assert list(pulling())[-1].status == "success"
    room(0)  # nothing is missing
    assert list(pulling())[-1].status == "success"


def test_what_was_left_needs_no_room_again(registry, pulling, store, room):
    registry.rate = 1_000_000
    digest, _ = registry.add("library/tale", "latest", [DATA])
    steps = pulling()
    next(step for step in steps if step.completed > 100_000)
    steps.close()
    ended(store)
    left = sum(end - first for first, end in claimed(store.root, digest))
    registry.rate = None
    room(SPARE + len(DATA) + 1 - left)
    assert "needed" in error_of(pulling(), StoreError)
    room(SPARE + len(DATA) + 2 - left)
    assert list(pulling())[-1].status == "success"


@pytest.fixture
def room(monkeypatch):
    """So many bytes are free on the disk."""

    def set_free(size):
        found = SimpleNamespace(free=size)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: found)

    return set_free
