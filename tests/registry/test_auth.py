"""Who we are: what a 401 asks for, what is signed, and to whom it may go."""

import base64
import json
import re
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from hypothesis import given
from hypothesis import strategies as st

from refollama.errors import Passing, RegistryError, Unauthorized
from refollama.store.registry import auth, keys, logins
from refollama.store.registry.auth import Challenge, challenges, token_of, token_url
from tests.registry.desk import open_desk, registry_at

EMPTY_HASH = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


# -------------------------------------------------------------------- challenges


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (
            'Bearer realm="https://a/t",service="s"',
            [("bearer", {"realm": "https://a/t", "service": "s"})],
        ),
        ("BEARER Realm=x , SERVICE = y", [("bearer", {"realm": "x", "service": "y"})]),
        (
            'Basic realm="a, b", Bearer realm="c",scope="repository:x:pull,push"',
            [
                ("basic", {"realm": "a, b"}),
                ("bearer", {"realm": "c", "scope": "repository:x:pull,push"}),
            ],
        ),
        ("Negotiate, Basic realm=x", [("negotiate", {}), ("basic", {"realm": "x"})]),
        ("Negotiate YWJj=, Basic realm=x", [("negotiate", {}), ("basic", {"realm": "x"})]),
        (r'Bearer realm="a\"b\\c"', [("bearer", {"realm": r'a"b\c'})]),
        ('Bearer realm="a",realm="b"', [("bearer", {"realm": "a"})]),
        ('Bearer realm="never closed', [("bearer", {}), ("closed", {})]),
        ("Bearer", [("bearer", {})]),
        (",,, ,", []),
        ("", []),
        ('realm="x"', []),
    ],
)
def test_challenges_are_read_as_the_standard_writes_them(header, expected):
    assert [(one.scheme, one.parameters) for one in challenges([header])] == expected


TOKENS = st.text("abcXYZ019-_.~", min_size=1, max_size=8)
TEXTS = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)


@given(
    st.lists(
        st.tuples(TOKENS, st.dictionaries(TOKENS.map(str.lower), TEXTS, max_size=3)), max_size=3
    ),
    st.sampled_from([", ", ",", " , ", ",,"]),
)
def test_what_is_written_is_read(offered, comma):
    def quoted(text):
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    parts = []
    for scheme, parameters in offered:
        pairs = [f"{name}={quoted(value)}" for name, value in parameters.items()]
        parts.append(f"{scheme} {comma.join(pairs)}".strip())
    expected = [Challenge(scheme.lower(), parameters) for scheme, parameters in offered]
    assert challenges([comma.join(parts)]) == expected
    assert challenges(parts) == expected  # or each in a header of its own


@given(st.text(max_size=200))
def test_any_header_is_read_without_failing(text):
    assert all(one.scheme == one.scheme.lower() for one in challenges([text]))


@pytest.mark.parametrize("piece", ['a="', 'a="\\', "a=", "a =", "a ", ",", "="])
def test_a_long_header_takes_no_time(piece):
    start = time.perf_counter()
    challenges(["Bearer " + piece * 50_000])
    assert time.perf_counter() - start < 2


# -------------------------------------------------------------------- the address that is signed


def test_the_parameters_are_sorted_and_escaped_as_forms_are():
    realm = httpx.URL("https://r.example/token?zone=a b&account=x")
    asked = {"service": "r.example", "scope": "repository:me/tale:pull,push repository:a/b:pull"}
    url = token_url(realm, Challenge("bearer", asked), nonce="n-_", now=1_700_000_000)
    assert str(url) == (
        "https://r.example/token?account=x&nonce=n-_&scope=repository%3Ame%2Ftale%3Apull%2Cpush"
        "&scope=repository%3Aa%2Fb%3Apull&service=r.example&ts=1700000000&zone=a+b"
    )


def test_what_the_registry_does_not_name_is_left_out():
    url = token_url(httpx.URL("https://r.example/t#x"), Challenge("bearer"), nonce="n", now=1)
    assert str(url) == "https://r.example/t?nonce=n&ts=1"


def test_the_hash_of_nothing_is_that_of_its_hex_digits():
    assert base64.b64decode(auth.NOTHING).decode() == EMPTY_HASH
    assert (
        auth.signed_text("https://r.example/t")
        == f"GET,https://r.example/t,{auth.NOTHING}".encode()
    )


def test_the_example_of_the_page_is_true():
    """docs/registry.md shows one token request of a key that RFC 8032 publishes."""
    page = (Path(__file__).parents[2] / "docs" / "registry.md").read_text()
    block = page.split("<!-- vector -->\n```\n")[1].split("\n```")[0]
    shown = dict(re.split(" +", line, maxsplit=1) for line in block.splitlines())
    key = keys.Key(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(shown["secret"])))
    (challenge,) = challenges([shown["challenge"]])
    realm = httpx.URL(challenge.parameters["realm"])
    url = token_url(realm, challenge, nonce=shown["nonce"], now=int(shown["ts"]))
    assert str(url) == shown["address"]
    assert auth.signed_text(str(url)).decode() == shown["signed"]
    public, _, signature = shown["header"].partition(":")
    assert (key.public, key.sign(shown["signed"].encode())) == (public, signature)


# -------------------------------------------------------------------- answers of a token service


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"token": "abc"}, ("abc", None)),
        ({"access_token": "abc"}, ("abc", None)),
        ({"token": "abc", "access_token": "x", "expires_in": 300}, ("abc", 300)),
        ({"token": "abc", "expires_in": -5}, ("abc", None)),
        ({"token": "abc", "expires_in": "soon"}, ("abc", None)),
        ({"token": "abc", "expires_in": 1e300}, ("abc", 1 << 30)),
    ],
)
def test_a_token_may_say_how_long_it_lives(answer, expected):
    assert token_of(json.dumps(answer).encode()) == expected


NO_TOKENS = [b"", b"null", b"[]", b"{}", b'{"token": 5}', b'{"token": ""}', b"[" * 60_000, b"\xff"]
NO_HEADERS = [
    b'{"token": "a\\r\\nX: y"}',
    b'{"token": "\xc3\xa4"}',
]  # tokens that cannot stand in one


@pytest.mark.parametrize(
    "body", [*NO_TOKENS, *NO_HEADERS, b'{"token": "a", "expires_in": ' + b"9" * 5000]
)
def test_an_answer_without_a_token_is_refused(body):
    with pytest.raises(RegistryError, match="without a token"):
        token_of(body)


# -------------------------------------------------------------------- the whole conversation


class Gate:
    """A registry that wants a token, and its token service, at one desk."""

    def __init__(self, challenge="", **answer):
        self.challenge = (
            challenge or 'Bearer realm="http://{host}/token",service="s",scope="a:b:pull"'
        )
        self.answer = answer
        self.good = "Bearer t1"
        self.status = 200
        self.issued = 0

    def __call__(self, exchange, seen):
        if seen.target.startswith("/token"):
            self.issued += 1
            body = json.dumps({"token": f"t{self.issued}"} | self.answer).encode()
            exchange.answer(self.status, body)
        elif seen.headers.get("authorization") == self.good:
            exchange.answer(200, b"come in")
        else:
            host = f"127.0.0.1:{exchange.server.port}"
            exchange.answer(401, WWW_Authenticate=self.challenge.replace("{host}", host))

    def token_requests(self, desk):
        return [seen for seen in desk.seen if seen.target.startswith("/token")]


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def desk(gate):
    with open_desk(gate) as one:
        yield one


def fetch(registry):
    return registry.read("GET", "manifests/latest", limit=100)


def test_the_signature_is_over_the_very_bytes_that_are_asked(desk, gate, home):
    gate.challenge = gate.challenge.replace("/token", "/token?b=%2f&a=x+y&c=ä%7E*'()")
    with registry_at(desk.host) as registry:
        assert fetch(registry)[2] == b"come in"
    (asked,) = gate.token_requests(desk)
    public, _, signature = asked.headers["authorization"].partition(":")
    assert f"ssh-ed25519 {public}\n" == (home / ".ollama" / "id_ed25519.pub").read_text()
    url = f"http://{asked.headers['host']}{asked.target}"
    digest = base64.b64encode(EMPTY_HASH.encode()).decode()
    key = Ed25519PublicKey.from_public_bytes(base64.b64decode(public)[-32:])
    key.verify(base64.b64decode(signature), f"GET,{url},{digest}".encode())
    query = parse_qs(urlsplit(asked.target).query)
    assert list(query) == sorted(query)
    assert query["a"] == ["x y"]
    assert abs(int(query["ts"][0]) - time.time()) < 60
    assert re.fullmatch(r"[A-Za-z0-9_-]{22}", query["nonce"][0])  # 16 bytes, unpadded


def test_each_token_request_has_a_nonce_of_its_own(desk, gate):
    for _ in range(2):
        gate.good = f"Bearer t{gate.issued + 1}"
        with registry_at(desk.host) as registry:
            fetch(registry)
    first, second = gate.token_requests(desk)
    assert (
        parse_qs(urlsplit(first.target).query)["nonce"]
        != parse_qs(urlsplit(second.target).query)["nonce"]
    )


def test_one_token_serves_all_requests(desk, gate):
    with registry_at(desk.host) as registry:
        assert [fetch(registry)[0] for _ in range(3)] == [200] * 3
    assert len(desk.seen) == 5  # refused, token, and three that went well


def test_threads_share_one_token(desk, gate):
    start, got = threading.Barrier(8), []

    def work():
        start.wait()
        got.append(fetch(registry)[0])

    with registry_at(desk.host) as registry:
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert got == [200] * 8
    assert gate.issued == 1


def test_a_token_is_renewed_before_it_ends(desk, gate, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(auth, "monotonic", lambda: clock[0])
    gate.answer = {"expires_in": 100}
    with registry_at(desk.host) as registry:
        fetch(registry)
        clock[0] += 85
        fetch(registry)
        assert gate.issued == 1
        clock[0] += 10
        gate.good = "Bearer t2"
        before = len(desk.seen)
        fetch(registry)
    assert [seen.target.partition("?")[0] for seen in desk.seen[before:]] == [
        "/token",
        "/v2/me/tale/manifests/latest",
    ]


def test_a_token_that_is_refused_is_renewed(desk, gate):
    with registry_at(desk.host) as registry:
        fetch(registry)
        gate.good = "Bearer t2"  # the registry forgot the first one
        assert fetch(registry)[0] == 200
    assert gate.issued == 2


def test_a_second_refusal_is_final(desk, gate):
    gate.good = "nothing will do"
    with registry_at(desk.host) as registry, pytest.raises(Unauthorized, match="^unauthorized$"):
        fetch(registry)
    assert len(desk.seen) == 3


@pytest.mark.parametrize(
    "realm",
    ["http://localhost:{port}/t", "http://x.127.0.0.1/t", "http://127.0.0.1@localhost:{port}/t"],
)
def test_a_realm_on_another_host_gets_nothing(desk, gate, realm, home):
    """CVE-2025-51471."""
    gate.challenge = f'Bearer realm="{realm.format(port=desk.port)}"'
    with registry_at(desk.host) as registry, pytest.raises(RegistryError) as caught:
        fetch(registry)
    assert "127.0.0.1" in str(caught.value)
    assert httpx.URL(realm.format(port=1)).host in str(caught.value)
    assert len(desk.seen) == 1
    assert not (home / ".ollama").exists()  # no key was made for it either


def test_a_token_service_may_have_a_port_of_its_own(gate):
    def issue(exchange, seen):
        exchange.answer(200, b'{"token": "t1"}')

    with open_desk(issue) as service, open_desk(gate) as desk:
        gate.challenge = f'Bearer realm="http://{service.host}/auth"'
        with registry_at(desk.host) as registry:
            assert fetch(registry)[0] == 200
        assert len(service.seen) == 1


@pytest.mark.parametrize(
    "realm", ["ftp://127.0.0.1/t", "//127.0.0.1/t", "token", "http://[", "http://127.0.0.1:0/t"]
)
def test_a_senseless_realm_is_refused(desk, gate, realm):
    gate.challenge = f'Bearer realm="{realm}"'
    with registry_at(desk.host) as registry, pytest.raises(RegistryError, match="127.0.0.1"):
        fetch(registry)
    assert len(desk.seen) == 1


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, RegistryError), (401, Unauthorized), (403, Unauthorized), (302, RegistryError)],
)
def test_a_token_service_that_says_no_is_quoted(desk, gate, status, kind):
    gate.status = status
    with registry_at(desk.host) as registry, pytest.raises(kind) as caught:
        fetch(registry)
    assert str(caught.value).startswith(f"on pull registry responded with code {status}: {{")
    assert not isinstance(caught.value, Passing)


def test_a_token_service_that_is_busy_may_be_asked_again(desk, gate):
    gate.status = 503
    with registry_at(desk.host) as registry:
        with pytest.raises(Passing, match="code 503"):
            fetch(registry)
        gate.status, gate.good = 200, "Bearer t2"
        assert fetch(registry)[0] == 200


def test_a_token_service_that_never_ends_is_cut_off(desk, gate):
    gate.answer = {"padding": "x" * 70_000}
    with registry_at(desk.host) as registry, pytest.raises(RegistryError, match="65536 bytes"):
        fetch(registry)


# -------------------------------------------------------------------- user and password


def expected_basic(user, password):
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def test_basic_shows_the_login_once_it_is_asked_for(desk, gate, home):
    gate.challenge, gate.good = 'Basic realm="here"', expected_basic("ann", "pä:ss")
    logins.store(desk.host, "ann", "pä:ss")
    with registry_at(desk.host) as registry:
        assert [fetch(registry)[0] for _ in range(2)] == [200, 200]
    assert [seen.headers.get("authorization") for seen in desk.seen] == [None, gate.good, gate.good]
    assert not (home / ".ollama" / "id_ed25519").exists()  # the key has no part in it


def test_basic_without_a_login_says_what_to_do(desk, gate):
    gate.challenge = "Basic realm=here"
    with registry_at(desk.host) as registry, pytest.raises(Unauthorized) as caught:
        fetch(registry)
    assert f"refollama login {desk.host}" in str(caught.value)
    assert len(desk.seen) == 1


def test_a_wrong_password_is_told_without_it(desk, gate, caplog):
    caplog.set_level("DEBUG")
    gate.challenge = "Basic realm=here"
    logins.store(desk.host, "ann", "hunter2")
    with registry_at(desk.host) as registry, pytest.raises(Unauthorized, match="'ann'") as caught:
        fetch(registry)
    secrets = ("hunter2", expected_basic("ann", "hunter2").split()[1])
    assert not any(secret in caplog.text + str(caught.value) for secret in secrets)
    assert len(desk.seen) == 2


def test_a_login_is_shown_to_the_token_service_where_there_is_one(desk, gate):
    logins.store(desk.host, "ann", "secret")
    with registry_at(desk.host) as registry:
        assert fetch(registry)[0] == 200
    assert [seen.headers.get("authorization") for seen in desk.seen] == [
        None,
        expected_basic("ann", "secret"),
        "Bearer t1",
    ]


def test_bearer_goes_before_basic(desk, gate):
    gate.challenge = f"Basic realm=x, {gate.challenge}"
    logins.store(desk.host, "ann", "secret")
    with registry_at(desk.host) as registry:
        assert fetch(registry)[0] == 200
    assert gate.issued == 1


@pytest.mark.parametrize("challenge", ["Negotiate", "", "Bearer", 'Bearer realm=""'])
def test_what_cannot_be_answered_is_named(desk, gate, challenge):
    gate.challenge = challenge
    with registry_at(desk.host) as registry, pytest.raises(Unauthorized, match="unauthorized: 127"):
        fetch(registry)
    assert len(desk.seen) == 1


def test_netrc_is_nobody_s_business(desk, gate, home):
    (home / ".netrc").write_text("machine 127.0.0.1 login ann password hunter2\n")
    (home / ".netrc").chmod(0o600)
    with registry_at(desk.host) as registry:
        fetch(registry)
    assert not any("Basic" in seen.headers.get("authorization", "") for seen in desk.seen)


def test_a_broken_key_ends_it_with_its_path(desk, home):
    (home / ".ollama").mkdir()
    (home / ".ollama" / "id_ed25519").write_text("no key")
    with registry_at(desk.host) as registry, pytest.raises(Exception, match="id_ed25519"):
        fetch(registry)


def test_the_home_that_is_given_holds_the_key(desk, tmp_path, home):
    with registry_at(desk.host, tmp_path) as registry:
        fetch(registry)
    assert (tmp_path / keys.NAME).exists()
    assert not (home / ".ollama").exists()
