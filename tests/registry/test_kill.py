"""A server that is killed in mid-pull, and one download for many: real processes, real bytes."""

import contextlib
import json
import random
import signal
import threading
import time
from typing import Any

import httpx
import pytest

from tests.registry.fake import FakeRegistry
from tests.registry.forks import forked_server
from tests.registry.models import contents, is_sound, some_file
from tests.registry.parts import Piece, claimed, overlap, size_of, true_claims, whole
from tests.server.process import running

pytestmark = pytest.mark.slow
MIB = 1 << 20


def records(url, name):
    """The lines of a pull, until they end or the server does."""
    body = {"model": name, "insecure": True}
    with (
        contextlib.suppress(httpx.TransportError),
        httpx.stream("POST", f"{url}/api/pull", json=body, timeout=60) as answer,
    ):
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            yield json.loads(line)


@pytest.mark.timeout(180)
def test_twenty_kills_lose_nothing_that_was_written(tmp_path):
    """Kill −9 at a random moment; the next server goes on from what the part files say.

    What they say is on the disk, and is never fetched again; what they leave out is little.
    """
    chance = random.Random(20)
    root = tmp_path / "models"
    weights = some_file(tmp_path / "weights", 300_000_000)
    with FakeRegistry(rate=2 * MIB) as registry:
        digest, *_ = registry.add("library/tale", "latest", [weights])
        name = f"{registry.host}/library/tale"
        before: list[Piece] = []
        sent = 0
        for _ in range(20):
            registry.asked.clear()
            told = killed_pull(root, name, chance.uniform(0.05, 2))
            assert told >= size_of(before)
            assert overlap(registry.pieces(digest), before) == 0
            sent += registry.sent(digest)
            before = list(claimed(root, digest))
            assert not whole(root, digest)
            assert true_claims(root, digest, weights)
        kept = size_of(before)
        assert sent / 2 < kept <= sent < 300_000_000
        registry.rate = None
        registry.asked.clear()
        with forked_server(root) as (url, _):
            assert list(records(url, name))[-1] == {"status": "success"}
        assert registry.sent(digest) == 300_000_000 - kept
    assert is_sound(root)


def killed_pull(root, name, moment):
    """Pull until bytes move, and for a moment more; the first count of bytes that was told."""
    with forked_server(root) as (url, process):
        told: list[int] = []
        for record in records(url, name):
            if record.get("completed") and not told:
                threading.Timer(moment, process.kill).start()
            told += [record["completed"]] if "completed" in record else []
        process.join(10)
        assert process.exitcode == -signal.SIGKILL
    return told[0]


def test_ten_clients_share_one_download(tmp_path):
    """Each of them sees its progress, and the registry sends every byte once."""
    root = tmp_path / "models"
    weights = some_file(tmp_path / "weights", 200_000_000)
    with FakeRegistry(rate=80 * MIB) as registry, running(OLLAMA_MODELS=str(root)) as (url, _):
        digest, config = registry.add("library/tale", "latest", [weights])
        name = f"{registry.host}/library/tale"
        answers: list[list[dict[str, Any]]] = [[] for _ in range(10)]
        threads = [
            threading.Thread(target=lambda one=one: one.extend(records(url, name)))
            for one in answers
        ]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        for thread in threads:
            thread.join()
        for answer in answers:
            assert answer[-1] == {"status": "success"}
            counts = [r.get("completed", 0) for r in answer if r.get("digest") == digest]
            assert len(counts) > 3 and counts == sorted(counts) and counts[-1] == 200_000_000
        assert registry.sent(digest) == 200_000_000
        assert registry.sent(config) == registry.size(config)
    assert is_sound(root)
    assert len(contents(root)) == 3


def test_a_download_ends_with_the_last_who_wants_it(tmp_path):
    """Nine leave: it goes on. The tenth leaves: no more bytes, and the parts stay."""
    root = tmp_path / "models"
    weights = some_file(tmp_path / "weights", 200_000_000)
    with FakeRegistry(rate=10 * MIB) as registry, forked_server(root) as (url, _):
        digest, *_ = registry.add("library/tale", "latest", [weights])
        body = {"model": f"{registry.host}/library/tale", "insecure": True}
        with contextlib.ExitStack() as last:
            answer = last.enter_context(httpx.stream("POST", f"{url}/api/pull", json=body))
            lines = answer.iter_lines()
            for _ in range(9):
                with httpx.stream("POST", f"{url}/api/pull", json=body) as other:
                    next(other.iter_lines())
            before = registry.sent(digest)
            time.sleep(1)
            assert registry.sent(digest) > before
            assert "status" in next(lines)
        time.sleep(2)
        before = registry.sent(digest)
        time.sleep(1)
        assert registry.sent(digest) == before < 200_000_000
        assert list(claimed(root, digest))
