"""The real server: a process of its own, sockets, the official client, signals."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest

from refollama.server.run import is_loopback
from tests.server.conftest import ENDLESS, GREEDY, endless
from tests.server.process import running


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return str(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def server(store):
    with running(OLLAMA_MODELS=store) as (url, _):
        yield url


@pytest.fixture
def made(server, tiny):
    """The server with a model named `tiny`."""
    body = {"model": "tiny", "modelfile": f"FROM {tiny}", "stream": False}
    assert httpx.post(f"{server}/api/create", json=body, timeout=60).json() == {"status": "success"}
    return server


def test_pieces_arrive_one_by_one_in_chunks(made):
    body = {"model": "tiny", "prompt": "the", "options": GREEDY | {"num_predict": 100}}
    with httpx.stream("POST", f"{made}/api/generate", json=body, timeout=60) as response:
        assert response.headers["Transfer-Encoding"] == "chunked"
        chunks = [chunk for chunk in response.iter_raw() if chunk]
    assert len(chunks) > 10
    assert json.loads(b"".join(chunks).splitlines()[-1])["done"] is True


def test_the_official_client(made):
    import ollama

    with contextlib.closing(ollama.Client(host=made)) as client:
        assert "tiny:latest" in [model.model for model in client.list().models]
        whole = client.generate("tiny", "the", options=GREEDY).model_dump()
        stream = client.generate("tiny", "the", options=GREEDY, stream=True)
        parts = [part.model_dump() for part in stream]
        assert "".join(part["response"] for part in parts) == whole["response"]
        assert parts[-1]["done"] and parts[-1]["done_reason"] == "length"
        assert parts[-1]["eval_count"] == whole["eval_count"] == 12
        assert whole["total_duration"] >= whole["eval_duration"] > 0
        again = client.generate("tiny", "e", context=whole["context"], options=GREEDY).model_dump()
        assert again["context"][: len(whole["context"])] == whole["context"]
        with pytest.raises(ollama.ResponseError, match="try pulling it first") as caught:
            client.generate("nope", "hi")
        assert caught.value.status_code == 404
        with pytest.raises(ollama.ResponseError, match="num_ctx"):
            list(client.generate("tiny", "hi", options={"num_ctx": "x"}, stream=True))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_the_slot_for_the_next(server, tmp_path, stream):
    """With one slot, the next answer could not come while the first, endless one is written."""
    body = {"model": str(endless(tmp_path)), "prompt": "a", "options": ENDLESS, "stream": stream}
    for _ in range(2):
        start_and_go(f"{server}/api/generate", body, 1.5)
        short = body | {"stream": False, "options": {"num_predict": 1}}
        assert httpx.post(f"{server}/api/generate", json=short, timeout=8).status_code == 200


def test_a_full_queue_answers_503_and_the_rest_of_the_server_answers_still(tmp_path):
    body = {"model": str(endless(tmp_path)), "prompt": "a", "options": ENDLESS}
    with (
        running(OLLAMA_MODELS=str(tmp_path / "store"), OLLAMA_MAX_QUEUE="2") as (url, _),
        httpx.stream("POST", f"{url}/api/generate", json=body, timeout=20) as first,
    ):
        pieces = first.iter_raw()  # kept: without it the connection would be closed
        next(pieces)
        waiting = threading.Thread(target=start_and_go, args=(f"{url}/api/generate", body, 3))
        waiting.start()
        time.sleep(1)
        refused = httpx.post(f"{url}/api/generate", json=body)
        assert refused.status_code == 503 and "busy" in refused.json()["error"]
        assert httpx.get(f"{url}/api/tags").json() == {"models": []}
        waiting.join()


def start_and_go(url, body, seconds):
    """Ask, and hang up at the first piece, or when none has come for so long."""
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.stream("POST", url, json=body, timeout=seconds) as response,
    ):
        next(response.iter_raw())


def test_many_clients_at_once_get_what_each_gets_alone(made):
    def ask(n):
        body = {"model": "tiny", "prompt": "a" * n, "stream": False, "options": GREEDY}
        return httpx.post(f"{made}/api/generate", json=body, timeout=60).json()["response"]

    alone = [ask(n) for n in range(1, 9)]
    together = [""] * 8

    def put(n):
        together[n - 1] = ask(n)

    threads = [threading.Thread(target=put, args=(n,)) for n in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_a_body_in_chunks_without_a_length(made):
    def body():
        yield b'{"model": "tiny", "prompt": '
        yield b'"the", "stream": false, "options": {"num_predict": 2}}'

    answer = httpx.post(f"{made}/api/generate", content=body(), timeout=60)
    assert answer.json().get("eval_count", 0) <= 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_cleanly_and_at_once_when_told_to(number, tmp_path):
    """A running answer, which would never end, is told why it does."""
    body = {"model": str(endless(tmp_path)), "prompt": "a", "options": ENDLESS}
    with running(OLLAMA_MODELS=str(tmp_path / "store")) as (url, process):
        with httpx.stream("POST", f"{url}/api/generate", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(number)
            start = time.monotonic()
            time.sleep(0.1)
            process.send_signal(number)  # the impatient ask twice
            *_, last = lines
        assert "unloaded" in json.loads(last)["error"]
        assert process.wait(10) == 0 and time.monotonic() - start < 4
        log = process.stderr.read()
        assert "stopped" in log and "Traceback" not in log


def test_a_large_body_is_refused_in_json(server):
    response = httpx.post(f"{server}/api/generate", content=b" " * ((64 << 20) + 1), timeout=60)
    assert response.status_code == 413 and "64 MiB" in response.json()["error"]


def test_a_taken_port_is_said_in_one_sentence(server):
    port = server.rsplit(":", 1)[1]
    done = subprocess.run(
        [sys.executable, "-m", "refollama", "serve", "--host", f"127.0.0.1:{port}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and f"port {port}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("host", "yes"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.1", False),
        ("box.example", False),
    ],
)
def test_loopback(host, yes):
    assert is_loopback(host) is yes
