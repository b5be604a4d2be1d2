"""The real server: a process of its own, sockets, the official client, signals."""

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from refollama.client import Client
from refollama.server.run import is_loopback
from tests.registry.fake import FakeRegistry
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


def test_clients_chat_over_a_socket(made):
    """The official client, with and without threads, and our own."""
    import asyncio

    import ollama

    said = [{"role": "user", "content": "the"}]
    with contextlib.closing(ollama.Client(host=made)) as client:
        whole = client.chat("tiny", said, options=GREEDY)
        parts = list(client.chat("tiny", said, options=GREEDY, stream=True))
    assert "".join(part.message.content or "" for part in parts) == whole.message.content != ""

    async def chat():
        client = ollama.AsyncClient(host=made)
        stream = await client.chat("tiny", said, options=GREEDY, stream=True)
        found = [part.message.content or "" async for part in stream]
        await client._client.aclose()
        return "".join(found)

    assert asyncio.run(chat()) == whole.message.content
    with Client(made) as ours:
        records = list(ours.chat("tiny", said, options=GREEDY))
    assert "".join(one["message"]["content"] for one in records) == whole.message.content
    assert records[-1]["done"] is True


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


def test_a_body_beyond_all_measure_is_refused_in_json_before_it_is_sent(server):
    """At twice the limit nobody listens to the rest: the answer comes at once."""
    head = f"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {1 << 40}\r\n\r\n"
    status, answer = raw_answer(server, head.encode())
    assert status == 413 and set(answer) == {"error"} and "Too Large" in answer["error"]


def test_what_is_no_http_is_refused_in_json(server):
    status, answer = raw_answer(server, b"GET / HTTP/1.1\r\nbad header\r\n\r\n")
    assert status == 400 and set(answer) == {"error"}


def raw_answer(server, sent):
    """Status and JSON of the answer to some bytes, of which the server need not read all."""
    host, port = server.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(sent)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, body = answer.split(b"\r\n\r\n", 1)
    return int(head.split()[1]), json.loads(body)


def test_each_request_is_a_line_of_the_log_and_says_nothing_of_its_content(tmp_path, tiny):
    body = {"model": str(tiny), "prompt": "confidential", "options": GREEDY}
    with running(OLLAMA_MODELS=str(tmp_path / "store")) as (url, process):
        httpx.post(f"{url}/api/generate", json=body, timeout=60)
        body |= {"model": str(endless(tmp_path)), "options": ENDLESS}
        start_and_go(f"{url}/api/generate", body, 20)
        time.sleep(2)  # for the server to notice
        process.terminate()
        log = process.communicate(timeout=20)[1]
    lines = [line.split("request ", 1)[1] for line in log.splitlines() if "request " in line]
    asked = [line for line in lines if "path=/api/generate" in line]
    assert len(asked) == 2 and "confidential" not in log
    assert "method=POST" in asked[0] and "client=127.0.0.1" in asked[0]
    assert "status=200" in asked[0] and "status=499" in asked[1]


def test_addresses_of_a_registry_stay_out_of_the_log(tmp_path):
    """They are signed, so that whoever has them may fetch what lies there."""
    with (
        FakeRegistry() as registry,
        running(OLLAMA_MODELS=str(tmp_path / "store")) as (url, process),
    ):
        name = f"{registry.host}/me/confidential"
        body = {"model": name, "insecure": True, "stream": False}
        assert httpx.post(f"{url}/api/pull", json=body, timeout=60).status_code == 500
        assert registry.count() == 1
        process.terminate()
        assert "confidential" not in process.communicate(timeout=20)[1]


def test_vectors_in_the_making_end_when_the_server_stops(tmp_path):
    """A long text is read in steps: between two of them the server may leave."""
    body = {
        "model": str(endless(tmp_path)),
        "input": "the " * 60_000,
        "options": {"num_ctx": 10**6},
    }
    found = []
    with running(OLLAMA_MODELS=str(tmp_path / "store")) as (url, process):
        asking = threading.Thread(
            target=lambda: found.append(httpx.post(f"{url}/api/embed", json=body, timeout=60))
        )
        asking.start()
        time.sleep(3)
        assert asking.is_alive()
        process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        assert process.wait(20) == 0 and time.monotonic() - start < 8
        asking.join()
    assert found[0].status_code == 503 and "unloaded" in found[0].json()["error"]


def test_bad_origins_stop_the_server_with_one_sentence(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "refollama", "serve", "--host", "127.0.0.1:0"],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"OLLAMA_ORIGINS": "chat.example"},
    )
    assert done.returncode == 1 and "an origin must contain '*'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("chunked", [True, False])
def test_an_upload_may_be_larger_than_any_request(tmp_path, chunked):
    """Its route has no limit; all others have theirs."""
    data = os.urandom(5 << 20)
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    store = str(tmp_path / "store")
    with running(OLLAMA_MODELS=store, REFOLLAMA_MAX_BODY="1") as (url, _):
        content = iter([data[: 1 << 20], data[1 << 20 :]]) if chunked else data
        sent = httpx.post(f"{url}/api/blobs/{digest}", content=content, timeout=60)
        assert sent.status_code == 201
        assert httpx.head(f"{url}/api/blobs/{digest}").status_code == 200
        refused = httpx.post(f"{url}/api/generate", content=data[: 3 << 19], timeout=60)
        assert refused.status_code == 413 and "1 MiB" in refused.json()["error"]


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
