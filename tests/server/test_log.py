"""One line for each request: no more, no less, and nothing that was said."""

import logging
import re

import pytest

from refollama.server.log import LONGEST_PATH
from tests.server.conftest import GREEDY

LINE = re.compile(
    r"request method=(\S+) path=(\S+) status=(\d+) duration=(\d+\.\d{3})s client=(\S+)"
)


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="refollama.server.log")

    def read():
        texts = [r.getMessage() for r in caplog.records if r.name == "refollama.server.log"]
        matches = [LINE.fullmatch(text) for text in texts]
        assert all(matches), texts
        return [match.groups() for match in matches if match]

    return read


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        ("HEAD", "/api/version", 200),
        ("GET", "/nothing", 404),
        ("GET", "/api/generate", 405),
        ("POST", "/api/generate", 400),
        ("OPTIONS", "/api/tags", 200),
    ],
)
def test_each_request_has_one_line(http, lines, method, path, status):
    assert http.request(method, path).status_code == status
    ((*told, duration, client),) = lines()
    assert told == [method, path, str(status)]
    assert float(duration) < 10 and client == "127.0.0.1"


def test_refused_pages_and_our_own_mistakes_have_one_too(http, lines, service, monkeypatch):
    http.get("/api/tags", headers={"Origin": "http://evil.example"})
    monkeypatch.setattr(service, "tags", lambda: 1 / 0)
    http.get("/api/tags")
    assert [line[2] for line in lines()] == ["403", "500"]


@pytest.mark.parametrize("stream", [True, False])
def test_nothing_that_was_said_is_in_it(http, lines, caplog, stream):
    body = {"model": "tiny", "prompt": "confidential", "stream": stream, "options": GREEDY}
    assert http.post("/api/generate", json=body).status_code == 200
    (line,) = lines()
    assert line[:3] == ("POST", "/api/generate", "200")
    assert "confidential" not in caplog.text


def test_the_duration_of_a_stream_is_that_of_all_of_it(http, lines):
    body = {"model": "tiny", "prompt": "the", "options": GREEDY}
    with http.stream("POST", "/api/generate", json=body) as response:
        pieces = response.iter_raw()
        next(pieces)
        assert lines() == []  # its line is written when it is over
        for _ in pieces:
            pass
    ((_, _, status, duration, _),) = lines()
    assert status == "200" and float(duration) > 0


def test_who_hangs_up_is_seen(http, lines):
    body = {"model": "tiny", "prompt": "the", "options": GREEDY | {"num_predict": -1}}
    with http.stream("POST", "/api/generate", json=body) as response:
        next(response.iter_raw())
    assert [line[2] for line in lines()] == ["499"]


def test_a_path_cannot_write_a_line_of_its_own(http, lines):
    http.get("/a%0Arequest%20method=GET%20status=200")
    http.get("/" + "long" * 1000)
    first, second = lines()
    assert first[1] == "/a%0Arequest%20method%3DGET%20status%3D200"
    assert len(second[1]) == LONGEST_PATH
