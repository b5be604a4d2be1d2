"""A server that plays its part by heart: the judge of the client and of the command line.

`python fake_server.py FILE` plays it alone, as the private server of a test: it writes its process
id into FILE, says where it listens, and ends when its standard input does.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
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
PS = {
    **TAG,
    "size": 5_000_000_000,
    "size_vram": 3_500_000_000,
    "expires_at": "2318-12-15T10:00:00Z",
    "context_length": 2048,
}
SHOW = {
    "license": "First\nSecond\nThird\n",
    "modelfile": "FROM tale\n",
    "parameters": 'seed                           7\nstop                           "a b"',
    "template": "{{ .Prompt }}",
    "system": "Be brief.",
    "details": {"family": "llama", "parameter_size": "7B", "quantization_level": "Q4_0"},
    "model_info": {
        "general.architecture": "llama",
        "general.parameter_count": 7_241_732_096,
        "llama.context_length": 32768,
        "llama.embedding_length": 4096,
        "tokenizer.ggml.tokens": ["a", "b", "c", "d", "e"],
    },
    "tensors": [{"name": "output.weight", "type": "Q6_K", "shape": [4096, 32000]}],
    "capabilities": ["completion", "tools"],
}
COUNTS = {
    "total_duration": 5_043_500_000,
    "load_duration": 5_025_959,
    "prompt_eval_count": 26,
    "prompt_eval_duration": 130_079_000,
    "eval_count": 259,
    "eval_duration": 4_232_710_000,
}
LAYER = f"sha256:{'ab' * 32}"
STEPS = (1_000_000, 2_500_000, 4_000_000)  # bytes of it, one after another

Told = Callable[[str], dict[str, Any]]  # a piece of an answer as one of the routes tells it


class FakeServer:
    """Answers every route; `requests` is what it was asked, `script` what it says instead."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.script: dict[str, Response] = {}
        self.blobs: dict[str, bytes] = {}
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
        app.add_url_rule("/api/<route>", view_func=self._route, methods=["GET", "POST", "DELETE"])
        app.add_url_rule("/api/blobs/<digest>", view_func=self._blob, methods=["HEAD", "POST"])
        return app

    def _blob(self, digest: str) -> Response:
        """HEAD: is it here? POST: take it, chunked or not."""
        if request.method == "HEAD":
            return Response(status=200 if digest in self.blobs else 404)
        body = request.environ["wsgi.input"].read()
        if digest != f"sha256:{hashlib.sha256(body).hexdigest()}":
            return one({"error": "digest mismatch"}, 400)
        self.blobs[digest] = body
        return Response(status=201)

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

    def _pull(self, _: dict[str, Any]) -> Response:
        """One layer that an earlier try had begun, and one that is there already."""
        layer = {"status": f"pulling {'ab' * 6}", "digest": LAYER, "total": 4_000_000}
        moves = [{**layer, "completed": at, "resumed": 1_000_000} for at in STEPS]
        there = {"status": f"pulling {'cd' * 6}", "digest": f"sha256:{'cd' * 32}", "total": 500}
        steps: list[dict[str, Any]] = [{"status": "pulling manifest"}, *moves]
        steps += [{**there, "completed": 500}, {"status": "verifying sha256 digest"}]
        return many([*steps, {"status": "success"}])

    def _push(self, _: dict[str, Any]) -> Response:
        layer = {"status": f"pushing {'ab' * 6}", "digest": LAYER, "total": 4_000_000}
        moves = [
            {**layer, "status": "starting upload"},
            layer,
            {**layer, "completed": 4_000_000},
        ]
        end = [{"status": "pushing manifest"}, {"status": "success"}]
        return many([{"status": "retrieving manifest"}, *moves, *end])

    def _show(self, body: dict[str, Any]) -> Response:
        info = SHOW["model_info"]
        assert isinstance(info, dict)
        short = {key: None if isinstance(value, list) else value for key, value in info.items()}
        return one({**SHOW, "model_info": info if body.get("verbose") else short})

    def _ps(self, _: dict[str, Any]) -> Response:
        return one({"models": [PS]})

    def _copy(self, _: dict[str, Any]) -> Response:
        return Response()

    def _delete(self, _: dict[str, Any]) -> Response:
        return Response()

    def _generate(self, body: dict[str, Any]) -> Response:
        prompt = body.get("prompt", "")
        last = {"context": [*body.get("context", []), len(prompt)]}
        return self._answer(prompt, lambda text: {"response": text}, last)

    def _chat(self, body: dict[str, Any]) -> Response:
        prompt = body["messages"][-1]["content"] if body["messages"] else ""
        return self._answer(prompt, lambda text: {"message": {"content": text}}, {})

    def _answer(self, prompt: str, told: Told, last: dict[str, Any]) -> Response:
        if not prompt:
            return one({**told(""), "done": True, "done_reason": "load"})
        if prompt == "forever":
            return many(self._forever(told))
        if prompt == "die":
            print("out of memory", flush=True)
            os._exit(9)
        pieces = [told("You said: "), told(prompt)]
        return many([*pieces, {**told(""), "done": True, **last, **COUNTS}])

    def _forever(self, told: Told) -> Iterator[dict[str, Any]]:
        try:
            while True:
                yield {**told("tick "), "done": False}
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
