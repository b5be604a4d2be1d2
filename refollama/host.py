"""OLLAMA_HOST: where the server listens and where clients look, read in one way by both.

    (unset)                127.0.0.1:11434
    example.com            example.com:11434
    0.0.0.0, ::, [::1]     that address, port 11434
    host:port, [ip6]:port  as given
    :1234                  every interface, port 1234
    host:0                 any free port, for servers only: their log says which
    1234                   127.0.0.1:1234
    http://host            host:80     https://host: 443; with a port, as given

A client that is told "every interface" looks on this machine. Spaces and quotes around the value
are dropped. A path after the host is kept by clients (a proxy may need it); servers ignore it.

And OLLAMA_API_KEY, which both sides know where not everybody may ask.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from refollama.errors import BadRequest

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 11434
SCHEME_PORTS = {"": DEFAULT_PORT, "http": 80, "https": 443}

# Where a client finds a server that listens everywhere.
_NEAREST = {"": LOOPBACK, "0.0.0.0": LOOPBACK, "::": "::1"}
_HOST_NAME = re.compile(r"[\w-]+(\.[\w-]+)*\.?")
_KEY = re.compile(r"[!-~]*")
_BRACKETED = re.compile(r"\[([^]]*)\](?::(.*))?")


def listen_address(env: Mapping[str, str]) -> tuple[str, int]:
    """Host and port that a server binds; port 0 means any free one, which the system chooses.

    Raises: BadRequest if OLLAMA_HOST is no address.
    """
    address = _parse(env.get("OLLAMA_HOST", ""))
    return address.host or "0.0.0.0", address.port


def base_url(env: Mapping[str, str]) -> str:
    """The URL that a client puts before `/api/…`, without a slash at its end.

    Raises: BadRequest if OLLAMA_HOST is no address, or one that nobody can be reached at.
    """
    address = _parse(env.get("OLLAMA_HOST", ""))
    if address.port == 0:
        raise _bad(env["OLLAMA_HOST"], "port 0 is for servers only, a client needs the real one")
    host = _NEAREST.get(address.host, address.host)
    shown = f"[{host.replace('%', '%25')}]" if ":" in host else host
    return f"{address.scheme or 'http'}://{shown}:{address.port}{address.path}"


def api_key(env: Mapping[str, str]) -> str:
    """OLLAMA_API_KEY: what a server that has one asks for, and clients send; empty if unset.

    Raises: BadRequest for one that the header of a request cannot carry.
    """
    key = env.get("OLLAMA_API_KEY", "").strip()
    if not _KEY.fullmatch(key):
        raise BadRequest(
            "OLLAMA_API_KEY must be of ASCII letters, digits and signs, without spaces"
        )
    return key


def on_this_machine(url: str) -> bool:
    """Whether a URL leads to the machine that we run on, as far as its host alone can tell."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.rstrip(".").lower() == "localhost"


# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Address:
    scheme: str  # "" if none was given
    host: str  # without brackets; "" = every interface
    port: int
    path: str  # "" or "/prefix"


def _parse(given: str) -> _Address:
    text = given.strip().strip("\"'").strip()
    scheme, found, rest = text.partition("://")
    scheme, rest = (scheme.lower(), rest) if found else ("", text)
    if scheme not in SCHEME_PORTS:
        raise _bad(given, f"the scheme must be http or https, not '{scheme}'")
    place, _, path = rest.partition("/")
    host, port = _split(place)
    _check_host(given, host)
    path = path.rstrip("/")
    return _Address(
        scheme=scheme,
        host=host,
        port=_port(given, port, SCHEME_PORTS[scheme]),
        path=f"/{path}" if path else "",
    )


def _split(place: str) -> tuple[str, str]:
    """`host:port` to its two texts; what is missing is the empty text.

    Nothing at all, or a port alone, means this machine; a colon and a port mean everywhere.
    """
    if not place or place.isdecimal():
        return LOOPBACK, place
    bracketed = _BRACKETED.fullmatch(place)
    if bracketed:
        return bracketed[1], bracketed[2] or ""
    if place.count(":") > 1:  # only IPv6 has that many, and without brackets it has no port
        return place, ""
    host, _, port = place.partition(":")
    return host, port


def _check_host(given: str, host: str) -> None:
    if ":" in host:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise _bad(given, f"'{host}' is no IPv6 address") from None
    elif host and not _HOST_NAME.fullmatch(host):
        raise _bad(given, f"'{host}' is no host name")


def _port(given: str, text: str, default: int) -> int:
    if not text:
        return default
    if not (text.isascii() and text.isdecimal()) or int(text) > 65535:
        raise _bad(given, f"the port must be between 0 and 65535, not '{text}'")
    return int(text)


def _bad(given: str, problem: str) -> BadRequest:
    forms = "host:port, :port, [ipv6]:port or http://host:port"
    return BadRequest(f"OLLAMA_HOST '{given}': {problem}; write it as {forms}")
