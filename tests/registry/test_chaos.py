"""Two hundred pulls and pushes through a network that fails, two by each seed.

Every try ends in success or in one clear sentence. The store is never wrong; a later try without
faults always succeeds, and what was whole by then is not moved again.
"""

import json
import math
import random
import threading
import time
from contextlib import closing
from functools import partial

import httpx
import pytest

from refollama.errors import RefollamaError
from refollama.store import Store
from refollama.store.registry import Downloads, pull, push, session
from tests.registry.debian import debian
from tests.registry.fake import MANIFEST, FakeRegistry, digest_of, wait_until
from tests.registry.faults import Faults
from tests.registry.models import contents, fill, is_sound, some_bytes
from tests.registry.parts import claimed, overlap, true_claims, whole

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("hurry", "small_parts")]
SIZES = (0, 1, 999, 30_000, 200_000, 400_000)  # bytes; with small parts, up to a dozen of them
ODDS = (0.1, 0.2, 0.5)


def layers(chance):
    """Up to four, of random sizes and bytes; perhaps one of them twice."""
    sizes = [chance.choice(SIZES) for _ in range(chance.randrange(1, 5))]
    some = [some_bytes(size, chance.random()) for size in sizes]
    return some + some[: chance.randrange(2)]


def attempt(chance, begin):
    """Success, the sentence of an error, or nothing: some leave early, or are found to be gone."""
    leaves, asked = chance.choice(("late", "late", "early", "gone")), time.monotonic()
    after = math.inf if leaves == "late" else chance.uniform(0, 0.6)  # seconds

    def over():
        return time.monotonic() > asked + after

    status = ""
    with closing(begin(gone=over if leaves == "gone" else lambda: False)) as work:
        try:
            for progress in work:
                status = progress.status
                if leaves == "early" and over():
                    return ""
        except RefollamaError as error:
            sentence = str(error)
            assert sentence.isprintable() and 5 < len(sentence) < 2000
            return sentence
    return status


def succeed(begin):
    """Without faults nothing else is to be expected."""
    assert [progress.status for progress in begin()][-1] == "success"


# -------------------------------------------------------------------- pulls


@pytest.mark.parametrize("seed", range(50))
def test_a_faulty_pull(tmp_path, monkeypatch, seed):
    chance = random.Random(seed)
    store = Store(tmp_path)
    with (
        FakeRegistry(rate=400_000) as registry,
        Faults(registry.host, seed, chance.choice(ODDS), patience=0.45) as network,
    ):
        digests = registry.add("library/tale", "latest", layers(chance))
        for _ in range(2):
            end = attempt(chance, pulling(store, network))
            assert is_sound(store.root)
            if end == "success":
                check_pulled(store, registry, digests, network)
            check_claims(store, registry, digests, network)
        network.odds, registry.rate = 0, None
        monkeypatch.setattr(session, "STALL", 30)  # a busy machine is no fault
        was_whole = {digest for digest in digests if whole(store.root, digest)}
        was_claimed = {digest: list(claimed(store.root, digest)) for digest in digests}
        registry.asked.clear()
        succeed(pulling(store, network))
        check_pulled(store, registry, digests, network)
        for digest in digests:
            assert registry.sent(digest) == 0 or digest not in was_whole
            if not spoilt(network, digest):
                assert overlap(registry.pieces(digest), was_claimed[digest]) == 0
                assert registry.twice(digest) == 0


def pulling(store, network):
    name = f"{network.host}/library/tale"
    return partial(pull, store, name, insecure=True, downloads=Downloads(store.blobs))


def check_pulled(store, registry, digests, network):
    """The model is here to the byte, and nothing else."""
    expected = {f"blobs/{digest.replace(':', '-')}": registry.blobs[digest] for digest in digests}
    path = f"manifests/{network.host}/library/tale/latest"
    expected[path] = registry.manifests["library/tale", "latest"]
    assert contents(store.root) == expected


def check_claims(store, registry, digests, network):
    """What part files say is there, is there, once nobody who was left behind still writes."""
    wait_until(lambda: not any(one.name == "download" for one in threading.enumerate()))
    for digest in digests:
        if not spoilt(network, digest):
            assert true_claims(store.root, digest, registry.blobs[digest])


def spoilt(network, digest):
    """Did a wrong bit come along, which nobody can see before the blob is whole?"""
    return any(passed.fault == "flipped" and digest in passed.path for passed in network.passed)


# -------------------------------------------------------------------- pushes


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    with debian(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.mark.parametrize("seed", range(50))
def test_a_faulty_push(tmp_path, monkeypatch, real, seed):
    chance = random.Random(1000 + seed)
    store = Store(tmp_path)
    with Faults(real.host, seed, chance.choice(ODDS), patience=0.45) as network:
        name = f"{network.host}/library/tale{seed}"
        made = fill(store, name, *layers(chance), texts=())
        before = contents(store.root)
        url = f"http://{real.host}/v2/library/tale{seed}"
        pushing = partial(push, store, name, insecure=True)
        for _ in range(2):
            end = attempt(chance, pushing)
            assert contents(store.root) == before
            if end == "success":
                check_pushed(real, url, made)
        network.odds = 0
        monkeypatch.setattr(session, "STALL", 30)  # a busy machine is no fault
        there = {d for d in made.digests if httpx.head(f"{url}/blobs/{d}").status_code == 200}
        network.passed.clear()
        succeed(pushing)
        check_pushed(real, url, made)
        sent = "".join(passed.path for passed in network.passed if passed.method == "PUT")
        assert not [digest for digest in there if digest.removeprefix("sha256:") in sent]


def check_pushed(real, url, made):
    """The registry has the manifest, and every byte."""
    found = httpx.get(f"{url}/manifests/latest", headers={"Accept": MANIFEST})
    assert found.json() == json.loads(made.to_bytes())
    for digest in made.digests:
        assert digest_of(real.blob(digest)) == digest
