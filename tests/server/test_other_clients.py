"""Clients that others built on the API: each holds one chat and makes one embedding.

They are heavy, and warn in ways that are not ours to mend: each runs in a process of its own and
prints JSON. Without the packages of the extra `clients` the tests are skipped.
"""

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import httpx
import pytest

from tests.server.conftest import GREEDY
from tests.server.process import running

pytestmark = pytest.mark.slow

SAID = [{"role": "user", "content": "the"}]
TEXTS = ["the", "sand"]

LANGCHAIN = """
import json, sys
from langchain_ollama import ChatOllama, OllamaEmbeddings

url = sys.argv[1]
chat = ChatOllama(
    model="tiny", base_url=url, temperature=0, repeat_penalty=1, num_predict=12,
    validate_model_on_init=True,
)
whole = chat.invoke("the")
parts = list(chat.stream("the"))
embeddings = OllamaEmbeddings(model="tiny", base_url=url)
print(json.dumps({
    "whole": whole.content,
    "usage": whole.usage_metadata,
    "reason": whole.response_metadata["done_reason"],
    "parts": [part.content for part in parts],
    "rows": embeddings.embed_documents(["the", "sand"]),
    "row": embeddings.embed_query("the"),
}))
"""

LITELLM = """
import json, sys
import litellm

url, model = sys.argv[1:]
ask = {
    "model": model, "messages": [{"role": "user", "content": "the"}], "api_base": url,
    "temperature": 0, "repeat_penalty": 1, "max_tokens": 12,
}
whole = litellm.completion(**ask)
parts = list(litellm.completion(**ask, stream=True))
rows = litellm.embedding(model="ollama/tiny", input=["the", "sand"], api_base=url)
print(json.dumps({
    "whole": whole.choices[0].message.content,
    "reason": whole.choices[0].finish_reason,
    "written": whole.usage.completion_tokens,
    "parts": [part.choices[0].delta.content or "" for part in parts],
    "rows": [one["embedding"] for one in rows.data],
}))
"""


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    """A server with a model named `tiny`, which has no template."""
    with running(OLLAMA_MODELS=str(tmp_path_factory.mktemp("store"))) as (url, _):
        post(url, "create", model="tiny", modelfile=f"FROM {tiny}", stream=False)
        yield url


def post(url: str, path: str, **body: Any) -> Any:
    answer = httpx.post(f"{url}/api/{path}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def chatted(url: str) -> Any:
    return post(url, "chat", model="tiny", messages=SAID, options=GREEDY, stream=False)


def generated(url: str, prompt: str) -> Any:
    body = {"model": "tiny", "prompt": prompt, "options": GREEDY, "stream": False}
    return post(url, "generate", **body)["response"]


def drive(package: str, code: str, *arguments: str) -> Any:
    """What the code prints, as JSON; told to call nobody but our server."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'refollama[clients]'")
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | quiet,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_langchain_chats_and_embeds(server):
    expected = chatted(server)
    rows = post(server, "embed", model="tiny", input=TEXTS)["embeddings"]
    found = drive("langchain_ollama", LANGCHAIN, server)
    assert found["whole"] == "".join(found["parts"]) == expected["message"]["content"] != ""
    assert found["reason"] == "length" and len(found["parts"]) > 2
    assert found["usage"]["output_tokens"] == 12
    assert found["usage"]["input_tokens"] == expected["prompt_eval_count"]
    assert found["rows"][0] == found["row"]
    for row, own in zip(found["rows"], rows, strict=True):
        assert row == pytest.approx(own, abs=1e-6)


@pytest.mark.parametrize(
    ("model", "reason", "text"),
    [
        # It writes the prompt itself, and knows no reason but "stop" on this way.
        ("ollama/tiny", "stop", lambda url: generated(url, "### User:\nthe\n\n")),
        ("ollama_chat/tiny", "length", lambda url: chatted(url)["message"]["content"]),
    ],
)
def test_litellm_chats_and_embeds(server, model, reason, text):
    rows = post(server, "embed", model="tiny", input=TEXTS)["embeddings"]
    found = drive("litellm", LITELLM, server, model)
    assert found["whole"] == "".join(found["parts"]) == text(server) != ""
    assert found["reason"] == reason and found["written"] == 12 and len(found["parts"]) > 2
    for row, own in zip(found["rows"], rows, strict=True):
        assert row == pytest.approx(own, abs=1e-6)
