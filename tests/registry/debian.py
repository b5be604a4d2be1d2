"""The reference registry, as Debian packs it (`docker-registry`), as a process of its own.

Tests that need it are skipped where it is not installed, and name the package.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.registry.certificates import Certificate
from tests.registry.tokens import TokenService
from tests.server.process import free_port

PACKAGE = "docker-registry"
USER, PASSWORD = "judge", "open sesame"
# What `htpasswd -nbB -C 4` prints for them; the program takes nothing but bcrypt.
HTPASSWD = f"{USER}:$2b$04$abcdefghijklmnopqrstuu/LVz6MZlItEy42I2juLihZ66HnQx/cy\n"


@dataclass
class Debian:
    """A running registry."""

    host: str
    storage: Path
    log: Path

    def blobs(self) -> set[str]:
        """Digests of what it has stored."""
        found = self.storage.glob("docker/registry/v2/blobs/sha256/*/*/data")
        return {f"sha256:{path.parent.name}" for path in found}

    def blob(self, digest: str) -> bytes:
        hex_digits = digest.removeprefix("sha256:")
        folder = self.storage / "docker/registry/v2/blobs/sha256" / hex_digits[:2] / hex_digits
        return (folder / "data").read_bytes()


@contextlib.contextmanager
def debian(
    folder: Path,
    *,
    basic: bool = False,
    tokens: TokenService | None = None,
    tls: Certificate | None = None,
) -> Iterator[Debian]:
    """Started with a configuration and a storage of its own below `folder`."""
    program = shutil.which(PACKAGE)
    if program is None:
        pytest.skip(f"needs the program of Debian's package {PACKAGE}")
    folder.mkdir(parents=True, exist_ok=True)
    host = f"127.0.0.1:{free_port()}"
    config = configuration(folder, host, basic, tokens, tls)
    (folder / "config.yml").write_text(json.dumps(config))  # JSON is YAML too
    log = folder / "log"
    with log.open("wb") as output:
        command = [program, "serve", str(folder / "config.yml")]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={})
    try:
        _wait(f"{'https' if tls else 'http'}://{host}/v2/", process, log)
        yield Debian(host, folder / "storage", log)
    finally:
        process.kill()
        process.wait()


def configuration(
    folder: Path, host: str, basic: bool, tokens: TokenService | None, tls: Certificate | None
) -> dict[str, Any]:
    """Source: Distribution's documentation, "Configuring a registry"."""
    config: dict[str, Any] = {
        "version": 0.1,
        "log": {"level": "warn"},
        "storage": {
            "filesystem": {"rootdirectory": str(folder / "storage")},
            "delete": {"enabled": True},
        },
        "http": {"addr": host, "secret": "of the judge"},
    }
    if basic:
        (folder / "htpasswd").write_text(HTPASSWD)
        config["auth"] = {"htpasswd": {"realm": "judge", "path": str(folder / "htpasswd")}}
    if tokens is not None:
        tokens.certificate.write(folder)
        config["auth"] = {"token": tokens.claims(str(folder / "certificate.pem"))}
    if tls is not None:
        tls.write(folder)
        files = {"certificate": "certificate.pem", "key": "key.pem"}
        config["http"]["tls"] = {key: str(folder / name) for key, name in files.items()}
    return config


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until it answers, whatever it answers."""
    for _ in range(400):
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(httpx.TransportError):
            httpx.get(url, verify=False, trust_env=False)
            return
        time.sleep(0.025)
    raise AssertionError(f"{PACKAGE} does not answer: {log.read_text()}")
