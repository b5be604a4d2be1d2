"""The whole API under bodies that are nearly right: no request may break it, stop it or spoil it.

Bodies are made from valid ones by changing, dropping and adding values, and by damage to the bytes.
"""

import copy
import gc
import json
import re
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from refollama.messages import Create
from refollama.store import Name
from refollama.store.registry import session
from tests.registry.fake import FakeRegistry

DURATION = 300  # seconds
PATIENCE = 3.0  # seconds after which the client of a case hangs up
SLOWEST = 30.0  # seconds for one case, hanging up included
WARM = 300  # cases until memory is measured for the first time
MOST_GROWTH = 200 << 20  # bytes of memory between then and the end

ABSENT = "sha256:" + "0" * 64
TURN = {"role": "user", "content": "the rest"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
OPTIONS = {"num_predict": 3, "temperature": 0.5, "stop": ["x"], "seed": 1, "num_ctx": 64}
ANSWER = {
    "model": "tiny",
    "stream": True,
    "options": OPTIONS,
    "keep_alive": "5m",
    "format": "",
    "think": False,
    "logprobs": True,
    "top_logprobs": 2,
    "truncate": True,
    "shift": True,
}
TEXTS = {"prompt": "the", "system": "be", "template": "{{ .Prompt }}", "suffix": "", "raw": False}
NEW = {"template": "{{ .Prompt }}", "system": "hi", "parameters": OPTIONS, "messages": [TURN]}
VALID = [
    ("POST", "/api/generate", ANSWER | TEXTS | {"context": [1, 270], "images": []}),
    ("POST", "/api/generate", {"model": "shy", "prompt": "a", "stream": False, "raw": True}),
    ("POST", "/api/chat", ANSWER | {"messages": [TURN, TURN | {"role": "system"}], "tools": []}),
    ("POST", "/api/chat", {"model": "shy", "messages": [TURN], "tools": [TOOL], "stream": False}),
    ("POST", "/api/embed", {"model": "tiny", "input": ["a", "the"], "truncate": True}),
    ("POST", "/api/embed", {"model": "tiny", "input": "a", "dimensions": 3, "options": OPTIONS}),
    ("POST", "/api/embeddings", {"model": "tiny", "prompt": "the", "options": OPTIONS}),
    ("POST", "/api/tokenize", {"model": "tiny", "text": "the <s>", "special": True, "bos": True}),
    ("POST", "/api/detokenize", {"model": "tiny", "tokens": [1, 270, 5], "special": True}),
    ("POST", "/api/show", {"model": "shy", "verbose": True, "system": "x", "options": OPTIONS}),
    ("POST", "/api/copy", {"source": "tiny", "destination": "other/name:tag"}),
    ("DELETE", "/api/delete", {"model": "other/name:tag"}),
    ("POST", "/api/create", {"model": "new", "modelfile": "FROM tiny\nPARAMETER top_k 3\n"}),
    ("POST", "/api/create", {"model": "new", "from": "tiny", "stream": False} | NEW),
    ("POST", "/api/create", {"model": "new", "files": {"a.gguf": ABSENT}, "adapters": {}} | NEW),
    ("POST", "/api/pull", {"model": "tiny", "insecure": False, "username": "a", "password": "b"}),
    ("POST", "/api/push", {"model": "tiny", "insecure": True, "stream": False}),
    ("POST", f"/api/blobs/{ABSENT}", {}),
    ("HEAD", f"/api/blobs/{ABSENT}", None),
    ("GET", "/api/tags", None),
    ("GET", "/api/ps", None),
    ("GET", "/api/version", None),
    ("GET", "/", None),
]
# Those that change the store; and uploads, of what has its digest.
CHANGING = {"/api/create", "/api/copy", "/api/delete", "/api/pull"}
FINE = {200, 201, 204, 400, 403, 404, 405, 413, 499, 503}
TRANSFERS = {"/api/pull", "/api/push"}  # unstreamed, all that a registry does is a 500: as Ollama

NAMES = ["../../etc/passwd", "/dev/zero", "~", "tiny:latest", "nope", "a" * 300, "\ud800", "\x00"]
TEMPLATES = ["{{", "{{ range . }}{{ end }}", "{{ .Nope.Nope }}", "{{ json . }}", "{% for %}"]
MODELFILES = ["FROM /dev/zero", 'FROM tiny\nSYSTEM """', "FROM tiny\nPARAMETER top_k x", "FROM"]
OTHERS = ["json", "5m", "-1", "999999999h", "%00", "sha256:zz", "<s></s>", "🙂", "\u2028", "system"]
HOSTILE = NAMES + TEMPLATES + MODELFILES + OTHERS
NUMBERS = [-1, 0, 1, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, 5e-324, float("nan")]
SCALARS = st.none() | st.booleans() | st.sampled_from(HOSTILE + NUMBERS) | st.text(max_size=8)
KEYS = st.sampled_from(["model", "Name", "options", "stop", "type", "$ref", ""]) | st.text(
    max_size=4
)
VALUES = st.recursive(
    SCALARS | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=6,
)


def places(value, at=()):
    """Where values stand in a body: each place as the keys that lead to it."""
    yield at
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            yield from places(inner, (*at, key))


@st.composite
def changed(draw, body):
    """The same body with another value somewhere, without one, or with one more."""
    at = draw(st.sampled_from(list(places(body))))
    if not at:
        return draw(VALUES) if draw(st.integers(0, 9)) == 0 else {**body, draw(KEYS): draw(VALUES)}
    body = copy.deepcopy(body)
    inside = body
    for key in at[:-1]:
        inside = inside[key]
    how = draw(st.sampled_from(["replace", "drop", "rename"]))
    if how == "replace" or isinstance(inside, list):
        inside[at[-1]] = draw(VALUES)
    else:
        value = inside.pop(at[-1])
        if how == "rename":
            inside[at[-1].swapcase()] = value
    return body


@st.composite
def requests(draw):
    """Method, path, bytes."""
    method, path, body = draw(st.sampled_from(VALID))
    for _ in range(draw(st.integers(0, 3))):
        body = draw(changed(body)) if isinstance(body, dict) else body
    raw = b"" if body is None else json.dumps(body).encode()
    if draw(st.integers(0, 14)) == 0:
        cut = draw(st.integers(0, len(raw)))
        raw = raw[:cut] + draw(st.binary(max_size=6)) + raw[cut + draw(st.integers(0, 3)) :]
    if draw(st.integers(0, 29)) == 0:
        method = draw(st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"]))
    return method, path, raw


def snapshot(store):
    files = (path for path in Path(store.root).rglob("*") if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def check_answer(response):
    """Whatever was asked: a status that we know, and lines of JSON that are no broken program."""
    fine = FINE | {500} if response.request.url.path in TRANSFERS else FINE
    assert response.status_code in fine, response.text
    assert "internal error" not in response.text
    if "json" in response.headers.get("Content-Type", "") and response.content:
        for line in response.text.split("\n")[:-1] or [response.text]:
            assert isinstance(json.loads(line), dict)
    if response.status_code >= 400 and response.request.method != "HEAD":
        assert response.json()["error"] and "Traceback" not in response.text


def check_store(service):
    """Every model is whole, and nothing that was being written lies about."""
    for entry in service.tags():
        service.store.resolve(entry.name)
    for path in snapshot(service.store):
        assert "partial" not in path
        if "/blobs/" in path:
            assert re.fullmatch(r"sha256-[0-9a-f]{64}", Path(path).name)


def memory():
    """Bytes of this process that are in memory."""
    gc.collect()
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * 4096 if pages.exists() else 0


class Impatient:
    """The app as a server shows it whose clients hang up after a while."""

    def __init__(self, app):
        self.app = app

    def __call__(self, environ, start_response):
        end = time.monotonic() + PATIENCE
        environ["waitress.client_disconnected"] = lambda: time.monotonic() > end
        return self.app(environ, start_response)


class Trial:
    """One server under one case after another."""

    def __init__(self, app, service, tiny):
        self.transport = httpx.WSGITransport(Impatient(app), raise_app_exceptions=False)
        self.service = service
        self.tiny = tiny
        self.seen = []  # path and status of each case
        self.early = 0  # bytes of memory once it had warmed up

    def run(self, method, path, raw):
        self.restore()
        before, began = snapshot(self.service.store), time.monotonic()
        with httpx.Client(transport=self.transport, base_url="http://localhost") as client:
            response = client.request(method, path, content=raw)
        assert time.monotonic() - began < SLOWEST
        check_answer(response)
        if path in CHANGING or (path.startswith("/api/blobs/") and response.status_code == 201):
            check_store(self.service)
        else:
            assert snapshot(self.service.store) == before
        self.seen.append((path, response.status_code))
        if len(self.seen) == WARM:
            self.early = memory()

    def restore(self):
        """What a case has deleted is there again for the next."""
        there = {str(entry.name) for entry in self.service.tags()}
        for name in {"tiny:latest", "shy:latest"} - there:
            list(self.service.create(Create(name, f"FROM {self.tiny}")))


@pytest.fixture
def registry(service, monkeypatch):
    """A registry that has `tiny`.  Whatever host a name begins with, it leads there."""
    base = session._base

    def here(_: str, name: Name) -> httpx.URL:
        return base("http", replace(name, host=one.host))

    with FakeRegistry() as one:
        like = "registry.ollama.ai/library/tiny/latest"
        one.add_from(service.store.root, "library/tiny", like=like)
        monkeypatch.setattr(session, "_base", here)
        yield one


def test_every_route_takes_part(app):
    rules = {re.sub("<.*>", ABSENT, rule.rule) for rule in app.url_map.iter_rules()}
    assert {path for _, path, _ in VALID} == rules


@pytest.mark.slow
@pytest.mark.timeout(4 * DURATION)
def test_no_request_breaks_the_server(app, service, tiny, registry):
    trial, start = Trial(app, service, tiny), time.monotonic()

    @settings(
        max_examples=100,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(requests())
    def some(case):
        trial.run(*case)

    for number in count():
        if time.monotonic() - start > DURATION:
            break
        seed(number)(some)()  # the same cases every time, but more of them on a faster machine
    good = {path for path, status in trial.seen if status < 300}
    assert len(trial.seen) > 2 * WARM
    assert good >= {path for _, path, _ in VALID if ABSENT not in path}
    assert memory() - trial.early < MOST_GROWTH
