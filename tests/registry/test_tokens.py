"""The token service is judged: a request as Ollama makes it gets a token, any other none."""

import base64
import struct
import time

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.registry.tokens import EMPTY_BODY, TokenService

GOOD = "judge=yes&nonce={nonce}&scope=repository%3Aa%2Fb%3Apull&service={who}&ts={now}"
KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))


@pytest.fixture
def service():
    with TokenService() as one:
        yield one


def public(key=KEY):
    raw = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    data = struct.pack(">I", 11) + b"ssh-ed25519" + struct.pack(">I", 32) + raw
    return base64.b64encode(data).decode()


def ask(service, *, query="", key=KEY, signed="GET,{url},{empty}", header="{public}:{signature}"):
    now = int(time.time())
    query = query or GOOD
    nonce, who = "A" * 21 + "w", "the+judge%27s+registry"
    path = f"/token?{query.format(nonce=nonce, who=who, now=now)}"
    url = f"http://127.0.0.1:{service.server.port}{path}"
    text = signed.format(url=url, empty=EMPTY_BODY).encode()
    signature = base64.b64encode(key.sign(text)).decode()
    proof = header.format(public=public(), signature=signature)
    return httpx.get(url, headers={"Authorization": proof}, verify=False)


def test_a_good_request_gets_a_token_for_what_it_asked(service):
    token = ask(service).json()["token"]
    assert service.challenge(f"Bearer {token}", "a/b", "pull") is None
    assert service.challenge(f"Bearer {token}", "a/b", "push") is not None
    assert service.challenge(f"Bearer {token}", "a/c", "pull") is not None
    assert service.challenge("", "a/b", "pull") is not None
    service.valid[token] = (time.time() - 1, {("a/b", "pull")})
    assert service.challenge(f"Bearer {token}", "a/b", "pull") is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"signed": "GET,{url},"},
        {"signed": "POST,{url},{empty}"},
        {"signed": "GET,{url}&x=y,{empty}"},
        {"key": Ed25519PrivateKey.from_private_bytes(b"x" * 32)},
        {"header": "Bearer {public}:{signature}"},
        {"header": "{signature}:{public}"},
        {"header": "{public}"},
        {"query": "nonce={nonce}&judge=yes&service={who}&ts={now}"},
        {"query": "judge=yes&nonce={nonce}&scope=repository:a/b:pull&service={who}&ts={now}"},
        {"query": "judge=yes&nonce=short&service={who}&ts={now}"},
        {"query": "judge=yes&nonce={nonce}&service={who}&ts=1700000000"},
        {"query": "nonce={nonce}&service={who}&ts={now}"},
        {"query": "judge=yes&nonce={nonce}&ts={now}"},
    ],
    ids=lambda changes: str(next(iter(changes.items()))) if "key" not in changes else "key",
)
def test_any_other_gets_none(service, changes):
    assert ask(service, **changes).status_code == 401
    assert len(service.refused) == 1


def test_a_nonce_is_good_once_and_a_key_must_be_known(service):
    assert [ask(service).status_code for _ in range(2)] == [200, 401]
    service.nonces.clear()
    service.only_keys = {"another"}
    assert ask(service).status_code == 401
