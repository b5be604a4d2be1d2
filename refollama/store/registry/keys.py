"""Our key: `~/.ollama/id_ed25519`, in OpenSSH's format, made when it is first needed.

A registry that knows the public half (a user entered it there) knows us by our signatures.
"""

from __future__ import annotations

import base64
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from refollama.errors import StoreError

log = logging.getLogger(__name__)

NAME = "id_ed25519"
LONGEST = 64 << 10  # bytes of a key file; ours has 400


class Key:
    """An Ed25519 key; `public` is the middle word of its `.pub` line."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        line = private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        self.public = line.split()[1].decode("ascii")

    def sign(self, text: bytes) -> str:
        """The signature, 64 bytes, as base64.  Equal texts have equal signatures."""
        return base64.b64encode(self._private.sign(text)).decode("ascii")


def load(home: Path) -> Key:
    """The key of this folder; a new one if there is none.

    Raises: StoreError, with the path, for a file that is no plain Ed25519 key.
    """
    path = home / NAME
    if not os.path.exists(path):  # Path.exists() raises where a folder cannot be looked into
        _make(path)
    key = Key(_parsed(path))
    _publish(path.with_name(f"{NAME}.pub"), key)
    return key


def _make(path: Path) -> None:
    """One key wins, even if several processes need their first one at the same time."""
    private = Ed25519PrivateKey.generate()
    data = private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    with written(path, data, 0o600) as file, suppress(FileExistsError):
        os.link(file, path)  # unlike a rename, this never takes another's place


def _parsed(path: Path) -> Ed25519PrivateKey:
    try:
        with path.open("rb") as file:
            private = load_ssh_private_key(file.read(LONGEST), password=None)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it wants a password
        raise StoreError(f"{path} is no OpenSSH key, or one with a password: remove it") from None
    if not isinstance(private, Ed25519PrivateKey):
        raise StoreError(f"{path} must be an Ed25519 key: remove it, and a new one is made")
    return private


def _publish(path: Path, key: Key) -> None:
    """The public half, for people to copy from; we ourselves never read it."""
    if os.path.exists(path):
        return
    try:
        with written(path, f"ssh-ed25519 {key.public}\n".encode(), 0o644) as file:
            os.replace(file, path)
    except StoreError as error:
        log.warning("the public key is not written: %s", error)


@contextmanager
def written(path: Path, data: bytes, mode: int) -> Iterator[Path]:
    """A file beside `path` with these bytes, on the disk; gone at the end unless renamed.

    Its folder is made (0700) if there is none.  Raises: StoreError with the path.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with open(handle, "wb") as file:
                os.fchmod(handle, mode)
                file.write(data)
                file.flush()
                os.fsync(handle)
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}") from error
