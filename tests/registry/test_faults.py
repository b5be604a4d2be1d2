"""The network that fails is judged too: it does the harm that it names, and no other."""

import httpx
import pytest

from tests.registry.fake import FakeRegistry
from tests.registry.faults import Faults

DATA = bytes(range(256)) * 100


@pytest.fixture
def digest(registry):
    return registry.add_blob("library/tale", DATA)[0]


def get(network, digest, first=1000, last=1999):
    url = f"http://{network.host}/v2/library/tale/blobs/{digest}"
    wanted = {"Range": f"bytes={first}-{last}"}
    return httpx.get(url, headers=wanted, timeout=0.3, verify=False)


def test_without_faults_all_is_as_the_registry_says(registry, digest):
    with Faults(registry.host, odds=0) as network:
        there, here = get(registry, digest), get(network, digest)
    assert (here.status_code, here.content) == (206, DATA[1000:2000])
    for name in ("Content-Length", "Content-Range", "Docker-Content-Digest"):
        assert here.headers[name] == there.headers[name]


@pytest.mark.parametrize(
    "fault", ["refused", "silent", "lost", "no HTTP", "cut", "stall", "longer than said"]
)
def test_a_connection_that_breaks(registry, digest, fault):
    with Faults(registry.host, odds=1, only=(fault,), patience=0.6) as network:
        if fault == "longer than said":  # what is too much is never read
            assert get(network, digest).content == DATA[1000:2000]
        else:
            with pytest.raises(httpx.TransportError):
                get(network, digest)
    assert [passed.fault for passed in network.passed] == [fault]


@pytest.mark.parametrize(
    ("fault", "status", "length"),
    [
        ("500", 500, None),
        ("429", 429, None),
        ("redirected", 307, 0),
        ("too long", 206, 1100),
        ("flipped", 206, 1000),
        ("range ignored", 200, len(DATA)),
        ("other range", 206, 1000),
        ("drip", 206, 1000),
    ],
)
def test_an_answer_that_is_another(registry, digest, fault, status, length):
    with Faults(registry.host, odds=1, only=(fault,)) as network:
        answer = get(network, digest)
    assert answer.status_code == status
    assert length is None or len(answer.content) == length
    right = answer.content == DATA[1000:2000] and "1000-1999/" in answer.headers["Content-Range"]
    assert right == (fault == "drip")


def test_the_same_seed_does_the_same_harm(registry, digest):
    def harm(seed):
        with Faults(registry.host, seed, odds=0.5, only=("500", "flipped", "range ignored")) as one:
            got = [get(one, digest, first, 5000).content for first in range(0, 4000, 200)]
        return got, [passed.fault for passed in one.passed]

    assert harm(1) == harm(1)
    assert harm(1) != harm(2)


def test_what_is_cut_on_its_way_in_is_less():
    with FakeRegistry() as registry, Faults(registry.host, odds=0) as network:
        where = httpx.post(f"http://{network.host}/v2/library/tale/blobs/uploads/").headers
        network.odds, network.only = 1, ("cut on the way in",)
        with pytest.raises(httpx.TransportError):
            httpx.patch(where["Location"], content=DATA)
        (upload,) = registry.uploads.values()
        assert len(upload.data) < len(DATA) and DATA.startswith(upload.data)
