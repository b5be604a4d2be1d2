"""The real server as a process of its own."""

import contextlib
import os
import socket
import subprocess
import sys
import time

import httpx


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def running(**environment):
    """`refollama serve` on a free port; yields its address and the process."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "refollama", "serve"],
        env=os.environ | {"OLLAMA_HOST": f"127.0.0.1:{port}"} | environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                httpx.head(url)
                break
            time.sleep(0.05)
        yield url, process
    finally:
        process.terminate()
        process.communicate(timeout=10)
