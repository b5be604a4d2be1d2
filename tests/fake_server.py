"""A server that plays its part by heart: the judge of the client and of the command line.

`python fake_server.py FILE` plays it alone, as the private server of a test: it writes its process
id into FILE, says where it listens, and ends when its standard input does.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flask import Flask, Response, request
from werkzeug.serving import make_server

TAG = {
    "name": "tale:latest",
    "modified_at": "2023-12-15T10:00:00.123456789+01:00",
    "size": 3_825_819_519,
    "digest": "fe938a131f40e6f6d40083c9f0f430a515233eb2edaa6d72eb85c50d64f2300e",
    "details": {},
}
COUNTS = {
    "total_duration": 5_043_500_000,
    "load_duration": 5_025_959,
    "prompt_eval_count": 26,
    "prompt_eval_duration": 130_079_000,
    "eval_count": 259,
    "eval_duration": 4_232_710_000,
}


class FakeServer:
    """Answers every route; `requests` is what it was asked, `script` what it says instead."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.script: dict[str, Response] = {}
        self.hung_up = threading.Event()
        self._server = make_server("127.0.0.1", 0, self._app(), threaded=True)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )
        self.host = f"127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _app(self) -> Flask:
        app = Flask(__name__)
        app.add_url_rule("/", view_func=lambda: "Ollama is running", endpoint="root")
        app.add_url_rule("/api/<route>", view_func=self._route, methods=["GET", "POST"])
        return app

    def _route(self, route: str) -> Response:
        body = request.get_json(silent=True) or {}
        self.requests.append((route, body))
        if route in self.script:
            return self.script[route]
        return getattr(self, f"_{route}")(body)

    def _version(self, _: dict[str, Any]) -> Response:
        return one({"version": "0.0.7"})

    def _tags(self, _: dict[str, Any]) -> Response:
        return one({"models": [TAG]})

    def _create(self, _: dict[str, Any]) -> Response:
        layer = {"status": "writing layer", "digest": "sha256:ab", "total": 2_000_000}
        steps = [layer, {**layer, "completed": 1_000_000}, {**layer, "completed": 2_000_000}]
        return many([{"status": "parsing"}, *steps, {"status": "success"}])

    def _generate(self, body: dict[str, Any]) -> Response:
        prompt = body["prompt"]
        if not prompt:
            return one({"response": "", "done": True, "done_reason": "load"})
        if prompt == "forever":
            return many(self._forever())
        if prompt == "die":
            print("out of memory", flush=True)
            os._exit(9)
        context = [*body.get("context", []), len(prompt)]
        last = {"response": "", "done": True, "context": context, **COUNTS}
        return many([{"response": "You said: "}, {"response": prompt}, last])

    def _forever(self) -> Iterator[dict[str, Any]]:
        try:
            while True:
                yield {"response": "tick ", "done": False}
                time.sleep(0.02)
        finally:
            self.hung_up.set()


def one(record: dict[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(record), status, mimetype="application/json")


def many(records: Iterable[dict[str, Any]]) -> Response:
    lines = (json.dumps(record) + "\n" for record in records)
    return Response(lines, mimetype="application/x-ndjson")


def alone(pid_file: Path) -> None:
    with FakeServer() as server:
        pid_file.write_text(str(os.getpid()))
        print(f"fake listens on http://{server.host}", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    alone(Path(sys.argv[1]))
