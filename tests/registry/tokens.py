"""A token service: gives tokens to whom it knows, after a look at every detail of the request.

    with TokenService() as tokens, FakeRegistry(guard=tokens) as registry: …

It knows people by their Ed25519 key, or by user and password (Basic); which of both, and for what,
its fields say. Source: section 7.6 of the notes on Ollama; Distribution's documentation of its
token authentication.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import secrets
import struct
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from tests.registry.certificates import Certificate
from tests.registry.serving import Handler, Server

SERVICE, ISSUER = "the judge's registry", "the judge"
EMPTY_BODY = (
    "ZTNiMGM0NDI5OGZjMWMxNDlhZmJmNGM4OTk2ZmI5MjQyN2FlNDFlNDY0OWI5MzRjYTQ5NTk5MWI3ODUyYjg1NQ=="
)
SCOPE = re.compile(r"repository:([^:]+):([a-z,*]+)")


class RefusedError(Exception):
    """Why somebody gets no token."""


@dataclass
class TokenService:
    """Tokens for everybody with a sound signature, or, with `users`, for them.

    only_keys  base64 fields of the public keys that are known; None knows every key
    users      name → password
    lifetime   of a token, in seconds
    field      how the answer calls it: token, or access_token
    """

    only_keys: set[str] | None = None
    users: dict[str, str] | None = None
    lifetime: float = 300
    field: str = "token"

    def __post_init__(self) -> None:
        self.certificate = Certificate.new()
        self.asked: list[str] = []  # each target that was asked for, to the byte
        self.keys: list[str] = []  # who signed
        self.refused: list[str] = []  # why
        self.nonces: set[str] = set()
        self.valid: dict[str, tuple[float, set[tuple[str, str]]]] = {}  # token: end, what for
        self.server = Server(_Service, self)

    def __enter__(self) -> TokenService:
        self.server.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.__exit__(*error)

    @property
    def realm(self) -> str:
        return f"http://127.0.0.1:{self.server.port}/token?judge=yes"

    def claims(self, certificate: str) -> dict[str, str]:
        """How a Distribution registry is told whom to trust."""
        trust = {"realm": self.realm, "service": SERVICE, "issuer": ISSUER}
        return trust | {"rootcertbundle": certificate}

    # ---------------------------------------------------------------- a registry of ours asks

    def challenge(self, authorization: str, repository: str, action: str) -> str | None:
        end, access = self.valid.get(authorization.removeprefix("Bearer "), (0.0, set()))
        if time.time() < end and (not repository or (repository, action) in access):
            return None
        actions = "pull" if action == "pull" else "pull,push"
        scope = f',scope="repository:{repository}:{actions}"' if repository else ""
        return f'Bearer realm="{self.realm}",service="{SERVICE}"{scope}'

    # ---------------------------------------------------------------- a client asks

    def token(self, target: str, host: str, authorization: str) -> dict[str, Any]:
        """Raises: RefusedError."""
        self.asked.append(target)
        self._known(target, host, authorization)
        given = parse_qsl(urlsplit(target).query)
        access = [match for key, scope in given if (match := SCOPE.fullmatch(scope))]
        allowed = {(match[1], action) for match in access for action in match[2].split(",")}
        token = self._signed(allowed)
        self.valid[token] = (time.time() + self.lifetime, allowed)
        return {self.field: token, "expires_in": self.lifetime}

    def _known(self, target: str, host: str, authorization: str) -> None:
        if authorization.startswith("Basic "):
            name, _, password = _base64(authorization[6:]).decode().partition(":")
            if not name or (self.users or {}).get(name) != password:
                raise RefusedError("wrong user or password")
        elif self.users is not None:
            raise RefusedError("only who has a password may come in")
        else:
            self._check_query(urlsplit(target).query)
            self._check_signature(f"http://{host}{target}", authorization)

    def _check_query(self, query: str) -> None:
        """Sorted and form-encoded; one service; a time that is now; a nonce as never before."""
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True)
        given = dict(pairs)
        if urlencode(sorted(pairs, key=lambda pair: pair[0])) != query:
            raise RefusedError(f"not sorted and form-encoded: {query}")
        if given.get("judge") != "yes" or given.get("service") != SERVICE:
            raise RefusedError("what the realm asked for is missing")
        if abs(time.time() - int(given.get("ts", "0"))) > 60:
            raise RefusedError("ts is not now")
        nonce = given.get("nonce", "")
        if not re.fullmatch(r"[A-Za-z0-9_-]{22}", nonce) or nonce in self.nonces:
            raise RefusedError("nonce must be 16 new bytes in base64url, unpadded")
        self.nonces.add(nonce)

    def _check_signature(self, url: str, authorization: str) -> None:
        """`<public key>:<signature>` of `GET,<url>,<hash of nothing>`, with no scheme before it."""
        key, colon, signature = authorization.partition(":")
        if not colon or " " in authorization:
            raise RefusedError("Authorization must be <public key>:<signature>")
        try:
            text = f"GET,{url},{EMPTY_BODY}".encode()
            Ed25519PublicKey.from_public_bytes(_raw_key(key)).verify(_base64(signature), text)
        except InvalidSignature:
            raise RefusedError(f"this is no signature of GET,{url}") from None
        if self.only_keys is not None and key not in self.only_keys:
            raise RefusedError("this key is not known")
        self.keys.append(key)

    # ---------------------------------------------------------------- what is given

    def _signed(self, allowed: set[tuple[str, str]]) -> str:
        """A JSON Web Token, signed by ES256 (RFC 7515, 7518, 7519)."""
        now = int(time.time())
        by_name: dict[str, list[str]] = {}
        for name, action in sorted(allowed):
            by_name.setdefault(name, []).append(action)
        access = [{"type": "repository", "name": n, "actions": a} for n, a in by_name.items()]
        claims: dict[str, Any] = {
            "iss": ISSUER,
            "sub": "",
            "aud": SERVICE,
            "jti": secrets.token_hex(8),
        }
        claims |= {"iat": now, "nbf": now - 5, "exp": int(now + self.lifetime), "access": access}
        head = {"typ": "JWT", "alg": "ES256", "kid": self.certificate.key_id}
        text = f"{_base64url(json.dumps(head))}.{_base64url(json.dumps(claims))}"
        der = self.certificate.key.sign(text.encode(), ECDSA(hashes.SHA256()))
        r, s = decode_dss_signature(der)
        return f"{text}.{_base64url(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


class _Service(Handler):
    def do_GET(self) -> None:  # noqa: N802
        service: TokenService = self.server.owner
        given = self.headers.get("Authorization", "")
        try:
            answer = service.token(self.path, self.headers["Host"], given)
        except RefusedError as why:
            service.refused.append(str(why))
            return self.answer(401, str(why).encode())
        return self.answer(200, json.dumps(answer).encode(), Content_Type="application/json")


def _raw_key(field: str) -> bytes:
    """The 32 bytes in `AAAAC3Nza…`: two texts, each with its length before it (RFC 8709)."""
    data = _base64(field)
    kind, key = b"ssh-ed25519", data[-32:]
    if data != struct.pack(">I", 11) + kind + struct.pack(">I", 32) + key:
        raise RefusedError("this is no Ed25519 key as OpenSSH writes it")
    return key


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise RefusedError(f"not base64: {text[:60]}") from None


def _base64url(data: str | bytes) -> str:
    data = data.encode() if isinstance(data, str) else data
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
