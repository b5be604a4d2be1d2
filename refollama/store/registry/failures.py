"""What breaks on the way to a registry, in a user's words: which host, and what happened."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime

import httpx

from refollama.errors import Passing, RegistryError, Unauthorized

SHOWN = 1024  # bytes of a refusal that a user gets to see

_PASSING = (408, 425, 429)  # and all from 500
_PORTS = {"http": 80, "https": 443}
_SILENCE = "nothing was heard or could be sent for too long"


def place(url: httpx.URL) -> str:
    """Host and port, as in `registry.example:443`."""
    host = f"[{url.host}]" if ":" in url.host else url.host
    return f"{host}:{url.port or _PORTS.get(url.scheme, 0)}"


@contextmanager
def explained(url: httpx.URL, reached: bool) -> Iterator[None]:
    """No exception of httpx leaves this block.

    Raises: Passing for what may pass.  Not so a certificate; nor a host that never answered
    (not `reached`): nobody wants to wait half a minute for a name that was mistyped.
    """
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        kind = Passing if reached and not _is_tls(error) else RegistryError
        raise kind(f"cannot reach {place(url)}: {_reason(error)}") from error
    except httpx.TransportError as error:
        raise Passing(f"the connection to {place(url)} broke: {_reason(error)}") from error
    except httpx.RequestError as error:
        raise RegistryError(f"{place(url)}: {error}") from error


def _reason(error: Exception) -> str:
    cause = _root(error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"its certificate is not valid: {cause.verify_message}"
    if isinstance(cause, ssl.SSLError):
        return "it does not speak https"
    if isinstance(cause, socket.gaierror):
        return "this name has no address"
    if isinstance(error, httpx.TimeoutException):
        return _SILENCE
    strerror = cause.strerror if isinstance(cause, OSError) else None
    return (strerror or str(error) or "unknown cause").lower().rstrip(".")


def _is_tls(error: Exception) -> bool:
    return isinstance(_root(error), ssl.SSLError)


def _root(error: BaseException) -> BaseException:
    """What it all began with."""
    while (below := error.__cause__ or error.__context__) is not None:
        error = below
    return error


# -------------------------------------------------------------------- refusals


def refusal(status: int, headers: httpx.Headers, body: bytes) -> RegistryError:
    """A refusal as the error that it is: one that may pass, or one that stays."""
    text = printable(body)
    problem = f"{status}: {text}" if text else f"{status}"
    if status in _PASSING or status >= 500:
        return Passing(problem, _seconds(headers.get("Retry-After", "")))
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        return Unauthorized(problem)
    return RegistryError(problem)


def printable(body: bytes) -> str:
    """At most a kilobyte of what a registry says, on one line and without control characters."""
    text = " ".join(body[:SHOWN].decode(errors="replace").split())
    return "".join(sign if sign.isprintable() else "�" for sign in text)


def _seconds(retry_after: str) -> float | None:
    """A number of seconds, or a date; None for anything else."""
    if retry_after.isascii() and retry_after.isdecimal():
        return float(retry_after[:9])
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
