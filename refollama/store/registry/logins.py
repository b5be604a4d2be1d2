"""User and password for a registry.

    OLLAMA_REGISTRY_HOST, _USERNAME, _PASSWORD     for this one host, and no other
    ~/.ollama/logins.json (0600)                   what `refollama login HOST` stored

A password never goes to a host that it was not given for: there is no variable for all hosts.
It stands in the file as it is, as Docker's does: who can read the file can log in.
"""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from refollama.errors import BadRequest, StoreError
from refollama.store.registry.keys import written

log = logging.getLogger(__name__)

NAME = "logins.json"
LONGEST = 1 << 20  # bytes of the file


@dataclass(frozen=True, slots=True)
class Login:
    """Who we are for one registry.  Printed, it keeps the password to itself."""

    user: str
    password: str = field(repr=False)


def find(host: str, *, home: Path | None = None) -> Login | None:
    """The login for a host, `registry.example` or `registry.example:5000`; None without one.

    Raises: StoreError, with the path, if the file of logins is broken.
    """
    return _from_environment(host) or _login(_read(_file(home)).get(_plain(host)))


def checked(user: str, password: str) -> Login:
    """A login that can be sent.  Raises: BadRequest."""
    if not user or ":" in user:
        raise BadRequest("a user name must not be empty, nor hold a colon")
    return Login(user, password)


def store(host: str, user: str, password: str, *, home: Path | None = None) -> None:
    """Remember a login.  Raises: BadRequest for a user that cannot be sent; StoreError."""
    kept = asdict(checked(user, password))
    _write(_file(home), _read(_file(home)) | {_plain(host): kept})


def forget(host: str, *, home: Path | None = None) -> bool:
    """Drop a stored login; was there one?"""
    known = _read(_file(home))
    there = known.pop(_plain(host), None) is not None
    if there:
        _write(_file(home), known)
    return there


def _from_environment(host: str) -> Login | None:
    names = ("OLLAMA_REGISTRY_HOST", "OLLAMA_REGISTRY_USERNAME", "OLLAMA_REGISTRY_PASSWORD")
    limited_to, user, password = (os.environ.get(name, "") for name in names)
    if not limited_to:
        if user:
            log.warning("%s is ignored: set %s to the registry it is for", names[1], names[0])
        return None
    return Login(user, password) if user and _plain(limited_to) == _plain(host) else None


def _plain(host: str) -> str:
    """One spelling for one registry."""
    return re.sub(":(80|443)$", "", host.strip().lower())


def _file(home: Path | None) -> Path:
    return (home or Path.home() / ".ollama") / NAME


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            known = json.loads(file.read(LONGEST))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError):
        known = None
    if not isinstance(known, dict):
        raise StoreError(f"{path} is broken: remove it, and log in again")
    return known


def _write(path: Path, known: dict[str, Any]) -> None:
    data = json.dumps(known, indent=2, sort_keys=True).encode()
    with written(path, data, 0o600) as file:
        os.replace(file, path)


def _login(record: Any) -> Login | None:
    if not isinstance(record, dict):
        return None
    user, password = record.get("user"), record.get("password")
    if not (isinstance(user, str) and isinstance(password, str)):
        return None
    return Login(user, password)
