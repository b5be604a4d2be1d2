"""Long tests of the server: clients that come and go, files that are damaged everywhere."""

import json
import random
import threading

import httpx
import pytest

from tests.server.conftest import GREEDY, unchanged
from tests.server.process import running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_clients_that_hang_up_at_random_moments_disturb_nobody(tiny, tmp_path):
    """Eight threads, fifteen rounds each: most hang up, the others must get the right answer."""
    body = {"model": str(tiny), "prompt": "the", "options": GREEDY | {"num_predict": 60}}
    with running(OLLAMA_MODELS=str(tmp_path), OLLAMA_NUM_PARALLEL="2") as (url, process):
        right = httpx.post(f"{url}/api/generate", json=body | {"stream": False}, timeout=60).json()
        wrong = []

        def visit(seed):
            rng = random.Random(seed)
            for _ in range(15):
                stay = rng.random() < 0.3
                text, limit = "", rng.randrange(30)
                with httpx.stream("POST", f"{url}/api/generate", json=body, timeout=120) as got:
                    for count, line in enumerate(got.iter_lines()):
                        text += json.loads(line)["response"]
                        if not stay and count >= limit:
                            break
                if stay and text != right["response"]:
                    wrong.append(text)

        threads = [threading.Thread(target=visit, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        again = httpx.post(f"{url}/api/generate", json=body | {"stream": False}, timeout=60).json()
        assert again["response"] == right["response"]
        assert process.poll() is None


def test_damaged_files_are_refused_or_answer_and_nothing_is_left_behind(
    http, service, tiny, tmp_path
):
    """A thousand files with flipped, cut or repeated bytes in the header."""
    whole = tiny.read_bytes()
    header = whole.index(b"token_embd.weight") + 2000
    rng = random.Random(11)
    refused = 0
    for _ in range(1000):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(header)] = rng.randrange(256)
        path = tmp_path / "damaged.gguf"
        path.write_bytes(data)
        with unchanged(service.store):
            answer = http.post(
                "/api/generate",
                json={"model": str(path), "prompt": "a", "options": {"num_predict": 2}},
            )
        assert answer.status_code in (200, 400), answer.text
        records = [json.loads(line) for line in answer.text.splitlines()]
        assert all("error" not in record for record in records[:-1])
        assert "internal error" not in records[-1].get("error", ""), answer.text
        refused += answer.status_code == 400
    assert refused > 300
